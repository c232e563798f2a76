"""What fitted schemes are guessed to cost, and where they are measured first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from explore_tables import write_explore_table

from mofq.decision.guessed_rows import pilot_groups, rows_for, with_guesses
from mofq.evidence.table import Row, Table, read_table

TWIN = "int4.g32@nats~descent"
TWINS = {TWIN: ("int4.g32",), "int8.channel@nats~descent": ("int8.channel",)}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return read_table(write_explore_table(tmp_path / "table.jsonl", decoder_layers=20))


def rows_of(table: Table, group: str, scheme: str) -> list[Row]:
    return [one for one in table.rows_of("kl_nats_per_token", "en")[group] if one.scheme == scheme]


def measured(table: Table, ratios: dict[str, float]) -> Table:
    """The table with rows of a twin: fusion group -> times the error of rounding."""
    rows = [
        replace(row, scheme=TWIN, error=ratio * row.error)
        for group, ratio in ratios.items()
        for row in rows_of(table, group, "int4.g32")
    ]
    return replace(table, rows=(*table.rows, *rows))


def test_pilots_are_a_few_groups_of_each_kind_spread_over_the_decoder_layers(
    table: Table,
) -> None:
    names = [f"{layer}.{kind}" for layer in (3, 10, 16) for kind in ("qkv", "o")]
    found = pilot_groups(table.header.groups)
    assert len(found) == 3 * 4
    assert [name for name in found if name.endswith((".qkv", ".o"))] == [
        f"layers.{one.replace('.', '.attn.')}" for one in names
    ]
    assert len(pilot_groups(table.header.groups[:4])) == 4


def test_a_guess_is_the_median_of_what_fitting_did_to_groups_of_the_kind(
    table: Table,
) -> None:
    some = [f"layers.{n}.attn.qkv" for n in range(5)]
    ratios = dict(zip(some, (0.5, 0.3, 0.4, 0.2, 0.6), strict=True)) | {"layers.0.mlp.down": 0.9}
    known = measured(table, ratios)
    guessed = with_guesses(known, TWINS, asked={group: [TWIN] for group in ratios})
    of_kind, of_none = "layers.9.attn.qkv", "layers.9.attn.o"
    (rounded,) = rows_of(table, of_kind, "int4.g32")
    (guess,) = rows_of(guessed, of_kind, TWIN)
    assert guess.error == pytest.approx(0.4 * rounded.error)
    assert guess.bytes == rounded.bytes
    assert guess.stderr == pytest.approx(0.4 * (rounded.stderr or 0))
    assert guess.sample_errors == pytest.approx([0.4 * e for e in rounded.sample_errors or ()])
    # Of a kind that was not measured, the median of all.
    (guess,) = rows_of(guessed, of_none, TWIN)
    assert guess.error == pytest.approx(0.45 * rows_of(table, of_none, "int4.g32")[0].error)
    # Of a twin that was measured nowhere, the usual ratio of 8 bits.
    (guess,) = rows_of(guessed, of_kind, "int8.channel@nats~descent")
    assert guess.error == pytest.approx(0.85 * rows_of(table, of_kind, "int8.channel")[0].error)


def test_a_group_in_which_one_twin_did_worse_is_guessed_to_do_so_with_others(table: Table) -> None:
    ratios = {f"layers.{n}.attn.qkv": ratio for n, ratio in enumerate((0.5, 0.4, 0.4))}
    known = measured(table, ratios)
    guessed = with_guesses(known, TWINS, asked={group: [TWIN] for group in ratios})
    for group, worse in (("layers.0.attn.qkv", 0.5 / 0.4), ("layers.1.attn.qkv", 1.0)):
        (guess,) = rows_of(guessed, group, "int8.channel@nats~descent")
        rounded = rows_of(table, group, "int8.channel")[0].error
        assert guess.error == pytest.approx(0.85 * worse * rounded)


def test_nothing_is_guessed_of_what_was_asked_for_or_has_no_rounded_row(table: Table) -> None:
    asked = {"layers.0.attn.o": [TWIN]}  # an engine may have refused it: there is no row
    guessed = with_guesses(table, {**TWINS, "int5.g32@nats~descent": ("int5.g32",)}, asked=asked)
    assert rows_of(guessed, "layers.0.attn.o", TWIN) == []
    assert len(rows_of(guessed, "layers.1.attn.o", TWIN)) == 1
    assert all(row.scheme != "int5.g32@nats~descent" for row in guessed.rows)


def test_twins_that_another_request_measured_do_not_count(table: Table) -> None:
    known = measured(table, {"layers.0.attn.o": 0.5, "layers.1.attn.o": 0.5})
    found = rows_for(known, TWINS, {"layers.1.attn.o": [TWIN]})
    assert rows_of(found, "layers.0.attn.o", TWIN) == []
    assert len(rows_of(found, "layers.1.attn.o", TWIN)) == 1
    assert rows_for(known, TWINS, {}).rows == table.rows
