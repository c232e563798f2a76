"""Rounding to element and scale formats, in float32.

For a float format with ``m`` mantissa bits and smallest normal exponent ``e0``,
a value ``x`` inside ``[-max, max]`` lies in a binade whose neighbouring format
values are ``step = 2**(max(floor(log2|x|), e0) - m)`` apart, and is rounded to
``step * round(x / step)``, ties to the even multiple, which is the even code.
Anything outside saturates, infinities included; a NaN stays a NaN, except in a
codebook, which has no code for it.

Every operation is elementwise and exact but for the one rounding, so that
eager and compiled code agree in every bit: powers of two are cut out of the
bits of the number, never computed by ``log2`` or ``exp2``, and divisions are
divisions, never products with a reciprocal.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import torch
from torch import Tensor

from mofq.formats import ELEMENT_FORMATS, CodebookFormat, ElementFormat, FloatFormat, IntFormat

#: Smallest positive normal float32 (and bfloat16); no scale is smaller.
SMALLEST_NORMAL = 2.0**-126

_EXPONENT_BITS = 0x7F800000
_UPPER_HALF = -0x10000  # the sixteen bits of a float32 that bfloat16 keeps


def _midpoints(element: CodebookFormat) -> tuple[float, ...]:
    # A midpoint may need one bit more than float32 has. Rounded down, and not
    # to nearest, "x > midpoint" is still exact for every float32 x.
    midpoints = []
    for low, high in pairwise(element.values):
        exact = (_as_float32(low) + _as_float32(high)) / 2
        nearest = _as_float32(exact)
        midpoints.append(nearest if nearest <= exact else _as_float32(nearest, away=-1))
    return tuple(midpoints)


def _as_float32(x: float, *, away: int = 0) -> float:
    """The nearest float32, or ``away`` places above it."""
    bits = struct.unpack("<i", struct.pack("<f", x))[0]
    bits += away if bits >= 0 else -away
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])


_MIDPOINTS = {
    element.name: _midpoints(element)
    for element in ELEMENT_FORMATS.values()
    if isinstance(element, CodebookFormat)
}


def power_of_two_floor(x: Tensor) -> Tensor:
    """The largest power of two at most ``|x|``.

    Args:
        x: float32, any shape.

    Returns:
        float32 of the same shape; 0 for zeros and subnormal numbers, infinity
        for infinities and NaN.
    """
    return (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)


def round_to_bfloat16(x: Tensor) -> Tensor:
    """Round to the nearest bfloat16, ties to even, kept as float32.

    Args:
        x: float32, finite, any shape.

    Returns:
        float32 of the same shape, exactly representable in bfloat16. Compilers
        may drop a cast to bfloat16 and back; they cannot drop this.
    """
    bits = x.view(torch.int32)
    odd = (bits >> 16) & 1
    return ((bits + (0x7FFF + odd)) & _UPPER_HALF).view(torch.float32)


def round_to_format(x: Tensor, element: ElementFormat) -> Tensor:
    """Round to the nearest value of an element format, saturating.

    Ties go to the even code; in a codebook, where no code is even, to the lower
    value, as the reference implementation of NF4 does.

    Args:
        x: Any shape, any floating dtype; computed in float32.
        element: Target format. Integers are the symmetric codes, ``±max``.

    Returns:
        float32 of the same shape, every finite entry a value of the format. The
        sign of a zero is the sign of what was rounded.
    """
    x = x.to(torch.float32)
    if isinstance(element, IntFormat):
        return round_to_integer(x, -element.max, element.max)
    if isinstance(element, FloatFormat):
        return _round_to_float(x, element)
    return codebook_values(nearest_code(x, element), element)


def round_to_integer(x: Tensor, low: int, high: int) -> Tensor:
    """Round to the nearest integer in ``[low, high]``, ties to even.

    Args:
        x: float32, any shape.
        low: Smallest result.
        high: Largest result.

    Returns:
        float32 of the same shape.
    """
    return torch.round(torch.clamp(x, low, high))


def _round_to_float(x: Tensor, element: FloatFormat) -> Tensor:
    x = torch.clamp(x, -element.max, element.max)
    binade = torch.clamp(power_of_two_floor(x), min=2.0**element.min_exponent)
    step = binade * 2.0**-element.mantissa_bits
    return torch.round(x / step) * step


def nearest_code(x: Tensor, element: CodebookFormat) -> Tensor:
    """Index of the nearest value in a codebook; a tie goes to the lower value.

    Args:
        x: float32, any shape.
        element: The codebook.

    Returns:
        uint8 of the same shape, in ``0 .. 2**bits - 1``.
    """
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint in _MIDPOINTS[element.name]:
        codes = codes + (x > midpoint)
    return codes


def codebook_values(codes: Tensor, element: CodebookFormat) -> Tensor:
    """Look codes up in a codebook.

    Args:
        codes: Integer indices, any shape.
        element: The codebook.

    Returns:
        float32 of the same shape.
    """
    values = torch.tensor(element.values, dtype=torch.float32, device=codes.device)
    return values[codes.to(torch.int32)]
