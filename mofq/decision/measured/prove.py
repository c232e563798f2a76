"""A budget in nats that is measured to be kept: ``--max-kl`` with ``--model`` and ``--text``.

Along the frontier the measured KL follows the predicted one, times a factor that changes slowly. So
the recipe that is predicted to meet the budget is measured, and the next is taken where a secant
through what was measured, by the logarithms of both, meets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from mofq.decision.budgets import Budgets, budget_constraints, check_kl_unit
from mofq.decision.decision import Decision, decide
from mofq.decision.from_table import request_problem
from mofq.decision.frontier import Frontier, sized, solve_frontier
from mofq.decision.measured.measurement import (
    Evaluate,
    Measured,
    require_windows,
    shown,
    with_measured,
)
from mofq.decision.model_error import ModelError
from mofq.decision.prediction import INTERVAL_STDERRS, error_of
from mofq.decision.problem import KL_UNIT
from mofq.decision.request import Request
from mofq.decision.result import budget_figures
from mofq.decision.timing import request_budgets, time_budget_figures
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


def measured_upper(measured: Measured) -> float:
    """Measured KL and two standard errors: what a budget is held against [nats per token]."""
    return measured.kl.value + INTERVAL_STDERRS * (measured.kl.stderr or 0.0)


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
    decisions: list[Decision] = []

    def measure(asked: Request, total: int) -> Measured:
        decision = decide(table, asked, problem=problem)
        windows = tuple(evaluate(decision.recipe))
        require_windows(windows)
        decisions.append(decision)
        if progress is not None:
            progress("prove", len(decisions), total)
        return Measured(decision.choice_F, windows)

    def measure_at(size: int) -> Measured:
        own = sized(problem, free.budgets, size)
        return measure(replace(free, budgets=own), MOST_MEASURED)

    if request.budgets.minimises_bytes:
        frontier = solve_frontier(problem, request_budgets(table, problem, free))
        measured = prove(frontier, limit, measure_at=measure_at, model=error_of(problem))
    else:
        measured = [measure(free, 1)]
    pairs = list(zip(measured, decisions, strict=True))
    within = [pair for pair in pairs if measured_upper(pair[0]) <= limit]
    if not within:
        least = min(measured, key=measured_upper)
        raise BudgetError(
            f"{option('max_kl')}: asked for {limit:.4g} nats per token; the best of "
            f"{len(measured)} recipes that were measured has {shown(least.kl)}, with two standard "
            f"errors {measured_upper(least):.4g}. Allow more, offer finer schemes, or measure on "
            f"more {option('tokens')}."
        )
    found, decision = min(within, key=lambda pair: problem.size_of(pair[0].choice_F))
    recipe = replace(
        decision.recipe,
        # As it was asked for, and not the size at which it was found.
        budget=budget_figures(request) | time_budget_figures(request),
        made_by={**decision.recipe.made_by, "text_tokens": tokens},
    )
    note = (
        f"Measured on {tokens} tokens: {shown(found.kl)} nats per token, with two standard errors "
        f"{measured_upper(found):.4g}, is within {limit:.4g}; {len(measured)} recipes were "
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
    measure_at: Callable[[int], Measured],
    model: ModelError,
    most: int = MOST_MEASURED,
) -> list[Measured]:
    """Measure recipes along a frontier until one just keeps a budget.

    Args:
        frontier: In nats, under the other budgets.
        limit: What measured KL plus two standard errors must not exceed [nats per token].
        measure_at: From a size on the frontier's axis to the recipe of that size, measured.
        model: What predictions are off by.
        most: Recipes at most.

    Returns:
        All that were measured, in their order.
    """
    error_K = np.maximum(frontier.error_K, np.finfo(np.float64).tiny)
    predicted_K = np.array([model.corrected(e) for e in error_K.tolist()])
    fails, keeps = -1, len(error_K)  # the largest that is over, the smallest that is within
    aim = limit * _FIRST_AIM
    trials: dict[int, Measured] = {}
    while len(trials) < most and keeps - fails > 1:
        k = int(np.searchsorted(-predicted_K, -aim))  # the smallest that is predicted within
        k = min(max(k, fails + 1), keeps - 1)
        trial = trials[k] = measure_at(int(frontier.bytes_K[k]))
        if measured_upper(trial) <= limit:
            keeps = k
            if measured_upper(trial) >= _NEAR * limit:
                break
        else:
            fails = k
        if fails >= 0 and keeps < len(error_K):
            low, high = frontier.bytes_K[[fails, keeps]]
            if high - low <= _SAME_SIZE * high:
                break
        caution = _CAUTION ** len(trials) if keeps == len(error_K) else 1.0
        points = [(float(predicted_K[n]), measured_upper(one)) for n, one in trials.items()]
        aim = secant(points, limit * _AIM * caution)
    return list(trials.values())


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
    logs = [(math.log(x), math.log(max(y, tiny))) for x, y in points]
    wanted = math.log(max(limit, tiny))
    nearest = sorted(logs, key=lambda one: abs(one[1] - wanted))[:2]
    slope = 1.0
    for (x, y), (other_x, other_y) in pairwise(nearest):
        if x != other_x:
            slope = min(max((other_y - y) / (other_x - x), _SLOPES[0]), _SLOPES[1])
    x, y = nearest[0]
    return math.exp(min(x + (wanted - y) / slope, _LARGEST_LOG))
