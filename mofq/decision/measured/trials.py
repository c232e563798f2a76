"""Recipes measured as the trials of one Optuna study, by any number of processes.

Every fusion group is a categorical parameter under its own name. The study starts from
recipes of the exact solver, and `thompson` proposes what lies around the best; Optuna keeps
the trials, gives hopeless ones up (its Wilcoxon test over windows) and shares them.

A study minimises the measured KL alone, or the KL and the size: true bits per weight, or where a
context's KV cache counts as size, the bytes of the checkpoint and that cache together. With two
objectives each further trial takes one of the sizes of the frontier in turn, and the best is the
best of no more than this size. Optuna gives up no trial of a study with several objectives, so
every recipe is then measured in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mofq.decision.budgets import Budgets, budget_constraints, keeps_all
from mofq.decision.frontier import axis_value, sized
from mofq.decision.measured.measurement import (
    Measure,
    Measured,
    is_less,
    paired,
    preferred_uniform,
    require_windows,
)
from mofq.decision.measured.sampler import (
    START,
    Sampler,
    propose_new,
    start_trial,
    study_space,
)
from mofq.decision.measured.study_storage import quiet
from mofq.decision.measured.thompson import Observation
from mofq.decision.problem import IntArray, Problem, usage
from mofq.exceptions import MofqError, option
from mofq.files.progress import Progress

#: What the origins of uniform recipes begin with.
UNIFORM = "uniform "
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """What a study found."""

    best: Measured  #: what is returned
    start: Measured
    uniform: str | None  #: the uniform scheme that is as good or better, and is `best` then
    finished: int  #: trials, those given up included
    given_up: int


@dataclass(frozen=True, slots=True, eq=False)
class FrontierTrial:
    """A measured recipe that no other of the study beats in KL and in size."""

    measured: Measured
    size: float  #: as `axis_value` has it
    trial: int  #: its number in the study


def enqueue(study: Study, problem: Problem, starts: Mapping[str, IntArray]) -> None:
    """Queue recipes to be measured first.

    Args:
        study: Those that it has measured or queued under the same name are not queued again.
        problem: Whose groups are the parameters.
        starts: Name -> choice. `START` must be among them.
    """
    known = {
        trial.user_attrs.get("origin")
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.FAIL
    }
    for name, choice_F in starts.items():
        if name not in known:
            study.enqueue_trial(problem.schemes_of(choice_F), user_attrs={"origin": name})


def run_trials(
    study: Study,
    problem: Problem,
    budgets: Budgets,
    start_F: IntArray,
    *,
    measure: Measure,
    trials: int,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Measure until a study has so many finished trials, whoever measures them.

    Of several processes each may finish the trial that it is at, so that there can be one
    more for each of the others.

    Args:
        study: With starts queued, `START` among them.
        problem: What may be chosen.
        budgets: That every recipe keeps. Not ``max_kl``.
        start_F: The start, should it have got lost.
        measure: The objective.
        trials: Finished ones, those that are there already included.
        sizes: Of ``Problem.axis_of``, where size is the second objective: each proposal keeps
            one of them [bytes].
        seed: Of the proposals, beside the number of the trial.
        progress: Called after each trial with ``"trials"``, those finished, and wanted.

    Raises:
        MofqError: The objective has one window only, which has no error bar.
    """

    def next_choice(study: Study, number: int) -> IntArray:
        size = sizes[number % len(sizes)] if sizes else None
        return _next_choice(study, problem, budgets, size=size, seed=(seed, number))

    study.sampler = Sampler(problem, budgets, next_choice)
    constraints = budget_constraints(problem, budgets)
    schemes = study_space(problem, budgets)

    def objective(trial: Trial) -> float | tuple[float, float]:
        chosen = {g: str(trial.suggest_categorical(g, d.choices)) for g, d in schemes.items()}
        choice_F = problem.choice_of(chosen)
        if not (keeps_all(constraints, choice_F) and problem.goes_together(choice_F)):
            raise optuna.TrialPruned("over the budget")  # queued by hand
        used = usage(problem, choice_F)
        trial.set_user_attr("recipe", chosen)
        trial.set_user_attr("bits_per_weight", used.bits_per_weight)
        if used.kv_bits is not None:
            trial.set_user_attr("kv_bits", used.kv_bits)
        windows: list[float] = []
        for window, value in enumerate(measure(chosen)):
            windows.append(value)
            if not sizes:
                trial.report(value, window)
                if trial.should_prune():
                    raise optuna.TrialPruned
        require_windows(windows)
        kl = math.fsum(windows) / len(windows)
        if not sizes:
            return kl
        trial.set_user_attr("windows", windows)  # several objectives cannot be reported
        return kl, float(axis_value(problem, choice_F))

    with quiet():
        while start_trial(study) is None or _finished(study) < trials:
            if start_trial(study) is None:
                _queue_lost_start(study, problem, start_F)
            study.optimize(objective, n_trials=1)
            if progress is not None:
                progress("trials", min(_finished(study), trials), trials)


def search_result(
    study: Study, problem: Problem, *, ties: bool = True, trial: int | None = None
) -> Searched:
    """The best recipe of a study, never worse than its start.

    Args:
        study: With a finished start.
        problem: Its groups are the parameters.
        ties: Whether a uniform scheme within noise is preferred; else only a better one.
        trial: Of which number; None: what follows.

    Returns:
        The trial of least mean KL where it is better than the start by more than two standard
        errors, paired window by window; else the start. Of a study of the KL alone, a uniform
        scheme instead where that is not beaten.

    Raises:
        MofqError: The trial that is asked for was not measured in full.
    """
    trials = study.get_trials(deepcopy=False, states=_FINISHED)
    measured = measured_trials(study, problem)
    first = start_trial(study)
    assert first is not None
    start = measured[first.number]
    best = min(_complete(study, measured).values(), key=lambda one: one.kl.value)
    if not is_less(paired(start.windows, best.windows)):
        best = start
    if trial is not None:
        check_trial(study, problem, trial)
        best = measured[trial]
    uniforms = {
        str(t.user_attrs["origin"]).removeprefix(UNIFORM): measured[t.number]
        for t in trials
        if str(t.user_attrs.get("origin", "")).startswith(UNIFORM) and t.number in measured
    }
    uniform = None
    if len(study.directions) == 1 and trial is None:
        same = (name for name, one in uniforms.items() if (one.choice_F == best.choice_F).all())
        uniform = next(same, None) or preferred_uniform(best, uniforms, ties=ties)
    return Searched(
        best if uniform is None else uniforms[uniform],
        start,
        uniform=uniform,
        finished=len(trials),
        given_up=sum(t.state == TrialState.PRUNED for t in trials),
    )


def check_trial(study: Study, problem: Problem, number: int) -> None:
    """Refuse a number of no trial that was measured in full.

    Raises:
        MofqError: The message names those that were.
    """
    complete = sorted(_complete(study, measured_trials(study, problem)))
    if number not in complete:
        has = f"it has {', '.join(map(str, complete))}" if complete else "it has none"
        raise MofqError(
            f"{option('trial', number)}: the study has no such trial that was measured in full; "
            f"{has}. A search with {option('multi_objective')} and the same {option('storage')}, "
            f"which by default lies beside {option('output')}, names those of the frontier."
        )


def measured_trials(study: Study, problem: Problem) -> dict[int, Measured]:
    """Number -> recipe and windows, of every finished trial that has any."""
    return {
        trial.number: Measured(problem.choice_of(trial.user_attrs["recipe"]), windows)
        for trial in study.get_trials(deepcopy=False, states=_FINISHED)
        if (windows := _windows(trial))
    }


def _complete(study: Study, measured: Mapping[int, Measured]) -> dict[int, Measured]:
    """Of what was measured, the trials that were not given up."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {one.number: measured[one.number] for one in trials if one.number in measured}


def measured_frontier(study: Study, problem: Problem) -> tuple[FrontierTrial, ...]:
    """The recipes that no other beats in KL and in size, smallest first."""
    points = [
        FrontierTrial(one, float(axis_value(problem, one.choice_F)), number)
        for number, one in measured_trials(study, problem).items()
    ]
    points.sort(key=lambda one: (one.size, one.measured.kl.value, one.trial))
    frontier: list[FrontierTrial] = []
    for point in points:
        if not frontier or point.measured.kl.value < frontier[-1].measured.kl.value:
            frontier.append(point)
    return tuple(frontier)


def _windows(trial: FrozenTrial) -> tuple[float, ...]:
    """What was measured; fewer than all where the trial was given up."""
    reported = trial.intermediate_values
    return tuple(trial.user_attrs.get("windows") or (reported[n] for n in sorted(reported)))


def _queue_lost_start(study: Study, problem: Problem, start_F: IntArray) -> None:
    """Queue the start again where the process that measured it is gone."""
    if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(problem.schemes_of(start_F), user_attrs={"origin": START})


def _finished(study: Study) -> int:
    return len(study.get_trials(deepcopy=False, states=_FINISHED))


def _next_choice(
    study: Study, problem: Problem, budgets: Budgets, *, size: int | None, seed: tuple[int, int]
) -> IntArray:
    """What lies around the best recipe so far, of those of no more than a size if there is one."""
    first = start_trial(study)
    if first is None:
        raise MofqError("the study has no start; begin it with `mofq search`.")
    measured = measured_trials(study, problem)
    start = measured[first.number]
    complete = list(_complete(study, measured).values())
    if size is not None:
        fitting = [one for one in complete if problem.axis_of(one.choice_F) <= size]
        if not fitting:  # the recipe of this size got lost: the start of another stands in
            fitting = [min(complete, key=lambda one: problem.axis_of(one.choice_F))]
            size = problem.axis_of(fitting[0].choice_F)
        complete, budgets = fitting, sized(problem, budgets, size)
    best = min(complete, key=lambda one: one.kl.value)
    every = study.get_trials(deepcopy=False)
    begun = [t for t in every if "recipe" in t.user_attrs and t.state != TrialState.FAIL]
    return propose_new(
        problem,
        budgets,
        start.choice_F,
        best_F=best.choice_F,
        observations=[
            Observation(one.choice_F, paired(start.windows, one.windows))
            for one in measured.values()
            if one is not start
        ],
        tried={problem.choice_of(t.user_attrs["recipe"]).tobytes() for t in begun},
        seed=seed,
    )
