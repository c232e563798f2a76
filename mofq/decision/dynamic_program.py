"""The optimum of a core by labels: dynamic programming over its fusion groups.

A label is what a choice in the groups so far adds up to. Of two labels, one that is
no better in any sum cannot lead to a better recipe and is dropped; so is one
that is further than ``reach`` from the bound already. Sums of integers stay exact.

Source: list dynamic programming with bounds, H. Kellerer, U. Pferschy and
D. Pisinger, "Knapsack Problems" (2004), section 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mofq.decision.budgets import Constraint, keeps_all
from mofq.decision.problem import FloatArray, IntArray
from mofq.decision.relaxation import Core, Prices

_CORE = 40  #: options beside the best of each group, to begin with
_NEIGHBOURS = 48  #: beyond two sums, a label is compared with so many others only
_GROWTH = 1.5

#: Labels (sums, further steps) of one group after another, to walk back.
_Step = tuple[IntArray, IntArray]


class TooManyLabelsError(Exception):
    """Another method is the better way."""


def search_labels(
    core: Core,
    prices: Prices,
    cost_PK: FloatArray,
    constraints: Sequence[Constraint],
    *,
    most_labels: int,
) -> IntArray | None:
    """Look ever further from the bound, until the optimum is proven to be in reach.

    Args:
        core: The options.
        prices: Their reduced costs.
        cost_PK: Of the problem's options: the largest column sum is minimised.
        constraints: Of the problem.
        most_labels: Give up beyond.

    Returns:
        The best option of each group; None: no choice keeps all constraints.

    Raises:
        TooManyLabelsError: As said.
    """
    ascending = np.sort(prices.reduced_P)
    reach = float(ascending[min(len(core.start_F) + _CORE, len(ascending)) - 1])
    least = 1e-9 * float(core.cost_PK.max(initial=0.0)) or 1.0
    while True:
        choices, complete = _run(core, prices, reach, most_labels)
        # Sums of floats are rounded on their way: only the constraint itself says whether it holds.
        best = next(
            (one for one in choices if keeps_all(constraints, one)),
            None,
        )
        if best is None:
            if complete:
                return None
            reach = max(_GROWTH * reach, least)
            continue
        # Under several costs the best in reach may be further away than some out of reach.
        gap = max(math.fsum(column) for column in cost_PK[best].T) - prices.bound
        if complete or gap <= reach:
            return best
        reach = min(max(_GROWTH * reach, least), gap)


def _run(core: Core, prices: Prices, reach: float, most_labels: int) -> tuple[list[IntArray], bool]:
    """All choices within reach that could be best, best first; and whether any was out of reach."""
    kept = np.flatnonzero(prices.reduced_P <= reach)
    complete = len(kept) == len(prices.reduced_P)
    starts = np.flatnonzero(np.diff(core.group_P[kept], prepend=-1))
    sums_PS = np.concatenate([core.cost_PK, core.row_PR], axis=1)
    columns = core.cost_PK.shape[1]
    # Most groups have their best option within reach and no other: these are decided.
    count_F = np.diff(starts, append=len(kept))
    decided = kept[starts[count_F == 1]]
    groups = [kept[start : start + count] for start, count in zip(starts, count_F, strict=True)]
    groups = [one for one in groups if len(one) > 1]
    # Large steps first: the last groups then fill what is left of a limit.
    groups.sort(key=lambda one: (-float(np.ptp(core.row_PR[one], axis=0).max(initial=0.0)), one[0]))
    least_FR = _still_to_come(_of_each(np.minimum, core, groups))
    most_FR = _still_to_come(_of_each(np.maximum, core, groups))
    row_R = core.row_PR[decided].sum(axis=0)
    if (row_R > core.limit_R).any():
        return [], complete
    sums_LS = np.append(core.cost_K + core.cost_PK[decided].sum(axis=0), row_R)[None, :]
    reduced_L = np.zeros(1)
    steps: list[_Step] = []
    for n, options in enumerate(groups):
        row_LPR = sums_LS[:, None, columns:] + core.row_PR[options]
        reduced_LP = reduced_L[:, None] + prices.reduced_P[options]
        fits_LP = (row_LPR + least_FR[n] <= core.limit_R).all(axis=2)
        # What the rest cannot use up of a limit is paid for at its price.
        unused_LPR = np.maximum(core.limit_R - row_LPR - most_FR[n], 0.0)
        near_LP = reduced_LP + unused_LPR @ prices.price_R <= reach
        complete = complete and not bool((fits_LP & ~near_LP).any())
        parent_L, option_L = np.nonzero(fits_LP & near_LP)
        if len(parent_L) > most_labels:
            raise TooManyLabelsError
        sums_LS = sums_LS[parent_L] + sums_PS[options[option_L]]
        stay = undominated(sums_LS)
        sums_LS, reduced_L = sums_LS[stay], reduced_LP[parent_L[stay], option_L[stay]]
        steps.append((parent_L[stay], options[option_L[stay]]))
    order = np.lexsort((*sums_LS[:, columns:].T, sums_LS[:, :columns].max(axis=1)))
    chosen_LF = np.pad(_trace(steps, order), ((0, 0), (len(decided), 0)))
    chosen_LF[:, : len(decided)] = decided
    return list(core.option_P[np.sort(chosen_LF, axis=1)]), complete


def _of_each(least_or_most: np.ufunc, core: Core, groups: Sequence[IntArray]) -> FloatArray:
    """The least or the most that the options of each group use of each constraint, [F, R]."""
    found = [least_or_most.reduce(core.row_PR[one], axis=0) for one in groups]
    return np.array(found).reshape(len(groups), len(core.limit_R))


def _still_to_come(values_FR: FloatArray) -> FloatArray:
    """For each group, the sum over the groups after it."""
    total_FR = np.cumsum(values_FR[::-1], axis=0)[::-1]
    return np.concatenate([total_FR[1:], np.zeros_like(total_FR[:1])])


def undominated(sums_LS: FloatArray) -> IntArray:
    """Labels that no other beats or equals in every sum; of equal ones the first.

    With two sums these and no others; with more, some dominated ones remain.
    """
    order = np.lexsort(sums_LS.T)  # by the last sum, the earlier ones break ties
    sorted_LS = sums_LS[order]
    keep_L = np.ones(len(order), dtype=np.bool_)
    if sums_LS.shape[1] <= 2:
        first_L = sorted_LS[:, 0]
        keep_L[1:] = first_L[1:] < np.minimum.accumulate(first_L)[:-1]
    else:
        for distance in range(1, min(_NEIGHBOURS, len(order))):
            keep_L[distance:] &= ~(sorted_LS[:-distance] <= sorted_LS[distance:]).all(axis=1)
    return np.sort(order[keep_L])


def _trace(steps: Sequence[_Step], order: IntArray) -> IntArray:
    """The options behind each label, [L, F], by walking back."""
    chosen: list[IntArray] = []
    label_L = order
    for parent_L, option_L in reversed(steps):
        chosen.append(option_L[label_L])
        label_L = parent_L[label_L]
    return np.array(chosen, dtype=np.int64).reshape(len(steps), len(order)).T
