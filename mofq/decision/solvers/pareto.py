"""Measured KL and size as the two objectives of one Optuna study.

Size is true bits per weight; where a context's KV cache counts as size, the bytes of the
checkpoint and that cache together.

The study starts from recipes along the whole frontier. Each further trial takes one of their
sizes in turn, and `thompson` proposes what lies around the best recipe that was measured at no
more than this size. Optuna gives up no trial of a study with several objectives, so every
recipe is measured in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mofq.decision.solvers.budgets import Budgets, budget_rows
from mofq.decision.solvers.frontier import axis_value, sized
from mofq.decision.solvers.optuna import quiet
from mofq.decision.solvers.problem import IntArray, Problem
from mofq.decision.solvers.refine import Measure, Measured, Progress, paired, require_windows
from mofq.decision.solvers.sampler import (
    START,
    Sampler,
    is_allowed,
    needs_start,
    propose_new,
    set_sizes,
    study_space,
)
from mofq.decision.solvers.thompson import Observation

#: A study of this module minimises KL, then size.
OBJECTIVES = 2


@dataclass(frozen=True, slots=True, eq=False)
class FrontPoint:
    """A measured recipe that no other of the study beats in both objectives."""

    measured: Measured
    size: float  #: in the study's second objective, `axis_value`
    trial: int  #: its number in the study


def run_front(
    study: Study,
    problem: Problem,
    budgets: Budgets,
    start_F: IntArray,
    *,
    sizes: Sequence[int],
    measure: Measure,
    trials: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Measure until a study of two objectives has so many complete trials.

    Args:
        study: With starts queued, `START` among them.
        problem: What may be chosen.
        budgets: That every recipe keeps. Not ``max_kl``.
        start_F: The start, should it have got lost.
        sizes: Of ``Problem.axis_of``; each proposal keeps one of them [bytes].
        measure: The objective.
        trials: Complete ones, those that are there already included.
        seed: Of the proposals, beside the number of the trial.
        progress: Called after each trial with those complete, and wanted.

    Raises:
        MofqError: The objective has one window only, which has no error bar.
    """
    next_choice = partial(_next_choice, problem, budgets, sizes, seed)
    study.sampler = Sampler(problem, budgets, next_choice)
    rows = budget_rows(problem, budgets)
    schemes = study_space(problem, budgets)

    def objective(trial: Trial) -> tuple[float, float]:
        chosen = {g: str(trial.suggest_categorical(g, d.choices)) for g, d in schemes.items()}
        choice_F = problem.choice_of(chosen)
        if not is_allowed(problem, rows, choice_F):
            raise optuna.TrialPruned("over the budget")  # queued by hand
        windows = list(measure(chosen))
        require_windows(windows)
        trial.set_user_attr("recipe", chosen)
        set_sizes(trial, problem, choice_F)
        trial.set_user_attr("windows", windows)
        return math.fsum(windows) / len(windows), float(axis_value(problem, choice_F))

    with quiet():
        while len(measured_trials(study, problem)) < trials or _start(study, problem) is None:
            if _start(study, problem) is None and not _waiting(study):
                study.enqueue_trial(problem.schemes_of(start_F), user_attrs={"origin": START})
            study.optimize(objective, n_trials=1)
            if progress is not None:
                progress(min(len(measured_trials(study, problem)), trials), trials)


def measured_trials(study: Study, problem: Problem) -> dict[int, Measured]:
    """Number -> recipe and windows, of every complete trial."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {trial.number: _measured(problem, trial) for trial in complete}


def measured_front(study: Study, problem: Problem) -> tuple[FrontPoint, ...]:
    """The recipes that no other beats in KL and in size, smallest first."""
    points = [
        FrontPoint(one, float(axis_value(problem, one.choice_F)), number)
        for number, one in measured_trials(study, problem).items()
    ]
    points.sort(key=lambda one: (one.size, one.measured.kl.value, one.trial))
    front: list[FrontPoint] = []
    for point in points:
        if not front or point.measured.kl.value < front[-1].measured.kl.value:
            front.append(point)
    return tuple(front)


def _measured(problem: Problem, trial: FrozenTrial) -> Measured:
    windows = tuple(float(value) for value in trial.user_attrs["windows"])
    return Measured(problem.choice_of(trial.user_attrs["recipe"]), windows)


def _start(study: Study, problem: Problem) -> Measured | None:
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.user_attrs.get("origin") == START:
            return _measured(problem, trial)
    return None


def _waiting(study: Study) -> bool:
    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _next_choice(
    problem: Problem,
    budgets: Budgets,
    sizes: Sequence[int],
    seed: int,
    study: Study,
    number: int,
) -> IntArray:
    """What lies around the best recipe of one size after another."""
    start = _start(study, problem)
    if start is None:
        raise needs_start()
    measured = list(measured_trials(study, problem).values())
    size = sizes[number % len(sizes)]
    fitting = [one for one in measured if problem.axis_of(one.choice_F) <= size]
    best = min(fitting, key=lambda one: one.kl.value, default=None)
    if best is None:  # the recipe of this size got lost: the start of another stands in
        best = min(measured, key=lambda one: problem.axis_of(one.choice_F))
        size = problem.axis_of(best.choice_F)
    return propose_new(
        problem,
        sized(problem, budgets, size),
        start.choice_F,
        best_F=best.choice_F,
        observations=[
            Observation(one.choice_F, paired(start.windows, one.windows))
            for one in measured
            if one.choice_F.tobytes() != start.choice_F.tobytes()
        ],
        tried={one.choice_F.tobytes() for one in measured},
        seed=(seed, number),
    )
