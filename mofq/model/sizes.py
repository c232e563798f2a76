"""Exact bytes of a layer under a scheme: the size of the tensors that ``export`` writes.

- INT8 weights with quantized activations: one byte a code (``int-quantized``).
- Every other INT: codes side by side along the row without gaps, each row padded
  to 32-bit words, and the shape as two I64 (``pack-quantized``).
- FP8: one byte a code.
- Unquantized: the checkpoint's own dtype, or bf16 where that is FP8, whose scales would be
  left behind.
- FP6, FP4, NF4: codes side by side along the row, each row padded to bytes.

A scale has the width of its format, and a scale format with a global scale
adds it once per tensor. One-bit scales lie side by side, each row padded to
bytes, and the exponents that they share take a byte each. Zero points of packed
channels and groups are packed like their codes, but down the rows; all others
take one byte each. Activations cost nothing, except that a static scale is
stored once per layer (``input_scale``; ``input_global_scale`` of NVFP4).

Bits per weight count codes, scales, zero points and padding, and not the shape that a packed
layer notes (`counted_bytes`): INT4 with a bf16 scale for 32 weights is 4.5 bits. A size in bytes
is that of the file, shapes included.

Source: compressed-tensors 0.20, ``compressors/*``, for what it stores; the same
rule for the widths that it does not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from mofq.exceptions import BudgetError, CheckpointError, nearest_name
from mofq.model.checkpoint.headers import DTYPE_BITS
from mofq.model.checkpoint.safetensors_header import kept_dtype, source_bits
from mofq.model.layers import AnyLayer, FusionGroup, layers_of
from mofq.numbers.formats import IntFormat
from mofq.numbers.schemes import Scheme, TensorScheme

_WEIGHT_SHAPE_BYTES = 16  # I64 [2]
_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def layer_bytes(layer: AnyLayer, scheme: Scheme) -> int:
    """Bytes of a linear layer's tensors under a scheme, as exported.

    Args:
        layer: A layer whose shape the scheme fits.
        scheme: What is done to it; without a weight scheme, the weight keeps the
            checkpoint's own width, except that FP8 becomes bf16.

    Returns:
        Codes, scales, zero points, padding and shape [bytes]; the bias, which no
        scheme touches, is not counted.

    Raises:
        CheckpointError: The layer's dtype is unknown.
    """
    total = 0 if scheme.activation is None else _activation_bytes(scheme.activation)
    if scheme.weight is None:
        return total + _plain_bytes(layer, kept_dtype(layer.dtype))
    return total + _weight_bytes(layer, scheme.weight, scheme.activation is not None)


def source_bytes(group: FusionGroup) -> int:
    """Bytes of all layers of a fusion group in the checkpoint as it is, FP8 with its scales."""
    return sum(_plain_bytes(layer, layer.dtype) + layer.scale_bytes for layer in group.layers)


def group_bytes(group: FusionGroup, scheme: Scheme) -> int:
    """Bytes of all layers of a fusion group under one scheme."""
    # Experts are hundreds, of two shapes.
    alike = {(one.out_features, one.in_features, one.dtype): one for one in group.layers}
    counts = Counter((one.out_features, one.in_features, one.dtype) for one in group.layers)
    return sum(counts[key] * layer_bytes(layer, scheme) for key, layer in alike.items())


def shape_bytes(scheme: Scheme, layers: int) -> int:
    """Of the bytes of some layers under one scheme, those of their noted shapes.

    Bits per weight do not count them.
    """
    weight = scheme.weight
    is_packed = weight is not None and _is_packed_int(weight, scheme.activation is not None)
    return layers * _WEIGHT_SHAPE_BYTES if is_packed else 0


def counted_bytes(group: FusionGroup, scheme: Scheme) -> int:
    """Bytes of all layers of a fusion group that bits per weight count."""
    return group_bytes(group, scheme) - shape_bytes(scheme, len(group.layers))


def weights_of(groups: Iterable[FusionGroup]) -> int:
    """Number of weights of all layers of some fusion groups."""
    return sum(layer.weights for layer in layers_of(groups))


def bits_per_weight(total_bytes: int, weights: int) -> float:
    """True bits: what is stored for some layers (`counted_bytes`), over their number of weights.

    Raises:
        BudgetError: There are no weights.
    """
    if weights <= 0:
        raise BudgetError("bits per weight: there are no linear layers to share the bytes.")
    return 8 * total_bytes / weights


def parse_size(text: str | int) -> int:
    """A size in bytes.

    Args:
        text: A number of bytes, or a number with a unit: ``"5GB"`` is 5 * 10**9,
            ``"4.5GiB"`` is 4.5 * 2**30.

    Returns:
        Whole bytes, rounded down, so that a budget is never overshot.

    Raises:
        BudgetError: The text is not a size.
    """
    words = re.fullmatch(r"(\d{1,30})(?:\.(\d{0,30}))?\s*([A-Za-z]*)", str(text).strip(), re.ASCII)
    if words is None:
        raise BudgetError(f"{text!r} is not a size. Write e.g. 5GB, 4.5GiB or 5000000000.")
    whole, fraction, unit = words[1], words[2] or "", words[3]
    if unit.lower() not in _SIZE_UNITS:
        raise BudgetError(
            f"{text!r}: unknown unit {unit!r}."
            + nearest_name(unit, ["B", "kB", "MB", "GB", "KiB", "GiB"])
        )
    if not unit and fraction.strip("0"):
        raise BudgetError(
            f"{text!r}: without a unit this is a number of bytes, and a part of one. "
            f"Write e.g. {words[0]}GB or {words[0]}GiB."
        )
    # Exact: 0.1 is not a binary fraction, and a byte more would be an overshot budget.
    digits, scale = int(whole + fraction), 10 ** len(fraction)
    size = int(digits * _SIZE_UNITS[unit.lower()] // int(scale))
    if size >= 2**63:
        raise BudgetError(f"{text!r}: no model is as large. Needed less than 2**63 bytes.")
    return size


def _plain_bytes(layer: AnyLayer, dtype: str) -> int:
    bits = source_bits(dtype)
    if bits is None:
        raise CheckpointError(
            f"{layer.name}: unknown dtype {dtype!r}." + nearest_name(dtype, DTYPE_BITS)
        )
    return -(-layer.out_features * layer.in_features * bits // 8)


def _weight_bytes(layer: AnyLayer, weight: TensorScheme, has_activation: bool) -> int:
    rows, columns, bits = layer.out_features, layer.in_features, weight.element.bits
    is_packed_int = _is_packed_int(weight, has_activation)
    row_bytes = 4 * -(-columns * bits // 32) if is_packed_int else -(-columns * bits // 8)
    scale_rows, scale_columns = _scale_shape(layer, weight)
    total = rows * row_bytes
    total += scale_rows * -(-scale_columns * weight.scale.bits // 8)
    if weight.scale.shared_bits:
        total += scale_rows * columns // weight.scale.shared_columns * weight.scale.shared_bits // 8
    if weight.has_scale:
        total += weight.scale.global_scale_bits // 8
    if not weight.symmetric:
        is_packed_zero_point = is_packed_int and weight.granularity.kind in ("channel", "group")
        column_bytes = 4 * -(-scale_rows * bits // 32) if is_packed_zero_point else scale_rows
        total += scale_columns * column_bytes
    return total + (_WEIGHT_SHAPE_BYTES if is_packed_int else 0)


def _is_packed_int(weight: TensorScheme, has_activation: bool) -> bool:
    is_int = isinstance(weight.element, IntFormat)
    return is_int and not (weight.element.bits == 8 and has_activation)


def _scale_shape(layer: AnyLayer, weight: TensorScheme) -> tuple[int, int]:
    """Rows and columns of the scales; a tile of 0 rows or columns spans all of them."""
    if not weight.has_scale:
        return 0, 0
    rows, columns = weight.granularity.rows, weight.granularity.columns
    return (
        -(-layer.out_features // rows) if rows else 1,
        -(-layer.in_features // columns) if columns else 1,
    )


def _activation_bytes(activation: TensorScheme) -> int:
    if activation.granularity.kind == "tensor":
        return activation.scale.bits // 8
    return activation.scale.global_scale_bits // 8 if activation.has_scale else 0
