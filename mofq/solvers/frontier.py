"""The whole curve of accuracy against size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mofq.exceptions import BudgetError
from mofq.solvers.budgets import Budgets, budget_rows, offered
from mofq.solvers.exact import least_bytes, solve_exact
from mofq.solvers.problem import FloatArray, IntArray, Problem

#: Sizes that are solved one by one where there is no hull.
_SIZES = 50


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """Recipes of which none is both smaller and better than another; K of them, smallest first."""

    choice_KF: IntArray  #: an option of each fusion group
    bytes_K: IntArray  #: of all groups
    error_K: FloatArray  #: falls from point to point
    bound_K: FloatArray  #: no recipe of this size has less error

    @property
    def gap(self) -> float:
        """The largest distance of a point from its bound, as a share of its error."""
        with np.errstate(invalid="ignore", divide="ignore"):
            gap_K = np.where(self.error_K > 0, 1 - self.bound_K / self.error_K, 0.0)
        return float(gap_K.max(initial=0.0))

    def at(self, total_bytes: int) -> int | None:
        """The last point of at most so many bytes; None: there is none."""
        index = int(np.searchsorted(self.bytes_K, total_bytes, side="right")) - 1
        return index if index >= 0 else None


def solve_frontier(
    problem: Problem,
    budgets: Budgets | None = None,
    *,
    sizes: int | None = None,
) -> Frontier:
    """All non-dominated recipes from the smallest to the best that the relaxation finds.

    Starting from the smallest option of each group, the step that removes most error
    per byte comes next, along the lower convex hull of each group's options. Every
    point on the way is the exact optimum at its own size, for it meets the
    Lagrangian bound. Between two points there may be optima that only an integer
    program finds: ``sizes`` asks for them.

    Args:
        problem: What may be chosen.
        budgets: ``max_bits`` and ``max_bytes`` end the curve. Under any other budget, and
            under ``worst-corpus``, there is no hull and each size is solved on its own.
        sizes: Solve exactly at so many sizes, evenly spaced, beside the points of the hull.

    Returns:
        The points, smallest first.

    Raises:
        BudgetError: No recipe keeps the budgets.
    """
    budgets = budgets or Budgets()
    limits = [row.limit for row in budget_rows(problem, budgets) if row.name in _SIZE_ROWS]
    most = int(min(limits)) if limits else int(problem.bytes_P.sum())
    other = replace(budgets, max_bits=None, max_bytes=None)
    has_hull = problem.cost_PK.shape[1] == 1 and other == Budgets()
    points: list[_Point] = []
    if has_hull:
        points = [point for point in _hull(problem) if point.bytes <= most]
        if not points:
            solve_exact(problem, budgets)  # says what the smallest size is
    if sizes is not None or not has_hull:
        points += _solved(problem, other, most=most, sizes=sizes or _SIZES)
    return _non_dominated(points)


_SIZE_ROWS = ("max_bits", "max_bytes")


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    choice_F: IntArray
    bytes: int
    error: float
    bound: float


def _non_dominated(points: Sequence[_Point]) -> Frontier:
    kept: list[_Point] = []
    for point in sorted(points, key=lambda one: (one.bytes, one.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return Frontier(
        choice_KF=np.array([point.choice_F for point in kept], dtype=np.int64),
        bytes_K=np.array([point.bytes for point in kept], dtype=np.int64),
        error_K=np.array([point.error for point in kept]),
        bound_K=np.array([point.bound for point in kept]),
    )


def _hull(problem: Problem) -> list[_Point]:
    """The path along the hulls of all groups, steepest step first."""
    cost_P = problem.cost_PK[:, 0]
    steps: list[tuple[float, int, int]] = []
    choice_F = np.zeros(len(problem.groups), dtype=np.int64)
    for group in range(len(problem.groups)):
        hull = _group_hull(problem.bytes_P, cost_P, problem.options_of(group))
        choice_F[group] = hull[0]
        for here, there in pairwise(hull):
            growth = int(problem.bytes_P[there] - problem.bytes_P[here])
            steps.append((float(cost_P[there] - cost_P[here]) / growth, group, there))
    steps.sort()
    points = [_hull_point(problem, choice_F)]
    for _, group, option in steps:
        choice_F[group] = option
        points.append(_hull_point(problem, choice_F))
    return points


def _hull_point(problem: Problem, choice_F: IntArray) -> _Point:
    error = problem.error_of(choice_F)
    return _Point(choice_F.copy(), problem.bytes_of(choice_F), error, bound=error)


def _group_hull(bytes_P: IntArray, cost_P: FloatArray, options: range) -> list[int]:
    """The options on the lower left convex hull, smallest first; the slope rises towards zero."""
    hull: list[int] = []
    for option in sorted(options, key=lambda p: (bytes_P[p], cost_P[p], p)):
        if hull and cost_P[option] >= cost_P[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(bytes_P, cost_P, hull[-2:], option):
            hull.pop()
        hull.append(option)
    return hull


def _is_above(bytes_P: IntArray, cost_P: FloatArray, last: Sequence[int], option: int) -> bool:
    """Whether the middle one of three options is not below the line through the others."""
    first, middle = last
    run, rise = int(bytes_P[middle] - bytes_P[first]), float(cost_P[middle] - cost_P[first])
    whole, fall = int(bytes_P[option] - bytes_P[first]), float(cost_P[option] - cost_P[first])
    return rise * whole >= fall * run


def _solved(problem: Problem, budgets: Budgets, *, most: int, sizes: int) -> list[_Point]:
    """The optimum at evenly spaced sizes, from the smallest possible to the best there is."""
    allowed_P = offered(problem, budgets)
    least = least_bytes(problem, budgets)
    if least > most:
        raise BudgetError(
            f"The smallest recipe under the other budgets has {least:,} bytes in its fusion groups "
            f"({8 * least / problem.weights:.4f} bits per weight), more than the curve may reach."
        )
    largest = [int(problem.bytes_P[p].max()) for p in _by_group(problem, np.flatnonzero(allowed_P))]
    points = []
    for size in np.unique(np.linspace(least, min(most, sum(largest)), sizes).astype(np.int64)):
        limit = min(max(int(size), least), most) + problem.other_bytes
        found = solve_exact(problem, replace(budgets, max_bytes=limit))
        error = problem.error_of(found.choice_F)
        used = problem.bytes_of(found.choice_F)
        bound = error if found.bound is None or math.isnan(found.bound) else found.bound
        points.append(_Point(found.choice_F, used, error, bound=bound))
    return points


def _by_group(problem: Problem, options: IntArray) -> list[IntArray]:
    return [options[problem.group_P[options] == group] for group in range(len(problem.groups))]
