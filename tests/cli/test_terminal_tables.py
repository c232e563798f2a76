"""Tables on a terminal of 80 columns."""

from __future__ import annotations

import re

import pytest

from mofq.cli.show.terminal import print_table

_DIFFERENCE = [
    ["layers.3.attn.qkv", "int5.channel@mse", "int4.g32@fullrange", "-2,560", "+0.00048 ± 0.00004"],
    ["KL [nats/token]", "0.005837", "0.00627", "", ""],
]


def _plain(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that were printed, without their styles."""
    return re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


def test_no_name_is_folded_where_the_table_can_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_table("a title", ["", "recipe.yaml", "edited.yaml", "bytes", "error"], _DIFFERENCE)
    lines = _plain(capsys)
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert {"layers.3.attn.qkv", "int5.channel@mse", "int4.g32@fullrange", "-2,560"} <= set(words)


def test_what_cannot_fit_is_folded_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_table("a title", ["name"], [["x" * 200]])
    lines = _plain(capsys)
    assert max(map(len, lines)) <= 80
    assert sum(line.count("x") for line in lines) == 200


def test_a_unit_in_brackets_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("a [title]", ["bits", "KL [nats/token]"], [["5.0", "0.01 [1]"]])
    assert [line.split() for line in _plain(capsys)] == [
        ["a", "[title]"],
        ["bits", "KL", "[nats/token]"],
        ["5.0", "0.01", "[1]"],
    ]
