"""Tasks through lm-eval, on a local multiple-choice task made from the bundled text."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import DEMO, ok, refused

from mofq.delivery.validation.tasks import TaskResult, TaskRunner, Tasks, TaskScore, compare_tasks
from mofq.exceptions import MofqError
from scripts.make.continuation_task import main as make_task
from scripts.make.continuation_task import make_items

TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks")
    for name, seed in (("going_on", "0"), ("going_on_too", "1")):
        make_task(
            ["--text", "demo-en", "--name", name, "--items", "6", "--seed", seed, "-o", str(out)]
        )
    return out


def test_the_true_continuation_is_one_of_four_of_equal_length() -> None:
    words = [f"w{n}" for n in range(400)]
    items: list[dict[str, Any]] = make_items(
        " ".join(words), context_words=10, continuation_words=4, seed=0
    )
    assert len(items) == 400 // 14
    for number, item in enumerate(items):
        start = number * 14
        assert item["context"].split() == words[start : start + 10]
        assert item["choices"][item["answer"]].split() == words[start + 10 : start + 14]
        assert len(set(item["choices"])) == 4
        assert {len(choice.split()) for choice in item["choices"]} == {4}
    assert {item["answer"] for item in items} == {0, 1, 2, 3}


@pytest.mark.long
def test_validate_reports_tasks_with_errors_and_recovery(folder: Path, tmp_path: Path) -> None:
    ok("recipe", "uniform", DEMO, "int2.g32", "-o", tmp_path / "recipe.yaml")
    arguments = ("--tasks", "going_on,going_on_too", "--task-folder", folder)
    ran = ok(
        *("validate", DEMO, tmp_path / "recipe.yaml", *TEXT, *arguments),
        *("-o", tmp_path / "validation.json"),
    )
    tasks = json.loads((tmp_path / "validation.json").read_text("utf-8"))["tasks"]
    assert [(one["task"], one["metric"]) for one in tasks] == [
        ("going_on", "acc"),
        ("going_on", "acc_norm"),
        ("going_on_too", "acc"),
        ("going_on_too", "acc_norm"),
    ]
    for one in tasks:
        assert one["items"] == 6
        for value, stderr in (("value", "stderr"), ("original", "original_stderr")):
            share = one[value]
            assert share * 6 == pytest.approx(round(share * 6))
            assert one[stderr] == pytest.approx(math.sqrt(share * (1 - share) / 5))
        assert one["difference"] == pytest.approx(one["value"] - one["original"])
    assert "going_on_too" in ran.out
    assert "recovery" in ran.out
    # Bars are for terminals.
    assert "it/s" not in ran.err


@pytest.mark.long
def test_a_model_is_to_itself_a_full_recovery_without_error(folder: Path) -> None:
    content = ok(
        *("validate", DEMO, DEMO, *TEXT, "--tasks", "going_on"),
        *("--task-folder", folder, "--task-limit", "5", "--json"),
    ).json
    assert content["enforced"] is None
    for one in content["tasks"]:
        assert (one["items"], one["difference"], one["difference_stderr"]) == (5, 0.0, 0.0)
        assert one["recovery_percent"] == (100.0 if one["original"] else None)


def test_the_error_of_a_difference_is_that_of_the_differences_of_items() -> None:
    ours = TaskScore("t", "acc", 0.5, 0.25, items=(1.0, 0.0, 1.0, 0.0))
    theirs = TaskScore("t", "acc", 0.75, 0.25, items=(1.0, 1.0, 1.0, 0.0))
    (result,) = compare_tasks([ours], [theirs])
    assert result == TaskResult(
        task="t",
        metric="acc",
        items=4,
        value=0.5,
        stderr=0.25,
        original=0.75,
        original_stderr=0.25,
        difference=-0.25,
        difference_stderr=statistics.stdev([0, -1, 0, 0]) / 2,
        recovery_percent=pytest.approx(200 / 3),
    )


def test_tasks_that_cannot_be_run_are_refused_before_any_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MofqError, match="is not a folder"):
        TaskRunner(Tasks(("going_on",), tmp_path / "none"))
    (folder / "going_on_too.jsonl").rename(folder / "kept")
    try:
        with pytest.raises(MofqError, match="going_on_too: their data cannot be read"):
            TaskRunner(Tasks(("going_on_too",), folder))
    finally:
        (folder / "kept").rename(folder / "going_on_too.jsonl")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(MofqError, match=r"pip install '\.\[lm-eval\]'"):
        TaskRunner(Tasks(("going_on",), folder))
    assert "need --tasks" in refused("validate", DEMO, DEMO, *TEXT, "--task-limit", "3")


@pytest.mark.slow
def test_an_unknown_task_suggests_one_that_lm_eval_knows() -> None:
    with pytest.raises(MofqError, match="Did you mean 'hellaswag'"):
        TaskRunner(Tasks(("hellaswagg",)))


@pytest.mark.long
def test_several_texts_are_validated_one_by_one_and_the_worst_named(tmp_path: Path) -> None:
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", tmp_path / "recipe.yaml")
    sizes = ("--tokens", "128", "--sequence-length", "64")
    texts = ("--text", "en=demo-en", "--text", "pt=demo-pt")
    out = tmp_path / "validation.json"
    ran = ok("validate", DEMO, tmp_path / "recipe.yaml", *texts, *sizes, "-o", out)
    found = {}
    for name in ("en", "pt"):
        alone = ok(
            *("validate", DEMO, tmp_path / "recipe.yaml", "--text", f"demo-{name}", *sizes),
            "--json",
        ).json
        written = json.loads((tmp_path / f"validation-{name}.json").read_text("utf-8"))
        assert written["windows"] == alone["windows"]
        assert written["text_sha256"] == alone["text_sha256"]
        found[name] = alone["kl_nats_per_token"]
    assert not out.exists()
    assert f"worst text: {max(found, key=lambda name: found[name])}" in ran.out
    both = ok("validate", DEMO, tmp_path / "recipe.yaml", *texts, *sizes, "--json").json
    assert {name: one["kl_nats_per_token"] for name, one in both.items()} == found
    assert "two corpora have the name" in refused(
        *("validate", DEMO, tmp_path / "recipe.yaml", "--text", "demo-en", "--text", "demo-en")
    )
