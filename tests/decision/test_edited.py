"""A recipe that was edited after it was found, and the figures that a table gives it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from explore_tables import write_explore_table

from mofq.decision import Budgets, Request, decide, predict_chosen, request_problem
from mofq.decision.recipe import Recipe
from mofq.decision.recipe_difference import with_figures
from mofq.decision.request import read_weights
from mofq.evidence.constraints import parse_constraint
from mofq.evidence.table import Table, read_table
from mofq.exceptions import MofqError

PLAIN = Request(Budgets())


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    path = tmp_path_factory.mktemp("edited") / "table.jsonl"
    return read_table(write_explore_table(path, decoder_layers=1, corpora=("en", "pt")))


def edited(table: Table, request: Request) -> Recipe:
    """What is decided at five bits, the first group then in INT8 by hand."""
    recipe = decide(table, replace(request, budgets=Budgets(max_bits=5.0))).recipe
    first, *others = recipe.groups
    assert first.scheme != "int8.channel"
    return replace(
        recipe,
        groups=(replace(first, scheme="int8.channel", static_amax=None), *others),
    )


@pytest.mark.parametrize(
    "request_",
    [replace(PLAIN, corpus_weights={"en": 0, "pt": 1}), replace(PLAIN, objective="worst-corpus")],
)
def test_corpora_count_as_where_it_was_found(table: Table, request_: Request) -> None:
    recipe = edited(table, request_)

    def kl(request: Request) -> float:
        problem = request_problem(table, request)
        choice_F = problem.choice_of(recipe.scheme_of_group)
        return predict_chosen(problem, Budgets(), choice_F).value

    assert with_figures(recipe, table).kl_nats_per_token == kl(request_) != kl(PLAIN)


def test_weights_of_corpora_that_cannot_be_read_are_refused(table: Table) -> None:
    recipe = edited(table, PLAIN)
    wrong = replace(recipe, made_by={**recipe.made_by, "corpus_weights": "en"}, file="mine.yaml")
    with pytest.raises(MofqError, match=r"mine\.yaml: made_by: corpus_weights en: cannot be read"):
        with_figures(wrong, table)


def test_it_names_no_constraints_that_it_may_break(table: Table) -> None:
    fixed = parse_constraint("fixed", "*.o_proj", "int4.g32", where="here")
    recipe = edited(table, replace(PLAIN, constraints=(fixed,)))
    assert recipe.is_edited
    assert "constraints" not in recipe.made_by


@pytest.mark.parametrize("number", ["many", None, -1])
def test_a_weight_of_a_corpus_is_a_number_of_0_or_more(number: object) -> None:
    with pytest.raises(MofqError, match=f"of 0 or more for 'en', found {number!r}"):
        read_weights({"en": number}, where="here")  # type: ignore[dict-item]
