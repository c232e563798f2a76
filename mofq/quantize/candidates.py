"""Every candidate of a block of rows in one pass: plain torch, written to be compiled.

A block is seen as ``[A, R, J, K]``: ``A`` bands of ``R`` rows, ``J`` strips of ``K``
columns. ``R`` and ``K`` hold whole tiles of every scheme and follow from the schemes
alone, so that a compiler sees two sizes that are fixed and two that are free, whatever
the shape of the layer. Rows of zeros fill the last band up; they round to zeros.

Squared errors are summed over the ``R`` rows of a band in float32, in the order of the
rows, which is how torch sums sixteen rows (and sixteen, then the next sixteen) eagerly
and how a compiled loop does: both give the same bits. Bands are added in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mofq.quantize.rules import tile_scales
from mofq.quantize.scales import Scales
from mofq.quantize.tiles import round_tiles
from mofq.schemes import TensorScheme

#: Rows whose squared errors are added one after the other.
SUMMED_ROWS = 16

#: Block and the largest magnitude of its tensor, float32 scalar -> what is asked for.
Pass = Callable[[Tensor, Tensor], Tensor]


def is_candidate(scheme: TensorScheme) -> bool:
    """Whether the weight alone says how a scheme rounds it."""
    return scheme.rounding == "nearest" and scheme.scale_rule != "nats"


def band_rows(schemes: Sequence[TensorScheme]) -> int:
    """Rows of a band, R: whole tiles of every scheme."""
    return math.lcm(SUMMED_ROWS, *(s.granularity.rows or 1 for s in schemes))


def strip_columns(schemes: Sequence[TensorScheme]) -> int:
    """Columns of a strip, K: whole tiles of every scheme."""
    return math.lcm(*(s.columns_multiple for s in schemes))


def to_bands(block_RI: Tensor, schemes: Sequence[TensorScheme]) -> Tensor:
    """A block of rows as bands and strips, zeros below it where it ends inside a band.

    Args:
        block_RI: Rows that begin where a tile does.
        schemes: All fit the layer.

    Returns:
        [A, R, J, K], contiguous, of the same dtype.
    """
    rows = band_rows(schemes)
    columns = strip_columns(schemes)
    missing = -block_RI.shape[0] % rows
    if missing:
        block_RI = torch.cat([block_RI, block_RI.new_zeros((missing, block_RI.shape[1]))])
    return block_RI.contiguous().view(-1, rows, block_RI.shape[1] // columns, columns)


def errors_pass(schemes: Sequence[TensorScheme]) -> Pass:
    """What sums the squared rounding errors of each column.

    Args:
        schemes: All are candidates and fit the layer.

    Returns:
        A function to [W + 2, A, R / 16, J, K], float32, over sixteen rows each: the sum of
        each scheme's squared errors, of the squared weights, and their largest magnitude.
    """

    def errors(x_ARJK: Tensor, tensor_amax: Tensor) -> Tensor:
        x_ARJK = x_ARJK.to(torch.float32)
        squares = [_summed(_rounded(x_ARJK, s, tensor_amax) - x_ARJK) for s in schemes]
        amax = torch.amax(torch.abs(_sixteens(x_ARJK)), 2)
        return torch.stack([*squares, _summed(x_ARJK), amax])

    return errors


def sum_sixteens(x_WRI: Tensor) -> Tensor:
    """Squares of some matrices, summed as ``errors_pass`` does: [W, R / 16, I], float32."""
    missing = -x_WRI.shape[1] % SUMMED_ROWS
    if missing:
        x_WRI = torch.cat([x_WRI, x_WRI.new_zeros((len(x_WRI), missing, x_WRI.shape[2]))], 1)
    return _summed(x_WRI)


def _summed(x_ARJK: Tensor) -> Tensor:
    return torch.sum(_sixteens(x_ARJK * x_ARJK), 2)


def _sixteens(x_ARJK: Tensor) -> Tensor:
    sixteens: Tensor = x_ARJK.unflatten(1, (-1, SUMMED_ROWS))
    return sixteens


def deltas_pass(schemes: Sequence[TensorScheme]) -> Pass:
    """What gives the rounding errors themselves.

    Args:
        schemes: All are candidates and fit the layer.

    Returns:
        A function to [W, A, R, J, K], float32: quantized minus original weight.
    """

    def deltas(x_ARJK: Tensor, tensor_amax: Tensor) -> Tensor:
        x_ARJK = x_ARJK.to(torch.float32)
        return torch.stack([_rounded(x_ARJK, s, tensor_amax) - x_ARJK for s in schemes])

    return deltas


def _rounded(x_ARJK: Tensor, scheme: TensorScheme, tensor_amax: Tensor) -> Tensor:
    x_tiles = _tiles(x_ARJK, scheme)
    amax = tensor_amax if scheme.needs_tensor_amax else None
    scales = tile_scales(x_tiles, scheme, tensor_amax=amax)
    if scales is None:
        return round_tiles(x_tiles, scheme, None).reshape(x_ARJK.shape)
    stored = Scales(
        _stored(scales.scale),
        None if scales.zero_point is None else _stored(scales.zero_point),
        scales.global_scale,
    )
    rounded = round_tiles(x_tiles, scheme, stored) * stored.multiplier
    return rounded.reshape(x_ARJK.shape)


def _stored(scale: Tensor) -> Tensor:
    """The scale, for a compiler: written down once, and not found again for each element."""
    return torch.as_strided(scale, scale.shape, scale.stride())


def _tiles(x_ARJK: Tensor, scheme: TensorScheme) -> Tensor:
    bands, band, strips, strip = x_ARJK.shape
    rows, columns = scheme.granularity.rows, scheme.granularity.columns
    if scheme.granularity.kind in ("tensor", "unscaled"):
        rows = 1  # the scale, if any, is given
    if not columns:
        return x_ARJK.reshape(bands * (band // rows), rows, 1, strips * strip)
    return x_ARJK.reshape(bands * (band // rows), rows, strips * (strip // columns), columns)
