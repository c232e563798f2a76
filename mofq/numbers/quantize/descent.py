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
from mofq.numbers.quantize.tiles import code_values, decode_tiles, encode_tiles, row_scales
from mofq.numbers.schemes import TensorScheme

#: How often all columns are passed.
SWEEPS = 3
#: Formats of scales that a small step can move.
_MOVABLE = ("bf16", "f32", "e4m3")


def descend(
    weight_IO: Tensor,
    codes_IO: Tensor,
    scales: Scales | None,
    *,
    scheme: TensorScheme,
    hessian_II: Tensor,
    tile: tuple[int, int],
    moves_scales: bool = True,
) -> tuple[Tensor, Scales | None]:
    """Lower what the rounding of some rows costs.

    Args:
        weight_IO: Whole tiles, each column a line, float64, finite.
        codes_IO: As ``encode_tiles`` gives them, of all columns.
        scales: Of all tiles; None where the scheme is unscaled.
        scheme: Whose grid and granularity are used.
        hessian_II: Damped, [in_features, in_features], each column whole multiples below 2**22 of
            a power of two.
        tile: Rows and columns that share a scale.
        moves_scales: Whether scales change where they can.

    Returns:
        Codes and scales in the place of those given.
    """
    rows, columns = tile
    descent = _Descent(weight_IO, codes_IO, scales, scheme, hessian_II, rows, columns)
    descent.moves_scales &= moves_scales
    for _ in range(SWEEPS):
        for start, stop in _batches(len(weight_IO), columns):
            descent.pass_batch(start, stop)
    return descent.codes_IO, descent.scales


def _batches(in_features: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns that lie within one tile; of small tiles, each is a range."""
    for first in range(0, in_features, columns):
        for start in range(first, first + columns, SUMMED):
            yield start, min(start + SUMMED, first + columns)


class _Descent:
    """Codes and scales of some rows on their way down."""

    def __init__(
        self,
        weight_IO: Tensor,
        codes_IO: Tensor,
        scales: Scales | None,
        scheme: TensorScheme,
        hessian_II: Tensor,
        rows: int,
        columns: int,
    ) -> None:
        self.codes_IO = codes_IO.clone()
        self.scales = None if scales is None else scales.map(torch.clone)
        self._scheme, self._rows, self._columns = scheme, rows, columns
        self._hessian_II = hessian_II
        self.moves_scales = (
            scales is not None
            and scheme.granularity.kind == "group"
            and columns <= SUMMED
            and scheme.scale.name in _MOVABLE
        )
        self._pull_IO = torch.zeros_like(weight_IO)
        error_IO = torch.cat(
            [
                weight_IO[start:stop] - self._decoded(start, stop, self._scales_at(start))
                for start, stop in _batches(len(weight_IO), columns)
            ]
        )
        for start in range(0, len(weight_IO), SUMMED):
            some = slice(start, start + SUMMED)
            send(error_IO[some], hessian_II[some], into_IO=self._pull_IO)

    def pass_batch(self, start: int, stop: int) -> None:
        """Take the best scale, and then the best code of each column in turn."""
        batch, scales = slice(start, stop), self._scales_at(start)
        before_BO = value_BO = self._decoded(start, stop, scales)
        pull_BO = self._pull_IO[batch].clone()
        hessian_BB = self._hessian_II[batch, batch].double()
        if self.moves_scales:
            self._move_scale(start, stop, pull_BO, hessian_BB)
            scales = self._scales_at(start)
            value_BO = self._decoded(start, stop, scales)
        after_BO = torch.empty_like(value_BO)
        for place in range(stop - start):
            wanted_O = value_BO[place] + pull_BO[place] / hessian_BB[place, place]
            code_O = encode_tiles(as_float32(wanted_O), self._scheme, scales)
            self.codes_IO[start + place] = code_O
            after_BO[place] = decode_tiles(code_O, self._scheme, scales)
            step_O = after_BO[place] - value_BO[place]
            pull_BO[place + 1 :] -= hessian_BB[place, place + 1 :, None] * step_O
        send(before_BO - after_BO, self._hessian_II[batch], into_IO=self._pull_IO)
        # Others got it in 22 bits; so do these, that all columns know one and the same error.

    def _move_scale(self, start: int, stop: int, pull_BO: Tensor, hessian_BB: Tensor) -> None:
        assert self.scales is not None
        group = start // self._columns
        value_BO = code_values(self.codes_IO[start:stop], self._scheme, self._scales_at(start))
        value_BO = value_BO.double()
        # Of codes and of 22 bits: exact in any order. The sums below are taken in a fixed one.
        turned_BO = hessian_BB.T @ value_BO
        if self.scales.global_scale is not None:
            whole = self.scales.global_scale.double()
            value_BO, turned_BO = value_BO * whole, turned_BO * whole
        gain_O, curve_O = torch.zeros_like(value_BO[0]), torch.zeros_like(value_BO[0])
        for place in range(stop - start):
            gain_O += pull_BO[place] * value_BO[place]
            curve_O += turned_BO[place] * value_BO[place]
        old_O = self.scales.scale[:, 0, group, 0].double()
        wanted_O = old_O + torch.where(curve_O > 0, gain_O / curve_O, 0.0)
        new_O = self._stored(as_float32(wanted_O)).double()
        step_O = new_O - old_O
        is_better_O = (step_O * curve_O < 2 * gain_O) == (step_O > 0)
        is_better_O &= (curve_O > 0) & (step_O != 0) & (torch.sign(new_O) == torch.sign(old_O))
        new_O, step_O = torch.where(is_better_O, new_O, old_O), torch.where(is_better_O, step_O, 0)
        self.scales.scale[:, 0, group, 0] = new_O.float()
        pull_BO -= step_O * turned_BO

    def _decoded(self, start: int, stop: int, scales: Scales | None) -> Tensor:
        """Values of a range of columns of one tile, float64."""
        return decode_tiles(self.codes_IO[start:stop], self._scheme, scales).double()

    def _scales_at(self, column: int) -> Scales | None:
        return row_scales(self.scales, column // self._columns, self._rows)

    def _stored(self, scale_O: Tensor) -> Tensor:
        """Scales as their format holds them, with the signs that they have."""
        size_O = scale_O.abs()
        if self._scheme.scale.name == "e4m3":
            stored_O = round_to_format(size_O, FP8_E4M3)
        else:
            stored_O = round_scale(size_O, self._scheme)
        return torch.where(scale_O < 0, -stored_O, stored_O)
