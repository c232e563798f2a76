"""`mofq search` where it measures recipes on the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import DEMO, Measured, mofq, ok, refused

import mofq as package
from mofq.evidence.corpora import load_text

TEXT = ("--text", "demo-en", "--tokens", "512", "--sequence-length", "64")


def search(table: Path, out: Path, *more: str) -> dict[str, object]:
    arguments = ("search", table, "--max-bits", "5", "--model", DEMO, *TEXT)
    return ok(*arguments, "-o", out, *more, "--json").json


@pytest.mark.long
@pytest.mark.parametrize("how", [("--refine", "4"), ("--solver", "optuna", "--trials", "8")])
def test_what_the_search_measured_is_what_validate_measures(
    measured: Measured, tmp_path: Path, how: tuple[str, ...]
) -> None:
    path = tmp_path / "recipe.yaml"
    content = search(measured.table, path, *how)
    recipe = package.load_recipe(path)
    assert recipe.bits_per_weight == content["bits_per_weight"]
    assert recipe.bits_per_weight is not None
    assert recipe.bits_per_weight <= 5
    assert recipe.made_by["text_sha256"] == load_text("demo-en").sha256
    assert recipe.made_by["trials"] == 8 if "optuna" in how else recipe.made_by["trials"]
    assert recipe.made_by["solver"] == ("optuna" if "optuna" in how else "exact")
    validation = ok("validate", DEMO, path, *TEXT, "--json").json
    assert validation["kl_nats_per_token"] == content["kl_measured"]
    assert validation["kl_stderr"] == pytest.approx(content["kl_measured_stderr"], rel=1e-12)
    before = ok("validate", DEMO, measured.recipe, *TEXT, "--json").json
    # A tie may have gone to a uniform scheme, within one standard error.
    noise = before["kl_stderr"] if len(set(recipe.schemes.values()) - {"bf16"}) == 1 else 0.0
    assert validation["kl_nats_per_token"] <= before["kl_nats_per_token"] + noise


def test_people_are_shown_what_was_measured(measured: Measured, tmp_path: Path) -> None:
    arguments = ("--max-bits", "5", "--model", DEMO, *TEXT, "--refine", "2")
    shown = ok("search", measured.table, *arguments, "-o", tmp_path / "recipe.yaml")
    assert "KL, measured on the text of the search" in shown.out
    assert "2 swaps measured" in shown.err
    assert "for every layer" in shown.err


@pytest.mark.long
def test_a_budget_of_kl_with_a_text_is_measured_to_be_kept(
    measured: Measured, tmp_path: Path
) -> None:
    path, limit = tmp_path / "recipe.yaml", 0.01
    arguments = ("--max-kl", limit, "--model", DEMO, *TEXT, "-o", path, "--json")
    content = ok("search", measured.table, *arguments).json
    recipe = package.load_recipe(path)
    assert content["kl_measured"] + 2 * content["kl_measured_stderr"] <= limit
    assert recipe.budget == {"kl_nats_per_token": limit}
    assert recipe.made_by["text_sha256"] == load_text("demo-en").sha256
    assert recipe.made_by["text_tokens"] == 512
    assert 1 <= int(str(recipe.made_by["trials"])) <= 6
    validation = ok("validate", DEMO, path, *TEXT, "--json").json
    assert validation["kl_nats_per_token"] == pytest.approx(content["kl_measured"], rel=1e-9)
    assert validation["within_kl_budget"]
    assert validation["predicted_kl_low"] < validation["predicted_kl_high"]
    # Half as much needs a larger recipe; nothing measures a millionth.
    arguments = ("--max-kl", limit / 2, "--model", DEMO, *TEXT, "-o", path, "--json")
    smaller = ok("search", measured.table, *arguments).json
    assert smaller["bits_per_weight"] > content["bits_per_weight"]
    arguments = ("--max-kl", 1e-8, "--model", DEMO, *TEXT, "--at-most", "*=8", "-o", path)
    assert "recipes that were measured has" in refused("search", measured.table, *arguments)


def test_a_text_for_a_budget_of_kl_needs_a_model(measured: Measured, tmp_path: Path) -> None:
    search = ("search", measured.table, "--max-kl", 0.01, "-o", tmp_path / "recipe.yaml")
    assert "needs --model" in refused(*search, *TEXT)
    assert "needs --text" in refused(*search, "--model", DEMO)


@pytest.mark.long
def test_a_second_run_of_a_study_measures_nothing_that_is_there(
    measured: Measured, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    more = ("--solver", "optuna", "--trials", "7")
    first = search(measured.table, path, *more, "--workers", "2")
    assert (tmp_path / "recipe.optuna.db").exists()
    second = search(measured.table, path, *more)
    assert {**first, "elapsed_seconds": 0} == {**second, "elapsed_seconds": 0}
    assert "recipe.optuna.db" in str(first["notes"])


@pytest.mark.long
def test_a_measured_search_says_what_it_lacks(measured: Measured, tmp_path: Path) -> None:
    search = ("search", measured.table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    assert "needs --model" in refused(*search, "--refine", "2")
    assert "needs --text" in refused(*search, "--solver", "optuna", "--model", DEMO)
    both = ("--solver", "optuna", "--refine", "2", "--model", DEMO, *TEXT)
    assert "--refine does not go with --solver optuna" in refused(*search, *both)
    one = ("--text", "demo-en", "--tokens", "64", "--sequence-length", "64")
    for how in (("--refine", "2"), ("--solver", "optuna")):
        assert "at least 2 windows" in refused(*search, *how, "--model", DEMO, *one)
    assert not (tmp_path / "recipe.yaml").exists()


def test_another_model_than_the_table_s_is_refused(
    measured: Measured, tiny_llama: Path, tmp_path: Path
) -> None:
    search = ("search", measured.table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    text = ("--text", "demo-en", "--tokens", "64", "--sequence-length", "32")
    ran = mofq(*search, "--refine", "2", "--model", tiny_llama, *text)
    assert ran.code == 1
    assert "index_sha256" in ran.err


def test_a_trial_of_a_study_that_is_not_there_is_refused_before_anything_is_measured(
    measured: Measured, tmp_path: Path
) -> None:
    search = ("search", measured.table, "--max-bits", "5", "-o", tmp_path / "other.yaml")
    optuna = ("--solver", "optuna", "--multi-objective", "--model", DEMO, *TEXT)
    message = refused(*search, *optuna, "--trial", "1")
    assert "--trial 1: there is no study in" in message
    assert "Give the --storage of the search that named the trial; by default" in message
    assert list(tmp_path.iterdir()) == []
