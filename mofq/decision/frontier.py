"""The whole frontier of accuracy against size.

Its axis is the bytes of the layers; where a context's KV cache counts as size, the bytes of the
checkpoint and that cache together (`Problem.axis_P`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mofq.decision.budgets import Budgets, Constraint, budget_constraints, offered
from mofq.decision.exact import Solution, least_bytes, solve_exact
from mofq.decision.interactions import act_together, solve_together
from mofq.decision.prediction import error_together, predict_given
from mofq.decision.problem import BoolArray, FloatArray, IntArray, Problem
from mofq.exceptions import BudgetError
from mofq.exceptions import option as spelled

#: Sizes that are solved one by one where there is no hull.
_SIZES = 50
#: Points that are solved again with what their groups do together: a tenth of a second each.
_MOST_TOGETHER = 240
_SIZE_BUDGETS = ("max_bits", "max_bytes")


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """Recipes of which none is both smaller and better than another; K of them, smallest first."""

    choice_KF: IntArray  #: an option of each fusion group
    bytes_K: IntArray  #: along the axis, ``Problem.axis_of``
    error_K: FloatArray  #: falls from point to point
    bound_K: FloatArray  #: no recipe of this size has less error; NaN: not known

    @property
    def gap(self) -> float | None:
        """The largest distance of a point from its bound, as a share of its error.

        Of points whose groups act together (`mofq.decision.interactions`) the error is no sum, and
        has no bound; None where that is all of them.
        """
        is_known_K = ~np.isnan(self.bound_K)
        if not is_known_K.any():
            return None
        error_K, bound_K = self.error_K[is_known_K], self.bound_K[is_known_K]
        with np.errstate(invalid="ignore", divide="ignore"):
            gap_K = np.where(error_K > 0, 1 - bound_K / error_K, 0.0)
        return float(gap_K.max(initial=0.0))

    @property
    def unbounded(self) -> int:
        """How many points have no bound."""
        return int(np.isnan(self.bound_K).sum())

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
        budgets: Those of size end the frontier. ``max_kv_bits`` is met once for all where the
            cache is not on the axis. Under any other budget, and under ``worst-corpus``,
            there is no hull and each size is solved on its own.
        sizes: Solve exactly at so many sizes, evenly spaced, beside the points of the hull.

    Returns:
        The points, smallest first.

    Raises:
        BudgetError: No recipe keeps the budgets.
    """
    budgets = budgets or Budgets()
    if problem.acts_together and budgets.max_kl is not None:
        # A solver would hold the budget against a sum, which what groups do together is not.
        whole = solve_frontier(problem, replace(budgets, max_kl=None), sizes=sizes)
        return _within_kl(problem, whole, budgets.max_kl)
    ends = [
        constraint
        for constraint in budget_constraints(problem, budgets)
        if _is_axis(problem, constraint)
    ]
    most = int(min(constraint.limit for constraint in ends)) if ends else int(problem.axis_P.sum())
    named = {constraint.name for constraint in ends}
    other = replace(
        budgets,
        max_bits=None if "max_bits" in named else budgets.max_bits,
        max_bytes=None if "max_bytes" in named else budgets.max_bytes,
    )
    cached_F = _best_caches(problem, other)
    free = other if cached_F is None else replace(other, max_kv_bits=None)
    has_hull = problem.cost_PK.shape[1] == 1 and free == Budgets()
    points: list[_Point] = []
    if has_hull:
        paths = [_hull(problem, allowed_P) for allowed_P in _hull_sets(problem, cached_F)]
        points = [point for point in _bounded(paths) if point.bytes <= most]
        if not points:
            solve_exact(problem, budgets)  # says what the smallest size is
    if sizes is not None or not has_hull:
        points += _solved(problem, other, most=most, sizes=sizes or _SIZES)
    if problem.acts_together:
        points = _together(problem, other, points)
    in_file = _in_file(problem, budgets, points)
    if not in_file:  # a larger one on the axis may have the smaller file, or the error says so
        in_file = [_solved_point(problem, solve_exact(problem, budgets))]
    return _non_dominated(in_file)


def _within_kl(problem: Problem, frontier: Frontier, max_kl: float) -> Frontier:
    """The points whose predicted KL's upper end is within a budget in nats."""
    upper_K = [predict_given(problem, one_F).upper for one_F in frontier.choice_KF]
    kept = [k for k, upper in enumerate(upper_K) if upper <= max_kl]
    if not kept:
        raise BudgetError(
            f"{spelled('max_kl')}: asked for {max_kl:.4g} nats per token; the least under the "
            f"other budgets is {min(upper_K):.4g}, the upper end of its 95 % interval."
        )
    return Frontier(
        choice_KF=frontier.choice_KF[kept],
        bytes_K=frontier.bytes_K[kept],
        error_K=frontier.error_K[kept],
        bound_K=frontier.bound_K[kept],
    )


def _together(problem: Problem, budgets: Budgets, points: Sequence[_Point]) -> list[_Point]:
    """Points with what their groups do together, of at most `_MOST_TOGETHER` also the best then."""
    acting = [n for n, one in enumerate(points) if act_together(problem, one.choice_F)]
    step = max(1, -(-len(acting) // _MOST_TOGETHER))
    solved, acts = set(acting[::step]), set(acting)
    found = []
    for number, point in enumerate(points):
        choice_F = point.choice_F
        if number in solved:
            own = sized(problem, budgets, point.bytes)
            choice_F = solve_together(problem, own, solve_exact).choice_F
        error = error_together(problem, choice_F)
        # The bound is that of the sum, from which the error of the others hardly differs.
        bound = math.nan if number in acts else error - (point.error - point.bound)
        found.append(_Point(choice_F, problem.axis_of(choice_F), error, bound=bound))
    return found


def sized(problem: Problem, budgets: Budgets, size: int) -> Budgets:
    """The budgets, and no more than a size on the axis of the frontier.

    Args:
        problem: Whose axis it is.
        budgets: Others.
        size: Of ``Problem.axis_of`` [bytes].
    """
    if not problem.kv_tokens:
        bits = 8 * size / problem.weights
        known = budgets.max_bits
        return replace(budgets, max_bits=bits if known is None else min(bits, known))
    limit, asked = size + problem.other_bytes, budgets.max_bytes
    return replace(budgets, max_bytes=limit if asked is None else min(limit, asked))


def axis_value(problem: Problem, choice_F: IntArray) -> float:
    """Where a choice stands on the axis, as people read it.

    Returns:
        True bits per weight; where a context's cache counts as size, the bytes of all that does.
    """
    if problem.kv_tokens:
        return problem.size_of(choice_F) + problem.other_bytes
    return 8 * problem.axis_of(choice_F) / problem.weights


def _is_axis(problem: Problem, constraint: Constraint) -> bool:
    """Whether a budget of size ends the frontier."""
    cost_P = constraint.cost_P
    if constraint.name == "max_bytes" and not problem.kv_tokens:
        cost_P = cost_P - problem.shape_bytes_P  # a little less than all: see `_in_file`
    return constraint.name in _SIZE_BUDGETS and np.array_equal(cost_P, problem.axis_P)


def _in_file(problem: Problem, budgets: Budgets, points: list[_Point]) -> list[_Point]:
    """Those whose file is within a budget of bytes, which the axis does not count in full."""
    if budgets.max_bytes is None:
        return points
    most = budgets.max_bytes - problem.other_bytes
    return [one for one in points if problem.size_of(one.choice_F) <= most]


def _best_caches(problem: Problem, budgets: Budgets) -> IntArray | None:
    """A choice with the best caches, where no size on the axis changes which these are."""
    if budgets.max_kv_bits is None or problem.kv_tokens or problem.cost_PK.shape[1] > 1:
        return None
    return solve_exact(problem, Budgets(max_kv_bits=budgets.max_kv_bits)).choice_F


def _hull_sets(problem: Problem, cached_F: IntArray | None) -> list[BoolArray]:
    """The options of each hull: those that go together, the cache as it is given."""
    if cached_F is None:
        return list(problem.sets)
    is_cached_F = np.array([group.cached > 0 for group in problem.groups])
    is_free_P = ~is_cached_F[problem.group_P]
    is_free_P[cached_F] = True
    return [np.asarray(is_free_P & problem.beside(cached_F))]


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


def _bounded(paths: Sequence[Sequence[_Point]]) -> list[_Point]:
    """The points of several hulls: none is better than any of them is at its size."""
    if len(paths) == 1:
        return list(paths[0])
    bytes_K = np.array([point.bytes for path in paths for point in path], dtype=np.float64)
    bound_K = np.full(len(bytes_K), np.inf)
    for path in paths:
        size_J = [point.bytes for point in path]
        error_J = [point.error for point in path]
        bound_K = np.minimum(bound_K, np.interp(bytes_K, size_J, error_J, left=np.inf))
    every = [point for path in paths for point in path]
    bounds = bound_K.tolist()
    return [replace(one, bound=min(one.error, b)) for one, b in zip(every, bounds, strict=True)]


def _hull(problem: Problem, allowed_P: BoolArray) -> list[_Point]:
    """The path along the hulls of all groups, steepest step first."""
    cost_P, size_P = problem.cost_PK[:, 0], problem.axis_P
    steps: list[tuple[float, int, int]] = []
    choice_F = np.zeros(len(problem.groups), dtype=np.int64)
    for group in range(len(problem.groups)):
        options = [p for p in problem.options_of(group) if allowed_P[p]]
        hull = _group_hull(size_P, cost_P, options)
        choice_F[group] = hull[0]
        for here, there in pairwise(hull):
            growth = int(size_P[there] - size_P[here])
            steps.append((float(cost_P[there] - cost_P[here]) / growth, group, there))
    steps.sort()
    points = [_hull_point(problem, choice_F)]
    for _, group, option in steps:
        choice_F[group] = option
        points.append(_hull_point(problem, choice_F))
    return points


def _hull_point(problem: Problem, choice_F: IntArray) -> _Point:
    error = problem.error_of(choice_F)
    return _Point(choice_F.copy(), problem.axis_of(choice_F), error, bound=error)


def _group_hull(bytes_P: IntArray, cost_P: FloatArray, options: Sequence[int]) -> list[int]:
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
    allowed_P, size_P = offered(problem, budgets), problem.axis_P
    least = least_bytes(problem, budgets, size_P)
    if least > most:
        raise BudgetError(
            f"The smallest recipe under the other budgets has {least:,} bytes in its fusion groups "
            f"({8 * least / problem.weights:.4f} bits per weight), more than the frontier "
            f"may reach. Allow more, or measure a search space with coarser schemes."
        )
    largest_F = np.maximum.reduceat(np.where(allowed_P, size_P, 0), problem.start_F[:-1])
    points = []
    for size in np.unique(
        np.linspace(least, min(most, int(largest_F.sum())), sizes).astype(np.int64)
    ):
        limit = min(max(int(size), least), most)
        found = solve_exact(problem, sized(problem, budgets, limit))
        points.append(_solved_point(problem, found))
    return points


def _solved_point(problem: Problem, found: Solution) -> _Point:
    error = problem.error_of(found.choice_F)
    bound = error if found.bound is None or math.isnan(found.bound) else found.bound
    return _Point(found.choice_F, problem.axis_of(found.choice_F), error, bound=bound)
