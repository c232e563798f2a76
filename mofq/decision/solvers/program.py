"""The optimum of a core by an integer program, kept exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mofq.decision.solvers.budgets import Row
from mofq.decision.solvers.core import Core, Prices
from mofq.decision.solvers.highs import Choices, solve_integer
from mofq.decision.solvers.problem import FloatArray, IntArray

_CORE = 100  #: options beside the best of each group, to begin with


def search_program(
    core: Core, prices: Prices, cost_PK: FloatArray, rows: Sequence[Row]
) -> IntArray | None:
    """Solve growing parts of the core until one is proven to hold the optimum.

    Args:
        core: The options.
        prices: Their reduced costs.
        cost_PK: Of the problem's options: the largest column sum is minimised.
        rows: Of the problem.

    Returns:
        The best option of each group; None: no choice keeps all rows.
    """
    ascending = np.sort(prices.reduced_P)
    count = min(len(core.start_F) + _CORE, len(ascending))
    while True:
        kept = np.flatnonzero(prices.reduced_P <= ascending[count - 1])
        choice_F = _solve(core, kept, rows)
        if choice_F is None:
            if len(kept) == len(ascending):
                return None
            count = min(4 * count, len(ascending))
            continue
        # An option that costs more than this beyond the bound is in no better solution.
        gap = max(math.fsum(column) for column in cost_PK[choice_F].T) - prices.bound
        needed = int(np.searchsorted(ascending, gap, side="right"))
        if needed <= len(kept):
            return choice_F
        count = needed


def _solve(core: Core, kept: IntArray, rows: Sequence[Row]) -> IntArray | None:
    """The optimum over some options of the core, rows checked without tolerance."""
    group_P = core.group_P[kept]
    open_P = np.bincount(group_P)[group_P] > 1
    fixed, free = kept[~open_P], kept[open_P]
    cost_K = core.cost_K + core.cost_PK[fixed].sum(axis=0)
    limit_R = core.limit_R - core.row_PR[fixed].sum(axis=0)
    cuts: list[IntArray] = []
    while True:
        chosen: IntArray | None = np.array([], dtype=np.int64)
        if len(free):
            part = Choices(
                core.cost_PK[free],
                cost_K,
                row_PR=core.row_PR[free],
                limit_R=limit_R,
                group_P=core.group_P[free],
            )
            chosen = solve_integer(part, cuts)
        if chosen is None:
            return None
        both = np.concatenate([fixed, free[chosen]])
        choice_F: IntArray = core.option_P[both[np.argsort(core.group_P[both])]]
        broken = next((row for row in rows if not row.holds(choice_F)), None)
        if broken is None:
            return choice_F
        if not len(free):
            return None
        cuts.append(_cover(broken.cost_P[core.option_P[free]], core.group_P[free], chosen))


def _cover(cost_P: IntArray | FloatArray, group_P: IntArray, chosen: IntArray) -> IntArray:
    """A cut that excludes a choice over its limit, and only choices that are over it too.

    In each group it names the options that cost at least as much as the chosen
    one; at most all but one of the groups may have one of these.
    """
    least = dict(zip(group_P[chosen].tolist(), cost_P[chosen].tolist(), strict=True))
    heavy = [p for p in range(len(cost_P)) if cost_P[p] >= least[int(group_P[p])]]
    return np.array([len(chosen) - 1, *heavy], dtype=np.int64)
