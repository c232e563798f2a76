"""Many recipes measured in one Optuna study, by any number of processes.

Every fusion group is a categorical parameter under its own name. The study starts from
recipes of the exact solver, and `thompson` proposes what lies around the best; Optuna keeps
the trials, gives hopeless ones up (its Wilcoxon test over windows) and shares them.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from mofq.decision.solvers.budgets import Budgets, budget_rows
from mofq.decision.solvers.problem import IntArray, Problem
from mofq.decision.solvers.refine import (
    Measure,
    Measured,
    Progress,
    is_less,
    paired,
    preferred_uniform,
    require_windows,
)
from mofq.decision.solvers.sampler import (
    START,
    Sampler,
    is_allowed,
    needs_start,
    propose_new,
    set_sizes,
    start_trial,
    study_space,
)
from mofq.decision.solvers.thompson import Observation
from mofq.decision.solvers.ties import TIE_STDERRS
from mofq.exceptions import MofqError

_UNIFORM = "uniform "
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

#: A process that is silent for so long is dead, and its trial is queued again [seconds].
_HEARTBEAT, _GRACE = 30, 150
#: How long a process waits for another to leave the SQLite file [seconds].
_SQLITE_TIMEOUT = 120
SQLITE_SUFFIXES = (".db", ".sqlite", ".sqlite3")

#: A trial is given up where it is worse than the best with this probability of error.
_PRUNE_P = 0.05
_PRUNE_WINDOWS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """What a study found."""

    best: Measured  #: what is returned
    start: Measured
    uniform: str | None  #: the uniform scheme that is as good or better, and is `best` then
    finished: int  #: trials, those given up included
    given_up: int


def open_study(storage: str, name: str, *, objectives: int = 1) -> Study:
    """Open or begin a study.

    Args:
        storage: A URL as SQLAlchemy has it (``postgresql://…``, ``sqlite:///…``); the path of
            an SQLite file (``.db``, ``.sqlite``); or any other path, of a journal file.
        name: Of the study. What its trials' values depend on should be part of it.
        objectives: All minimised; with more than one no trial is given up.

    Returns:
        The study.

    Raises:
        MofqError: The storage cannot be opened.
    """
    try:
        with quiet():
            backend = _storage(storage)
            study = optuna.create_study(
                storage=backend,
                study_name=name,
                load_if_exists=True,
                directions=["minimize"] * objectives,
                pruner=optuna.pruners.WilcoxonPruner(
                    p_threshold=_PRUNE_P, n_startup_steps=_PRUNE_WINDOWS
                ),
            )
    except (SQLAlchemyError, ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MofqError(
            f"--storage {storage}: cannot be opened: {reason}. Give a path, or a URL whose server "
            f"runs and whose driver is installed (pip install psycopg[binary])."
        ) from error
    if isinstance(backend, RDBStorage):
        weakref.finalize(study, backend.engine.dispose)
    return study


def _storage(storage: str) -> BaseStorage:
    if "://" not in storage and Path(storage).suffix not in SQLITE_SUFFIXES:
        return JournalStorage(JournalFileBackend(storage))
    url = storage if "://" in storage else f"sqlite:///{storage}"
    is_sqlite = url.startswith("sqlite")
    database = RDBStorage(
        url,
        engine_kwargs={"connect_args": {"timeout": _SQLITE_TIMEOUT}} if is_sqlite else {},
        heartbeat_interval=_HEARTBEAT,
        grace_period=_GRACE,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
    )
    if is_sqlite:
        event.listen(database.engine, "connect", _without_fsync)
        database.engine.dispose()
    return database


def _without_fsync(connection: Any, _record: Any) -> None:
    # One commit for each parameter: waiting for the disk would take longer than the model.
    # A killed process loses nothing by it; a power cut may lose the study.
    connection.execute("PRAGMA synchronous = OFF")


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna reports every trial on stderr, where our progress bars are, and what we raise again.

    And it calls parts of itself experimental that have been there since its version 3.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


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
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Measure until a study has so many finished trials, whoever measures them.

    Of several processes each may finish the trial that it is at, so that there can be one
    more for each of the others.

    Args:
        study: With starts queued.
        problem: What may be chosen.
        budgets: That every recipe keeps. Not ``max_kl``.
        start_F: The start, should it have got lost.
        measure: The objective.
        trials: Finished ones, those that are there already included.
        seed: Of the proposals, beside the number of the trial.
        progress: Called after each trial with those finished, and wanted.

    Raises:
        MofqError: The objective has one window only, which has no error bar.
    """
    study.sampler = Sampler(problem, budgets, partial(_next_choice, problem, budgets, seed))
    rows = budget_rows(problem, budgets)
    schemes = study_space(problem, budgets)

    def objective(trial: Trial) -> float:
        chosen = {g: trial.suggest_categorical(g, d.choices) for g, d in schemes.items()}
        choice_F = problem.choice_of({g.name: str(chosen[g.name]) for g in problem.groups})
        if not is_allowed(problem, rows, choice_F):
            raise optuna.TrialPruned("over the budget")  # queued by hand
        trial.set_user_attr("recipe", problem.schemes_of(choice_F))
        set_sizes(trial, problem, choice_F)
        windows: list[float] = []
        for window, value in enumerate(measure(problem.schemes_of(choice_F))):
            windows.append(value)
            trial.report(value, window)
            if trial.should_prune():
                raise optuna.TrialPruned
        require_windows(windows)
        return math.fsum(windows) / len(windows)

    with quiet():
        while start_trial(study) is None or _finished(study) < trials:
            if start_trial(study) is None:
                _queue_lost_start(study, problem, start_F)
            study.optimize(objective, n_trials=1)
            if progress is not None:
                progress(min(_finished(study), trials), trials)


def search_result(study: Study, problem: Problem, *, ties: bool = True) -> Searched:
    """The best recipe of a study, never worse than its start.

    Args:
        study: With a finished start.
        problem: Its groups are the parameters.
        ties: Whether a uniform scheme within noise is preferred; else only a better one.

    Returns:
        The trial of least mean KL where it is better than the start by more than two standard
        errors, paired window by window; else the start; a uniform scheme instead
        where that is not beaten.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.state in _FINISHED]
    measured = {t.number: _measured(problem, t) for t in trials if t.intermediate_values}
    first = start_trial(study)
    assert first is not None
    start = measured[first.number]
    complete = [measured[t.number] for t in trials if t.state == TrialState.COMPLETE]
    best = min(complete, key=lambda one: one.kl.value)
    if not is_less(paired(start.windows, best.windows), TIE_STDERRS):
        best = start
    uniforms = {
        str(t.user_attrs["origin"]).removeprefix(_UNIFORM): measured[t.number]
        for t in trials
        if str(t.user_attrs.get("origin", "")).startswith(_UNIFORM) and t.number in measured
    }
    same = (name for name, one in uniforms.items() if (one.choice_F == best.choice_F).all())
    uniform = next(same, None) or preferred_uniform(best, uniforms, ties=ties)
    return Searched(
        best if uniform is None else uniforms[uniform],
        start,
        uniform=uniform,
        finished=len(trials),
        given_up=sum(t.state == TrialState.PRUNED for t in trials),
    )


def uniform_starts(candidates: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Uniform recipes under the names that `search_result` knows them by."""
    return {f"{_UNIFORM}{name}": choice_F for name, choice_F in candidates.items()}


def _queue_lost_start(study: Study, problem: Problem, start_F: IntArray) -> None:
    """Queue the start again where the process that measured it is gone."""
    if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(problem.schemes_of(start_F), user_attrs={"origin": START})


def _finished(study: Study) -> int:
    return len(study.get_trials(deepcopy=False, states=_FINISHED))


def _measured(problem: Problem, trial: FrozenTrial) -> Measured:
    windows = tuple(trial.intermediate_values[n] for n in sorted(trial.intermediate_values))
    return Measured(problem.choice_of(trial.user_attrs["recipe"]), windows)


def _next_choice(
    problem: Problem, budgets: Budgets, seed: int, study: Study, number: int
) -> IntArray:
    """What lies around the best recipe so far."""
    every = study.get_trials(deepcopy=False)
    trials = [t for t in every if "recipe" in t.user_attrs and t.state != TrialState.FAIL]
    done = [t for t in trials if t.state in _FINISHED and t.intermediate_values]
    measured = {t.number: _measured(problem, t) for t in done}
    starts = [t.number for t in done if t.user_attrs.get("origin") == START]
    if not starts:
        raise needs_start()
    start = measured[starts[0]]
    complete = [measured[t.number] for t in done if t.state == TrialState.COMPLETE]
    best = min(complete, key=lambda one: one.kl.value, default=start)
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
        tried={problem.choice_of(t.user_attrs["recipe"]).tobytes() for t in trials},
        seed=(seed, number),
    )
