"""Budgets of KL, predicted and proved, beside brute force. A part of ``interval.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mofq.decision import Budgets, Problem, choose, solve_frontier
from mofq.decision.frontier import Frontier, axis_value, sized
from mofq.decision.measured.measurement import Measured
from mofq.decision.measured.proved_budget import prove
from mofq.decision.prediction import error_of
from mofq.decision.problem import IntArray
from mofq.evidence.table import Table
from mofq.exceptions import BudgetError
from scripts.bench.interval_recipes import MeasuredText, restricted, weight_bits
from scripts.shared.command import print_markdown

#: Budgets are spread over these by their logarithm [nats per token].
_LEAST, _MOST = 0.002, 0.2
#: Points of the frontier that are smaller by this share than what was proved are looked at, if
#: not all are.
_SMALLER = 0.06

_SPACES: dict[str, Callable[[str], bool]] = {
    "all": lambda scheme: True,
    "4 to 8 bits": lambda scheme: weight_bits(scheme) >= 4,
}


def print_budgets(table: Table, text: MeasuredText, *, count: int, points: int | None) -> None:
    """One row for each space and budget: sizes in bits per weight, KL in nats per token.

    *At most* is measured KL and two standard errors; *best* the smallest recipe of which that is
    within the budget, of the frontier's points, the predicted recipe and the proved one.

    Args:
        table: That recipes are searched in.
        text: They are measured on.
        count: Of budgets, in each space.
        points: Of the frontier below each proved recipe that are measured; None: all there are.
    """
    rows = []
    for name, is_wanted in _SPACES.items():
        problem = restricted(table, is_wanted)
        frontier = solve_frontier(problem)
        for limit in np.geomspace(_LEAST, _MOST, count).tolist():
            if row := _budget_row(problem, frontier, text, limit, points):
                rows.append([name, *row])
    heads = ("schemes", "budget", "predicted", "measures", "kept", "proved", "measures", "at most")
    print_markdown((*heads, "recipes run", "best", "larger by"), rows)


def _budget_row(
    problem: Problem, frontier: Frontier, text: MeasuredText, limit: float, points: int | None
) -> list[str] | None:
    """None where no recipe is predicted to keep the budget."""

    def measure(choice_F: IntArray) -> Measured:
        label = f"budget {limit:.4g}, {problem.axis_of(choice_F)} bytes"
        return Measured(choice_F, text.measure(label, problem.schemes_of(choice_F)).windows)

    def solve_at(size: int) -> IntArray:
        return choose(problem, sized(problem, Budgets(), size)).choice_F

    try:
        predicted = measure(choose(problem, Budgets(max_kl=limit)).choice_F)
    except BudgetError:
        return None
    bits = f"{axis_value(problem, predicted.choice_F):.3f}"
    is_kept = "yes" if predicted.kl.value <= limit else "NO"
    row = [f"{limit:.4f}", bits, f"{predicted.kl.value:.4f}", is_kept]
    tried = prove(
        frontier,
        limit,
        solve_at=solve_at,
        size_of=problem.axis_of,
        measure=measure,
        model=error_of(problem),
    )
    keeping = [one for one in tried if one.kl.upper <= limit]
    if not keeping:
        return [*row, "none", "", "", str(len(tried)), "", ""]
    found = min(keeping, key=lambda one: problem.axis_of(one.choice_F))
    size = problem.axis_of(found.choice_F)
    smaller = [measure(frontier.choice_KF[k]) for k in _smaller(frontier, size, points)]
    best = min(
        problem.axis_of(one.choice_F)
        for one in (found, predicted, *smaller)
        if one.kl.upper <= limit
    )
    proved = [f"{axis_value(problem, found.choice_F):.3f}", f"{found.kl.value:.4f}"]
    upper = f"{found.kl.upper:.4f}"
    return [
        *row,
        *proved,
        upper,
        str(len(tried)),
        f"{8 * best / problem.weights:.3f}",
        f"{size / best - 1:.1%}",
    ]


def _smaller(frontier: Frontier, size: int, points: int | None) -> Sequence[int]:
    """Points of the frontier that are smaller than a size; all, or some a little smaller."""
    below = np.flatnonzero(frontier.bytes_K < size)
    if points is None:
        return [int(k) for k in below]
    near = below[frontier.bytes_K[below] >= (1 - _SMALLER) * size]
    if not len(near):
        return []
    chosen = np.linspace(0, len(near) - 1, min(points, len(near)))
    return [int(k) for k in near[chosen.round().astype(int)]]
