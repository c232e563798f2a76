"""Goes over rounded columns again, each now knowing the errors of all others: ``~descent``.

Rounding with feedback (``gptq``) chooses a column when only those before it have their codes, and
a scale when none of its own columns has. Afterwards all codes are there, and the cost
``e H e^T`` of a row, ``e = w - q`` and ``H`` the damped Hessian, is lowered one number at a time.
With the pull ``p = e H``, what is best for column j while nothing else moves is known:

    value:   q_j + p_j / H_jj, rounded to the element's grid
    scale:   s + sum_j p_j v_j / (v H v^T),  v the code values of the group, rounded to its format

So every change lowers the cost, but for what rounding to the grid allows, and a change that would
raise it is not made. Groups are passed from first to last, the scale and then its columns,
`SWEEPS` times. Scales change where a group is part of one row and its scale's format is no power
of two; zero points and global scales stay.

The numbers do not depend on how rows are split: within a batch of columns all is elementwise, and
what a batch sends to other columns are sums that are exact in any order, as in ``gptq``.

Source: cyclic coordinate descent on GPTQ's objective, CDQuant, arXiv:2406.17542; of codes, the
greedy updates of QuIP, arXiv:2307.13304. The step of the scale is the same for one more number.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mofq.numbers.formats import FP8_E4M3
from mofq.numbers.quantize.exact_sums import SUMMED, as_float32, send
from mofq.numbers.quantize.rounding import round_to_format
from mofq.numbers.quantize.scales import Scales, round_scale
from mofq.numbers.quantize.tiles import (
    code_values,
    decode_tiles,
    encode_tiles,
    from_tiles,
    to_tiles,
)
from mofq.numbers.schemes import TensorScheme

#: How often all columns are passed.
SWEEPS = 3
#: Formats of scales that a small step can move.
_MOVABLE = ("bf16", "f32", "e4m3")


def descend(
    weight_OI: Tensor,
    codes_OI: Tensor,
    scales: Scales | None,
    *,
    scheme: TensorScheme,
    hessian_II: Tensor,
    tile: tuple[int, int],
) -> tuple[Tensor, Scales | None]:
    """Lower what the rounding of some rows costs.

    Args:
        weight_OI: Whole tiles, float32, finite.
        codes_OI: As ``encode_tiles`` gives them, of all columns.
        scales: Of all tiles; None where the scheme is unscaled.
        scheme: Whose grid and granularity are used.
        hessian_II: Damped, [in_features, in_features], each column whole multiples below 2**22 of
            a power of two.
        tile: Rows and columns that share a scale.

    Returns:
        Codes and scales in the place of those given.
    """
    rows, columns = tile
    descent = _Descent(weight_OI, codes_OI, scales, scheme, hessian_II, rows, columns)
    for _ in range(SWEEPS):
        for start, stop in _batches(weight_OI.shape[1], columns):
            descent.pass_batch(start, stop)
    return descent.codes_OI, descent.scales


def _batches(in_features: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns that lie within one tile; of small tiles, each is a range."""
    for first in range(0, in_features, columns):
        for start in range(first, first + columns, SUMMED):
            yield start, min(start + SUMMED, first + columns)


class _Descent:
    """Codes and scales of some rows on their way down."""

    def __init__(
        self,
        weight_OI: Tensor,
        codes_OI: Tensor,
        scales: Scales | None,
        scheme: TensorScheme,
        hessian_II: Tensor,
        rows: int,
        columns: int,
    ) -> None:
        self.codes_OI = codes_OI.clone()
        self.scales = None if scales is None else scales.map(torch.clone)
        self._scheme, self._rows, self._columns = scheme, rows, columns
        self._hessian_II = hessian_II
        self._weight_OI = weight_OI.double()
        self._moves_scales = (
            scales is not None
            and scheme.granularity.kind == "group"
            and columns <= SUMMED
            and scheme.scale.name in _MOVABLE
        )
        error_OI = self._weight_OI - self._decoded(0, weight_OI.shape[1])
        self._pull_OI = torch.zeros_like(error_OI)
        for start in range(0, weight_OI.shape[1], SUMMED):
            some = slice(start, start + SUMMED)
            send(error_OI[:, some], hessian_II[some], into_OI=self._pull_OI)

    def pass_batch(self, start: int, stop: int) -> None:
        """Take the best scale, and then the best code of each column in turn."""
        batch = slice(start, stop)
        before_OB = self._decoded(start, stop)
        pull_OB, hessian_BB = self._pull_OI[:, batch].clone(), self._hessian_II[batch, batch]
        hessian_BB = hessian_BB.double()
        if self._moves_scales:
            self._move_scale(start, stop, pull_OB, hessian_BB)
        for place, column in enumerate(range(start, stop)):
            self._move_code(column, place, pull_OB, hessian_BB)
        change_OB = self._decoded(start, stop) - before_OB
        send(-change_OB, self._hessian_II[batch], into_OI=self._pull_OI)
        # Others got it in 22 bits; so do these, that all columns know one and the same error.

    def _move_scale(self, start: int, stop: int, pull_OB: Tensor, hessian_BB: Tensor) -> None:
        scales = self._scales_at(start)
        assert scales is not None
        tiles = to_tiles(self.codes_OI[:, start:stop], 1, stop - start)
        value_OB = from_tiles(code_values(tiles, self._scheme, scales)).double()
        # Of codes and of 22 bits: exact in any order. The sums below are taken in a fixed one.
        turned_OB = value_OB @ hessian_BB
        if scales.global_scale is not None:
            whole = scales.global_scale.double()
            value_OB, turned_OB = value_OB * whole, turned_OB * whole
        gain_O, curve_O = torch.zeros_like(value_OB[:, 0]), torch.zeros_like(value_OB[:, 0])
        for place in range(stop - start):
            gain_O += pull_OB[:, place] * value_OB[:, place]
            curve_O += turned_OB[:, place] * value_OB[:, place]
        old_O = scales.scale.reshape(-1).double()
        wanted_O = old_O + torch.where(curve_O > 0, gain_O / curve_O, 0.0)
        new_O = self._stored(as_float32(wanted_O)).double()
        step_O = new_O - old_O
        is_better_O = (step_O * curve_O < 2 * gain_O) == (step_O > 0)
        is_better_O &= (curve_O > 0) & (step_O != 0) & (torch.sign(new_O) == torch.sign(old_O))
        new_O, step_O = torch.where(is_better_O, new_O, old_O), torch.where(is_better_O, step_O, 0)
        group = start // self._columns
        self.scales.scale[:, 0, group, 0] = new_O.float()  # type: ignore[union-attr]
        pull_OB -= step_O[:, None] * turned_OB

    def _move_code(self, column: int, place: int, pull_OB: Tensor, hessian_BB: Tensor) -> None:
        scales = self._scales_at(column)
        code_O1 = self.codes_OI[:, column, None]
        old_AR11 = to_tiles(code_O1, self._rows, 1)
        old_O1 = from_tiles(decode_tiles(old_AR11, self._scheme, scales)).double()
        wanted_O1 = old_O1 + pull_OB[:, place, None] / hessian_BB[place, place]
        new_AR11 = encode_tiles(
            to_tiles(as_float32(wanted_O1), self._rows, 1), self._scheme, scales
        )
        new_O1 = from_tiles(decode_tiles(new_AR11, self._scheme, scales)).double()
        self.codes_OI[:, column, None] = from_tiles(new_AR11)
        pull_OB -= (new_O1 - old_O1) * hessian_BB[place]

    def _decoded(self, start: int, stop: int) -> Tensor:
        """Values of a range of columns, float64."""
        parts = []
        for first, last in _within_tiles(start, stop, self._columns):
            tiles = to_tiles(self.codes_OI[:, first:last], self._rows, last - first)
            parts.append(from_tiles(decode_tiles(tiles, self._scheme, self._scales_at(first))))
        return torch.cat(parts, 1).double()

    def _scales_at(self, column: int) -> Scales | None:
        if self.scales is None:
            return None
        tile = column // self._columns
        return self.scales.map(lambda value_A1G1: value_A1G1[:, :, tile : tile + 1])

    def _stored(self, scale_O: Tensor) -> Tensor:
        """Scales as their format holds them, with the signs that they have."""
        size_O = scale_O.abs()
        if self._scheme.scale.name == "e4m3":
            stored_O = round_to_format(size_O, FP8_E4M3)
        else:
            stored_O = round_scale(size_O, self._scheme)
        return torch.where(scale_O < 0, -stored_O, stored_O)


def _within_tiles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        last = min(stop, (start // columns + 1) * columns)
        yield start, last
        start = last
