"""The header of one safetensors file, and JSON files of a checkpoint. Reads no weight, no torch.

Headers are untrusted input: whatever does not follow the format exactly is refused before
anything is read by it. The safetensors library does not give the byte range of a tensor, by
which rows, samples and copies are read here, and it names neither tensor nor offsets in errors.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mofq.exceptions import CheckpointError, nearest_name
from mofq.files.documents import parse_json, shown

#: Width of one element [bits], in the order in which safetensors ranks the dtypes.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: What FP8 checkpoints keep their weights in.
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")

#: What packed codes of a source are called, which no file has as a dtype of its own; their width.
PACKED_BITS: dict[str, int] = {**{f"INT{bits}": bits for bits in range(2, 9)}, "FP4": 4}

#: The safetensors library refuses longer headers too. No JSON file here is longer [bytes].
MAX_JSON_BYTES = 100_000_000
#: What to do about a damaged file.
AGAIN = "Fetch the file again from where it came."

_MAX_DIMENSIONS = 64  # torch's own limit


def kept_dtype(dtype: str) -> str:
    """The dtype in which a tensor is written where no scheme quantizes it.

    Args:
        dtype: In which it is stored.

    Returns:
        The same; for codes, whose scales no engine would find beside them then, ``BF16``.
    """
    return "BF16" if dtype in FP8_DTYPES or dtype in PACKED_BITS else dtype


def source_bits(dtype: str) -> int | None:
    """Width of one element of a source [bits], codes that are packed included; None: unknown."""
    return DTYPE_BITS.get(dtype, PACKED_BITS.get(dtype))


@dataclass(frozen=True, slots=True)
class Scaling:
    """What the codes of an FP8 tensor are multiplied by: a matrix of scales, each of a tile."""

    scale: TensorInfo
    rows: int  #: of the matrix of scales; one matrix for each expert of a fused tensor
    columns: int
    tile_rows: int  #: rows of the weight that share a scale
    tile_columns: int  #: columns that do


@dataclass(frozen=True, slots=True)
class SourceTensors:
    """A checkpoint's tensors as a quantized source has them."""

    tensors: dict[str, TensorInfo]  #: of the model; quantized weights know their scales
    consumed: dict[str, TensorInfo]  #: what those are made of, which are no tensors of the model
    description: str  #: of the format, for a reader


#: How codes, scales and zero points lie; see `mofq.model.checkpoint.packed`.
Layout = Literal["words", "bytes", "fp4", "gptq", "awq", "experts"]


@dataclass(frozen=True, slots=True)
class Packed:
    """How a weight [out, in] lies in several tensors of a quantized source.

    A weight is ``(code - zero point) * scale``; see `mofq.model.checkpoint.packed`.
    """

    layout: Layout
    scale: TensorInfo
    group_size: int  #: columns that share a scale
    zero_point: TensorInfo | None = None
    zero_offset: int = 0  #: what is to be added to the stored zero points
    global_scale: TensorInfo | None = None  #: that scales are multiplied by
    is_divisor: bool = False  #: or divided by
    global_value: float | None = None  #: what scales are multiplied by, where it is a number
    group_of_I: TensorInfo | None = None  #: which group each column is in, if that is stored
    is_sorted: bool = False  #: whether columns of a group lie apart
    is_symmetric: bool = False  #: whether zero points, if there are any, are all in the middle

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """What is stored beside the codes."""
        every = (self.scale, self.zero_point, self.global_scale, self.group_of_I)
        return tuple(part for part in every if part is not None)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies, and how its values are read."""

    name: str
    dtype: str  #: as safetensors calls it: "BF16", "F16", "F32", …
    shape: tuple[int, ...]
    file: Path
    start: int  #: first byte in the file
    stop: int  #: one past the last byte in the file
    decoded: bool = False  #: codes of a source: read as float32, times their scales if any
    scaling: Scaling | None = None
    packed: Packed | None = None  #: name, dtype and shape are the weight's; the bytes its codes'

    @property
    def nbytes(self) -> int:
        """Size on disk, without scales [bytes]."""
        return self.stop - self.start

    @property
    def scale_bytes(self) -> int:
        """Size of the scales on disk, and of what else is beside the codes [bytes]."""
        if self.packed is not None:
            return sum(part.nbytes for part in self.packed.parts)
        return 0 if self.scaling is None else self.scaling.scale.nbytes

    @property
    def kept_dtype(self) -> str:
        """As the function of that name; where it is read as it is stored, its own."""
        return kept_dtype(self.dtype) if self.decoded else self.dtype

    @property
    def kept_bytes(self) -> int:
        """Size where it is written unquantized [bytes]."""
        if self.packed is not None:
            return math.prod(self.shape) * DTYPE_BITS[self.kept_dtype] // 8
        return self.nbytes * DTYPE_BITS[self.kept_dtype] // DTYPE_BITS[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and validate the header of one safetensors file.

    Args:
        path: The file.

    Returns:
        Tensor name to location, in order of name.

    Raises:
        CheckpointError: The file is missing, truncated, or not safetensors: a header
            longer than the file, invalid JSON, a key that stands twice, an unknown
            dtype, byte ranges that overlap, leave holes, run past the end, or
            disagree with dtype and shape. The message names file and tensor.
    """
    raw, data_start, data_bytes = _read_raw_header(path)
    entries = _parse_object(raw, f"{path}: the header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: '__metadata__' needs texts under names, found {shown(metadata)}. {AGAIN}"
        )
    infos = [_parse_entry(path, name, entry, data_start) for name, entry in entries.items()]
    _check_byte_ranges(path, infos, data_start, data_bytes)
    return {info.name: info for info in sorted(infos, key=lambda info: info.name)}


def encode_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file.

    Args:
        tensors: Name -> dtype and shape, in the order in which their values follow one another.
        metadata: Of the file.

    Returns:
        All before the first value; and where in the file those of each tensor begin [bytes].
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        stop = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        offsets[name], position = position, stop
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    beginning = len(raw).to_bytes(8, "little") + raw
    return beginning, {name: len(beginning) + offset for name, offset in offsets.items()}


def _read_raw_header(path: Path) -> tuple[bytes, int, int]:
    """The header's bytes, where the data starts, and how many bytes of data there are."""
    if not path.is_file():
        raise CheckpointError(f"{path}: needed a safetensors file, found none. {AGAIN}")
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > min(file_bytes - 8, MAX_JSON_BYTES):
                raise CheckpointError(
                    f"{path}: the first 8 bytes claim a header of {length:,} bytes; the file has"
                    f" {file_bytes:,}, and a header at most {MAX_JSON_BYTES:,}. It is truncated"
                    f" or no safetensors file. {AGAIN}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    return raw, 8 + length, file_bytes - 8 - length


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not name.isprintable():
        raise CheckpointError(
            f"{where}: its name holds control characters, which would change what a"
            " terminal shows. Do not trust this checkpoint."
        )
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(
            f"{where}: needed dtype, shape and data_offsets, found {shown(entry)}. {AGAIN}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{where}: unknown dtype {shown(dtype)}." + nearest_name(str(dtype), DTYPE_BITS)
        )
    if not _is_sizes(shape):
        raise CheckpointError(
            f"{where}: needed a shape of at most {_MAX_DIMENSIONS} integers >= 0,"
            f" found {shown(shape)}. {AGAIN}"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: needed data_offsets [begin, end] with 0 <= begin <= end,"
            f" found {shown(offsets)}. {AGAIN}"
        )
    nbytes, bits_left = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
    if bits_left or nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shown(shape)} needs {nbytes:,} bytes"
            f"{f' and {bits_left} bits' if bits_left else ''}, data_offsets give it"
            f" {offsets[1] - offsets[0]:,} bytes. {AGAIN}"
        )
    begin, end = (data_start + offset for offset in offsets)
    return TensorInfo(name, dtype, tuple(shape), path, begin, end)


def _is_sizes(value: object) -> bool:
    # bool is an int to Python, and not a size. Without limits, a product of sizes takes forever.
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _check_byte_ranges(
    path: Path, infos: list[TensorInfo], data_start: int, data_bytes: int
) -> None:
    """Tensors must tile the data: no overlap, no hole, nothing past the end, nothing left."""
    position = data_start
    previous = "the header"
    for info in sorted(infos, key=lambda info: (info.start, info.stop)):
        if info.start != position:
            problem = "overlaps" if info.start < position else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {info.name!r} {problem} {previous}: needed it to begin at byte"
                f" {position - data_start:,} of the data, found {info.start - data_start:,}."
                f" {AGAIN}"
            )
        position, previous = info.stop, repr(info.name)
    needed = position - data_start
    if needed != data_bytes:
        problem = "is truncated" if needed > data_bytes else "has bytes that no tensor claims"
        raise CheckpointError(
            f"{path}: the file {problem}: its header needs {needed:,} bytes of data,"
            f" found {data_bytes:,}. {AGAIN}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size in which no key stands twice.

    Raises:
        CheckpointError: The file is not such a file.
    """
    try:
        size = path.stat().st_size
        raw = b"" if size > MAX_JSON_BYTES else path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: needed at most {MAX_JSON_BYTES:,} bytes, found {size:,}.")
    return _parse_object(raw, str(path))


def _parse_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = parse_json(raw, where, CheckpointError, finite=False)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: needed a JSON object, found {shown(value)}. {AGAIN}")
    return value
