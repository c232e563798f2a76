"""Quantized checkpoints as sources: weights whose codes are packed, or INT8. FP8 is in `fp8`.

A weight is its codes, less the zero point where there is one, times its scales, in float32. What
releases write down:

- ``compressed-tensors``: ``X.weight_packed`` [out, words] of integers without gaps along a row
  (``pack-quantized``), or [out, in / 2] of FP4 (``nvfp4-pack-quantized``, with
  ``X.weight_global_scale`` that scales are divided by, and ``mxfp4-pack-quantized``, whose scales
  are powers of two); ``X.weight`` of INT8 (``int-quantized``). Scales are ``X.weight_scale``,
  zero points ``X.weight_zero_point``, packed down the rows beside packed codes.
- ``gptq``: ``X.qweight`` [in words, out] packed down the columns of the weight, ``X.scales``
  [groups, out], ``X.qzeros`` packed along a row and too small by one (``gptq_v2``: as they are),
  ``X.g_idx`` [in].
- ``awq``: ``X.qweight`` [in, out words] with eight columns in the order 0, 2, 4, 6, 1, 3, 5, 7;
  scales and zero points likewise.
- ``mxfp4`` of gpt-oss: ``X_blocks`` [experts, out, groups, 16] and ``X_scales`` [experts, out,
  groups]; the parameter ``X`` that transformers makes of them is [experts, in, out].
- ``modelopt`` NVFP4: ``X.weight`` [out, in / 2], ``X.weight_scale``, ``X.weight_scale_2`` that
  scales are multiplied by.

Only headers are read here, the sixteen bytes of ``weight_shape``, and global scales.

Source: compressed-tensors 0.20 ``compressors/``; GPTQModel's ``qlinear``; AutoAWQ
``utils/packing_utils.py``; transformers 5.23 ``integrations/mxfp4.py``; vLLM 0.33
``quantization/{gptq,awq,modelopt}.py``.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mofq.exceptions import CheckpointError
from mofq.files.documents import shown
from mofq.model.checkpoint.safetensors_header import AGAIN, Packed, SourceTensors, TensorInfo

#: What a source may be quantized as besides FP8, for messages.
SUPPORTED = (
    "'compressed-tensors' with integers or FP4, 'gptq', 'awq', 'mxfp4' of gpt-oss, or 'modelopt'"
    " with NVFP4"
)

_WORD_BITS = 32
_INT8_BITS = 8
_FLOATS = ("F16", "BF16", "F32")
_NVFP4_GROUP = 16
_MXFP4_GROUP = 32


def read_packed(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> SourceTensors | None:
    """Find the weights of a checkpoint that lie in several tensors each.

    Args:
        folder: Of the model, for messages.
        config: Its ``quantization_config``.
        tensors: All that it stores.

    Returns:
        The tensors as they are read; None where no weight is packed in a way that is known.

    Raises:
        CheckpointError: One is, and a part of it is missing, or has a dtype or shape that does
            not fit.
    """
    method = str(config.get("quant_method", "")).replace("_", "-")
    find = _METHODS.get(method)
    if find is None or (method == "compressed-tensors" and config.get("transform_config")):
        return None
    found = find(_Source(folder, config, tensors))
    if not found:
        return None
    consumed: dict[str, TensorInfo] = {}
    for info in found:
        assert info.packed is not None
        codes = next(n for n in _code_names(info.name) if n in tensors)
        if codes != info.name:
            consumed[codes] = tensors[codes]
        consumed |= {part.name: part for part in info.packed.parts}
        for suffix in ("weight_shape", "input_scale", "input_global_scale", "input_zero_point"):
            name = info.name.removesuffix("weight") + suffix
            if name in tensors:
                consumed[name] = tensors[name]
    kept = {name: info for name, info in tensors.items() if name not in consumed}
    for info in found:
        if info.name in kept and kept[info.name].start != info.start:
            raise CheckpointError(
                f"{info.file}: holds {info.name!r} and packed codes of the same weight. Remove the"
                " one that is not meant."
            )
    kinds = sorted({f"{info.dtype} in groups of {_group(info)}" for info in found})
    return SourceTensors(
        tensors={**kept, **{info.name: info for info in found}},
        consumed=consumed,
        description=f"{method}, {' and '.join(kinds)}",
    )


def _group(info: TensorInfo) -> int:
    assert info.packed is not None
    return info.packed.group_size


def _code_names(weight: str) -> tuple[str, ...]:
    stem = weight.removesuffix("weight")
    return (f"{stem}weight_packed", f"{stem}qweight", f"{weight}_blocks", weight)


@dataclass(frozen=True, slots=True)
class _Source:
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def part(
        self, of: TensorInfo, name: str, shapes: Sequence[tuple[int, ...]], dtypes: tuple[str, ...]
    ) -> TensorInfo:
        """A tensor that a weight needs, of one of some shapes and dtypes."""
        info = self.tensors.get(name)
        needed = f"{' or '.join(str(list(shape)) for shape in shapes)} of {', '.join(dtypes)}"
        if info is None:
            raise CheckpointError(
                f"{of.file}: {of.name!r} needs {name!r} ({needed}) in one of the shards of"
                f" {self.folder}, found none. Fetch the shards again, or give the checkpoint"
                " before it was quantized."
            )
        if info.shape not in shapes or info.dtype not in dtypes:
            raise CheckpointError(
                f"{info.file}: {name!r} needs {needed}, found {list(info.shape)} of {info.dtype}."
                f" It and {of.name!r} are of different models, or the config is. {AGAIN}"
            )
        return info

    def maybe(
        self, of: TensorInfo, name: str, shapes: Sequence[tuple[int, ...]], dtypes: tuple[str, ...]
    ) -> TensorInfo | None:
        """As `part`; None where it is not there."""
        return self.part(of, name, shapes, dtypes) if name in self.tensors else None

    def wrong(self, info: TensorInfo, needed: str) -> CheckpointError:
        """What to say of codes that fit nothing."""
        return CheckpointError(
            f"{info.file}: {info.name!r} needs {needed}, found {list(info.shape)} of {info.dtype}."
            f" {AGAIN}"
        )


def _weight(
    codes: TensorInfo, name: str, dtype: str, shape: tuple[int, ...], packed: Packed
) -> TensorInfo:
    return TensorInfo(
        name, dtype, shape, codes.file, codes.start, codes.stop, decoded=True, packed=packed
    )


def _read_compressed_tensors(source: _Source) -> list[TensorInfo]:
    stated = _stated_integers(source)
    found = []
    for name, codes in source.tensors.items():
        stem = name.removesuffix("weight_packed")
        if name.endswith(".weight_packed") and codes.dtype == "U8":
            found.append(_fp4_weight(source, codes, stem))
        elif name.endswith(".weight_packed"):
            found.append(_packed_integers(source, codes, stem, stated))
        elif name.endswith(".weight") and codes.dtype == "I8" and f"{name}_scale" in source.tensors:
            found.append(_plain_integers(source, codes, stated))
    return found


class _Integers(NamedTuple):
    """What a config says of some weights in integers."""

    bits: int
    group_size: int | None  #: columns that share a scale; None: all of a row


def _stated_integers(source: _Source) -> frozenset[_Integers]:
    groups = source.config.get("config_groups")
    stated = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in stated if isinstance(group, dict)]
    found = set()
    for one in weights:
        if isinstance(one, dict) and one.get("type") == "int" and type(one.get("num_bits")) is int:
            size = one.get("group_size")
            found.add(_Integers(one["num_bits"], size if type(size) is int and size > 0 else None))
    return frozenset(found)


def _packed_integers(
    source: _Source, codes: TensorInfo, stem: str, stated: frozenset[_Integers]
) -> TensorInfo:
    if codes.dtype != "I32" or len(codes.shape) != 2:
        raise source.wrong(codes, "words of I32 in two dimensions")
    shape = source.part(codes, f"{stem}weight_shape", [(2,)], ("I64", "I32"))
    rows, columns = _read_integers(shape)
    widths = {one.bits for one in stated}
    fitting = [b for b in widths if 2 <= b <= 8 and -(-columns * b // 32) == codes.shape[1]]
    if rows != codes.shape[0] or columns < 1 or len(fitting) != 1:
        raise CheckpointError(
            f"{codes.file}: {codes.name!r} of {list(codes.shape)} is no weight of {[rows, columns]}"
            f" (weight_shape) in integers of {shown(sorted(widths))} bits. {AGAIN}"
        )
    sizes = [one.group_size for one in stated if one.bits == fitting[0]]
    scale, group = _group_scale(source, codes, f"{stem}weight_scale", (rows, columns), sizes)
    words = -(-rows * fitting[0] // _WORD_BITS)
    point = source.maybe(codes, f"{stem}weight_zero_point", [(words, columns // group)], ("I32",))
    order = source.maybe(codes, f"{stem}weight_g_idx", [(columns,)], ("I32", "I64"))
    packed = Packed(
        *("words", scale, group, point),
        group_of_I=order,
        is_sorted=order is not None,
        is_symmetric=point is None,
    )
    return _weight(codes, f"{stem}weight", f"INT{fitting[0]}", (rows, columns), packed)


def _plain_integers(source: _Source, codes: TensorInfo, stated: frozenset[_Integers]) -> TensorInfo:
    if len(codes.shape) != 2:
        raise source.wrong(codes, "INT8 codes in two dimensions")
    rows, columns = codes.shape
    sizes = [one.group_size for one in stated if one.bits == _INT8_BITS]
    scale, group = _group_scale(source, codes, f"{codes.name}_scale", (rows, columns), sizes)
    point = source.maybe(codes, f"{codes.name}_zero_point", [scale.shape], ("I8",))
    packed = Packed("bytes", scale, group, point, is_symmetric=point is None)
    return _weight(codes, codes.name, "INT8", (rows, columns), packed)


def _group_scale(
    source: _Source,
    codes: TensorInfo,
    name: str,
    shape: tuple[int, int],
    sizes: Sequence[int | None],
) -> tuple[TensorInfo, int]:
    """The scales of integers, one for each group, row, or for all; and the columns of a group.

    Args:
        source: All tensors.
        codes: Of the weight.
        name: Of the scales.
        shape: Of the weight.
        sizes: Of groups, that the config has for integers of this width.
    """
    rows, columns = shape
    stored = source.tensors.get(name)
    groups = stored.shape[1] if stored is not None and len(stored.shape) == 2 else 1
    wide = [columns if size is None else min(size, columns) for size in sizes]
    if stored is not None and not any(columns == groups * size for size in wide):
        raise CheckpointError(
            f"{codes.file}: {codes.name!r} has {columns} columns and {groups} scales a row, and"
            f" 'group_size' is {shown(sorted(size or -1 for size in sizes))}; needed groups that"
            f" divide the columns. {AGAIN}"
        )
    shapes: list[tuple[int, ...]] = [(rows, groups), (rows, 1), (rows,), (1,), ()]
    return source.part(codes, name, shapes, _FLOATS), columns // groups


def _fp4_weight(source: _Source, codes: TensorInfo, stem: str) -> TensorInfo:
    if len(codes.shape) != 2:
        raise source.wrong(codes, "two FP4 codes a byte in two dimensions")
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    name = f"{stem}weight_global_scale"
    if name in source.tensors:
        whole = source.part(codes, name, [(1,), ()], ("F32",))
        return _fp4(source, codes, f"{stem}weight", (rows, columns), whole, is_divisor=True)
    shape = [(rows, columns // _MXFP4_GROUP)]
    scale = source.part(codes, f"{stem}weight_scale", shape, ("U8", "F8_E8M0"))
    packed = Packed("fp4", scale, _MXFP4_GROUP)
    return _weight(codes, f"{stem}weight", "FP4", (rows, columns), packed)


def _fp4(
    source: _Source,
    codes: TensorInfo,
    name: str,
    shape: tuple[int, int],
    whole: TensorInfo,
    *,
    is_divisor: bool,
) -> TensorInfo:
    """NVFP4, by either convention for the global scale."""
    scales = [(shape[0], shape[1] // _NVFP4_GROUP)]
    scale = source.part(codes, f"{name}_scale", scales, ("F8_E4M3",))
    packed = Packed(
        *("fp4", scale, _NVFP4_GROUP),
        global_scale=whole,
        is_divisor=is_divisor,
        global_value=_read_global(whole, is_divisor=is_divisor),
    )
    return _weight(codes, name, "FP4", shape, packed)


def _read_modelopt(source: _Source) -> list[TensorInfo]:
    found = []
    for name, codes in source.tensors.items():
        if name.endswith(".weight") and codes.dtype == "U8" and len(codes.shape) == 2:
            whole = source.part(codes, f"{name}_scale_2", [(), (1,)], ("F32",))
            shape = (codes.shape[0], 2 * codes.shape[1])
            found.append(_fp4(source, codes, name, shape, whole, is_divisor=False))
    return found


def _read_gptq(source: _Source) -> list[TensorInfo]:
    bits = _stated_bits(source, (2, 3, 4, 8))
    layout = source.config.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        return []
    found = []
    for name, codes in source.tensors.items():
        if not name.endswith(".qweight"):
            continue
        if codes.dtype != "I32" or len(codes.shape) != 2 or codes.shape[0] * 32 % bits:
            raise source.wrong(codes, f"words of I32 that hold whole columns of {bits} bits")
        stem = name.removesuffix("qweight")
        columns, rows = codes.shape[0] * _WORD_BITS // bits, codes.shape[1]
        scale, group = _group_scale_in_columns(source, codes, stem, rows, columns)
        groups = columns // group
        shapes = [(groups, -(-rows * bits // _WORD_BITS))]
        point = source.part(codes, f"{stem}qzeros", shapes, ("I32",))
        order = source.maybe(codes, f"{stem}g_idx", [(columns,)], ("I32", "I64"))
        offset = 1 if layout == "gptq" else 0
        packed = Packed(
            *("gptq", scale, group, point, offset),
            group_of_I=order,
            is_sorted=bool(source.config.get("desc_act")),
            is_symmetric=source.config.get("sym") is True,
        )
        found.append(_weight(codes, f"{stem}weight", f"INT{bits}", (rows, columns), packed))
    return found


def _read_awq(source: _Source) -> list[TensorInfo]:
    bits = _stated_bits(source, (4,))
    if source.config.get("version", "gemm") != "gemm":
        return []
    found = []
    for name, codes in source.tensors.items():
        if not name.endswith(".qweight"):
            continue
        if codes.dtype != "I32" or len(codes.shape) != 2:
            raise source.wrong(codes, "words of I32 in two dimensions")
        stem = name.removesuffix("qweight")
        columns, rows = codes.shape[0], codes.shape[1] * _WORD_BITS // bits
        scale, group = _group_scale_in_columns(source, codes, stem, rows, columns)
        shapes = [(columns // group, codes.shape[1])]
        point = source.maybe(codes, f"{stem}qzeros", shapes, ("I32",))
        packed = Packed("awq", scale, group, point, is_symmetric=point is None)
        found.append(_weight(codes, f"{stem}weight", f"INT{bits}", (rows, columns), packed))
    return found


def _stated_bits(source: _Source, known: tuple[int, ...]) -> int:
    bits = source.config.get("bits", source.config.get("w_bit"))
    if bits not in known:
        raise CheckpointError(
            f"{source.folder / 'config.json'}: quantization_config: 'bits' needs one of"
            f" {', '.join(map(str, known))}, found {shown(bits)}. Give the checkpoint before it"
            " was quantized."
        )
    return int(bits)


def _group_scale_in_columns(
    source: _Source, codes: TensorInfo, stem: str, rows: int, columns: int
) -> tuple[TensorInfo, int]:
    stored = source.tensors.get(f"{stem}scales")
    groups = stored.shape[0] if stored is not None and len(stored.shape) == 2 else 1
    # The last group may be cut; its size is the config's then.
    size = source.config.get("group_size", source.config.get("q_group_size"))
    group = columns if size in (None, -1) or type(size) is not int else size
    if group < 1 or -(-columns // group) != groups or columns % group:
        raise CheckpointError(
            f"{codes.file}: {codes.name!r} has {columns} columns and {groups} scales a row, and"
            f" 'group_size' is {shown(size)}; needed groups that divide the columns. {AGAIN}"
        )
    return source.part(codes, f"{stem}scales", [(groups, rows)], _FLOATS), group


def _read_mxfp4(source: _Source) -> list[TensorInfo]:
    found = []
    for name, codes in source.tensors.items():
        if not name.endswith("_blocks"):
            continue
        if codes.dtype != "U8" or len(codes.shape) != 4 or codes.shape[3] != _MXFP4_GROUP // 2:
            raise source.wrong(codes, "U8 blocks [experts, out, groups, 16]")
        stem = name.removesuffix("_blocks")
        experts, rows, groups, _ = codes.shape
        scale = source.part(codes, f"{stem}_scales", [(experts, rows, groups)], ("U8", "F8_E8M0"))
        shape = (experts, groups * _MXFP4_GROUP, rows)
        found.append(_weight(codes, stem, "FP4", shape, Packed("experts", scale, _MXFP4_GROUP)))
    return found


_METHODS: Mapping[str, Callable[[_Source], list[TensorInfo]]] = {
    "compressed-tensors": _read_compressed_tensors,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "mxfp4": _read_mxfp4,
    "modelopt": _read_modelopt,
}


def _read_integers(info: TensorInfo) -> tuple[int, int]:
    """The two numbers of a ``weight_shape``."""
    first, second = _read_numbers(info, "<2q" if info.dtype == "I64" else "<2i")
    return int(first), int(second)


def _read_global(info: TensorInfo, *, is_divisor: bool) -> float | None:
    """A global scale as a multiplier; None where it is none, which reading the weight refuses."""
    (value,) = _read_numbers(info, "<f")
    if not (math.isfinite(value) and value > 0):
        return None
    return 1 / value if is_divisor else float(value)


def _read_numbers(info: TensorInfo, form: str) -> tuple[float, ...]:
    """A tensor of a few numbers, of the form that `struct` knows."""
    try:
        with open(info.file, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), info.nbytes, info.start)
        return struct.unpack(form, data)
    except (OSError, struct.error) as error:
        raise CheckpointError(f"{info.file}: {info.name!r} cannot be read: {error}.") from error
