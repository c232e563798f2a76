"""From a table and a study of two objectives to a recipe and the measured frontier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mofq.decision.choice import Decision, decide
from mofq.decision.measured import (
    Evaluate,
    decide_again,
    measured_by,
    recipe_choice,
    shown,
    with_measured,
)
from mofq.decision.request import Request, request_problem
from mofq.decision.solvers import Budgets, Problem, solve_frontier
from mofq.decision.solvers.optuna import enqueue, uniform_starts
from mofq.decision.solvers.pareto import (
    OBJECTIVES,
    FrontPoint,
    measured_front,
    measured_trials,
    run_front,
)
from mofq.decision.solvers.problem import IntArray
from mofq.decision.solvers.refine import (
    Measured,
    Progress,
    fixed_budgets,
    is_less,
    paired,
    uniform_candidates,
)
from mofq.decision.solvers.sampler import START
from mofq.decision.solvers.study_storage import joined_study
from mofq.decision.solvers.ties import TIE_STDERRS
from mofq.decision.study import FRONTIER, StudyPlan, dashboard_url, frontier_start, study_name
from mofq.decision.timing import request_budgets
from mofq.evidence.table import Table

#: Points of the frontier that a study starts from, and whose sizes its trials keep.
_SIZES = 6


def decide_on_front(
    table: Table,
    request: Request,
    *,
    evaluate: Evaluate,
    plan: StudyPlan,
    progress: Progress | None = None,
) -> tuple[Decision, tuple[FrontPoint, ...]]:
    """Measure recipes of many sizes, from the smallest to the budget's, in one study.

    Args:
        table: From `mofq measure`.
        request: Budgets, which every recipe keeps; the solver is not looked at.
        evaluate: The objective, of the table's model.
        plan: The study.
        progress: Called with trials complete, and wanted.

    Returns:
        The best recipe within the budgets, never worse than the exact solver's; and all
        recipes that no other beats in measured KL and size, smallest first.

    Raises:
        MofqError: As `decide`, as the objective, and where the storage cannot be opened.
    """
    decision = decide(table, replace(request, solver="exact"))
    problem = request_problem(table, request)
    start_F = recipe_choice(problem, decision.recipe)
    budgets = fixed_budgets(problem, request_budgets(table, problem, request), start_F)
    starts = front_starts(problem, budgets, start_F)
    name = f"{study_name(table, request, plan)} KL and bits"
    with joined_study(plan.storage, name, objectives=OBJECTIVES) as study:
        enqueue(study, problem, starts)
        run_front(
            study,
            problem,
            budgets,
            start_F,
            sizes=_sizes(problem, starts),
            measure=measured_by(table, evaluate),
            trials=max(plan.trials, len(starts)),
            seed=plan.seed,
            progress=progress,
        )
        front, measured = measured_front(study, problem), measured_trials(study, problem)
    start, best = _start_and_best(measured, start_F)
    decision = decide_again(table, request, decision, best.choice_F)
    trials = len(measured)
    decision = with_measured(decision, best, text_sha256=plan.text_sha256, trials=trials)
    note = (
        f"{trials} recipes measured, {len(front)} of them on the frontier; at the budget "
        f"{shown(start.kl)} became {shown(best.kl)} nats per token. "
        f"Look at them with: optuna-dashboard {dashboard_url(plan.storage)}"
    )
    return _by_optuna(decision, plan, note), front


def _sizes(problem: Problem, starts: Mapping[str, IntArray]) -> list[int]:
    kept = [one for name, one in starts.items() if name.startswith(FRONTIER) or name == START]
    return sorted({problem.axis_of(choice_F) for choice_F in kept})


def _start_and_best(
    measured: Mapping[int, Measured], start_F: IntArray
) -> tuple[Measured, Measured]:
    """The exact solver's recipe, and the best; the same where that is not better beyond noise."""
    start = next(one for one in measured.values() if (one.choice_F == start_F).all())
    best = min(measured.values(), key=lambda one: one.kl.value)
    if not is_less(paired(start.windows, best.windows), TIE_STDERRS):
        best = start
    return start, best


def _by_optuna(decision: Decision, plan: StudyPlan, note: str) -> Decision:
    made_by: dict[str, Any] = {**decision.recipe.made_by, "solver": "optuna", "seed": plan.seed}
    recipe = replace(decision.recipe, made_by=made_by)
    return replace(decision, recipe=recipe, notes=(*decision.notes, note))


def front_starts(problem: Problem, budgets: Budgets, start_F: IntArray) -> dict[str, IntArray]:
    """The recipe, points of the frontier from the smallest on, and uniform schemes.

    Returns:
        Name -> choice, no two the same.
    """
    frontier = solve_frontier(problem, budgets)
    starts = {START: start_F}
    for k in np.unique(np.linspace(0, len(frontier.bytes_K) - 1, _SIZES).round().astype(int)):
        starts[frontier_start(problem, int(frontier.bytes_K[k]))] = frontier.choice_KF[k]
    starts |= uniform_starts(uniform_candidates(problem, budgets, start_F))
    seen: dict[bytes, str] = {}
    for name, choice_F in starts.items():
        seen.setdefault(choice_F.tobytes(), name)
    return {name: starts[name] for name in seen.values()}
