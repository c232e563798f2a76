"""The line of schemes under what `mofq search` and `mofq validate` print."""

from __future__ import annotations

from collections import Counter

import pytest

from mofq.cli.show.histogram import histogram

MANY = Counter({"nvfp4@mse": 50, "int5.g64@mse": 30, "int8.g128": 19, "bf16": 1})


def test_every_scheme_has_its_count_and_a_bar_of_its_share() -> None:
    line = histogram(Counter({"int4.g32": 15, "bf16": 5}), columns=120)
    assert line == f"fusion groups: int4.g32 {'█' * 15} 15  bf16 {'█' * 5} 5"


def test_schemes_that_a_narrow_terminal_has_no_room_for_are_counted_together() -> None:
    bar = "█" * 10
    assert histogram(MANY, columns=60) == f"fusion groups: nvfp4@mse {bar} 50  3 more 50"


@pytest.mark.parametrize("columns", range(52, 140, 8))
def test_it_is_one_line_and_no_group_is_left_out(columns: int) -> None:
    line = histogram(MANY, columns=columns)
    assert len(line) <= columns
    words = line.removeprefix("fusion groups: ").split()
    counts = [
        int(word)
        for word, after in zip(words, [*words[1:], ""], strict=True)
        if word.isdigit() and after != "more"
    ]
    assert sum(counts) == 100
