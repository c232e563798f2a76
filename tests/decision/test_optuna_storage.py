"""Storages that a process left half-made, or whose name does not say what they are."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import Study
from sqlalchemy import event
from sqlalchemy.engine import Engine

from mofq.decision.measured.study_storage import joined_study, open_study
from mofq.exceptions import MofqError

UNIQUE_NAMES = "ix_studies_study_name"


class Killed(BaseException):
    """Raised where a signal would have ended the process."""


@contextmanager
def killed_before(statement: int) -> Iterator[None]:
    """End what is done before its n-th statement that writes; SQLite keeps those before it."""
    written = count()

    def look(_connection: Any, _cursor: Any, text: str, *_: Any) -> None:
        if text.split()[0] in ("CREATE", "INSERT") and next(written) == statement:
            raise Killed

    event.listen(Engine, "before_cursor_execute", look)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", look)


def indexes(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as database:
        return {name for (name,) in database.execute("select name from sqlite_master")}


def measure_one(study: Study) -> None:
    study.add_trial(optuna.trial.create_trial(value=0.5))


def assert_goes_on(storage: str, *, trials: int = 0) -> None:
    """Three openings in turn find one study, and what the former ones measured."""
    for measured in range(trials, trials + 3):
        with joined_study(storage, "test") as study:
            assert len(study.trials) == measured
            measure_one(study)
    assert optuna.get_all_study_names(study._storage) == ["test"]


@pytest.mark.long
def test_a_database_that_was_killed_at_any_statement_of_its_making_is_completed(
    tmp_path: Path,
) -> None:
    for statement in count():
        path = tmp_path / f"{statement}.db"
        try:
            with killed_before(statement):
                open_study(str(path), "test")
        except Killed:
            assert_goes_on(str(path))
            assert {UNIQUE_NAMES, "ix_trials_study_id", "alembic_version"} <= indexes(path)
        else:
            break
    assert statement > 12  # tables and indexes alone are more


def test_a_second_study_of_the_same_name_without_trials_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    measure_one(open_study(str(path), "test"))
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"drop index {UNIQUE_NAMES}")
        for _ in range(2):
            database.execute("insert into studies (study_name) values ('test')")
    assert_goes_on(str(path), trials=1)
    assert UNIQUE_NAMES in indexes(path)


def test_two_studies_of_the_same_name_with_trials_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    measure_one(open_study(str(path), "test"))
    measure_one(open_study(str(path), "other"))
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"drop index {UNIQUE_NAMES}")
        database.execute("update studies set study_name = 'test'")
    with pytest.raises(MofqError, match="UNIQUE constraint failed"):
        open_study(str(path), "test")


@pytest.mark.parametrize("name", ["study.data", "study"])
def test_an_sqlite_file_given_as_a_url_is_no_journal_whatever_its_name(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    with joined_study(f"sqlite:///{path}", "test") as study:
        measure_one(study)
    before = path.read_bytes()
    assert not before.endswith(b"\n")  # a journal would be cut after its last line
    with joined_study(f"sqlite:///{path}", "test") as study:
        assert len(study.trials) == 1
    assert len(path.read_bytes()) == len(before)
