"""How large the values of a matrix are, along its inputs and against their neighbours.

Taken while the weight streams by; no error and no decision depends on it. It is what a table
keeps so that a reader sees why a format loses: an input channel whose weights or activations
stand out as a wall, or scale groups in which one value is much larger than the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.functional import pad

from mofq.evidence.measure.worker_threads import Workers, run_all
from mofq.evidence.table import Extent, Profile, bin_width
from mofq.model.layers import FusionGroup

#: Neighbours along the inputs whose crest factor is taken, where they divide the inputs;
#: each is twice the one before.
GROUP_SIZES = (16, 32, 64, 128)
#: Blocks of a weight whose crest factors are taken are this far apart, rows of it at least.
_CREST_STEP = 8
#: Rows of such a block, about.
_CREST_ROWS = 16
#: Columns, and elements of whole rows, of the inputs that are in float32 at once.
_WIDTH, _ELEMENTS = 512, 2**20


@dataclass(frozen=True, slots=True)
class ExtentSums:
    """Of some rows whose columns are input channels; those of two sets of rows add up."""

    rows: int
    amax_I: Tensor  #: largest magnitude of each column, float32
    square_I: Tensor  #: sum of squares of each column, float64
    crest_G: Tensor  #: crest factors of each of `GROUP_SIZES` and of whole rows, added, float64
    count_G: Tensor  #: how many were not all zero, float64

    def __add__(self, other: ExtentSums) -> ExtentSums:
        return ExtentSums(
            self.rows + other.rows,
            torch.maximum(self.amax_I, other.amax_I),
            self.square_I + other.square_I,
            self.crest_G + other.crest_G,
            self.count_G + other.count_G,
        )


def tokens_extent(x_TI: Tensor, *, workers: Workers | None = None) -> ExtentSums:
    """The extent of inputs, which are never all in float32 at once; in every bit as if they were.

    Args:
        x_TI: Inputs [tokens, in_features], any floating dtype.
        workers: What shares the work.

    Returns:
        Their sums, on the device of the inputs.
    """
    tokens, channels = x_TI.shape
    amax_I = torch.empty(channels, device=x_TI.device)
    square_I = torch.empty(channels, dtype=torch.float64, device=x_TI.device)

    def columns(start: int, stop: int) -> None:
        values_TI = x_TI[:, start:stop].float()
        amax_I[start:stop] = values_TI.abs().amax(0)
        square_I[start:stop] = values_TI.square().sum(0, dtype=torch.float64)

    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def rows(start: int, stop: int) -> None:
        parts[start] = _group_extents(x_TI[start:stop].float())

    wide, high = _WIDTH, max(1, _ELEMENTS // max(1, channels))
    run_all(workers, [partial(columns, *some) for some in _ranges(channels, wide)])
    run_all(workers, [partial(rows, *some) for some in _ranges(tokens, high)])
    of_sizes = list(zip(*(parts[start] for start in sorted(parts)), strict=True))
    amaxes = [torch.cat([amax for amax, _ in of_size]) for of_size in of_sizes]
    squares = [torch.cat([square for _, square in of_size]) for of_size in of_sizes]
    return ExtentSums(tokens, amax_I, square_I, *_added_crests(amaxes, squares))


def _ranges(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def rows_extent(block_RI: Tensor, *, number: int, amax_I: Tensor, square_I: Tensor) -> ExtentSums:
    """The extent of a block of weights of which the columns' sums are known.

    Args:
        block_RI: [rows, in_features], bfloat16 or float32.
        number: Of the block in its layer.
        amax_I: Largest magnitude of each column, float32.
        square_I: Sum of squares of each column, float64.

    Returns:
        Its sums, with crest factors of some sixteen rows of every eighth block: a mean
        over some hundred scale groups is known well enough, and all would take longer than
        all schemes together.
    """
    crests = torch.zeros(2, len(GROUP_SIZES) + 1, dtype=torch.float64).unbind()
    if number % _CREST_STEP == 0:
        step = max(_CREST_STEP, len(block_RI) // _CREST_ROWS)
        crests = _crests(block_RI[::step].float())
    return ExtentSums(len(block_RI), amax_I, square_I, *crests)


def _crests(values_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Crest factors of each of `GROUP_SIZES` and of whole rows, added, and how many."""
    amaxes, mean_squares = zip(*_group_extents(values_RI), strict=True)
    return _added_crests(amaxes, mean_squares)


def _group_extents(values_RI: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Largest magnitudes and mean squares of the groups of each of `GROUP_SIZES`, and of rows."""
    amax_RG, square_RG = values_RI.abs(), values_RI.square()
    in_features = values_RI.shape[1]
    found = []
    width = 1
    for size in (*GROUP_SIZES, in_features):
        if in_features % size:  # none of these
            found.append((amax_RG.new_empty(0), amax_RG.new_empty(0)))
            continue
        amax_RG = amax_RG.unflatten(1, (-1, size // width)).amax(2)
        square_RG = square_RG.unflatten(1, (-1, size // width)).sum(2)
        width = size
        found.append((amax_RG.flatten(), (square_RG / size).flatten()))
    return found


def _added_crests(
    amaxes: Sequence[Tensor], mean_squares: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Crest factors of some sets of groups of values, added, and how many are not all zero."""
    mean_square = torch.cat(list(mean_squares))  # all sets at once: each operation has its price
    is_some = mean_square > 0
    root = torch.where(is_some, mean_square, 1.0).sqrt()
    crest = torch.where(is_some, torch.cat(list(amaxes)) / root, 0.0)
    sizes = [len(each) for each in amaxes]
    return (
        torch.stack([each.sum(dtype=torch.float64) for each in crest.split(sizes)]).cpu(),
        torch.stack([each.sum(dtype=torch.float64) for each in is_some.split(sizes)]).cpu(),
    )


def group_profiles(
    group: FusionGroup,
    weights: Mapping[str, ExtentSums],
    inputs: Mapping[str, Mapping[str, ExtentSums]],
) -> list[Profile]:
    """The profile of every kind of layer of a fusion group.

    Args:
        group: The fusion group.
        weights: Layer name -> of its weight.
        inputs: Layer name -> corpus -> of its inputs; without those that no token reached.

    Returns:
        In the order of the first layer of each kind.
    """
    profiles = []
    for module in dict.fromkeys(layer.module for layer in group.layers):
        layers = [layer for layer in group.layers if layer.module == module]
        corpora = dict.fromkeys(name for layer in layers for name in inputs[layer.name])
        profiles.append(
            Profile(
                group=group.name,
                module=module,
                channels=layers[0].in_features,
                weight=_extent([weights[layer.name] for layer in layers], whole="channel"),
                inputs={
                    name: _extent(
                        (inputs[la.name][name] for la in layers if name in inputs[la.name]),
                        whole="token",
                    )
                    for name in corpora
                },
            )
        )
    return profiles


def _extent(parts: Iterable[ExtentSums], *, whole: str) -> Extent:
    sums = reduce(add, parts)
    names = [*(f"g{size}" for size in GROUP_SIZES), whole]
    crests = zip(names, sums.crest_G.tolist(), sums.count_G.tolist(), strict=True)
    return Extent(
        amax=_largest_of_bins(sums.amax_I),
        rms=_largest_of_bins((sums.square_I / sums.rows).sqrt().float()),
        crest={name: total / count for name, total, count in crests if count},
    )


def _largest_of_bins(values_I: Tensor) -> tuple[float, ...]:
    width = bin_width(len(values_I))
    padded = pad(values_I.cpu(), (0, -len(values_I) % width))
    return tuple(padded.unflatten(0, (-1, width)).amax(1).tolist())
