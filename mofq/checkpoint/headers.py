"""Names, dtypes, shapes and byte ranges of a checkpoint's tensors. Reads no weight, needs no torch.

Headers are input from strangers: whatever does not follow the format to the
letter is refused before anything is read on its word.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mofq.exceptions import CheckpointError, nearest_name

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

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

#: The safetensors library refuses longer headers too. No JSON file here is longer [bytes].
MAX_JSON_BYTES = 100_000_000

_MAX_DIMENSIONS = 64  # torch's own limit
_AGAIN = "Fetch the file again from where it came."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str  #: as safetensors calls it: "BF16", "F16", "F32", …
    shape: tuple[int, ...]
    file: Path
    start: int  #: first byte in the file
    stop: int  #: one past the last byte in the file

    @property
    def nbytes(self) -> int:
        """Size on disk [bytes]."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder, known by its config and the headers of its shards."""

    folder: Path
    name: str  #: hub id, or the folder's own name
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    index_sha256: str  #: of every tensor's name, dtype and shape, and of the config


def open_checkpoint(model: str) -> Checkpoint:
    """Read the config and all headers of a checkpoint.

    Args:
        model: A folder with ``config.json`` and safetensors weights (one file, or
            shards and their index), or a hub id such as ``"Qwen/Qwen3-0.6B"``,
            which is fetched into the hub's cache. An existing path wins.

    Returns:
        The checkpoint. Quantized ones open too; ``find_layers`` refuses them.

    Raises:
        CheckpointError: No such folder, a file is missing or damaged, or the
            shards disagree with their index.
    """
    path = Path(model).expanduser()
    if os.path.isdir(path):
        folder, name = path, path.resolve().name
    elif os.path.exists(path):
        raise CheckpointError(
            f"{model}: needed the folder of a model, found a file. Give {str(path.parent)!r}."
        )
    elif _HUB_ID.fullmatch(model):
        folder, name = _fetch_from_hub(model), model
    else:
        raise CheckpointError(f"{model}: no such folder.{_nearest_folder(path)}")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder}: needed {CONFIG_FILE}, found none.{_model_folder_inside(folder)}"
            " Give the folder that holds config.json and the safetensors files."
        )
    config = read_json(folder / CONFIG_FILE)
    tensors = _read_all_headers(folder)
    return Checkpoint(folder, name, config, tensors, _hash_index(config, tensors))


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
    entries = _parse_json(raw, path, "the header")
    entries.pop("__metadata__", None)
    infos = [_parse_entry(path, name, entry, data_start) for name, entry in entries.items()]
    _check_byte_ranges(path, infos, data_start, data_bytes)
    return {info.name: info for info in sorted(infos, key=lambda info: info.name)}


def _read_raw_header(path: Path) -> tuple[bytes, int, int]:
    """The header's bytes, where the data starts, and how many bytes of data there are."""
    if not path.is_file():
        raise CheckpointError(f"{path}: needed a safetensors file, found none. {_AGAIN}")
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > min(file_bytes - 8, MAX_JSON_BYTES):
                raise CheckpointError(
                    f"{path}: the first 8 bytes claim a header of {length:,} bytes; the file has"
                    f" {file_bytes:,}, and a header at most {MAX_JSON_BYTES:,}. It is truncated"
                    f" or no safetensors file. {_AGAIN}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    return raw, 8 + length, file_bytes - 8 - length


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not name.isprintable():
        raise CheckpointError(
            f"{where}: its name holds characters that a terminal would obey and not show."
            " Do not trust this checkpoint."
        )
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(
            f"{where}: needed dtype, shape and data_offsets, found {_shorten(entry)}. {_AGAIN}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{where}: unknown dtype {_shorten(dtype)}." + nearest_name(str(dtype), DTYPE_BITS)
        )
    if not _is_sizes(shape):
        raise CheckpointError(
            f"{where}: needed a shape of at most {_MAX_DIMENSIONS} integers >= 0,"
            f" found {_shorten(shape)}. {_AGAIN}"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: needed data_offsets [begin, end] with 0 <= begin <= end,"
            f" found {_shorten(offsets)}. {_AGAIN}"
        )
    nbytes, bits_left = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
    if bits_left or nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} of shape {_shorten(shape)} needs {nbytes:,} bytes"
            f"{f' and {bits_left} bits' if bits_left else ''}, data_offsets give it"
            f" {offsets[1] - offsets[0]:,} bytes. {_AGAIN}"
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
                f" {_AGAIN}"
            )
        position, previous = info.stop, repr(info.name)
    needed = position - data_start
    if needed != data_bytes:
        problem = "is truncated" if needed > data_bytes else "has bytes that no tensor claims"
        raise CheckpointError(
            f"{path}: the file {problem}: its header needs {needed:,} bytes of data,"
            f" found {data_bytes:,}. {_AGAIN}"
        )


def _read_all_headers(folder: Path) -> dict[str, TensorInfo]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{folder}: found both {SINGLE_FILE} and {INDEX_FILE}; engines differ in which they"
            " load. Remove the one that is not meant."
        )
    if index.exists():
        return _read_shards(index)
    if single.exists():
        return read_header(single)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise CheckpointError(
        f"{folder}: needed {SINGLE_FILE} or {INDEX_FILE}, found neither."
        + (
            f" {pickled[0]} is a pickle, which can run code and is never read here: have it"
            " converted to safetensors first."
            if pickled
            else f" {_AGAIN}"
        )
    )


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: needed a 'weight_map' of tensor names, found none. {_AGAIN}"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted({_shard_name(index, key, file) for key, file in weight_map.items()}):
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(
                f"{path}: {INDEX_FILE} needs this shard, and it is missing. Fetch it again."
            )
        for name, info in read_header(path).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{path}: holds tensor {name!r}, which {INDEX_FILE} places in"
                    f" {weight_map.get(name)!r}. {_AGAIN}"
                )
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index}: tensor {name!r} is needed in {shard!r}, and is not there. {_AGAIN}"
            )
    return tensors


def _shard_name(index: Path, key: str, file: object) -> str:
    """A plain file name: an index must not lead out of its folder."""
    plain = isinstance(file, str) and file not in ("", ".", "..")
    if not plain or re.search(r"[/\\:\x00]", str(file)):
        raise CheckpointError(
            f"{index}: tensor {key!r} is said to be in {_shorten(file)}; needed the plain name of"
            " a file in the same folder. Do not trust this checkpoint."
        )
    return str(file)


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
    return _parse_json(raw, path, "the file")


def _parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(keys) != len(set(keys)):
            twice = next(key for position, key in enumerate(keys) if key in keys[:position])
            raise CheckpointError(
                f"{path}: key {twice!r} stands twice in {what}; which one is meant is unknown."
                f" {_AGAIN}"
            )
        for key in keys:
            key.encode()  # a lone surrogate is not a name that anything else could write
        return dict(pairs)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON: {error}. {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: needed a JSON object as {what}, found {_shorten(value)}. {_AGAIN}"
        )
    return value


def _hash_index(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> str:
    rows = [[info.name, info.dtype, info.shape] for _, info in sorted(tensors.items())]
    text = json.dumps({"config": config, "tensors": rows}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Weights, config and tokenizer at the top level; no pickles, no second formats.
        folder = snapshot_download(
            model, allow_patterns=_HUB_PATTERNS, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:  # whatever the client raises, the model cannot be had
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{model}: no such folder, and as a hub id it cannot be fetched: {reason[0]}"
            f"{_nearest_folder(Path(model))} Check the spelling and the network, or give a folder."
        ) from error
    return Path(folder)


def _nearest_folder(path: Path) -> str:
    """``" Did you mean …?"`` for the first part of the path that does not exist."""
    missing = path.absolute()
    while not os.path.exists(missing.parent):
        missing = missing.parent
    try:
        siblings = [entry.name for entry in os.scandir(missing.parent) if entry.is_dir()]
    except OSError as error:
        return f" {missing.parent}: {error.strerror}."
    near = get_close_matches(missing.name, siblings, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {str(missing.parent / near[0])!r}?"
    return f" {missing.parent} has no folder {missing.name!r}."


def _model_folder_inside(folder: Path) -> str:
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    return f" Did you mean {str(inside[0])!r}?" if inside else ""


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
