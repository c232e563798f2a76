"""The optimum of a multiple-choice knapsack with any linear constraints.

One option of each fusion group, least cost. The relaxation gives a price to
every budget, and under these prices a lower bound and, for each option, what
it costs more than the best of its group (its reduced cost). An option whose
reduced cost exceeds the distance between the bound and a solution is in no better
solution; so only a small core has to be searched, and its optimum is the
optimum of the whole. One budget is searched by labels, where integer sums are exact;
several budgets, or several corpora, by HiGHS through ``scipy.optimize.milp``
where labels would be too many.

Source: reduction by reduced costs as in D. Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", EJOR 83 (1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision.solvers.budgets import Row
from mofq.decision.solvers.core import Core, Prices, price, reduce_problem
from mofq.decision.solvers.labels import TooManyLabelsError, search_labels
from mofq.decision.solvers.problem import BoolArray, FloatArray, IntArray, Problem
from mofq.decision.solvers.program import search_program

_LABELS_OF_TWO_SUMS = 400_000
_LABELS_OF_MORE = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Optimum:
    """A choice that is proven best, and what the proof rests on."""

    choice_F: IntArray
    value: float  #: of the cost that was minimised
    bound: float  #: of the relaxation: no choice costs less
    prices: tuple[float, ...]  #: of each row: cost that one more unit of its limit would save


def minimise(
    problem: Problem, cost_PK: FloatArray, rows: Sequence[Row], allowed_P: BoolArray
) -> Optimum | None:
    """The choice of least cost that keeps every row.

    Args:
        problem: The fusion groups.
        cost_PK: Several columns: the largest of their sums is minimised.
        rows: The constraints, kept without tolerance.
        allowed_P: Which options may be chosen; at least one of each group.

    Returns:
        The optimum; of options that no row and no cost tells apart, the smallest
        and simplest. None: no choice keeps all rows.
    """
    tightest = _tightest_of_equal(rows)
    cores = []
    for number, set_P in enumerate(problem.sets):
        priced = _priced_core(problem, cost_PK, tightest, allowed_P & set_P)
        if priced is not None:
            cores.append((priced[1].bound, number, priced))
    best: Optimum | None = None
    for bound, _, (core, prices) in sorted(cores, key=lambda one: one[:2]):
        if best is not None and bound > best.value:
            break
        found = _search(core, prices, cost_PK, tightest)
        if found is not None and (best is None or _rank(problem, found) < _rank(problem, best)):
            best = found
    if best is None:
        return None
    shown = [best.prices[n] if (n := _position(tightest, row)) is not None else 0.0 for row in rows]
    least = min(bound for bound, _, _ in cores)
    return replace(best, bound=min(least, best.value), prices=tuple(shown))


def _rank(problem: Problem, one: Optimum) -> tuple[float, int]:
    return one.value, problem.size_of(one.choice_F)


def _priced_core(
    problem: Problem, cost_PK: FloatArray, rows: Sequence[Row], allowed_P: BoolArray
) -> tuple[Core, Prices] | None:
    """The core of options that go together; None where no choice of them keeps all rows."""
    if not problem.offers_all(allowed_P):
        return None
    core = reduce_problem(problem, cost_PK, rows, allowed_P)
    prices = None if core is None else price(core)
    return None if core is None or prices is None else (core, prices)


def _search(
    core: Core, prices: Prices, cost_PK: FloatArray, tightest: Sequence[Row]
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


def _tightest_of_equal(rows: Sequence[Row]) -> list[Row]:
    """Of rows over the same costs (two ways to limit the size) the tightest."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda one: one.limit):
        if not any(np.array_equal(row.cost_P, other.cost_P) for other in kept):
            kept.append(row)
    return [row for row in rows if any(row is one for one in kept)]


def _position(rows: Sequence[Row], row: Row) -> int | None:
    return next((n for n, one in enumerate(rows) if one is row), None)
