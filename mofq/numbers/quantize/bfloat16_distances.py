"""How far bfloat16 weights are from the nearest value of a format, in few instructions.

`tiles` divides by the scale, rounds with ties to even, and saturates. This is for squared
errors alone, and for a compiler: a product with the scale's reciprocal instead of the
quotient, ties to either side, and no saturation where nothing saturates. The distances are
the same in every bit:

- A bfloat16 has 8 significant bits, so has the scale, and a tie of a format has at most 8.
  So ``x / scale`` is a tie, or further from it than 2**-17 of itself, while the product is
  nearer to it than 2**-22: both lie on the same side of every tie.
- At a tie both neighbours are as far as each other, and float32 holds that distance.
- ``value * scale`` needs 16 bits, so it does not matter whether a product is rounded before
  it is added or fused with the addition.
- Where ``scale = round(amax / max)``, no quotient is above ``max * (1 + 2**-8)``, which rounds
  to ``max``.

Rounding is an addition whose sum has the unit of the format in its last place. For integers
the addend is 2**23. For floats it follows from the number itself: ``p = (2**s + 1) * y`` with
``s = 23 - mantissa_bits`` has the exponent that ``y - p`` needs, and below the smallest
normal number ``1.5 * 2**s`` times that takes its place.

Source: G. W. Veltkamp's splitting, in T. J. Dekker, "A floating-point technique for extending
the available precision", Numer. Math. 18 (1971).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mofq.numbers.formats import CodebookFormat, ElementFormat, IntFormat
from mofq.numbers.quantize.scales import symmetric_scale
from mofq.numbers.schemes import TensorScheme

_MANTISSA_BITS = 23  # that float32 stores
#: Scale formats of at most 8 significant bits.
_SHORT_SCALES = ("bf16", "e8m0", "e8m0ceil", "micro16")
#: Scales from whose reciprocal on all squared errors are below the smallest float32.
_LARGEST_RECIPROCAL = 2.0**100


def has_short_form(scheme: TensorScheme) -> bool:
    """Whether `distances` knows a scheme."""
    return (
        scheme.has_scale
        and scheme.symmetric
        and scheme.scale_rule == "absmax"
        and scheme.scale.name in _SHORT_SCALES
        and not isinstance(scheme.element, CodebookFormat)
    )


def row_amaxes(magnitude_BI: Tensor, schemes: Sequence[TensorScheme]) -> dict[int, Tensor]:
    """Largest magnitudes of all tiles that lie in one row, each size from a smaller one.

    Args:
        magnitude_BI: Float32, at least 0.
        schemes: Any; those whose tiles have one row count.

    Returns:
        Columns of a tile, 0 for whole rows -> [B, 1, G, 1].
    """
    sizes = {s.granularity.columns for s in schemes if s.granularity.rows == 1}
    found: dict[int, Tensor] = {}
    for size in sorted(sizes, key=lambda columns: columns or math.inf):
        parts = [part for part in found if size % part == 0]
        part = max(parts, default=1)
        values_BG = found[part][:, 0, :, 0] if parts else magnitude_BI
        tiles_BGK = values_BG.unflatten(1, (-1, size // part) if size else (1, -1))
        found[size] = torch.amax(tiles_BGK, 2)[:, None, :, None]
    return found


def distances(magnitude_ARGK: Tensor, scheme: TensorScheme, amax: Tensor) -> Tensor:
    """``|x|`` minus the nearest value of the format to it, by a scheme that has a short form.

    Args:
        magnitude_ARGK: Of bfloat16 numbers, as tiles, float32.
        scheme: See `has_short_form`.
        amax: Largest magnitude of each tile, [A, 1, G, 1], or of the tensor.

    Returns:
        Of the shape of the tiles. Squares are the reference's in every bit as float32; the
        sign is not where two values are as near.
    """
    scale = symmetric_scale(amax, scheme)
    inverse = torch.clamp(1.0 / scale, max=_LARGEST_RECIPROCAL)
    value = _nearest(magnitude_ARGK, inverse, scheme.element)
    if scheme.scale.name != "bf16":
        largest = float(scheme.element.max)
        value = value - torch.relu(value - largest)
    return _multiply_add(value, stored(-scale), magnitude_ARGK)


def stored(scale: Tensor) -> Tensor:
    """The scale, for a compiler: written down once, and not found again for each element."""
    return torch.as_strided(scale, scale.shape, scale.stride())


def _nearest(x: Tensor, inverse: Tensor, element: ElementFormat) -> Tensor:
    """A nearest value to ``x * inverse``, which is at least 0; unbounded above."""
    if isinstance(element, (IntFormat, CodebookFormat)):
        addend = torch.full_like(x, 2.0**_MANTISSA_BITS)
    else:
        shift = 2.0 ** (_MANTISSA_BITS - element.mantissa_bits)
        least = 1.5 * shift * 2.0**element.min_exponent
        above = _multiply_add(x, stored(inverse * (shift + 1)), torch.full_like(x, -least))
        addend = -least - torch.relu(above)
    return _multiply_add(x, stored(inverse), addend) - addend


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c``, fused where the compiler can say so."""
    from torch._inductor import inductor_prims  # the compiler's own, and loaded with it

    fused = getattr(inductor_prims, "fma", None)
    result: Tensor = a * b + c if fused is None else fused(a, b, c)
    return result
