"""From a table, budgets and a study of measured recipes to a recipe: ``--solver optuna``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mofq.decision.budgets import Budgets
from mofq.decision.decision import Decision, decide
from mofq.decision.frontier import solve_frontier
from mofq.decision.measured.measurement import (
    Evaluate,
    decide_again,
    fixed_budgets,
    measured_by,
    shown,
    uniform_candidates,
    uniform_note,
    with_measured,
)
from mofq.decision.measured.sampler import START
from mofq.decision.measured.study_storage import joined_study
from mofq.decision.measured.trials import (
    UNIFORM,
    FrontierTrial,
    Searched,
    check_trial,
    enqueue,
    measured_frontier,
    run_trials,
    search_result,
)
from mofq.decision.problem import IntArray, Problem
from mofq.decision.request import Request
from mofq.evidence.table import Table
from mofq.files.progress import Progress

#: Points of the frontier that a study of the KL alone starts from, beside the recipe.
_LARGEST_STARTS = 3
#: Those along the whole frontier, whose sizes the trials keep where size is an objective too.
_SPREAD_STARTS = 6
_FRONTIER = "frontier "


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """Where trials are kept, and how many are wanted."""

    storage: str  #: see `joined_study`
    text_sha256: str  #: of the objective's text
    tokens: int  #: of it
    sequence_length: int
    device: str
    trials: int  #: finished ones, those of earlier runs included
    seed: int
    bos: bool = False  #: whether its windows begin with it
    with_size: bool = False  #: whether size is a second objective
    trial: int | None = None  #: whose recipe is taken; None: the best within the budget


def study_name(table: Table, request: Request, plan: StudyPlan) -> str:
    """What a study is called: the model, and a hash of all that its values depend on.

    So a second run goes on where the first stopped, and another budget, text or table in the
    same storage has a study of its own.
    """
    content: dict[str, Any] = {
        "table": table.sha256,
        "request": _noted(request),
        "text": plan.text_sha256,
        "tokens": plan.tokens,
        "sequence_length": plan.sequence_length,
        "device": plan.device,
    }
    if plan.bos:
        content["bos"] = True
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    name = f"{table.header.model_name} {digest.hexdigest()[:12]}"
    return f"{name} KL and bits" if plan.with_size else name


def _noted(request: Request) -> dict[str, Any]:
    """A request; without what it leaves out as before there was that, so that studies go on."""
    content = asdict(request)
    if request.corpus_weights is None:
        del content["corpus_weights"]
    if not request.constraints:
        del content["constraints"]
    if request.budgets.max_active_bits is None:
        del content["budgets"]["max_active_bits"]
    return content


@dataclass(frozen=True, slots=True, eq=False)
class StudyDecision:
    """A decision, and the frontier that was measured on the way."""

    decision: Decision
    frontier: tuple[FrontierTrial, ...]  #: smallest first; empty where size is no objective


def decide_in_study(
    table: Table,
    request: Request,
    *,
    evaluate: Evaluate,
    plan: StudyPlan,
    progress: Progress | None = None,
) -> StudyDecision:
    """Decide, then measure recipes around the decision until a study has enough trials.

    Any number of processes may do so with one storage; each returns the same recipe, but
    for trials that others still finish.

    Args:
        table: From `mofq measure`.
        request: Budgets and how to meet them; the solver is not looked at.
        evaluate: The objective, of the table's model.
        plan: The study; with size as a second objective, recipes of many sizes are measured,
            from the smallest to the budget's.
        progress: Called with ``"trials"``, those finished, and wanted.

    Returns:
        The best recipe that was measured; the exact solver's where none is better beyond noise;
        or that of the plan's trial.
        In a study of the KL alone, a uniform scheme where that is as good, and a note says so.

    Raises:
        MofqError: As `decide`, as the objective, and where the storage cannot be opened.
    """
    decision = decide(table, replace(request, solver="exact"))
    problem, start_F = decision.problem, decision.choice_F
    budgets = fixed_budgets(problem, decision.budgets, start_F)
    starts = study_starts(problem, budgets, start_F, along_frontier=plan.with_size)
    name, objectives = study_name(table, request, plan), 2 if plan.with_size else 1
    with joined_study(plan.storage, name, objectives=objectives) as study:
        if plan.trial is not None:
            check_trial(study, problem, plan.trial)  # before anything is measured
        enqueue(study, problem, starts)
        run_trials(
            study,
            problem,
            budgets,
            start_F,
            measure=measured_by(table, evaluate),
            trials=max(plan.trials, len(starts)),
            sizes=start_sizes(problem, starts) if plan.with_size else None,
            seed=plan.seed,
            progress=progress,
        )
        found = search_result(study, problem, ties=request.ties, trial=plan.trial)
        frontier = measured_frontier(study, problem) if plan.with_size else ()
    decision = with_measured(
        decide_again(table, request, decision, found.best.choice_F),
        found.best,
        text_sha256=plan.text_sha256,
        trials=found.finished,
    )
    made_by: dict[str, Any] = {**decision.recipe.made_by, "solver": "optuna", "seed": plan.seed}
    recipe = replace(decision.recipe, made_by=made_by)
    notes = (*decision.notes, *_notes(found, frontier, plan))
    return StudyDecision(replace(decision, recipe=recipe, notes=notes), frontier)


def study_starts(
    problem: Problem, budgets: Budgets, start_F: IntArray, *, along_frontier: bool = False
) -> dict[str, IntArray]:
    """What a study measures first: the recipe, points of the frontier, and uniform schemes.

    Args:
        problem: What may be chosen.
        budgets: That all of them keep.
        start_F: The recipe.
        along_frontier: Points from the smallest on; else those just below the recipe.

    Returns:
        Name -> choice, no two the same.
    """
    frontier = solve_frontier(problem, budgets)
    last = len(frontier.bytes_K) - 1
    numbers = np.arange(last, max(last - _LARGEST_STARTS, -1), -1)
    if along_frontier:
        numbers = np.unique(np.linspace(0, last, _SPREAD_STARTS).round().astype(int))
    starts = {START: start_F}
    for k in numbers:
        starts[_frontier_start(problem, int(frontier.bytes_K[k]))] = frontier.choice_KF[k]
    for name, uniform_F in uniform_candidates(problem, budgets, start_F).items():
        starts[f"{UNIFORM}{name}"] = uniform_F
    seen: dict[bytes, str] = {}
    for name, choice_F in starts.items():
        seen.setdefault(choice_F.tobytes(), name)
    return {name: starts[name] for name in seen.values()}


def start_sizes(problem: Problem, starts: Mapping[str, IntArray]) -> list[int]:
    """The sizes of the recipe and of the points of the frontier among some starts [bytes]."""
    kept = [one for name, one in starts.items() if name.startswith(_FRONTIER) or name == START]
    return sorted({problem.axis_of(choice_F) for choice_F in kept})


def _frontier_start(problem: Problem, size: int) -> str:
    """What a study calls the point of the frontier at a size on its axis."""
    if problem.kv_tokens:
        return f"{_FRONTIER}{size} bytes"
    return f"{_FRONTIER}{8 * size / problem.weights:.4f} bits"


def _notes(found: Searched, frontier: tuple[FrontierTrial, ...], plan: StudyPlan) -> list[str]:
    what = f"{found.given_up} of them given up early:"
    if plan.with_size:
        what = f"{len(frontier)} of them on the frontier; at the budget"
    became = f"{what} {shown(found.start.kl)} became {shown(found.best.kl)} nats per token"
    if plan.trial is not None:
        became = f"of which trial {plan.trial} is taken: {shown(found.best.kl)} nats per token"
    notes = [
        f"{found.finished} recipes measured, {became}. "
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
