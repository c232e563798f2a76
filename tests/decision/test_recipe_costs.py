"""Corpora count in a comparison of recipes as they did where the recipes were found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from explore_tables import write_explore_table

from mofq.decision import Budgets, Request, decide
from mofq.decision.recipe import Recipe
from mofq.decision.recipe_difference import Difference, compare_recipes, with_figures
from mofq.evidence.table import Table, read_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    path = tmp_path_factory.mktemp("pricing") / "table.jsonl"
    return read_table(write_explore_table(path, decoder_layers=2, corpora=("en", "pt")))


def pair(table: Table, request: Request) -> tuple[Recipe, Recipe]:
    first, second = (
        decide(table, replace(request, budgets=Budgets(max_bits=bits))).recipe for bits in (5, 8)
    )
    assert first.groups != second.groups
    return first, second


def value(found: Difference) -> float:
    assert found.total is not None
    return found.total.value


def test_a_difference_weighs_corpora_as_the_recipes_do_or_as_is_asked(table: Table) -> None:
    asked = Request(Budgets(), corpus_weights={"en": 3.0, "pt": 1.0})
    first, second = pair(table, asked)
    en, pt = (
        value(compare_recipes(first, second, table, corpus_weights=weights))
        for weights in ({"en": 1, "pt": 0}, {"en": 0, "pt": 1})
    )
    assert en != pytest.approx(pt)
    found = compare_recipes(first, second, table)
    assert value(found) == pytest.approx((3 * en + pt) / 4)
    assert (found.objective, found.corpus_weights) == ("mean", {"en": 3.0, "pt": 1.0})
    assert sum(one.error.value for one in found.groups if one.error) == pytest.approx(value(found))
    evenly = compare_recipes(first, second, table, corpus_weights={"en": 2, "pt": 2})
    assert value(evenly) == pytest.approx((en + pt) / 2)


def test_recipes_that_do_not_agree_are_compared_on_all_corpora_alike(table: Table) -> None:
    first, second = pair(table, Request(Budgets(), corpus_weights={"en": 3.0, "pt": 1.0}))
    same = replace(second, made_by={**second.made_by, "corpus_weights": "pt=2,en=6"})
    assert compare_recipes(first, same, table).corpus_weights == {"en": 3.0, "pt": 1.0}
    unasked = replace(second, made_by={"solver": "uniform"})
    assert compare_recipes(unasked, first, table).corpus_weights == {"en": 3.0, "pt": 1.0}
    made_by = {key: one for key, one in second.made_by.items() if key != "corpus_weights"}
    other = replace(second, made_by=made_by)
    assert compare_recipes(first, other, table).corpus_weights == {"en": 1.0, "pt": 1.0}


def test_figures_hold_where_corpora_count_as_they_did(table: Table) -> None:
    first, _ = pair(table, Request(Budgets(), corpus_weights={"en": 3.0, "pt": 1.0}))
    assert (
        with_figures(first, table, Request(Budgets(), corpus_weights={"pt": 2, "en": 6})) is first
    )
    en, pt, both = (
        with_figures(first, table, Request(Budgets(), corpus_weights=weights)).result.error or 0.0
        for weights in ({"en": 1, "pt": 0}, {"en": 0, "pt": 1}, {"en": 1, "pt": 1})
    )
    assert both == pytest.approx((en + pt) / 2)
    assert first.result.error == pytest.approx((3 * en + pt) / 4)


def test_a_difference_of_recipes_for_the_worst_corpus_is_that_of_the_worst(table: Table) -> None:
    first, second = pair(table, Request(Budgets(), objective="worst-corpus"))
    found = compare_recipes(first, second, table)
    assert (found.objective, found.corpus_weights) == ("worst-corpus", None)
    alone = [
        compare_recipes(first, second, table, corpus_weights=weights).total
        for weights in ({"en": 1, "pt": 0}, {"en": 0, "pt": 1})
    ]
    assert found.total == max((one for one in alone if one), key=lambda one: one.upper)
