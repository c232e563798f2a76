"""From a problem and budgets to a choice: the solver, the ties, and what may be promised of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from mofq.decision.budgets import Budgets, check_kl_unit
from mofq.decision.exact import Solution, least_bytes, solve_exact
from mofq.decision.flip_costs import flip_costs
from mofq.decision.frontier import sized
from mofq.decision.greedy import solve_greedy
from mofq.decision.interactions import Solver, act_together, solve_together
from mofq.decision.prediction import (
    Estimate,
    crossfit,
    is_crossfitted,
    predict,
    stated,
    with_flip_noise,
)
from mofq.decision.problem import IntArray, Problem
from mofq.decision.ties import Ties, move_ties
from mofq.exceptions import BudgetError, MofqError, nearest_name, option

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
    reported: Estimate  #: what budgets and reports use, see `predict_chosen`


def choose(
    problem: Problem, budgets: Budgets, *, solver: str = "exact", ties: bool = True
) -> Chosen:
    """Choose one option of each fusion group under budgets.

    ``max_kl`` is held against the upper end of the prediction's 95 % interval
    where samples are kept: with a budget of size too, it is checked; without one the size
    is lowered until it is just met.

    Args:
        problem: What may be chosen.
        budgets: Any number at once.
        solver: A key of `SOLVERS`.
        ties: Whether choices within noise move to simpler schemes.

    Returns:
        The choice with its prediction.

    Raises:
        BudgetError: No recipe keeps the budgets.
        MofqError: There is no such solver.
    """
    if solver not in SOLVERS:
        raise MofqError(f"no solver is called {solver!r}." + nearest_name(solver, SOLVERS))
    once = partial(_choose_once, problem, solve=SOLVERS[solver], with_ties=ties)
    if budgets.max_kl is not None:
        check_kl_unit(problem)
        # The solver would hold the budget against a sum, which what groups do together is not.
        if is_crossfitted(problem) or problem.acts_together:
            free = replace(budgets, max_kl=None)
            if budgets.minimises_bytes:
                return _smallest(problem, free, budgets.max_kl, once)
            return _checked(once(free), budgets.max_kl)
    return once(budgets)


def _choose_once(problem: Problem, budgets: Budgets, *, solve: Solver, with_ties: bool) -> Chosen:
    solution = solve_together(problem, budgets, solve)
    ties = move_ties(problem, budgets, solution.choice_F) if with_ties else None
    choice_F = solution.choice_F if ties is None else ties.choice_F
    is_optimum = solve is solve_exact and choice_F is solution.choice_F
    reported = predict_chosen(problem, budgets, choice_F, is_optimum=is_optimum)
    return Chosen(choice_F, solution, ties=ties, reported=reported)


def predict_chosen(
    problem: Problem, budgets: Budgets, choice_F: IntArray, *, is_optimum: bool = False
) -> Estimate:
    """What a recipe that was chosen on the samples is predicted to cost.

    Every command, figure and file shows this one. The least error of any recipe that is no
    larger is cross-fitted, and what this recipe costs more than that one is added, sample by
    sample. So the figure depends on the recipe, and not on how it was found, and no recipe is
    predicted to be better than the best of its size.

    Args:
        problem: What might be chosen.
        budgets: Others than of size and of KL, as they were kept.
        choice_F: One option of each fusion group.
        is_optimum: Whether it is known to have the least sum of errors of its size.

    Returns:
        The prediction; where there are too few samples to cross-fit, or half of them do not
        offer what the budgets need, that on the samples themselves.
    """
    return stated(problem, expand_chosen(problem, budgets, choice_F, is_optimum=is_optimum))


def expand_chosen(
    problem: Problem, budgets: Budgets, choice_F: IntArray, *, is_optimum: bool = False
) -> Estimate:
    """The sum of errors that `predict_chosen` rests on, cross-fitted, by the same arguments."""
    in_sample = replace(predict(problem, choice_F), is_in_sample=problem.sample_errors is not None)
    if not is_crossfitted(problem):
        return in_sample
    try:
        best_F = choice_F
        # A choice that is best as a sum may not be best together.
        if not is_optimum or act_together(problem, choice_F):
            own = _own_size(problem, budgets, choice_F)
            best_F = solve_together(problem, own, solve_exact).choice_F
        own = _own_size(problem, budgets, best_F)
        instead = None if (best_F == choice_F).all() else (best_F, choice_F)
        fitted = crossfit(
            problem,
            lambda part: solve_together(part, own, solve_exact).choice_F,
            instead=instead,
        )
    except BudgetError:
        # A finer scheme may be on offer with all samples and not with half of them.
        fitted = None
    if fitted is None:
        return in_sample
    return with_flip_noise(problem, fitted, flip_costs(problem, choice_F))


def _own_size(problem: Problem, budgets: Budgets, choice_F: IntArray) -> Budgets:
    """The budgets, with a choice's own size in place of those of size and of KL."""
    others = replace(budgets, max_bits=None, max_bytes=None, max_kl=None)
    if problem.cached and not problem.kv_tokens:
        bits = int(problem.cache_bits_P[choice_F].sum()) / problem.cached
        others = replace(others, max_kv_bits=bits)
    return sized(problem, others, problem.axis_of(choice_F))


def _checked(found: Chosen, max_kl: float) -> Chosen:
    """The least error under the budgets of size, whose prediction must be within ``max_kl``."""
    upper = found.reported.upper
    if upper > max_kl:
        raise BudgetError(
            f"{option('max_kl')}: asked for {max_kl:.4g} nats per token; the least under "
            f"the other budgets is {upper:.4g}, the upper end of its 95 % interval. Allow "
            f"more, or a larger size."
        )
    return found


def _smallest(
    problem: Problem, free: Budgets, limit: float, once: Callable[[Budgets], Chosen]
) -> Chosen:
    """The smallest recipe whose predicted KL's upper end is within a limit.

    The figure falls as the size grows, so the size is searched; see `predict_chosen`.

    Args:
        problem: In nats, with sample errors.
        free: Any budgets that are neither of size nor of KL.
        limit: Of the figure [nats per token].
        once: Chooses under budgets without one of KL.

    Returns:
        The choice, its size found to one part in ten thousand.

    Raises:
        BudgetError: Not even the best recipe is within the limit; the message says how far it is.
    """
    best = once(free)
    if best.reported.upper > limit:
        raise BudgetError(
            f"{option('max_kl')}: asked for {limit:.4g} nats per token; the smallest possible is "
            f"{best.reported.upper:.4g}, the upper end of its 95 % interval. "
            f"Offer finer schemes, or calibrate with more samples."
        )

    def at(size: int) -> Chosen | None:
        try:
            return once(replace(free, max_bytes=size + problem.other_bytes))
        except BudgetError:
            return None

    low = _naive_size(problem, free, limit)
    return _search_size(problem, at, limit, free=free, low=low, best=best)


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
    free: Budgets,
    low: int,
    best: Chosen,
) -> Chosen:
    """Between a size that fails and one that holds, by the logarithm of the figure."""
    first = at(low)
    if first is not None and first.reported.upper <= limit:
        if problem.answers is None:
            return first
        # What groups do together may make it less than the sum: smaller ones may hold too.
        best, low = first, least_bytes(problem, free)
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
