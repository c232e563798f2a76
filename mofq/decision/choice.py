"""From a problem and budgets to a choice: the solver, the ties, and what may be promised of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mofq.decision.budgets import Budgets, check_kl_unit
from mofq.decision.exact import Solution, least_bytes, solve_exact
from mofq.decision.greedy import solve_greedy
from mofq.decision.prediction import Estimate, crossfit, predict
from mofq.decision.problem import IntArray, Problem
from mofq.decision.ties import Ties, move_ties
from mofq.exceptions import BudgetError, MofqError, nearest_name, option

Solver = Callable[[Problem, Budgets], Solution]

SOLVERS: dict[str, Solver] = {
    "exact": solve_exact,
    "greedy": solve_greedy,
}

#: The size is found to this share of itself.
_SIZE_TOLERANCE = 1e-4
_MOST_STEPS = 30


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """A choice and what is known of it."""

    choice_F: IntArray  #: one option of each fusion group, ties moved
    solution: Solution  #: of the solver, before ties
    ties: Ties | None  #: None: they were not asked for
    prediction: Estimate  #: on the samples that it was chosen on
    crossfit: Estimate | None  #: without their optimism; None: too few samples, or none

    @property
    def reported(self) -> Estimate:
        """The prediction that budgets and reports use."""
        return self.prediction if self.crossfit is None else self.crossfit


def choose(
    problem: Problem, budgets: Budgets, *, solver: str = "exact", ties: bool = True
) -> Chosen:
    """Choose one option of each fusion group under budgets.

    ``max_kl`` is held against the cross-fitted prediction plus two standard errors
    where samples are kept: with a budget of size too, it is checked; without one the size
    is lowered until it is just met (see `solve_smallest`).

    Args:
        problem: What may be chosen.
        budgets: Any number at once.
        solver: A key of `SOLVERS`.
        ties: Whether choices within noise move to simpler schemes.

    Returns:
        The choice with both predictions.

    Raises:
        BudgetError: No recipe keeps the budgets.
        MofqError: There is no such solver.
    """
    if solver not in SOLVERS:
        raise MofqError(f"no solver is called {solver!r}." + nearest_name(solver, SOLVERS))
    if budgets.max_kl is not None:
        check_kl_unit(problem)
        if problem.sample_errors is not None and problem.sample_errors[0].shape[1] >= 4:
            if budgets.minimises_bytes:
                return solve_smallest(problem, budgets, solver=solver, ties=ties)
            return _checked(problem, budgets, solver=solver, ties=ties)
    return _choose_once(problem, budgets, SOLVERS[solver], ties)


def _choose_once(problem: Problem, budgets: Budgets, solve: Solver, with_ties: bool) -> Chosen:
    def chosen_on(part: Problem) -> IntArray:
        choice_F = solve(part, budgets).choice_F
        return move_ties(part, budgets, choice_F).choice_F if with_ties else choice_F

    solution = solve(problem, budgets)
    ties = move_ties(problem, budgets, solution.choice_F) if with_ties else None
    choice_F = solution.choice_F if ties is None else ties.choice_F
    return Chosen(
        choice_F,
        solution,
        ties=ties,
        prediction=predict(problem, choice_F),
        crossfit=_crossfit_or_none(problem, chosen_on),
    )


def _crossfit_or_none(
    problem: Problem, chosen_on: Callable[[Problem], IntArray]
) -> Estimate | None:
    try:
        return crossfit(problem, chosen_on)
    except BudgetError:
        # A finer scheme may be on offer with all samples and not with half of them.
        return None


def _checked(problem: Problem, budgets: Budgets, *, solver: str, ties: bool) -> Chosen:
    """Least error under the budgets of size; then its prediction must be within ``max_kl``."""
    assert budgets.max_kl is not None
    found = _choose_once(problem, replace(budgets, max_kl=None), SOLVERS[solver], ties)
    upper = found.reported.upper
    if upper > budgets.max_kl:
        raise BudgetError(
            f"{option('max_kl')}: asked for {budgets.max_kl:.4g} nats per token; the least under "
            f"the other budgets is {upper:.4g}, two standard errors included. Allow more, or a "
            f"larger size."
        )
    return found


def solve_smallest(
    problem: Problem, budgets: Budgets, *, solver: str = "exact", ties: bool = True
) -> Chosen:
    """The smallest recipe whose cross-fitted KL plus two standard errors is within ``max_kl``.

    The figure falls as the size grows, so the size is searched: at each, the recipes of
    least error that two halves of the samples choose are predicted on the other halves.

    Args:
        problem: In nats, with sample errors.
        budgets: ``max_kl``, and any that are not of size.
        solver: A key of `SOLVERS`.
        ties: Whether choices within noise move to simpler schemes.

    Returns:
        The choice, its size found to one part in ten thousand.

    Raises:
        BudgetError: Not even the best recipe is within ``max_kl``; the message says how far it is.
    """
    assert budgets.max_kl is not None
    limit = budgets.max_kl
    free = replace(budgets, max_kl=None)
    solve = SOLVERS[solver]
    best = _choose_once(problem, free, solve, ties)
    if best.reported.upper > limit:
        raise BudgetError(
            f"{option('max_kl')}: asked for {limit:.4g} nats per token; the smallest possible is "
            f"{best.reported.upper:.4g}, two standard errors included. "
            f"Offer finer schemes, or calibrate with more samples."
        )

    def at(size: int) -> Chosen | None:
        sized = replace(free, max_bytes=size + problem.other_bytes)
        try:
            return _choose_once(problem, sized, solve, ties)
        except BudgetError:
            return None

    return _search_size(problem, at, limit, low=_naive_size(problem, free, limit), best=best)


def _naive_size(problem: Problem, budgets: Budgets, limit: float) -> int:
    """A size from which to start: where the error itself meets the limit."""
    without_error_bars = replace(problem, stderr_PC=problem.error_PC * 0)
    try:
        return least_bytes(without_error_bars, replace(budgets, max_kl=limit))
    except BudgetError:
        return least_bytes(problem, budgets)


def _search_size(
    problem: Problem,
    at: Callable[[int], Chosen | None],
    limit: float,
    *,
    low: int,
    best: Chosen,
) -> Chosen:
    """Between a size that fails and one that holds, by the logarithm of the figure."""
    first = at(low)
    if first is not None and first.reported.upper <= limit:
        return first
    high, high_figure = problem.size_of(best.choice_F), best.reported.upper
    low_figure = math.inf if first is None else first.reported.upper
    step = problem.weights // 16  # half a bit
    for _ in range(_MOST_STEPS):
        if high - low <= max(_SIZE_TOLERANCE * high, 1):
            break
        size = _next_size(low, high, (low_figure, high_figure), limit, step)
        found = at(size)
        figure = math.inf if found is None else found.reported.upper
        if found is not None and figure <= limit:
            best, high_figure = found, figure
            high = min(size, problem.size_of(found.solution.choice_F))
        else:
            low, low_figure = size, figure
        step //= 2
    return best


def _next_size(low: int, high: int, figures: tuple[float, float], limit: float, step: int) -> int:
    """Where the figure, exponential in the size, would meet the limit; a bisection at worst."""
    low_figure, high_figure = figures
    size = (low + high) // 2
    if high_figure > 0 and math.isfinite(low_figure) and low_figure > limit:
        share = math.log(low_figure / limit) / math.log(low_figure / high_figure)
        size = low + math.ceil(share * (high - low))
    elif high_figure == 0:
        size = min(size, low + step)
    margin = max((high - low) // 16, 1)
    return min(max(size, low + margin), high - margin, high - 1) if high - low > 2 else low + 1
