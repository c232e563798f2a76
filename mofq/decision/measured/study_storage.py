"""Opening and joining a study: the first process of a machine puts aside what killed ones left.

A trial that was running when its process was killed stays "running" in the storage, and
Optuna would take it for dead only after minutes. Where the storage is a file, a lock beside
it says at once whether anybody is still alive; then a study that goes on after a kill
measures what an undisturbed one does, in the same order.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages._rdb.models import BaseModel
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from mofq.exceptions import MofqError, first_line, option
from mofq.files.locks import try_lock

#: A process that is silent for so long is dead, and its trial is queued again [seconds].
_HEARTBEAT, _GRACE = 30, 150
#: How long a process waits for another to leave the SQLite file [seconds].
_SQLITE_TIMEOUT = 120
_SQLITE_SUFFIXES = (".db", ".sqlite", ".sqlite3")

#: A trial is given up where it is worse than the best with this probability of error.
_PRUNE_P = 0.05
_PRUNE_WINDOWS = 4

_LOST = (TrialState.RUNNING, TrialState.FAIL)


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
        raise MofqError(
            f"{option('storage', storage)}: cannot be opened: {first_line(error)}. Give a path, or "
            f"a URL whose server runs and whose driver is installed (pip install psycopg[binary])."
        ) from error
    if isinstance(backend, RDBStorage):
        weakref.finalize(study, backend.engine.dispose)
    return study


def _storage(storage: str) -> BaseStorage:
    if _is_journal(storage):
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
    _complete(database)
    return database


def _is_journal(storage: str) -> bool:
    return "://" not in storage and Path(storage).suffix not in _SQLITE_SUFFIXES


def _complete(database: RDBStorage) -> None:
    """Create the indexes that a process which was killed while it made the database left out.

    SQLite commits each table and each index by itself, and Optuna creates the indexes of a table
    with the table only. Without the index that keeps names of studies unique, every opening adds a
    study of the same name, and the second one finds two.
    """
    found = sqlalchemy.inspect(database.engine)
    missing = [
        index
        for table in BaseModel.metadata.tables.values()
        for index in table.indexes
        if not found.has_index(table.name, str(index.name))
    ]
    if missing:
        _remove_empty_doubles(database)
    for index in missing:
        index.create(database.engine)


def _remove_empty_doubles(database: RDBStorage) -> None:
    """Of studies that have one name, remove those without trials, and keep one at least."""
    trials = {s._study_id: database.get_n_trials(s._study_id) for s in database.get_all_studies()}
    names = set()
    for study in sorted(database.get_all_studies(), key=lambda s: -trials[s._study_id]):
        if study.study_name in names and not trials[study._study_id]:
            database.delete_study(study._study_id)
        names.add(study.study_name)


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


@contextmanager
def joined_study(storage: str, name: str, *, objectives: int = 1) -> Iterator[Study]:
    """Open a study and count as one of its processes until the block ends.

    Args:
        storage: See `open_study`.
        name: Likewise.
        objectives: Likewise.

    Raises:
        MofqError: The storage cannot be opened.
    """
    path = storage_file(storage)
    if path is None:
        yield open_study(storage, name, objectives=objectives)
        return
    try:
        beside = path.with_name(f".{path.name}.lock")
        file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as problem:
        raise MofqError(
            f"{option('storage', storage)}: cannot be opened: {problem.strerror}. Make its folder, "
            f"or give another path."
        ) from problem
    try:
        is_alone = try_lock(file)
        if not is_alone:
            fcntl.flock(file, fcntl.LOCK_SH)  # whoever came first may be mending it
        if is_alone and _is_journal(storage):
            _mend_journal(path)
        study = open_study(storage, name, objectives=objectives)
        if is_alone:
            _put_aside(study)
        fcntl.flock(file, fcntl.LOCK_SH)
        yield study
    except Exception as problem:
        reason = _disk_problem(problem)
        if reason is None:
            raise
        raise MofqError(
            f"{option('storage', storage)}: cannot be written: {reason}. The trials that were "
            f"finished are kept; free some space and run the same command again."
        ) from problem
    finally:
        os.close(file)


def storage_file(storage: str) -> Path | None:
    """The file that a storage is; None for a server."""
    if "://" not in storage:
        return Path(storage)
    path = storage.removeprefix("sqlite:///")
    return Path(path) if path not in (storage, "") else None


def _mend_journal(path: Path) -> None:
    """Remove the lock and the half last line of a process that was killed while it wrote."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.is_file():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _put_aside(study: Study) -> None:
    """Fail the trials that nobody runs, and of the queue what is then queued anew in order."""
    trials = study.get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    lost = {t.user_attrs.get("origin") for t in trials if t.state in _LOST}
    lost -= {t.user_attrs.get("origin") for t in trials if t.state not in _LOST}
    dropped = [t for t in waiting if lost - {None} and "origin" in t.user_attrs]
    # The running ones last: should this be killed too, it is done again.
    for trial in [*dropped, *running]:
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def _disk_problem(problem: BaseException | None) -> str | None:
    """What the disk said, where an error began with it: Optuna wraps it in others."""
    while problem is not None:
        if isinstance(problem, MofqError):
            return None
        if isinstance(problem, sqlite3.OperationalError):
            return str(problem)
        if isinstance(problem, OSError):
            return problem.strerror
        problem = problem.__cause__ or problem.__context__
    return None
