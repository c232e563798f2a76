"""Scales that minimise the squared error of a tile: ``mse``, ``nats`` and ``fouroversix``.

The candidates, in order, all rounded to the scale's format like any other
scale (``absmax`` below is the absmax scale before that rounding):

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

import torch
from torch import Tensor

from mofq.formats import IntFormat
from mofq.quantize.rounding import SMALLEST_NORMAL, power_of_two_floor
from mofq.quantize.scales import (
    TILE_DIMS,
    Scales,
    asymmetric_scales,
    scale_for,
    tile_amax,
)
from mofq.quantize.tiles import code_values, encode_tiles
from mofq.schemes import TensorScheme

_CLIPS = (
    *(percent / 100 for percent in range(98, 68, -2)),
    *(percent / 100 for percent in range(64, 22, -6)),
)
_STRETCHES = tuple(part / 24 for part in range(48, 11, -1) if part != 24)


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
        scheme: Its ``scale_rule`` is ``mse``, ``nats`` or ``fouroversix``.
        global_scale: From ``global_scale_of``.
        importance_ARGK: Weight of each element's squared error, float32, at
            least 0, broadcastable to the tiles; None weighs all alike.

    Returns:
        One scale, and where asymmetric one zero point, for each tile.
    """
    amax = tile_amax(x_ARGK)
    unit = 2.0**16 / torch.clamp(power_of_two_floor(amax), min=SMALLEST_NORMAL).double()
    target_ARGK = x_ARGK.double() * unit
    weight_ARGK = None if importance_ARGK is None else _relative(importance_ARGK)
    best: Scales | None = None
    best_error = amax.double()  # replaced by the first candidate's
    for scales in _candidates(x_ARGK, amax, scheme, global_scale=global_scale):
        codes_ARGK = encode_tiles(x_ARGK, scheme, scales)
        value_ARGK = code_values(codes_ARGK, scheme, scales).double()
        # Exact products, so that a fused multiply-add changes nothing.
        delta_ARGK = target_ARGK - value_ARGK * (scales.multiplier.double() * unit)
        squared_ARGK = delta_ARGK * delta_ARGK
        if weight_ARGK is not None:
            squared_ARGK = squared_ARGK * weight_ARGK
        error = torch.sum(torch.round(squared_ARGK), dim=TILE_DIMS, keepdim=True)
        best, best_error = (
            (scales, error) if best is None else _better(best, best_error, scales, error)
        )
    assert best is not None
    return best


def _better(
    best: Scales, best_error: Tensor, scales: Scales, error: Tensor
) -> tuple[Scales, Tensor]:
    wins = error < best_error
    zero_point = best.zero_point
    if zero_point is not None and scales.zero_point is not None:
        zero_point = torch.where(wins, scales.zero_point, zero_point)
    scale = torch.where(wins, scales.scale, best.scale)
    return Scales(scale, zero_point, best.global_scale), torch.minimum(error, best_error)


def _candidates(
    x_ARGK: Tensor, amax: Tensor, scheme: TensorScheme, *, global_scale: Tensor | None
) -> list[Scales]:
    if not scheme.symmetric:
        low = torch.clamp(torch.amin(x_ARGK, dim=TILE_DIMS, keepdim=True), max=0.0)
        high = torch.clamp(torch.amax(x_ARGK, dim=TILE_DIMS, keepdim=True), min=0.0)
        return [asymmetric_scales(low * r, high * r, scheme) for r in (1.0, *_CLIPS)]

    def scales(ratio: float, *, largest: float = float(scheme.element.max)) -> Scales:
        scale = scale_for(amax * ratio, largest, scheme, global_scale=global_scale)
        return Scales(torch.where(amax == 0, 1.0, scale), None, global_scale)

    if scheme.scale_rule == "fouroversix":
        return [scales(1.0), scales(1.5)]
    has_sign = not scheme.scale.name.startswith("e8m0")
    if not has_sign:
        return [scales(1.0), scales(2.0), scales(0.5)]
    if not isinstance(scheme.element, IntFormat):
        return [scales(ratio) for ratio in (1.0, *_STRETCHES)]
    full = scales(1.0, largest=2.0 ** (scheme.element.bits - 1))
    positive = [full, *(scales(ratio) for ratio in _CLIPS)]
    signed = [pair for each in positive for pair in (each, _negated(each, amax))]
    return [scales(1.0), *signed]


def _negated(scales: Scales, amax: Tensor) -> Scales:
    return Scales(torch.where(amax == 0, 1.0, -scales.scale), None, scales.global_scale)


def _relative(importance_ARGK: Tensor) -> Tensor:
    largest = torch.amax(importance_ARGK, dim=TILE_DIMS, keepdim=True).double()
    return torch.where(largest > 0, importance_ARGK.double() / largest, 1.0)
