"""Scales of tiles by the rule that a scheme names, those that are searched included.

The rules ``absmax`` and ``fullrange`` are formulas (see ``scales``); ``mse``, ``nats``,
``fouroversix`` and ``stored`` minimise the squared error of a tile. Their candidates, in order,
all rounded to the scale's format like any other scale (``absmax`` below is the absmax scale before
that rounding):

=================  =============================================================
integer, symmetric absmax; then ``amax / 2**(bits-1)`` with both signs, which
                   contains the fullrange rule; then ``r * absmax`` with both
                   signs for r = 0.98, 0.96 … 0.70, 0.64, 0.58 … 0.28.
                   Codes are ``-2**(bits-1) .. 2**(bits-1) - 1``
integer, asym.     ``low`` and ``high`` both times r = 1, 0.98, 0.96 … 0.70,
                   0.64, 0.58 … 0.28
float, codebook    absmax; then ``r * absmax`` for r = 48/24, 47/24 … 12/24. Above
                   1 the largest magnitude takes a smaller code (r = 1.5 maps
                   it to 4 in FP4 E2M1), which moves the whole grid
E8M0 scales        instead of all these r: the rule's own scale, its double,
                   its half
fouroversix        instead of all these r: absmax, which gives the largest magnitude
                   the code 6; then ``1.5 * absmax``, which gives it the code 4
stored             instead of all these r: that the largest magnitude has the code
                   ``2**(bits-1) - 1``, ``2**(bits-1)``, and then each smaller one, at most
                   16; asym. that the largest and the smallest number are ``2**bits - 1``
                   codes apart, ``2**bits - 2`` …, at most 16. One of them is the scale from
                   which the values of an integer source were decoded, and has no error.
                   NVFP4: that the largest magnitude has each code above 0, the largest first,
                   under the global scale of the source
=================  =============================================================

The smallest error wins, among equals the first, so that the result is never
worse than absmax, nor than fullrange.

The error of a candidate is ``sum_j round(w_j * (2**16 * (x_j - q_j) / p)**2)``
in float64, where ``p`` is the power of two at or below the tile's ``amax`` and
``w`` the importance relative to the tile's largest (1 where there is none).
The terms are integers and their sum is below 2**53 for tiles of up to 2**17
elements, so it is exact: no order of summation, number of threads or compiler
can change which candidate wins.

Source: the clip search of GPTQ (arXiv:2210.17323, ``quant.py``) and the search
over signed scales of llama.cpp (``make_qx_quants``); the grids are our own. Four over
six: arXiv:2512.02010, by the squared error, 6 where both are equal.
"""

from __future__ import annotations

from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from mofq.numbers.formats import FloatFormat, IntFormat
from mofq.numbers.quantize.rounding import SMALLEST_NORMAL, power_of_two_floor, round_to_integer
from mofq.numbers.quantize.scales import (
    TILE_DIMS,
    Scales,
    asymmetric_scales,
    choose_scales,
    code_range,
    global_scale_of,
    round_scale,
    scale_for,
    symmetric_scale,
    tile_amax,
    tile_range,
)
from mofq.numbers.quantize.tiles import round_tiles
from mofq.numbers.schemes import TensorScheme

#: The dimensions inside a tile, also where candidates have one before the others.
_TILE_DIMS = (-3, -1)
_CLIPS = (
    *(percent / 100 for percent in range(98, 68, -2)),
    *(percent / 100 for percent in range(64, 22, -6)),
)
_STORED_CODES = 16
#: Numbers that several candidates are tried on at once: with few, what a step costs is the call.
_TOGETHER_ELEMENTS = 2**16
_FP4_CODES = (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5)
_STRETCHES = tuple(part / 24 for part in range(48, 11, -1) if part != 24)


def tile_scales(
    x_ARGK: Tensor,
    scheme: TensorScheme,
    *,
    tensor_amax: Tensor | None = None,
    importance_ARGK: Tensor | None = None,
) -> Scales | None:
    """Scales of tiles by the scheme's own rule; nothing is checked.

    Args:
        x_ARGK: Tiles (see ``scales``), float32, finite.
        scheme: Any.
        tensor_amax: float32 scalar; needed if ``scheme.needs_tensor_amax``.
        importance_ARGK: Broadcastable to the tiles; for the rule ``nats``.

    Returns:
        The scales, or None where the scheme is unscaled.
    """
    if not scheme.has_scale:
        return None
    global_scale = None if tensor_amax is None else global_scale_of(scheme, tensor_amax)
    if scheme.granularity.kind == "tensor":
        assert tensor_amax is not None
        amax = tensor_amax.reshape(1, 1, 1, 1)
        return Scales(symmetric_scale(amax, scheme, global_scale=global_scale), None, global_scale)
    if scheme.has_searched_scale:
        return search_scales(
            x_ARGK, scheme, global_scale=global_scale, importance_ARGK=importance_ARGK
        )
    return choose_scales(x_ARGK, scheme, global_scale=global_scale)


def search_scales(
    x_ARGK: Tensor,
    scheme: TensorScheme,
    *,
    global_scale: Tensor | None = None,
    importance_ARGK: Tensor | None = None,
) -> Scales:
    """The scale of each tile that makes its squared error smallest.

    Args:
        x_ARGK: Tiles, float32, finite.
        scheme: It has a searched scale.
        global_scale: From ``global_scale_of``.
        importance_ARGK: Weight of each element's squared error, float32, at
            least 0, broadcastable to the tiles; None weighs all alike.

    Returns:
        One scale, and where asymmetric one zero point, for each tile.
    """
    amax = tile_amax(x_ARGK)
    candidates = _candidates(x_ARGK, amax, scheme, global_scale=global_scale)
    unit = 2.0**16 / torch.clamp(power_of_two_floor(amax), min=SMALLEST_NORMAL).double()
    target_ARGK = x_ARGK.double() * unit
    weight_ARGK = None if importance_ARGK is None else _relative(importance_ARGK)

    def error_of(scales: Scales) -> Tensor:
        value_ARGK = round_tiles(x_ARGK, scheme, scales).double()
        # Exact products, so that a fused multiply-add changes nothing.
        delta_ARGK = target_ARGK - value_ARGK * (scales.multiplier.double() * unit)
        squared_ARGK = delta_ARGK * delta_ARGK
        if weight_ARGK is not None:
            squared_ARGK = squared_ARGK * weight_ARGK
        return torch.sum(torch.round(squared_ARGK), dim=_TILE_DIMS, keepdim=True)

    if torch.compiler.is_compiling():
        # One loop over the candidates that the compiler writes, and not one for each of them.
        return _pick(candidates, _first_least(error_of(candidates))[0])
    best = torch.zeros_like(amax, dtype=torch.int64)
    least = torch.full_like(amax, torch.inf, dtype=torch.float64)
    together = max(1, _TOGETHER_ELEMENTS // x_ARGK.numel())
    for first in range(0, len(candidates.scale), together):
        some = candidates.map(itemgetter(slice(first, first + together)))
        place, error = _first_least(error_of(some))
        best, least = torch.where(error < least, first + place, best), torch.minimum(error, least)
    return _pick(candidates, best)


def _first_least(error_CA1G1: Tensor) -> tuple[Tensor, Tensor]:
    """Where the smallest error of each tile stands first, and the error."""
    least = torch.amin(error_CA1G1, 0, keepdim=True)
    count = len(error_CA1G1)
    place = torch.arange(count, device=least.device).view(-1, 1, 1, 1, 1)
    return torch.amin(torch.where(error_CA1G1 == least, place, count), 0), least[0]


def _pick(candidates: Scales, place_A1G1: Tensor) -> Scales:
    """The candidate of each tile that stands at ``place``."""
    return candidates.map(lambda values_CA1G1: values_CA1G1.gather(0, place_A1G1[None])[0])


def _candidates(
    x_ARGK: Tensor, amax: Tensor, scheme: TensorScheme, *, global_scale: Tensor | None
) -> Scales:
    """All candidates, each value with one more dimension before the others."""
    ratio = partial(_ratios, like=amax)
    if scheme.scale_rule == "stored":
        return _stored_scales(x_ARGK, amax, scheme, global_scale=global_scale)
    if not scheme.symmetric:
        low, high = tile_range(x_ARGK)
        return asymmetric_scales(low * ratio(1.0, *_CLIPS), high * ratio(1.0, *_CLIPS), scheme)

    def scale(*ratios: float, largest: float = float(scheme.element.max)) -> Tensor:
        found = scale_for(amax * ratio(*ratios), largest, scheme, global_scale=global_scale)
        return torch.where(amax == 0, 1.0, found)

    if scheme.scale_rule == "fouroversix":
        return Scales(scale(1.0, 1.5), None, global_scale)
    if scheme.scale.name.startswith("e8m0"):  # which have no sign
        return Scales(scale(1.0, 2.0, 0.5), None, global_scale)
    if not isinstance(scheme.element, IntFormat):
        return Scales(scale(1.0, *_STRETCHES), None, global_scale)
    full = scale(1.0, largest=2.0 ** (scheme.element.bits - 1))
    positive = torch.cat([full, scale(*_CLIPS)])
    negative = torch.where(amax == 0, 1.0, -positive)
    signed = torch.stack([positive, negative], 1).flatten(0, 1)
    return Scales(torch.cat([scale(1.0), signed]), None, global_scale)


def _stored_scales(
    x_ARGK: Tensor, amax: Tensor, scheme: TensorScheme, *, global_scale: Tensor | None
) -> Scales:
    """One scale for each code that the largest number of a tile may have been."""
    if isinstance(scheme.element, FloatFormat):
        scales = [
            torch.where(amax == 0, 1.0, scale_for(amax, code, scheme, global_scale=global_scale))
            for code in _FP4_CODES
        ]
        return Scales(torch.stack(scales), None, global_scale)
    low, high = code_range(scheme)
    codes = range(high, max(0, high - _STORED_CODES), -1)
    if scheme.symmetric:
        code_C = _ratios(*map(float, (high, -low, *codes[1:-1])), like=amax)
        scale = torch.where(amax == 0, 1.0, round_scale(amax / code_C, scheme))
        return Scales(scale, None, None)
    least, largest = tile_range(x_ARGK)
    extent = largest - least
    code_C = _ratios(*map(float, codes), like=amax)
    scale = torch.where(extent == 0, 1.0, round_scale(extent / code_C, scheme))
    middle = (high + 1) // 2
    point = round_to_integer(-middle - least / scale, -middle, high - middle) + middle
    return Scales(scale, point, None)


def _ratios(*ratios: float, like: Tensor) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float32, device=like.device).view(-1, 1, 1, 1, 1)


def _relative(importance_ARGK: Tensor) -> Tensor:
    largest = torch.amax(importance_ARGK, dim=TILE_DIMS, keepdim=True).double()
    return torch.where(largest > 0, importance_ARGK.double() / largest, 1.0)
