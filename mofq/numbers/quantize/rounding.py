"""Rounding to element and scale formats, in float32.

For a float format with ``m`` mantissa bits and smallest normal exponent ``e0``,
a value ``x`` inside ``[-max, max]`` lies in a binade whose neighbouring format
values are ``step = 2**(max(floor(log2|x|), e0) - m)`` apart, and is rounded to
the nearest multiple of ``step``, ties to the even one, which is the even code.
Anything outside saturates, infinities included; a NaN stays a NaN, except in a
codebook, which has no code for it.

The rounding itself is ``(x + c) - c`` with ``c = 1.5 * 2**23 * step``: in the sum
the last bit of a float32 is worth one step, so the processor rounds to it. The
binade is found by two products and a difference (``_unit_in_first_place``).

Every operation is elementwise and exact but for the one rounding, so that
eager and compiled code agree in every bit: no power of two is computed by
``log2`` or ``exp2``, and divisions are divisions, never products with a
reciprocal (``divide``). All are operations that compilers turn into vector
instructions; reading the bits of a float32 as an integer is none of them.

Source: S. M. Rump, T. Ogita, S. Oishi, "Accurate floating-point summation part I",
SIAM J. Sci. Comput. 31 (2008), algorithm 3.5, for the unit in the first place.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import torch
from torch import Tensor

from mofq.numbers.formats import (
    ELEMENT_FORMATS,
    CodebookFormat,
    ElementFormat,
    FloatFormat,
    IntFormat,
)

#: Smallest positive normal float32 (and bfloat16); no scale is smaller.
SMALLEST_NORMAL = 2.0**-126

_MANTISSA_BITS = 23  # that float32 stores
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


def divide(x: Tensor, by: float) -> Tensor:
    """``x / by``, rounded once.

    Args:
        x: float32, any shape.
        by: A number that float32 holds.

    Returns:
        float32 of the same shape. By a plain number, torch multiplies with its rounded
        reciprocal on a GPU; so does its compiler by what it can see to be one number, which
        what depends on ``x`` is not.
    """
    return x / torch.where(x < 0, by, torch.full_like(x, by))


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
    return nearest_value(x, element)


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
    binade = torch.clamp(_unit_in_first_place(x), min=2.0**element.min_exponent)
    magic = binade * (1.5 * 2.0 ** (_MANTISSA_BITS - element.mantissa_bits))
    return torch.copysign((x + magic) - magic, x)


def _unit_in_first_place(x: Tensor) -> Tensor:
    """`power_of_two_floor` of numbers between 2**-102 and 2**103; smaller where ``x`` is."""
    scaled = x * (2.0**_MANTISSA_BITS + 1)
    return torch.abs(scaled - scaled * (1 - 2.0 ** -(_MANTISSA_BITS + 1)))


def nearest_value(x: Tensor, element: CodebookFormat) -> Tensor:
    """The nearest value in a codebook; a tie goes to the lower one.

    Args:
        x: float32, any shape.
        element: The codebook.

    Returns:
        float32 of the same shape: ``codebook_values(nearest_code(x, …), …)``.
    """
    first, *others = element.values
    nearest = torch.full_like(x, first)
    for midpoint, value in zip(_MIDPOINTS[element.name], others, strict=True):
        nearest = torch.where(x > midpoint, value, nearest)
    return nearest


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
