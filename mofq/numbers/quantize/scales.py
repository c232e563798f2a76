"""Scales of tiles: what a code is multiplied by.

A weight or an activation matrix is seen as tiles that share a scale, in the
shape ``[A, R, G, K]``: ``A`` rows of tiles, ``R`` rows in a tile, ``G`` tiles
beside each other, ``K`` columns in a tile. A scale has the shape ``[A, 1, G, 1]``.
With ``amax`` the largest magnitude in a tile, ``max`` the largest of the
element format, and ``round_s`` the rounding to the scale's format:

=============  =================================================================
absmax         ``round_s(amax / max)``; for ``bits``-bit integers
               ``max = 2**(bits-1) - 1`` and codes saturate at ``±max``
fullrange      ``round_s(-m / 2**(bits-1))`` where ``m`` is the element of
               largest magnitude (the first in row order if several), so that
               ``m`` gets the code ``-2**(bits-1)``; may be negative; codes
               ``-2**(bits-1) .. 2**(bits-1) - 1``
asymmetric     ``round_s((high - low) / (2**bits - 1))`` with
               ``low = min(x, 0)``, ``high = max(x, 0)``; zero point
               ``round(-low / scale)`` and codes ``round(x / scale + zero_point)``,
               both clamped to ``0 .. 2**bits - 1``. The sums are taken with
               ``2**(bits-1)`` subtracted, as compressed-tensors does, so that
               the float32 sum rounds as it does there
=============  =================================================================

``round_s`` by scale format:

=========  =====================================================================
f32        nothing
bf16       nearest bfloat16, ties to even
e8m0       floor rule of OCP MX v1.0, section 6.3:
           ``2**(floor(log2(amax)) - floor(log2(max)))``, elements saturate. For
           ``int8`` this is MXINT8: there the element is ``code / 64`` and the
           shared scale 64 times this one; the code -128, which the standard
           allows to leave unused, is not used
e8m0ceil   the smallest power of two with ``amax / scale <= max``
micro16    shared microexponents (MX9, MX6, MX4): with ``E`` the E8M0 scale
           of 16 columns by the floor rule, ``E / 2`` for a pair of elements that
           are both below ``2**floor(log2(amax))`` of the 16, else ``E``
e4m3       NVFP4: ``global = tensor_amax / (448 * max)`` in float32, the tile's
           scale ``round_e4m3(amax / (max * global))``, saturating at 448; what
           the code is multiplied by is ``scale * global``, rounded to float32.
           Under the rule ``fouroversix`` 256 stands for 448, which leaves room
           for scales 1.5 times as large
=========  =====================================================================

Nothing here makes an infinity or a NaN out of finite numbers:

- A tile of zeros has the scale 1 (and codes 0), a tensor of zeros the global
  scale 1. ModelOpt does the same; compressed-tensors stores 2**-3 there.
- No scale is below 2**-126, the smallest normal float32; elements under half
  of the smallest step times that are rounded to zero.
- An E4M3 scale that would underflow to 0 is the smallest positive E4M3, 2**-9.
  (compressed-tensors uses 2**-3 and torchao 2**-6, which erase such a tile.)
- No scale is so large that the largest code times it overflows float32.

Source: OCP Microscaling Formats v1.0; NVIDIA TensorRT Model Optimizer
(``NVFP4QTensor``) for the two levels of NVFP4 and the order of operations;
arXiv:2302.08007 for microexponents, as AMD Quark describes how they are found;
arXiv:2512.02010 and its repository for 256.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.numbers.formats import FP8_E4M3, IntFormat
from mofq.numbers.quantize.rounding import (
    SMALLEST_NORMAL,
    divide,
    power_of_two_floor,
    round_to_bfloat16,
    round_to_format,
    round_to_integer,
)
from mofq.numbers.schemes import TensorScheme

_LARGEST_FLOAT32 = float(torch.finfo(torch.float32).max)
_SMALLEST_E4M3 = 2.0**-9
#: 1.5 times this is an E4M3 scale as well.
_LARGEST_SCALE_TO_6 = 256.0
#: The dimensions inside a tile.
TILE_DIMS = (1, 3)


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of all tiles, as float32 values that the storage format holds exactly.

    Suffixes as in the module's docstring, with tiles' own dimensions being 1.
    """

    scale: Tensor  #: [A, 1, G, 1]
    zero_point: Tensor | None  #: [A, 1, G, 1], integers held as float32; asymmetric only
    global_scale: Tensor | None  #: scalar; scale formats with two levels only

    def map(self, change: Callable[[Tensor], Tensor]) -> Scales:
        """The scales with a change made to the numbers of all tiles, not to the global scale."""
        point = self.zero_point
        return Scales(
            change(self.scale), None if point is None else change(point), self.global_scale
        )

    @property
    def multiplier(self) -> Tensor:
        """What a code is multiplied by, [A, 1, G, 1]."""
        return self.scale if self.global_scale is None else self.scale * self.global_scale


def join_scales(parts: Sequence[Scales], dim: int) -> Scales:
    """Scales of tiles below each other (dim 0) or beside each other (dim 2) as those of all."""
    points = [part.zero_point for part in parts if part.zero_point is not None]
    return Scales(
        torch.cat([part.scale for part in parts], dim),
        torch.cat(points, dim) if points else None,
        parts[0].global_scale,
    )


def code_range(scheme: TensorScheme) -> tuple[int, int]:
    """Smallest and largest code of an integer scheme, asymmetric ones counted from 0."""
    assert isinstance(scheme.element, IntFormat)
    bits = scheme.element.bits
    if not scheme.symmetric:
        return 0, 2**bits - 1
    if scheme.scale_rule == "absmax":
        return -scheme.element.max, scheme.element.max
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def global_scale_of(scheme: TensorScheme, tensor_amax: Tensor) -> Tensor | None:
    """The float32 scale of the whole tensor, where the scale format has one.

    Args:
        scheme: Any scheme.
        tensor_amax: Largest magnitude of the tensor, or of all tensors that
            share the scale, float32 scalar.

    Returns:
        Positive float32 scalar, or None.
    """
    if not scheme.scale.global_scale_bits:
        return None
    largest_scale = FP8_E4M3.max
    limit = _largest_scale(largest_scale * _largest_code(scheme), significant_bits=8)
    if scheme.scale_rule == "fouroversix":
        largest_scale = _LARGEST_SCALE_TO_6
    scale = divide(tensor_amax, largest_scale * scheme.element.max)
    scale = torch.clamp(scale, SMALLEST_NORMAL, limit)
    return torch.where(tensor_amax == 0, 1.0, scale)


def choose_scales(
    x_ARGK: Tensor, scheme: TensorScheme, *, global_scale: Tensor | None = None
) -> Scales:
    """Scales of all tiles by the absmax or the fullrange rule.

    Args:
        x_ARGK: Tiles, float32, finite.
        scheme: Its ``scale_rule`` is ``absmax`` or ``fullrange``.
        global_scale: From ``global_scale_of``.

    Returns:
        One scale, and where asymmetric one zero point, for each tile.
    """
    if not scheme.symmetric:
        return asymmetric_scales(*tile_range(x_ARGK), scheme)
    amax = tile_amax(x_ARGK)
    scale = symmetric_scale(amax, scheme, global_scale=global_scale)
    if scheme.scale_rule == "fullrange":
        scale = torch.where(_largest_is_positive(x_ARGK, amax), -scale, scale)
    return Scales(scale, None, global_scale)


def tile_amax(x_ARGK: Tensor) -> Tensor:
    """Largest magnitude of each tile, [A, 1, G, 1]."""
    return torch.amax(torch.abs(x_ARGK), dim=TILE_DIMS, keepdim=True)


def tile_range(x_ARGK: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each tile and 0, both [A, 1, G, 1]."""
    low = torch.clamp(torch.amin(x_ARGK, dim=TILE_DIMS, keepdim=True), max=0.0)
    high = torch.clamp(torch.amax(x_ARGK, dim=TILE_DIMS, keepdim=True), min=0.0)
    return low, high


def symmetric_scale(
    amax: Tensor, scheme: TensorScheme, *, global_scale: Tensor | None = None
) -> Tensor:
    """The positive scale for a largest magnitude, in the scale's format.

    Args:
        amax: Largest magnitudes, float32, any shape, at least 0.
        scheme: Symmetric. Under the fullrange rule ``amax`` gets the code
            ``2**(bits-1)``, under all others ``element.max``.
        global_scale: From ``global_scale_of``.

    Returns:
        float32 of the shape of ``amax``; 1 where it is 0.
    """
    largest = float(scheme.element.max)
    if scheme.scale_rule == "fullrange":
        largest += 1
    if scheme.scale.shared_bits:
        return _microexponent_scale(amax, scheme)
    scale = scale_for(amax, largest, scheme, global_scale=global_scale)
    return torch.where(amax == 0, 1.0, scale)


def scale_for(
    amax: Tensor, largest: float, scheme: TensorScheme, *, global_scale: Tensor | None
) -> Tensor:
    """Scale that maps ``amax`` to the code value ``largest``, in the scale's format, unless 0."""
    if scheme.scale.name in ("e8m0", "e8m0ceil"):
        return _power_of_two_scale(amax, largest, scheme)
    if global_scale is not None:
        scale = round_to_format(amax / (largest * global_scale), FP8_E4M3)
        return torch.clamp(scale, min=_SMALLEST_E4M3)
    return round_scale(divide(amax, largest), scheme)


def round_scale(scale: Tensor, scheme: TensorScheme) -> Tensor:
    """Round a positive scale to bf16 or f32, within what neither under- nor overflows."""
    bf16 = scheme.scale.name == "bf16"
    limit = _largest_scale(_largest_code(scheme), significant_bits=8 if bf16 else 24)
    scale = torch.clamp(scale, SMALLEST_NORMAL, limit)
    return round_to_bfloat16(scale) if bf16 else scale


def asymmetric_scales(low: Tensor, high: Tensor, scheme: TensorScheme) -> Scales:
    """Scales and zero points that cover ``low .. high``.

    Args:
        low: At most 0, float32, any shape.
        high: At least 0, same shape.
        scheme: Asymmetric.

    Returns:
        Of the same shape; scale 1 and zero point 0 where both are 0.
    """
    _, largest = code_range(scheme)
    middle = (largest + 1) // 2
    extent = high - low  # infinite at worst, and then the scale is the largest there is
    scale = torch.where(extent == 0, 1.0, round_scale(divide(extent, largest), scheme))
    zero_point = round_to_integer(-middle - low / scale, -middle, largest - middle) + middle
    return Scales(scale, zero_point, None)


def _power_of_two_scale(amax: Tensor, largest: float, scheme: TensorScheme) -> Tensor:
    scale = power_of_two_floor(amax) * 2.0 ** -math.floor(math.log2(largest))
    if scheme.scale.name == "e8m0ceil":
        scale = torch.where(amax > scale * largest, scale * 2.0, scale)
    limit = _largest_scale(_largest_code(scheme), significant_bits=1)
    return torch.clamp(scale, SMALLEST_NORMAL, limit)


def _microexponent_scale(amax_A1G1: Tensor, scheme: TensorScheme) -> Tensor:
    """All or half of the power of two that neighbouring pairs share."""
    pairs = scheme.scale.shared_columns // scheme.granularity.columns
    amax = amax_A1G1.unflatten(2, (-1, pairs))  # [A, 1, blocks, pairs, 1]
    shared_amax = torch.amax(amax, dim=3, keepdim=True)
    # Twice the smallest normal, so that half of it is one.
    shared = torch.clamp(
        _power_of_two_scale(shared_amax, float(scheme.element.max), scheme),
        min=2 * SMALLEST_NORMAL,
    )
    shared = torch.where(shared_amax == 0, 1.0, shared)
    is_below = power_of_two_floor(amax) < power_of_two_floor(shared_amax)
    return torch.where(is_below, shared * 0.5, shared).flatten(2, 3)


def _largest_is_positive(x_ARGK: Tensor, amax: Tensor) -> Tensor:
    # Only elementwise operations and one reduction, which a compiler can fuse;
    # argmax over two dimensions is neither. An odd place holds a positive number.
    rows, columns = x_ARGK.shape[1], x_ARGK.shape[3]
    row = torch.arange(rows, device=x_ARGK.device, dtype=torch.int32).view(rows, 1, 1)
    column = torch.arange(columns, device=x_ARGK.device, dtype=torch.int32)
    place = (row * columns + column) * 2 + (x_ARGK > 0)
    absent = rows * columns * 2
    first = torch.amin(torch.where(torch.abs(x_ARGK) == amax, place, absent), TILE_DIMS, True)
    return (first & 1) == 1


def _largest_code(scheme: TensorScheme) -> float:
    if isinstance(scheme.element, IntFormat):
        low, high = code_range(scheme)
        return float(max(-low, high))
    return float(scheme.element.max)


def _largest_scale(largest_code: float, *, significant_bits: int) -> float:
    """The largest scale of that many bits whose product with the code is finite in float32."""
    mantissa, exponent = math.frexp(_LARGEST_FLOAT32 / largest_code)
    return math.ldexp(
        math.floor(math.ldexp(mantissa, significant_bits)), exponent - significant_bits
    )
