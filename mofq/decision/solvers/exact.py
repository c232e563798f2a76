"""The best recipe under any budgets, proven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mofq.decision.solvers.budgets import Budgets, Row, budget_rows, max_kl_rows, offered
from mofq.decision.solvers.optimum import Optimum, minimise
from mofq.decision.solvers.problem import BoolArray, FloatArray, IntArray, Problem
from mofq.exceptions import BudgetError


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What a solver chose."""

    choice_F: IntArray  #: an option of each fusion group
    bound: float | None = (
        None  #: no recipe under the budgets has less error [unit]; None: not known
    )
    prices: dict[str, float] | None = None  #: error that one more byte, layer, … of it saves


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
    rows = _all_rows(problem, budgets)
    allowed_P = offered(problem, budgets)
    if budgets.minimises_bytes:
        smallest = require(problem, _bytes_PK(problem), rows, allowed_P)
        size = problem.size_of(smallest.choice_F)
        rows += (Row("bytes", problem.size_P, limit=size, shown=str),)
    best = require(problem, problem.cost_PK, rows, allowed_P)
    names = [row.name for row in rows]
    prices = {
        name: max(p for n, p in zip(names, best.prices, strict=True) if n == name) for name in names
    }
    return Solution(best.choice_F, bound=best.bound, prices=prices)


def least_bytes(problem: Problem, budgets: Budgets) -> int:
    """The size of the smallest recipe that keeps the budgets, over all groups [bytes].

    Raises:
        BudgetError: No recipe does.
    """
    return least_of(problem, budgets, problem.size_P)


def least_of(problem: Problem, budgets: Budgets, size_P: IntArray) -> int:
    """The least of any size that a recipe can have within the budgets.

    Raises:
        BudgetError: No recipe does.
    """
    rows = _all_rows(problem, budgets)
    cost_PK = size_P.astype(np.float64)[:, None]
    best = require(problem, cost_PK, rows, offered(problem, budgets))
    return int(size_P[best.choice_F].sum())


def _all_rows(problem: Problem, budgets: Budgets) -> tuple[Row, ...]:
    rows = budget_rows(problem, budgets)
    return rows if budgets.max_kl is None else rows + max_kl_rows(problem, budgets.max_kl)


def _bytes_PK(problem: Problem) -> FloatArray:
    return problem.size_P.astype(np.float64)[:, None]


def require(
    problem: Problem, cost_PK: FloatArray, rows: Sequence[Row], allowed_P: BoolArray
) -> Optimum:
    """`minimise`, or an error that says which budget cannot be met and what can.

    Raises:
        BudgetError: No choice keeps all rows.
    """
    best = minimise(problem, cost_PK, rows, allowed_P)
    if best is not None:
        return best
    raise BudgetError(
        "No recipe meets the budget. " + " ".join(_tightest(problem, rows, allowed_P))
    )


def _tightest(problem: Problem, rows: Sequence[Row], allowed_P: BoolArray) -> list[str]:
    """For each row that cannot be kept, the least that it can be held to."""
    alone = []
    for row in rows:
        least = _least(problem, row, (), allowed_P)
        if least is None or least > row.limit:
            alone.append(_sentence(row, least, others=()))
    if alone:
        return alone
    together = []
    for row in rows:
        others = [other for other in rows if other is not row]
        least = _least(problem, row, others, allowed_P)
        if least is not None:
            together.append(_sentence(row, least, others=others))
    if together:
        return ["Each can be met alone, and not all together.", *together]
    return ["Three or more of them contradict each other; drop one."]


def _least(
    problem: Problem, row: Row, others: Sequence[Row], allowed_P: BoolArray
) -> int | float | None:
    cost_PK = np.asarray(row.cost_P, dtype=np.float64)[:, None]
    best = minimise(problem, cost_PK, others, allowed_P)
    return None if best is None else row.used(best.choice_F)


def _sentence(row: Row, least: int | float | None, *, others: Sequence[Row]) -> str:
    if least is None:
        return f"{row.name}: no choice is possible."
    beside = " beside " + ", ".join(dict.fromkeys(other.name for other in others)) if others else ""
    asked = f"{row.name}: asked for {row.shown(row.limit)}"
    return f"{asked}; the smallest possible{beside} is {row.shown(least)}."
