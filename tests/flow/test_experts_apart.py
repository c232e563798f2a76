"""Experts with schemes of their own, from the statistics to what can be done with a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import ok, refused
from conftest import TinyCheckpoint
from emulated import recipe_of, validate

from mofq.decision.recipe import Recipe, load_recipe, write_recipe
from mofq.delivery.recipe_layers import find_recipe_layers
from mofq.delivery.validation.measured_kl import MeasuredKl
from mofq.evidence.corpora import load_text
from mofq.exceptions import RecipeError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import ExpertsBy, split_experts

SPACE = "version: 1\nschemes: [int4.g32, int6.channel+int6.token, int8.channel]\n"
SHORT = ("--corpus", "a=demo-en-calibration", "--sequences", "4", "--sequence-length", "64")
TEXT = ("--text", "demo-en", "--tokens", "96", "--sequence-length", "32")


@pytest.fixture(scope="module")
def mixture(tiny: TinyCheckpoint) -> Checkpoint:
    return open_checkpoint(str(tiny("qwen3_moe")))


@pytest.fixture(scope="module")
def stats(mixture: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apart")
    ok("calibrate", mixture.folder, *SHORT, "-o", folder / "stats")
    (folder / "space.yaml").write_text(SPACE)
    return folder / "stats"


def measured(mixture: Checkpoint, stats: Path, by: str, table: Path) -> Path:
    space = stats.with_name("space.yaml")
    ok("measure", mixture.folder, "--space", space, "--stats", stats, "--experts", by, "-o", table)
    return table


def divided(mixture: Checkpoint, by: ExpertsBy, **schemes: str) -> Recipe:
    """A recipe of INT8 in which the groups named (dots as underscores) have another scheme."""
    whole = recipe_of(mixture, "int8.channel")
    groups = split_experts(find_recipe_layers(mixture, whole), by).groups
    entries = tuple(
        replace(
            whole.groups[0],
            name=group.name,
            scheme=schemes.get(group.name.replace(".", "_"), "int8.channel"),
            layers=tuple(layer.name for layer in group.layers),
        )
        for group in groups
    )
    return replace(whole, groups=entries)


@pytest.mark.parametrize("by", ["expert", "matrix"])
def test_a_recipe_with_experts_apart_is_applied_layer_by_layer(
    by: str, mixture: Checkpoint, stats: Path, tmp_path: Path
) -> None:
    table = measured(mixture, stats, by, tmp_path / "table.jsonl")
    recipe = tmp_path / "recipe.yaml"
    ok("search", table, "--max-active-bits", "6", "-o", recipe)
    of_experts = {one.scheme for one in load_recipe(recipe).groups if "layers.0.moe" in one.name}
    assert len(of_experts) > 1
    assert ok("validate", mixture.folder, recipe, *TEXT, "--json").json["enforced"] is True


def test_an_explanation_says_that_changes_of_experts_are_in_none_of_its_errors(
    mixture: Checkpoint, stats: Path, tmp_path: Path
) -> None:
    table = measured(mixture, stats, "layer", tmp_path / "table.jsonl")
    explain = ("--explain", "layers.0.attn.o", "-o", tmp_path / "recipe.yaml")
    shown = ok("search", table, "--max-bits", "6", *explain)
    assert "Errors are of tokens that stay with their experts" in shown.err


def test_engines_are_given_no_experts_apart(
    mixture: Checkpoint, stats: Path, tmp_path: Path
) -> None:
    space, table, recipe = stats.with_name("space.yaml"), tmp_path / "t.jsonl", tmp_path / "r.yaml"
    engine = ("--engine", "vllm-ampere")
    common = ("--space", space, "--stats", stats, "-o", table)
    message = refused("measure", mixture.folder, *common, *engine, "--experts", "expert")
    assert "--experts expert: engines give all experts of a decoder layer one scheme" in message
    measured(mixture, stats, "expert", table)
    message = refused("search", table, *engine, "--max-bits", "8", "-o", recipe)
    assert "gives all experts of a decoder layer one scheme" in message
    write_recipe(divided(mixture, "expert", layers_0_moe_experts_1="int4.g32"), recipe)
    export = ("export", mixture.folder, recipe, "-o", tmp_path / "exported", "--to")
    assert "needs one scheme" in refused(*export, "compressed-tensors")
    assert "holds this part of all experts" in refused(*export, "llama.cpp")


def test_experts_apart_that_agree_are_served_as_one(mixture: Checkpoint, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    write_recipe(divided(mixture, "matrix"), recipe)
    ok("export", mixture.folder, recipe, "--to", "compressed-tensors", "-o", tmp_path / "exported")
    assert ok("validate", mixture.folder, tmp_path / "exported", *TEXT, "--json").json["enforced"]


def test_llama_cpp_takes_another_type_for_what_leads_out_of_experts(
    mixture: Checkpoint, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "types.txt"
    write_recipe(divided(mixture, "projection", layers_0_moe_experts_down="int4.g32"), recipe)
    ok("export", mixture.folder, recipe, "--to", "llama.cpp", "-o", out)
    lines = out.read_text().splitlines()
    assert r"--tensor-type blk\.0\.ffn_down_exps\.weight=q4_0" in lines
    assert r"--tensor-type blk\.0\.ffn_gate_exps\.weight=q8_0" in lines


def test_a_recipe_that_splits_what_engines_concatenate_is_refused(mixture: Checkpoint) -> None:
    recipe = divided(mixture, "matrix")
    first = next(one for one in recipe.groups if one.name.endswith("experts.0.gate_up"))
    gate, up = (replace(first, name=name, layers=(name,)) for name in first.layers)
    groups = (*(one for one in recipe.groups if one is not first), gate, up)
    broken = replace(recipe, groups=(*groups[:-1], replace(up, scheme="int4.g32")))
    with pytest.raises(RecipeError, match="needs one scheme"):
        validate(str(mixture.folder), broken, load_text("demo-en"), tokens=32, sequence_length=16)


def test_measuring_one_expert_s_recipe_after_another_s_gives_the_bits_of_validate(
    mixture: Checkpoint,
) -> None:
    text = load_text("demo-en")
    recipes = [
        divided(mixture, "expert", layers_0_moe_experts_1="int4.g32+int8.token"),
        divided(mixture, "expert", layers_0_moe_experts_2="bf16+int4.token"),
        divided(mixture, "projection", layers_1_moe_experts_down="int4.g32+int8.token"),
        divided(mixture, "layer"),
    ]
    shape = {"tokens": 32, "sequence_length": 16}
    expected = [validate(str(mixture.folder), one, text, **shape).windows for one in recipes]
    with MeasuredKl(str(mixture.folder), text, **shape) as objective:
        for index in (0, 1, 2, 3, 1, 0):
            assert tuple(objective.evaluate(recipes[index])) == expected[index]
