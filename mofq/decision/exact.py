"""The best recipe under any budgets, proven: a multiple-choice knapsack with linear constraints.

One option of each fusion group, least cost. The relaxation gives a price to
every budget, and under these prices a lower bound and, for each option, what
it costs more than the best of its group (its reduced cost). An option whose
reduced cost exceeds the distance between the bound and a solution is in no better
solution; so only a small core has to be searched, and its optimum is the
optimum of the whole. It is searched by labels, where integer sums are exact; by an integer
program where several budgets, or several corpora, would make labels too many.

Source: reduction by reduced costs as in D. Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", EJOR 83 (1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision.budgets import Budgets, Constraint, all_constraints, offered
from mofq.decision.dynamic_program import TooManyLabelsError, search_labels
from mofq.decision.integer_program import search_program
from mofq.decision.problem import BoolArray, FloatArray, IntArray, Problem
from mofq.decision.relaxation import Core, Prices, price, reduce_problem
from mofq.exceptions import BudgetError

_LABELS_OF_TWO_SUMS = 400_000
_LABELS_OF_MORE = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What a solver chose."""

    choice_F: IntArray  #: an option of each fusion group
    #: No recipe under the budgets has less error [unit]; None: not known.
    bound: float | None = None
    prices: dict[str, float] | None = None  #: error that one more byte, layer, … of it saves


@dataclass(frozen=True, slots=True, eq=False)
class Optimum:
    """A choice that is proven best, and what the proof rests on."""

    choice_F: IntArray
    value: float  #: of the cost that was minimised
    bound: float  #: of the relaxation: no choice costs less
    #: Of each constraint: cost that one more unit of its limit would save.
    prices: tuple[float, ...]


def solve_exact(problem: Problem, budgets: Budgets) -> Solution:
    """The recipe of least error under all budgets, by a mixed-integer program.

    Where ``max_kl`` is given and no size, the smallest recipe, and of the
    smallest ones the one of least error. ``max_kl`` bounds the sum of error and two
    standard errors of each choice here; `choose` knows the error bar of the whole
    recipe where samples are kept.

    Args:
        problem: What may be chosen.
        budgets: Any number at once.

    Returns:
        The choice, which keeps every budget in exact arithmetic; the bound of the
        relaxation; the price of each budget.

    Raises:
        BudgetError: No recipe keeps all budgets; the message names the tightest possible.
    """
    constraints = all_constraints(problem, budgets)
    allowed_P = offered(problem, budgets)
    if budgets.minimises_bytes:
        smallest = _require(problem, _column(problem.size_P), constraints, allowed_P)
        size = problem.size_of(smallest.choice_F)
        constraints += (Constraint("bytes", problem.size_P, limit=size, shown=str),)
    best = _require(problem, problem.cost_PK, constraints, allowed_P)
    names = [constraint.name for constraint in constraints]
    prices = {
        name: max(p for n, p in zip(names, best.prices, strict=True) if n == name) for name in names
    }
    return Solution(best.choice_F, bound=best.bound, prices=prices)


def least_bytes(problem: Problem, budgets: Budgets, size_P: IntArray | None = None) -> int:
    """The size of the smallest recipe that keeps the budgets, over all groups [bytes].

    Args:
        problem: What may be chosen.
        budgets: Any number at once.
        size_P: Which size; by default what a budget of size counts.

    Raises:
        BudgetError: No recipe does.
    """
    size_P = problem.size_P if size_P is None else size_P
    best = _require(
        problem, _column(size_P), all_constraints(problem, budgets), offered(problem, budgets)
    )
    return int(size_P[best.choice_F].sum())


def _column(cost_P: IntArray | FloatArray) -> FloatArray:
    """A single cost, [P, 1]."""
    return np.asarray(cost_P, dtype=np.float64)[:, None]


def _require(
    problem: Problem, cost_PK: FloatArray, constraints: Sequence[Constraint], allowed_P: BoolArray
) -> Optimum:
    """`minimise`, or an error that says which budget cannot be met and what can.

    Raises:
        BudgetError: No choice keeps all constraints.
    """
    best = minimise(problem, cost_PK, constraints, allowed_P)
    if best is not None:
        return best
    raise BudgetError(
        "No recipe meets the budget. " + " ".join(_tightest(problem, constraints, allowed_P))
    )


def _tightest(
    problem: Problem, constraints: Sequence[Constraint], allowed_P: BoolArray
) -> list[str]:
    """For each constraint that cannot be kept, the least that it can be held to."""
    alone = []
    for constraint in constraints:
        least = _least(problem, constraint, (), allowed_P)
        if least is None or least > constraint.limit:
            alone.append(_sentence(constraint, least, others=()))
    if alone:
        return alone
    together = []
    for constraint in constraints:
        others = [other for other in constraints if other is not constraint]
        least = _least(problem, constraint, others, allowed_P)
        if least is not None:
            together.append(_sentence(constraint, least, others=others))
    if together:
        return ["Each can be met alone, and not all together.", *together]
    return ["Three or more of them contradict each other; drop one."]


def _least(
    problem: Problem, constraint: Constraint, others: Sequence[Constraint], allowed_P: BoolArray
) -> int | float | None:
    best = minimise(problem, _column(constraint.cost_P), others, allowed_P)
    return None if best is None else constraint.used(best.choice_F)


def _sentence(
    constraint: Constraint, least: int | float | None, *, others: Sequence[Constraint]
) -> str:
    if least is None:
        return f"{constraint.option}: no choice is possible."
    beside = (
        " beside " + ", ".join(dict.fromkeys(other.option for other in others)) if others else ""
    )
    asked = f"{constraint.option}: asked for {constraint.shown(constraint.limit)}"
    return f"{asked}; the smallest possible{beside} is {constraint.shown(least)}."


def minimise(
    problem: Problem, cost_PK: FloatArray, constraints: Sequence[Constraint], allowed_P: BoolArray
) -> Optimum | None:
    """The choice of least cost that keeps every constraint.

    Args:
        problem: The fusion groups.
        cost_PK: Several columns: the largest of their sums is minimised.
        constraints: The constraints, kept without tolerance.
        allowed_P: Which options may be chosen; at least one of each group.

    Returns:
        The optimum; of options that no constraint and no cost tells apart, the smallest
        and simplest. None: no choice keeps all constraints.
    """
    tightest = _tightest_of_equal(constraints)
    cores = []
    for number, set_P in enumerate(problem.sets):
        found_core = _priced_core(problem, cost_PK, tightest, allowed_P & set_P)
        if found_core is not None:
            cores.append((found_core[1].bound, number, found_core))
    best: Optimum | None = None
    for bound, _, (core, priced) in sorted(cores, key=lambda one: one[:2]):
        if best is not None and bound > best.value:
            break
        found = _search(core, priced, cost_PK, tightest)
        if found is not None and (best is None or _rank(problem, found) < _rank(problem, best)):
            best = found
    if best is None:
        return None
    price_of = dict(zip(map(id, tightest), best.prices, strict=True))
    prices = tuple(price_of.get(id(one), 0.0) for one in constraints)
    least = min(bound for bound, _, _ in cores)
    return replace(best, bound=min(least, best.value), prices=prices)


def _rank(problem: Problem, one: Optimum) -> tuple[float, int]:
    return one.value, problem.size_of(one.choice_F)


def _priced_core(
    problem: Problem, cost_PK: FloatArray, constraints: Sequence[Constraint], allowed_P: BoolArray
) -> tuple[Core, Prices] | None:
    """The core of options that go together; None where no choice of them keeps all constraints."""
    if not problem.offers_all(allowed_P):
        return None
    core = reduce_problem(problem, cost_PK, constraints, allowed_P)
    prices = None if core is None else price(core)
    return None if core is None or prices is None else (core, prices)


def _search(
    core: Core, prices: Prices, cost_PK: FloatArray, tightest: Sequence[Constraint]
) -> Optimum | None:
    few_sums = cost_PK.shape[1] + len(tightest) <= 2
    try:
        most = _LABELS_OF_TWO_SUMS if few_sums else _LABELS_OF_MORE
        choice_F = search_labels(core, prices, cost_PK, tightest, most_labels=most)
    except TooManyLabelsError:
        choice_F = search_program(core, prices, cost_PK, tightest)
    if choice_F is None:
        return None
    value = max(math.fsum(column) for column in cost_PK[choice_F].T)
    raw_R = prices.price_R / core.divisor_R
    return Optimum(choice_F, value, bound=prices.bound, prices=tuple(map(float, raw_R)))


def _tightest_of_equal(constraints: Sequence[Constraint]) -> list[Constraint]:
    """Of constraints over the same costs (two ways to limit the size) the tightest."""
    kept: list[Constraint] = []
    for constraint in sorted(constraints, key=lambda one: one.limit):
        if not any(np.array_equal(constraint.cost_P, other.cost_P) for other in kept):
            kept.append(constraint)
    return [constraint for constraint in constraints if any(constraint is one for one in kept)]
