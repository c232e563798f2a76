"""The linear relaxation: what is left of a problem, a price for each constraint, and a bound."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np

from mofq.decision.budgets import Constraint
from mofq.decision.problem import BoolArray, FloatArray, IntArray, Problem

#: A constraint whose costs are nowhere larger is left as it is: dividing by them would overflow.
#: HiGHS then takes it for nothing, and whoever asked checks it.
_NOTHING = 1e-200
#: Held while the standard output, of which a process has one, is another; see `silent`.
_one_thread = Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """Undominated options, each group counted from its minimum. Suffix R: constraints."""

    option_P: IntArray  #: in the problem
    group_P: IntArray  #: every group has at least one option
    start_F: IntArray  #: first option of each group
    cost_PK: FloatArray  #: from the group's minimum
    cost_K: FloatArray  #: sum of the minima
    row_PR: FloatArray  #: from the group's minimum; integers divided by their divisor
    limit_R: FloatArray  #: of floats no less than the constraint's own, whatever sums round to
    divisor_R: FloatArray

    def part(self, kept_P: BoolArray) -> Core:
        """Some of the options, at least one of each group."""
        group_P = self.group_P[kept_P]
        return replace(
            self,
            option_P=self.option_P[kept_P],
            group_P=group_P,
            start_F=np.flatnonzero(np.diff(group_P, prepend=-1)),
            cost_PK=self.cost_PK[kept_P],
            row_PR=self.row_PR[kept_P],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """A price for each constraint, and what follows from it."""

    price_R: FloatArray  #: cost of one unit of a constraint of the core
    bound: float  #: no choice costs less
    reduced_P: FloatArray  #: what an option costs more than the best of its group, >= 0


@dataclass(frozen=True, slots=True, eq=False)
class LinearProgram:
    """A core as HiGHS takes it: scaled, and the largest of several costs as one more variable.

    Suffix V: variables, which are the options, then the largest cost if there are several.
    """

    objective_V: FloatArray
    row_RV: FloatArray  #: the constraints, then the costs if there are several
    limit_R: FloatArray
    one_FV: Any  #: sparse: the options of each group
    lower_V: FloatArray
    cost_scale: float


def reduce_problem(
    problem: Problem, cost_PK: FloatArray, constraints: Sequence[Constraint], allowed_P: BoolArray
) -> Core | None:
    """Drop dominated options and count each group from its minimum.

    Returns:
        The core; None where even the minima break a constraint.
    """
    columns = [*cost_PK.T, *(one.cost_P for one in constraints)]
    option_P = _undominated(problem, columns, np.flatnonzero(allowed_P))
    group_P = problem.group_P[option_P]
    start_F = np.flatnonzero(np.diff(group_P, prepend=-1))
    least_FK = np.minimum.reduceat(cost_PK[option_P], start_F, axis=0)
    row_PR = np.zeros((len(option_P), len(constraints)))
    limit_R, divisor_R = np.zeros(len(constraints)), np.ones(len(constraints))
    for n, one in enumerate(constraints):
        values = one.cost_P[option_P]
        least_F = np.minimum.reduceat(values, start_F)
        excess = values - least_F[group_P]
        if one.cost_P.dtype == np.int64:
            divisor = max(int(np.gcd.reduce(excess)), 1)
            row_PR[:, n], divisor_R[n] = excess // divisor, divisor
            limit_R[n] = (int(one.limit) - int(least_F.sum())) // divisor
        else:
            row_PR[:, n] = excess
            limit_R[n] = math.fsum([one.limit, *(-least_F)]) + _slack(one.limit, least_F)
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
    """What adding floats up, one of each group, may lose at most; `Constraint.holds` is exact."""
    magnitude = abs(limit) + math.fsum(np.abs(least_F))
    return 2 * (len(least_F) + 1) * float(np.finfo(np.float64).eps) * magnitude


def _undominated(
    problem: Problem, columns: Sequence[IntArray | FloatArray], option_P: IntArray
) -> IntArray:
    """Options that no other of their group beats or equals in every column.

    Of equal ones the smallest stays, then the simplest.
    """
    group_P = problem.group_P[option_P]
    order = option_P[np.lexsort((option_P, problem.size_P[option_P], group_P))]
    starts = np.flatnonzero(np.diff(group_P, prepend=-1))
    counts = np.diff(starts, append=len(option_P))
    kept: list[IntArray] = []
    for count in np.unique(counts):  # groups of as many options, all at once
        place_FP = starts[counts == count][:, None] + np.arange(count)
        option_FP = order[place_FP]
        no_better_FPP = np.ones((*option_FP.shape, count), dtype=np.bool_)  # row, than column
        equal_FPP = np.ones_like(no_better_FPP)
        for column in columns:
            values_FP = column[option_FP]
            no_better_FPP &= values_FP[:, None, :] <= values_FP[:, :, None]
            equal_FPP &= values_FP[:, None, :] == values_FP[:, :, None]
        earlier_PP = np.tri(count, k=-1, dtype=np.bool_)
        beaten_FP = (no_better_FPP & (~equal_FPP | earlier_PP)).any(axis=2)
        kept.append(option_FP[~beaten_FP])
    return np.sort(np.concatenate(kept))


def linear_program(core: Core, row_scale_R: FloatArray, largest: float) -> LinearProgram:
    """The arrays of a linear program.

    Args:
        core: One option of each group is chosen, or a mixture where the problem is relaxed; the
            largest over K of the summed costs is minimised.
        row_scale_R: What each constraint is divided by.
        largest: What the largest cost is scaled to.
    """
    from scipy import sparse

    options, columns = core.cost_PK.shape
    scale = (float(np.abs(core.cost_PK).max(initial=0.0)) or 1.0) / largest
    row_RV = (core.row_PR / row_scale_R).T
    limit_R = core.limit_R / row_scale_R
    objective_V = core.cost_PK[:, 0] / scale
    lower_V = np.zeros(options)
    if columns > 1:
        objective_V = np.append(np.zeros(options), 1.0)
        lower_V = np.append(lower_V, -np.inf)
        cost_KV = np.column_stack([core.cost_PK.T / scale, -np.ones(columns)])
        row_RV = np.concatenate([np.pad(row_RV, ((0, 0), (0, 1))), cost_KV])
        limit_R = np.concatenate([limit_R, -core.cost_K / scale])
    shape = (len(core.start_F), len(objective_V))
    one_FV = sparse.csr_array((np.ones(options), (core.group_P, np.arange(options))), shape=shape)
    return LinearProgram(
        objective_V, row_RV, limit_R, one_FV=one_FV, lower_V=lower_V, cost_scale=scale
    )


def row_scales(core: Core, largest: float) -> FloatArray:
    """What to divide each constraint by, so that its largest cost becomes ``largest``."""
    largest_R = core.row_PR.max(axis=0, initial=0.0)
    return np.where(largest_R > _NOTHING, largest_R / largest, 1.0)


def price(core: Core) -> Prices | None:
    """Prices from the linear relaxation; None where it is infeasible."""
    if len(core.limit_R) == core.cost_PK.shape[1] == 1:
        return _priced(core, np.ones(1), np.array([_only_price(core)]))
    return _program_prices(core)


def _only_price(core: Core) -> float:
    """The price of one constraint under one cost: where the bound, concave in it, is highest.

    Two choices enclose it, one of more than the limit and one of less. At the price under which
    they cost the same no other costs less, or one that does takes the place of one of them.
    """
    row_scale, cost_scale = float(core.row_PR.max()), float(core.cost_PK.max()) or 1.0
    if row_scale <= _NOTHING:
        return 0.0
    cost_P, use_P = core.cost_PK[:, 0] / cost_scale, core.row_PR[:, 0] / row_scale
    limit = float(core.limit_R[0]) / row_scale

    def of_choice(price: float) -> tuple[float, float]:
        """Cost and use of the choice that costs least under a price, the smallest of equal ones."""
        lagrangian_P = cost_P + price * use_P
        best_F = np.minimum.reduceat(lagrangian_P, core.start_F)
        equal_P = lagrangian_P <= best_F[core.group_P]
        use = np.minimum.reduceat(np.where(equal_P, use_P, np.inf), core.start_F).sum()
        return float(best_F.sum() - price * use), float(use)

    over, price = of_choice(0.0), 0.0
    # Each group is counted from its minimum, which some option has.
    least_F = np.minimum.reduceat(np.where(use_P == 0, cost_P, np.inf), core.start_F)
    under = (float(least_F.sum()), 0.0)
    while over[1] > limit:
        price = (under[0] - over[0]) / (over[1] - under[1])
        found = of_choice(price)
        if not (under[1] < found[1] < over[1] and found[0] < under[0]):
            break
        over, under = (found, under) if found[1] > limit else (over, found)
    return price * (cost_scale / row_scale)


def _program_prices(core: Core) -> Prices | None:
    """As `price`, by a linear program."""
    from scipy.optimize import linprog

    constraints, columns = len(core.limit_R), core.cost_PK.shape[1]
    scale_R = row_scales(core, 1.0)
    program = linear_program(core, scale_R, 1.0)
    with silent():
        found = linprog(
            program.objective_V,
            A_ub=program.row_RV,
            b_ub=program.limit_R,
            A_eq=program.one_FV,
            b_eq=np.ones(len(core.start_F)),
            bounds=[(low, None) for low in program.lower_V.tolist()],
            method="highs-ds",
        )
    if found.status == 2:
        return None
    # A weight >= 0 for each cost (they add up to 1) and a price >= 0 for each constraint: any
    # such numbers give a valid bound, so zeros do where HiGHS fails, though a bad one.
    weight_K, price_R = np.full(columns, 1 / columns), np.zeros(constraints)
    if found.success:
        dual = np.maximum(-np.asarray(found.ineqlin.marginals, dtype=np.float64), 0.0)
        price_R = dual[:constraints] * program.cost_scale / scale_R
        if dual[constraints:].sum() > 0:
            weight_K = dual[constraints:] / dual[constraints:].sum()
    return _priced(core, weight_K, price_R)


def _priced(core: Core, weight_K: FloatArray, price_R: FloatArray) -> Prices:
    """The bound and the reduced costs under any weights and prices, none of them below zero."""
    lagrangian_P = core.cost_PK @ weight_K + core.row_PR @ price_R
    best_F = np.minimum.reduceat(lagrangian_P, core.start_F)
    constant = float(core.cost_K @ weight_K - core.limit_R @ price_R)
    noise = 1e-12 * float(np.abs(best_F).sum() + np.abs(core.cost_K).sum() + abs(constant))
    return Prices(
        price_R=price_R,
        bound=math.fsum([*best_F, constant]) - noise,
        reduced_P=lagrangian_P - best_F[core.group_P],
    )


@contextmanager
def silent() -> Iterator[None]:
    """HiGHS writes a debugging line to file descriptor 1, which `--json` needs for itself.

    One thread at a time: a second one would take the first one's silence for the output.
    """
    with _one_thread:
        if sys.stdout is not None:
            sys.stdout.flush()
        try:
            kept = os.dup(1)
        except OSError:  # there is no standard output to keep clean
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
