"""The rounding errors of many schemes on a block of rows in one pass, written to be compiled.

A block is seen as ``[A, R, J, K]``: ``A`` bands of ``R`` rows, ``J`` strips of ``K``
columns. ``R`` and ``K`` hold whole tiles of every scheme and follow from the schemes
alone, so that a compiler sees two sizes that are fixed and two that are free, whatever
the shape of the layer. Rows of zeros fill the last band up; they round to zeros.

Squared errors are summed over sixty-four rows in float32, one row after the other, as a
compiled loop does and torch does not by itself: both give the same bits.

Compiled for bfloat16 weights on the CPU, most schemes are done in a shorter way that gives
the same errors (`bfloat16_distances`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from mofq.numbers.quantize.bfloat16_distances import distances, has_short_form, row_amaxes, stored
from mofq.numbers.quantize.scale_rules import tile_scales
from mofq.numbers.quantize.scales import tile_amax
from mofq.numbers.quantize.tiles import round_tiles
from mofq.numbers.schemes import TensorScheme

#: Rows whose squared errors are added one after the other.
SUMMED_ROWS = 64

#: Block and the largest magnitude of its tensor, float32 scalar -> what is asked for.
Pass = Callable[[Tensor, Tensor], Tensor]


def is_candidate(scheme: TensorScheme) -> bool:
    """Whether the weight alone says how a scheme rounds it."""
    if scheme.has_stored_global_scale:
        return False
    return scheme.rounding == "nearest" and scheme.scale_rule != "nats"


def tile_rows(schemes: Sequence[TensorScheme]) -> int:
    """Rows that hold whole tiles of every scheme."""
    return math.lcm(*(s.granularity.rows or 1 for s in schemes))


def band_rows(schemes: Sequence[TensorScheme]) -> int:
    """Rows of a band, R: whole tiles of every scheme, and whole sums."""
    return math.lcm(SUMMED_ROWS, tile_rows(schemes))


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


def errors_pass(schemes: Sequence[TensorScheme], *, with_weights: bool = True) -> Pass:
    """What sums the squared rounding errors of each column.

    Args:
        schemes: All are candidates and fit the layer.
        with_weights: Whether the last two are given.

    Returns:
        A function to [W + 2, A, R / 64, J, K], float32, over sixty-four rows each: the sum of
        each scheme's squared errors, of the squared weights, and their largest magnitude.
    """

    def errors(x_ARJK: Tensor, tensor_amax: Tensor) -> Tensor:
        is_short = _has_short_forms(x_ARJK)
        x_ARJK = x_ARJK.to(torch.float32)
        magnitude_ARJK = torch.abs(x_ARJK)
        short = [s for s in schemes if is_short and has_short_form(s)]
        amaxes = row_amaxes(magnitude_ARJK.flatten(2).flatten(0, 1), short)
        errors_W = [
            _distances(magnitude_ARJK, s, amaxes, tensor_amax)
            if s in short
            else _rounded(x_ARJK, s, tensor_amax) - x_ARJK
            for s in schemes
        ]
        sums = [_summed(error_ARJK) for error_ARJK in errors_W]
        if with_weights:
            sums += [_summed(magnitude_ARJK), torch.amax(_parts(magnitude_ARJK), 2)]
        return torch.stack(sums)

    return errors


def sum_squares(x_WRI: Tensor) -> Tensor:
    """Squares of some matrices, summed as ``errors_pass`` does: [W, R / 64, I], float32."""
    missing = -x_WRI.shape[1] % SUMMED_ROWS
    if missing:
        x_WRI = torch.cat([x_WRI, x_WRI.new_zeros((len(x_WRI), missing, x_WRI.shape[2]))], 1)
    return _summed(x_WRI)


def _summed(x_ARJK: Tensor) -> Tensor:
    squares = _parts(x_ARJK * x_ARJK)
    if torch.compiler.is_compiling():
        return torch.sum(squares, 2)
    first, *others = squares.unbind(2)
    return reduce(torch.add, others, first)


def _parts(x_ARJK: Tensor) -> Tensor:
    parts: Tensor = x_ARJK.unflatten(1, (-1, SUMMED_ROWS))
    return parts


def _has_short_forms(x_ARJK: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        and x_ARJK.dtype == torch.bfloat16
        and x_ARJK.device.type == "cpu"
    )


def _distances(
    magnitude_ARJK: Tensor,
    scheme: TensorScheme,
    amaxes: Mapping[int, Tensor],
    tensor_amax: Tensor,
) -> Tensor:
    tiles = _tiles(magnitude_ARJK, scheme)
    if scheme.granularity.kind == "tensor":
        amax = tensor_amax.reshape(1, 1, 1, 1)
    elif scheme.granularity.rows == 1:
        amax = amaxes[scheme.granularity.columns]
    else:
        amax = tile_amax(tiles)
    return distances(tiles, scheme, amax).reshape(magnitude_ARJK.shape)


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
    scales = scales.map(stored)
    rounded = round_tiles(x_tiles, scheme, scales) * scales.multiplier
    return rounded.reshape(x_ARJK.shape)


def _tiles(x_ARJK: Tensor, scheme: TensorScheme) -> Tensor:
    bands, band, strips, strip = x_ARJK.shape
    rows, columns = scheme.granularity.rows, scheme.granularity.columns
    if scheme.granularity.kind in ("tensor", "unscaled"):
        rows = 1  # the scale, if any, is given
    if not columns:
        return x_ARJK.reshape(bands * (band // rows), rows, 1, strips * strip)
    return x_ARJK.reshape(bands * (band // rows), rows, strips * (strip // columns), columns)
