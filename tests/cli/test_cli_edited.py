"""A recipe that was edited by hand, and what every command then says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import DEMO, Measured, ok, refused

from mofq.decision import Budgets, Request, predict_chosen, request_problem
from mofq.decision.recipe import load_recipe
from mofq.evidence.table import read_table
from mofq.explore.drawing import read_drawing

WINDOWS = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")


@pytest.fixture
def edited(measured: Measured, tmp_path: Path) -> Path:
    """The recipe with the scheme of one fusion group replaced by another measured one."""
    text = measured.recipe.read_text("utf-8")
    before, after = "    scheme: int4.g32@mse\n", "    scheme: int8.channel\n"
    assert before in text
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(before, after, 1))
    return path


def test_it_is_priced_by_the_table_and_has_no_figures_without(
    measured: Measured, edited: Path
) -> None:
    table = read_table(measured.table)
    problem = request_problem(table, Request(Budgets()))
    choice_F = problem.choice_of(load_recipe(edited).scheme_of_group)
    kl = predict_chosen(problem, Budgets(), choice_F).value
    bits = 8 * int(problem.layer_bytes_P[choice_F].sum()) / problem.weights
    before = load_recipe(measured.recipe)
    priced = ok("diff", measured.recipe, edited, "--table", measured.table, "--json").json
    assert priced["bits_per_weight"] == [before.bits_per_weight, bits]
    assert priced["kl_nats_per_token"] == [before.kl_nats_per_token, kl]
    alone = ok("diff", measured.recipe, edited)
    assert (
        json.loads(ok("diff", measured.recipe, edited, "--json").out)["bits_per_weight"][1] is None
    )
    assert "edited.yaml: was edited after it was found" in alone.err
    (point,) = read_drawing(table, recipes=[edited]).recipes
    assert (point.value, point.bits_per_weight, point.solver) == (kl, bits, "edited")


def test_validation_and_export_show_no_prediction_of_before(
    measured: Measured, edited: Path, tmp_path: Path
) -> None:
    shown = ok("validate", DEMO, edited, *WINDOWS, "-o", tmp_path / "v.json")
    content = json.loads((tmp_path / "v.json").read_text())
    assert content["predicted_kl_nats_per_token"] is None
    assert "was edited after it was found" in shown.err
    ok("export", DEMO, edited, "--to", "compressed-tensors", "-o", tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text("utf-8")
    assert "Not measured. The recipe was edited after it was found." in card
    assert "Predicted" not in card
    assert "- solver: edited" in card
    written = load_recipe(tmp_path / "model/recipe.yaml")
    assert written.bits_per_weight == pytest.approx(content["bits_per_weight"])
    assert written.kl_nats_per_token is None


def test_a_model_card_has_the_validation_of_what_is_exported(
    measured: Measured, edited: Path, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.json"
    ran = ok("validate", DEMO, measured.recipe, *WINDOWS, "-o", validation)
    assert f"--validation {validation} " in ran.err
    export = ("export", DEMO, "--to", "compressed-tensors", "--validation", validation)
    ok(*export, measured.recipe, "-o", tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text("utf-8")
    kl = json.loads(validation.read_text())["kl_nats_per_token"]
    assert "On 128 tokens of `demo-en`: KL divergence from the original" in card
    assert f"{kl:.4f}"[:5] in card
    assert "Not measured" not in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "transformers"
    assert "compressed-tensors" in metadata["tags"]
    assert "of another recipe" in refused(*export, edited, "-o", tmp_path / "other")
    assert "has no model card" in refused(
        "export", DEMO, measured.recipe, "--to", "llama.cpp", "--validation", validation,
        "-o", tmp_path / "types.txt",
    )  # fmt: skip
    content = json.loads(validation.read_text()) | {"enforced": False}
    validation.write_text(json.dumps(content))
    said = refused(*export, measured.recipe, "-o", tmp_path / "other")
    assert "not as the recipe says" in said
    validation.write_text("{}")
    assert "no validation of version 1" in refused(
        *export, measured.recipe, "-o", tmp_path / "other"
    )


@pytest.mark.long
def test_frontier_search_and_page_predict_the_same(measured: Measured, tmp_path: Path) -> None:
    points = ok("frontier", measured.table, "--json").json["points"]
    page = read_drawing(read_table(measured.table))
    recipe, compared = tmp_path / "recipe.yaml", 0
    for point in points[:: max(1, len(points) // 6)]:
        size = ("--max-bits", repr(point["bits_per_weight"]))
        for ties in ("off", "on"):
            found = ok("search", measured.table, *size, "--ties", ties, "-o", recipe, "--json").json
            if found["error"] == point["error"]:
                kl = (point["kl_nats_per_token"], point["kl_stderr"] or None)
                assert (found["kl_nats_per_token"], found.get("kl_stderr") or None) == kl
                (drawn,) = read_drawing(page.table, recipes=[recipe]).recipes
                assert drawn.value == kl[0]
                compared += 1
    assert compared >= 6
    shown = ok("frontier", measured.table)
    assert "--ties off" in shown.err
    bits, _, _, kl, *_ = shown.out.splitlines()[8].split()
    size = ("--max-bits", bits, "--ties", "off")
    found = ok("search", measured.table, *size, "-o", recipe).out
    assert f"KL, predicted, 95 % [nats/token] {kl} (" in " ".join(found.split())
    assert "no doubt about a point" not in shown.err
    polished = ok("frontier", measured.table, "--polish", "30")
    assert "The gap is no doubt about a point: each has the least error" in polished.err
