"""The processes that a study is shared with end when the search does."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import DEMO, Measured

from mofq import api
from mofq.api import Budget, Method, OnModel, Study


class Worker:
    """Is told what a process is told, and starts none."""

    def __init__(self, **given: Any) -> None:
        self.given, self.calls, self.exitcode = given, [], 0  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


def test_a_search_that_is_broken_off_leaves_no_worker_at_work(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[Worker] = []

    def process(**given: Any) -> Worker:
        workers.append(Worker(**given))
        return workers[-1]

    monkeypatch.setattr(
        multiprocessing, "get_context", lambda how: SimpleNamespace(Process=process)
    )

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "trials":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.search(
            measured.table,
            tmp_path / "recipe.yaml",
            budget=Budget(max_bits=5),
            method=Method(solver="optuna"),
            on_model=OnModel(model=DEMO, text="demo-en", tokens=128, sequence_length=64),
            study=Study(trials=3, workers=3),
            progress=stop,
        )
    assert [one.calls for one in workers] == [["start", "terminate"]] * 2
    assert not (tmp_path / "recipe.yaml").exists()
