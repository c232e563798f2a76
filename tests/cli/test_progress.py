"""How far a stage is: one bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from time import sleep

import pytest
from command_line import DEMO, ok
from rich.console import Console

from mofq.cli.show import terminal
from mofq.cli.show.terminal import Bars
from mofq.decision.recipe import Recipe
from mofq.decision.uniform import uniform_recipe
from mofq.delivery.validation import validate_many
from mofq.evidence.corpora import load_text
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def shown_on(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> StringIO:
    stream = StringIO()
    screen = Console(file=stream, force_terminal=is_terminal, width=80)
    monkeypatch.setattr(terminal, "console", lambda: screen)
    return stream


def test_without_a_terminal_a_long_stage_prints_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, clock = shown_on(monkeypatch, is_terminal=False), Clock()
    monkeypatch.setattr(terminal, "monotonic", clock)
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LOOKS", 1000.0)
    with Bars() as bars:
        for step in range(1, 101):
            clock.now += 1
            bars.stage("measure", step, 100)
    assert stream.getvalue().splitlines() == [
        "measure: 30 of 100, 30 s since the start",
        "measure: 60 of 100, 60 s since the start",
        "measure: 90 of 100, 90 s since the start",
    ]


def test_without_a_terminal_one_step_that_takes_long_prints_lines_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, clock = shown_on(monkeypatch, is_terminal=False), Clock()
    monkeypatch.setattr(terminal, "monotonic", clock)
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LOOKS", 0.001)
    with Bars() as bars:
        bars.stage("measure", 0, 1)
        for seconds in (45, 90):
            clock.now = 100.0 + seconds
            while f"{seconds} s" not in stream.getvalue():
                sleep(0.001)
        clock.now += 10
        bars.stage("measure", 1, 1)
        clock.now += 100  # what comes after the last step is no step
        sleep(0.05)
    assert stream.getvalue().splitlines() == [
        "measure: 0 of 1, 45 s since the start",
        "measure: 0 of 1, 90 s since the start",
    ]


def test_a_short_command_prints_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown_on(monkeypatch, is_terminal=False)
    with Bars() as bars:
        bars.stage("measure", 1, 1)
    assert stream.getvalue() == ""


def test_on_a_terminal_all_stages_share_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown_on(monkeypatch, is_terminal=True)
    with Bars() as bars:
        bars.stage("calibrate", 3, 4)
        bars.stage("measure", 5, 24)
        (task,) = bars._progress.tasks
        assert (task.description, task.completed, task.total) == ("measure", 5, 24)
        bars._progress.refresh()
    assert "5/24" in stream.getvalue()


def test_calibrating_on_several_corpora_counts_the_sequences_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Bars, "stage", lambda _, *step: told.append(step))
    corpora = ("--corpus", "en=demo-en-calibration", "--corpus", "pt=demo-pt-calibration")
    ok(
        "calibrate",
        DEMO,
        *corpora,
        "--sequences",
        "2",
        "--sequence-length",
        "32",
        "-o",
        tmp_path / "s",
    )
    assert told == [("calibrate", done, 4) for done in (1, 2, 3, 4)]


@pytest.mark.long
def test_validating_several_candidates_counts_the_windows_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, int, int]] = []
    uniform = [uniform_of(name) for name in ("int8.channel", "int4.g32")]
    validate_many(
        DEMO,
        uniform,
        load_text("demo-en"),
        tokens=64,
        sequence_length=32,
        progress=lambda *step: told.append(step),
    )
    assert [step for step in told if step[0] == "validate"] == [
        ("validate", done, 4)
        for done in (0, 1, 2, 2, 3, 4)  # each candidate begins where the last one ended
    ]
    enforced = [(done, total) for stage, done, total in told if stage == "enforce"]
    totals = {total for _, total in enforced}
    assert enforced == sorted(enforced)
    assert enforced[-1] == (*totals, *totals)


def uniform_of(scheme: str) -> Recipe:
    checkpoint = open_checkpoint(DEMO)
    return uniform_recipe(checkpoint, find_layers(checkpoint), scheme)
