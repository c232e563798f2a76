"""A budget in nats that is measured to be kept: ``--max-kl`` with ``--model`` and ``--text``.

Along the frontier the measured KL follows the predicted one, times a factor that changes slowly. So
the recipe that is predicted to meet the budget is measured, and the next is taken where a secant
through what was measured, by the logarithms of both, meets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mofq.decision.budgets import Budgets, budget_constraints, check_kl_unit
from mofq.decision.decision import Decision, decide
from mofq.decision.from_table import request_problem
from mofq.decision.frontier import Frontier, sized, solve_frontier
from mofq.decision.make_recipe import budget_figures
from mofq.decision.measured.measurement import (
    Evaluate,
    Measured,
    require_windows,
    shown,
    with_measured,
)
from mofq.decision.model_error import ModelError
from mofq.decision.prediction import error_of
from mofq.decision.problem import KL_UNIT, FloatArray, IntArray
from mofq.decision.request import Request
from mofq.decision.timing import request_budgets
from mofq.evidence.table import Table
from mofq.exceptions import BudgetError, option
from mofq.files.progress import Progress

#: Recipes that are measured at most.
MOST_MEASURED = 6
#: A recipe that measures so much of the budget is near enough, and what is aimed at.
_NEAR, _AIM = 0.98, 0.99
#: Of the first, for the standard errors of the measurement; and of every further one while none
#: was within the budget.
_FIRST_AIM, _CAUTION = 0.93, 0.97
#: Sizes that differ by less than this share are one.
_SAME_SIZE = 0.001
#: Of the logarithm of measured over that of predicted, between neighbours of the frontier.
_SLOPES = (0.5, 2.0)
#: Of what `secant` returns, which points at 0 may send anywhere.
_LARGEST_LOG = 700.0


def decide_proved(
    table: Table,
    request: Request,
    *,
    evaluate: Evaluate,
    text_sha256: str,
    tokens: int,
    progress: Progress | None = None,
) -> Decision:
    """Decide under a budget in nats, and let measurements say what it takes.

    Args:
        table: From `mofq measure`, in nats.
        request: With ``max_kl``. With a budget of size too, the recipe of least error under that
            is measured, and no other.
        evaluate: The objective, of the table's model.
        text_sha256: Of the objective's text, for the recipe.
        tokens: Of it that are compared.
        progress: Called with ``"prove"``, recipes measured, and all that may be.

    Returns:
        The smallest recipe of those measured whose KL plus two standard errors is within the
        budget. The recipe notes the text, its tokens and how many were measured.

    Raises:
        BudgetError: None is; the message says what the best one measured. Or errors are not in
            nats, or the budget is no number of at least 0.
        MofqError: As `decide`, and as the objective.
    """
    limit = request.budgets.max_kl
    assert limit is not None
    free = replace(request, budgets=replace(request.budgets, max_kl=None))
    problem = request_problem(table, request)
    # `decide` will not see this budget.
    budget_constraints(problem, Budgets(max_kl=limit))
    if problem.unit != KL_UNIT:
        check_kl_unit(problem)
    solved: dict[bytes, Decision] = {}
    decisions: list[Decision] = []

    def solve(asked: Request) -> IntArray:
        decision = decide(table, asked, problem=problem)
        solved[decision.choice_F.tobytes()] = decision
        return decision.choice_F

    def measure(choice_F: IntArray, total: int = MOST_MEASURED) -> Measured:
        decision = solved[choice_F.tobytes()]
        windows = tuple(evaluate(decision.recipe))
        require_windows(windows)
        decisions.append(decision)
        if progress is not None:
            progress("prove", len(decisions), total)
        return Measured(choice_F, windows)

    if request.budgets.minimises_bytes:
        measured = prove(
            solve_frontier(problem, request_budgets(table, problem, free)),
            limit,
            solve_at=lambda size: solve(replace(free, budgets=sized(problem, free.budgets, size))),
            size_of=problem.axis_of,
            measure=measure,
            model=error_of(problem),
        )
    else:
        measured = [measure(solve(free), total=1)]
    pairs = list(zip(measured, decisions, strict=True))
    within = [pair for pair in pairs if pair[0].kl.upper <= limit]
    if not within:
        least = min(measured, key=lambda one: one.kl.upper)
        raise BudgetError(
            f"{option('max_kl')}: asked for {limit:.4g} nats per token; the best of "
            f"{len(measured)} recipes that were measured has {shown(least.kl)}, with two standard "
            f"errors {least.kl.upper:.4g}. Allow more, offer finer schemes, or measure on "
            f"more {option('tokens')}."
        )
    found, decision = min(within, key=lambda pair: problem.size_of(pair[0].choice_F))
    recipe = replace(
        decision.recipe,
        # As it was asked for, and not the size at which it was found.
        budget=budget_figures(request),
        made_by={**decision.recipe.made_by, "text_tokens": tokens},
    )
    note = (
        f"Measured on {tokens} tokens: {shown(found.kl)} nats per token, with two standard errors "
        f"{found.kl.upper:.4g}, is within {limit:.4g}; {len(measured)} recipes were "
        f"measured."
    )
    proved = with_measured(
        replace(decision, recipe=recipe), found, text_sha256=text_sha256, trials=len(measured)
    )
    return replace(proved, notes=(*decision.notes, note))


def prove(
    frontier: Frontier,
    limit: float,
    *,
    solve_at: Callable[[int], IntArray],
    size_of: Callable[[IntArray], int],
    measure: Callable[[IntArray], Measured],
    model: ModelError,
) -> list[Measured]:
    """Measure recipes along a frontier, and between its points, until one just keeps a budget.

    Args:
        frontier: In nats, under the other budgets.
        limit: What measured KL plus two standard errors must not exceed [nats per token].
        solve_at: The best choice of at most a size on the frontier's axis [bytes].
        size_of: A choice's size on that axis [bytes].
        measure: Measures a choice.
        model: What predictions are off by.

    Returns:
        All that were measured, at most `MOST_MEASURED`, in their order.
    """
    line = _Interpolated(frontier.bytes_K, np.array([model.corrected(e) for e in frontier.error_K]))
    # The largest size that is over and the smallest that is within, so far; none at first.
    fails, keeps = line.least - 1, line.most + 1
    aim = limit * _FIRST_AIM
    tried: list[Measured] = []
    points: list[tuple[float, float]] = []  # predicted and measured
    step = 1  # doubles where a little more size has no other recipe
    while len(tried) < MOST_MEASURED and keeps - fails > _near_sizes(keeps, line):
        size = min(max(line.size_at(aim), fails + step), keeps - 1)
        choice_F = solve_at(size)
        if any((one.choice_F == choice_F).all() for one in tried):
            # What was over is still the best of this size.
            fails, step = size, max(2 * step, _near_sizes(size, line))
            continue
        step = 1
        trial = measure(choice_F)
        upper = trial.kl.upper
        tried.append(trial)
        points.append((line.predicted_at(size_of(choice_F)), upper))
        if upper <= limit:
            keeps = size_of(choice_F)
            if upper >= _NEAR * limit:
                break
        else:
            fails = size
        caution = 1.0 if keeps <= line.most else _CAUTION ** len(tried)
        aim = secant(points, limit * _AIM * caution)
    return tried


@dataclass(frozen=True, slots=True, eq=False)
class _Interpolated:
    """The frontier; what it predicts between two of its points is on the line through them."""

    size_K: IntArray  #: rises
    predicted_K: FloatArray  #: falls

    @property
    def least(self) -> int:
        return int(self.size_K[0])

    @property
    def most(self) -> int:
        return int(self.size_K[-1])

    def size_at(self, predicted: float) -> int:
        return math.ceil(np.interp(predicted, self.predicted_K[::-1], self.size_K[::-1]))

    def predicted_at(self, size: int) -> float:
        return float(np.interp(size, self.size_K, self.predicted_K))


def _near_sizes(keeps: int, line: _Interpolated) -> int:
    """How close two sizes are one; all are told apart while none is within the budget."""
    return max(1, int(_SAME_SIZE * keeps)) if keeps <= line.most else 1


def secant(points: Sequence[tuple[float, float]], limit: float) -> float:
    """The prediction at which the measured value is expected to be a limit.

    Args:
        points: Predicted and measured, at least one.
        limit: Of what is measured.

    Returns:
        By the line, in logarithms, through the two points whose measured values are nearest to
        the limit; through the only one, of slope 1.
    """
    tiny = float(np.finfo(np.float64).tiny)
    logs = [(math.log(max(x, tiny)), math.log(max(y, tiny))) for x, y in points]
    wanted = math.log(max(limit, tiny))
    nearest = sorted(logs, key=lambda one: abs(one[1] - wanted))[:2]
    slope = 1.0
    for (x, y), (other_x, other_y) in pairwise(nearest):
        if x != other_x:
            slope = min(max((other_y - y) / (other_x - x), _SLOPES[0]), _SLOPES[1])
    x, y = nearest[0]
    return math.exp(min(x + (wanted - y) / slope, _LARGEST_LOG))
