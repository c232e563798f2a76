"""What `mofq run` notes and says of the uniform schemes beside its recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from explore_tables import write_explore_table

from mofq.api.options import Budget, Choices
from mofq.api.request import make_request
from mofq.api.run_delivery import preferred, uniform_rivals, within_budgets
from mofq.decision.recipe import Recipe, RecipeGroup, RecipeResult
from mofq.delivery.validation import Validation
from mofq.evidence.table import read_table

RECIPE = Recipe(
    "Tiny/model",
    None,
    (RecipeGroup("mlp.down", "bf16", ("mlp.down_proj",)),),
    made_by={"space": "test", "constraints": "at_least attn.*=8", "objective": "mean"},
    budget={"bits_per_weight": 5.0},
    result=RecipeResult(bits_per_weight=5.0),
)


def test_uniform_recipes_note_the_request_that_they_answer(tmp_path: Path) -> None:
    table = read_table(write_explore_table(tmp_path / "table.jsonl", decoder_layers=1))
    found = uniform_rivals(table, make_request(Choices()), RECIPE, most=4)
    assert {"int4.g128", "int4.g32"} <= set(found)
    for one in found.values():
        assert RECIPE.made_by.items() <= one.made_by.items()
        assert one.budget == RECIPE.budget


@pytest.mark.parametrize(
    ("of_router", "words"),
    [("int4.g32", "for every layer is"), ("bf16", "for every layer that has a choice is")],
)
def test_a_uniform_scheme_is_said_to_be_of_the_layers_that_have_it(
    of_router: str, words: str
) -> None:
    uniform = Recipe(
        "Tiny/model",
        None,
        (
            RecipeGroup("mlp.down", "int4.g32", ("mlp.down_proj",)),
            RecipeGroup("router", of_router, ("router",)),
        ),
    )
    measured = Mock(spec=Validation, bits_per_weight=4.5, windows=(0.1, 0.2))
    told: list[str] = []
    names = {"recipe": RECIPE, "int4.g32": uniform}
    assert preferred(dict.fromkeys(names, measured), names, told.append) == "int4.g32"
    assert told[0].startswith(f"int4.g32 {words} as small as the mixture")


def test_a_uniform_scheme_is_chosen_on_other_windows_than_are_told() -> None:
    def measured(*windows: float) -> Mock:
        return Mock(spec=Validation, bits_per_weight=4.5, windows=windows)

    uniform = replace(RECIPE, groups=(RecipeGroup("mlp.down", "int4.g32", ("mlp.down_proj",)),))
    candidates = {"recipe": RECIPE, "int4.g32": uniform}
    told: list[str] = []
    # Better on the first and third window, and worse on all of them.
    found = {"recipe": measured(0.2, 0.2, 0.2, 0.2), "int4.g32": measured(0.1, 0.5, 0.1, 0.5)}
    assert preferred(found, candidates, told.append) == "int4.g32"
    assert "on the 2 in between it has 0.5 nats per token, the mixture 0.2" in told[0]
    found = {"recipe": measured(0.2, 0.5), "int4.g32": measured(0.3, 0.1)}
    assert preferred(found, candidates, told.append) == "recipe"


def test_a_uniform_scheme_that_breaks_a_budget_does_not_become_the_recipe(tmp_path: Path) -> None:
    table = read_table(write_explore_table(tmp_path / "table.jsonl", decoder_layers=1))
    every = uniform_rivals(table, make_request(Choices()), RECIPE, most=4)
    names = ("int4.g128", "int4.g32")
    candidates = {"recipe": RECIPE, **{name: every[name] for name in names}}

    def kept(budget: Budget, *, stderr: float = 0.001) -> set[str]:
        request = make_request(Choices(), budget=budget)
        one = Mock(spec=Validation, kl_upper=0.1 + 2 * stderr)
        return set(within_budgets(table, request, candidates, dict.fromkeys(candidates, one)))

    assert kept(Budget(max_bits=4.6)) == {"recipe", *names}
    assert kept(Budget(max_bits=4.2)) == {"recipe", "int4.g128"}
    file = every["int4.g128"].result.checkpoint_bytes
    assert file is not None
    assert kept(Budget(max_size=str(file))) == {"recipe", "int4.g128"}
    assert kept(Budget(max_size=str(file - 1))) == {"recipe"}
    assert kept(Budget(max_kl=0.1021)) == {"recipe", *names}
    assert kept(Budget(max_kl=0.1021), stderr=0.0011) == {"recipe"}
