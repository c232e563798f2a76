"""What is left of a problem once options that cannot matter are gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mofq.decision.solvers.budgets import Row
from mofq.decision.solvers.highs import Choices, relax
from mofq.decision.solvers.problem import BoolArray, FloatArray, IntArray, Problem


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """Undominated options, each group counted from its minimum. Suffix K: cost columns, R: rows."""

    option_P: IntArray  #: in the problem
    group_P: IntArray
    start_F: IntArray  #: first option of each group
    cost_PK: FloatArray  #: from the group's minimum
    cost_K: FloatArray  #: sum of the minima
    row_PR: FloatArray  #: from the group's minimum; whole rows divided by their divisor
    limit_R: FloatArray  #: of rows of floats no less than the row's own, whatever sums round to
    divisor_R: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """A price for each row, and what follows from it."""

    price_R: FloatArray  #: cost of one unit of a row of the core
    bound: float  #: no choice costs less
    reduced_P: FloatArray  #: what an option costs more than the best of its group, >= 0


def reduce_problem(
    problem: Problem, cost_PK: FloatArray, rows: Sequence[Row], allowed_P: BoolArray
) -> Core | None:
    """Drop dominated options and count each group from its minimum.

    Returns:
        The core; None where even the minima break a row.
    """
    columns = [*cost_PK.T, *(row.cost_P for row in rows)]
    option_P = _undominated(problem, columns, np.flatnonzero(allowed_P))
    group_P = problem.group_P[option_P]
    start_F = np.flatnonzero(np.diff(group_P, prepend=-1))
    least_FK = np.minimum.reduceat(cost_PK[option_P], start_F, axis=0)
    row_PR = np.zeros((len(option_P), len(rows)))
    limit_R, divisor_R = np.zeros(len(rows)), np.ones(len(rows))
    for n, row in enumerate(rows):
        values = row.cost_P[option_P]
        least_F = np.minimum.reduceat(values, start_F)
        excess = values - least_F[group_P]
        if row.cost_P.dtype == np.int64:
            divisor = max(int(np.gcd.reduce(excess)), 1)
            row_PR[:, n], divisor_R[n] = excess // divisor, divisor
            limit_R[n] = (int(row.limit) - int(least_F.sum())) // divisor
        else:
            row_PR[:, n] = excess
            limit_R[n] = math.fsum([row.limit, *(-least_F)]) + _slack(row.limit, least_F)
        if limit_R[n] < 0:
            return None
    return Core(
        option_P=option_P,
        group_P=group_P,
        start_F=start_F,
        cost_PK=cost_PK[option_P] - least_FK[group_P],
        cost_K=least_FK.sum(axis=0),
        row_PR=row_PR,
        limit_R=limit_R,
        divisor_R=divisor_R,
    )


def _slack(limit: float, least_F: FloatArray) -> float:
    """What adding floats up, one of each group, may lose at most; `Row.holds` is exact."""
    magnitude = abs(limit) + math.fsum(np.abs(least_F))
    return 2 * (len(least_F) + 1) * float(np.finfo(np.float64).eps) * magnitude


def _undominated(
    problem: Problem, columns: Sequence[IntArray | FloatArray], option_P: IntArray
) -> IntArray:
    """Options that no other of their group beats or equals in every column.

    Of equal ones the smallest stays, then the simplest.
    """
    kept: list[IntArray] = []
    starts = np.flatnonzero(np.diff(problem.group_P[option_P], prepend=-1))
    for members in np.split(option_P, starts[1:]):
        order = members[np.lexsort((members, problem.size_P[members]))]
        no_better_PP = np.ones((len(order), len(order)), dtype=np.bool_)  # row, than column
        equal_PP = np.ones_like(no_better_PP)
        for column in columns:
            values = column[order]
            no_better_PP &= values[None, :] <= values[:, None]
            equal_PP &= values[None, :] == values[:, None]
        earlier_PP = np.tri(len(order), k=-1, dtype=np.bool_)
        beaten = (no_better_PP & (~equal_PP | earlier_PP)).any(axis=1)
        kept.append(np.sort(order[~beaten]))
    return np.concatenate(kept)


def price(core: Core) -> Prices | None:
    """Prices from the linear relaxation; None where it is infeasible."""
    duals = relax(
        Choices(
            core.cost_PK,
            core.cost_K,
            row_PR=core.row_PR,
            limit_R=core.limit_R,
            group_P=core.group_P,
        )
    )
    if duals is None:
        return None
    weight_K, price_R = duals
    lagrangian_P = core.cost_PK @ weight_K + core.row_PR @ price_R
    best_F = np.minimum.reduceat(lagrangian_P, core.start_F)
    constant = float(core.cost_K @ weight_K - core.limit_R @ price_R)
    noise = 1e-12 * float(np.abs(best_F).sum() + np.abs(core.cost_K).sum() + abs(constant))
    group_F = np.repeat(np.arange(len(best_F)), np.diff(np.append(core.start_F, len(core.group_P))))
    return Prices(
        price_R=price_R,
        bound=math.fsum([*best_F, constant]) - noise,
        reduced_P=lagrangian_P - best_F[group_F],
    )
