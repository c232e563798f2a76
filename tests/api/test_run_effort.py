"""Where `mofq run` fits codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from explore_tables import write_explore_table

from mofq.api.options import Budget, Choices
from mofq.api.request import make_request
from mofq.api.run_effort import Offered, Twins, fit_where_chosen
from mofq.decision import decide
from mofq.decision.guessed_rows import with_guesses
from mofq.evidence.spaces import parse_search_space
from mofq.evidence.table import Table, read_table

TEXT = "version: 1\nschemes: [int4.g32, int8.channel]\n"
REQUEST = make_request(Choices(), budget=Budget(max_bits=5.0))
INT4, INT8 = "int4.g32@nats~descent", "int8.channel@nats~descent"


@pytest.fixture
def table(tmp_path: Path) -> Table:
    found = read_table(write_explore_table(tmp_path / "table.jsonl", decoder_layers=16))
    kept = [row for row in found.rows if row.scheme in ("int4.g32", "int8.channel", "bf16")]
    return replace(found, rows=tuple(kept), spaces=())


class Measuring:
    """Measures twins: INT4 as good as its rounded scheme times a ratio, INT8 no better."""

    def __init__(self, table: Table, ratio: float) -> None:
        self.table, self.ratio = table, ratio
        self.asked: list[Twins] = []

    def __call__(self, twins: Twins) -> Table:
        self.asked.append(twins)
        rows = [
            replace(
                row,
                scheme=twin,
                error=ratio * row.error,
                sample_errors=tuple(ratio * one for one in row.sample_errors or ()) or None,
            )
            for row in self.table.rows
            for twin, ratio in ((INT4, self.ratio), (INT8, 1.0))
            if row.scheme == twin.partition("@")[0] and twin in twins.get(row.group, ())
        ]
        return replace(self.table, rows=(*self.table.rows, *rows))


def test_quick_offers_the_space_as_it_is_and_other_efforts_its_twins() -> None:
    space = parse_search_space(TEXT, name="some", where="s")
    assert Offered.at("quick", space) == Offered(space)
    assert set(Offered.at("normal", space).twins) == {INT4, INT8}
    fitted = parse_search_space("version: 1\nschemes: [int4.g32@nats]", name="f", where="f")
    assert Offered.at("best", fitted) == Offered(fitted)


def test_twins_are_measured_in_pilots_and_where_the_search_chooses_them(table: Table) -> None:
    offered = Offered.at("normal", parse_search_space(TEXT, name="some", where="s"))
    measure = Measuring(table, 0.3)
    found = fit_where_chosen(table, REQUEST, offered, measure=measure, rounds=4)
    pilots, *rounds = measure.asked
    assert len(pilots) == 4 * 2
    assert 1 <= len(rounds) <= 4
    assert found.rows == measure(rounds[-1]).rows
    # Nothing that is not measured would be chosen, and INT8 is measured in few groups.
    guessed = with_guesses(found, offered.twins, asked=rounds[-1])
    assert decide(found, REQUEST).recipe.schemes == decide(guessed, REQUEST).recipe.schemes
    groups = [group.name for group in table.header.groups]
    wants = offered.wants(rounds[-1])
    assert wants("layers.0.attn.o", "bf16")
    assert sum(wants(group, INT8) for group in groups) < len(groups) / 2


def test_what_pilots_say_is_not_worth_it_is_measured_nowhere_else(table: Table) -> None:
    offered = Offered.at("normal", parse_search_space(TEXT, name="some", where="s"))
    measure = Measuring(table, 2.0)
    fit_where_chosen(table, REQUEST, offered, measure=measure, rounds=4)
    assert all(
        INT4 not in twins
        for group, twins in measure.asked[-1].items()
        if group not in measure.asked[0]
    )


def test_without_stored_samples_what_is_guessed_to_be_chosen_is_measured_at_once(
    table: Table,
) -> None:
    offered = Offered.at("normal", parse_search_space(TEXT, name="some", where="s"))
    measure = Measuring(table, 0.3)
    fit_where_chosen(table, REQUEST, offered, measure=measure, rounds=1)
    (asked,) = measure.asked
    assert {len(twins) for twins in asked.values()} == {1}
