"""From a table, budgets and a study of measured recipes to a recipe: ``--solver optuna``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from mofq.decision.choice import Decision, decide
from mofq.decision.measured import (
    Evaluate,
    decide_again,
    measured_by,
    recipe_choice,
    shown,
    uniform_note,
    with_measured,
)
from mofq.decision.request import Request, request_problem
from mofq.decision.solvers import Budgets, Problem, solve_frontier
from mofq.decision.solvers.optuna import (
    Searched,
    enqueue,
    run_trials,
    search_result,
    uniform_starts,
)
from mofq.decision.solvers.problem import IntArray
from mofq.decision.solvers.refine import Progress, fixed_budgets, uniform_candidates
from mofq.decision.solvers.sampler import START
from mofq.decision.solvers.study_storage import joined_study
from mofq.decision.timing import request_budgets
from mofq.evidence.table import Table

#: Points of the frontier that a study starts from, beside the recipe.
_FRONTIER_STARTS = 3
FRONTIER = "frontier "


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """Where trials are kept, and how many are wanted."""

    storage: str  #: see `open_study`
    text_sha256: str  #: of the objective's text
    tokens: int  #: of it
    sequence_length: int
    device: str = "cpu"
    trials: int = 60  #: finished ones, those of earlier runs included
    seed: int = 0


def study_name(table: Table, request: Request, plan: StudyPlan) -> str:
    """What a study is called: the model, and a hash of all that its values depend on.

    So a second run goes on where the first stopped, and another budget, text or table in the
    same storage has a study of its own.
    """
    content = {
        "table": table.sha256,
        "request": asdict(request),
        "text": plan.text_sha256,
        "tokens": plan.tokens,
        "sequence_length": plan.sequence_length,
        "device": plan.device,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    return f"{table.header.model_name} {digest.hexdigest()[:12]}"


def decide_in_study(
    table: Table,
    request: Request,
    *,
    evaluate: Evaluate,
    plan: StudyPlan,
    progress: Progress | None = None,
) -> Decision:
    """Decide, then measure recipes around the decision until a study has enough trials.

    Any number of processes may do so with one storage; each returns the same recipe, but
    for trials that others still finish.

    Args:
        table: From `mofq measure`.
        request: Budgets and how to meet them; the solver is not looked at.
        evaluate: The objective, of the table's model.
        plan: The study.
        progress: Called with trials finished, and wanted.

    Returns:
        The best recipe that was measured; the exact solver's where none is better beyond noise;
        a uniform scheme where that is as good, and a note says so.

    Raises:
        MofqError: As `decide`, as the objective, and where the storage cannot be opened.
    """
    decision = decide(table, replace(request, solver="exact"))
    problem = request_problem(table, request)
    start_F = recipe_choice(problem, decision.recipe)
    budgets = fixed_budgets(problem, request_budgets(table, problem, request), start_F)
    starts = study_starts(problem, budgets, start_F)
    with joined_study(plan.storage, study_name(table, request, plan)) as study:
        enqueue(study, problem, starts)
        run_trials(
            study,
            problem,
            budgets,
            start_F,
            measure=measured_by(table, evaluate),
            trials=max(plan.trials, len(starts)),
            seed=plan.seed,
            progress=progress,
        )
        found = search_result(study, problem, ties=request.ties)
    decision = with_measured(
        decide_again(table, request, decision, found.best.choice_F),
        found.best,
        text_sha256=plan.text_sha256,
        trials=found.finished,
    )
    made_by: dict[str, Any] = {**decision.recipe.made_by, "solver": "optuna", "seed": plan.seed}
    recipe = replace(decision.recipe, made_by=made_by)
    return replace(decision, recipe=recipe, notes=(*decision.notes, *_notes(found, plan)))


def study_starts(problem: Problem, budgets: Budgets, start_F: IntArray) -> dict[str, IntArray]:
    """What a study measures first: the recipe, the frontier just below it, uniform schemes.

    Returns:
        Name -> choice, no two the same.
    """
    frontier = solve_frontier(problem, budgets)
    starts = {START: start_F}
    points = zip(frontier.bytes_K[::-1].tolist(), frontier.choice_KF[::-1], strict=True)
    for size, choice_F in list(points)[:_FRONTIER_STARTS]:
        starts[frontier_start(problem, size)] = choice_F
    starts |= uniform_starts(uniform_candidates(problem, budgets, start_F))
    seen: dict[bytes, str] = {}
    for name, choice_F in starts.items():
        seen.setdefault(choice_F.tobytes(), name)
    return {name: starts[name] for name in seen.values()}


def frontier_start(problem: Problem, size: int) -> str:
    """What a study calls the point of the frontier at a size on its axis."""
    if problem.kv_tokens:
        return f"{FRONTIER}{size} bytes"
    return f"{FRONTIER}{8 * size / problem.weights:.4f} bits"


def _notes(found: Searched, plan: StudyPlan) -> list[str]:
    notes = [
        f"{found.finished} recipes measured, {found.given_up} of them given up early: "
        f"{shown(found.start.kl)} became {shown(found.best.kl)} nats per token. "
        f"Look at them with: optuna-dashboard {dashboard_url(plan.storage)}"
    ]
    if found.uniform is not None:
        notes.append(uniform_note(found.uniform, found.best))
    return notes


def dashboard_url(storage: str) -> str:
    """A storage as optuna-dashboard takes it, without a password."""
    if "://" not in storage:
        return f"sqlite:///{storage}" if storage.endswith(".db") else storage
    scheme, _, rest = storage.partition("://")
    login, at, host = rest.rpartition("@")
    return f"{scheme}://{login.partition(':')[0]}{at}{host}"
