from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mofq.decision.recipe import (
    Recipe,
    RecipeGroup,
    RecipeResult,
    check_recipe,
    load_recipe,
    parse_recipe,
    recipe_text,
    write_recipe,
)
from mofq.decision.rewriting import Rewriting, SiteRewriting
from mofq.exceptions import MofqError, RecipeError
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers

HASH = "3f9ac1d0" * 8

TEXT = """\
# A recipe of mofq. It may be edited by hand, and is checked in full when it is read.
version: 1
model: {name: Qwen/Qwen3-0.6B, index_sha256: "12345678"}
made_by: {mofq: 0.1.0, solver: exact, seed: 0, table_sha256: b71e0452}
budget: {bits_per_weight: 5.0}
result: {bits_per_weight: 4.981, bytes: 274205184, kl_nats_per_token: 1.0e-05, \
decisions_sha256: 1d84a281846fe491c87c9d89724f6c8926422393d07fe3c4267f7cc68933f8e6}
groups:  # one scheme per fusion group
  layers.0.attn.qk:
    scheme: nvfp4
    layers: [model.layers.0.q_proj, model.layers.0.k_proj]
  layers.0.attn.o:
    scheme: int8.channel+int8.tensor
    layers: [model.layers.0.o_proj]
    static_amax: {model.layers.0.o_proj: 12.5}
unquantized: [lm_head]  # nothing else is left out
"""
RECIPE = Recipe(
    "Qwen/Qwen3-0.6B",
    "12345678",
    groups=(
        RecipeGroup(
            "layers.0.attn.qk", "nvfp4", ("model.layers.0.q_proj", "model.layers.0.k_proj")
        ),
        RecipeGroup(
            "layers.0.attn.o",
            "int8.channel+int8.tensor",
            ("model.layers.0.o_proj",),
            {"model.layers.0.o_proj": 12.5},
        ),
    ),
    unquantized=("lm_head",),
    made_by={"mofq": "0.1.0", "solver": "exact", "seed": 0, "table_sha256": "b71e0452"},
    budget={"bits_per_weight": 5.0},
    result=RecipeResult(bits_per_weight=4.981, bytes=274205184, kl_nats_per_token=1e-5),
)


def layer(name: str, in_features: int = 64) -> LinearLayer:
    return LinearLayer(
        name=name,
        tensor=f"{name}.weight",
        out_features=32,
        in_features=in_features,
        dtype="BF16",
        transposed=False,
        expert=None,
        row_start=0,
        decoder_layer=0,
        module=name,
        shares_scale=name,
    )


def model(in_features: int = 64) -> ModelLayers:
    q, k, o = (layer(f"model.layers.0.{word}_proj", in_features) for word in "qko")
    groups = (FusionGroup("layers.0.attn.qk", (q, k)), FusionGroup("layers.0.attn.o", (o,)))
    return ModelLayers("llama", groups, (layer("lm_head"),), False, 0)


def recipe_of(schemes: dict[str, str], unquantized: tuple[str, ...] = ("lm_head",)) -> Recipe:
    """A hand-written recipe that gives every layer an entry of its own."""
    groups = (RecipeGroup(f"of {name}", scheme, (name,)) for name, scheme in schemes.items())
    return Recipe("m", None, groups=tuple(groups), unquantized=unquantized)


ALL = {f"model.layers.0.{word}_proj": "int8.channel" for word in "qko"}


def test_a_recipe_is_written_and_read_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    write_recipe(RECIPE, path)
    assert path.read_text() == TEXT
    assert load_recipe(path) == RECIPE
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_older_recipe_with_a_prediction_of_interactions_is_read_and_kept() -> None:
    text = TEXT.replace(
        "kl_nats_per_token: 1.0e-05", "kl_nats_per_token: 1.0e-05, kl_joint: 2.0e-05"
    )
    assert text != TEXT
    recipe = parse_recipe(text)
    assert recipe.result.kl_joint == 2e-5
    assert recipe_text(recipe) == text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("scheme: nvfp4", "scheme: mxfp4"),
        ("12.5}", "12.75}"),
        ("[lm_head]", "[lm_head, model.layers.0.extra]"),
        (
            "unquantized",
            "kv_cache: {layers.0.attn.kv_cache: {scheme: 'kv:fp8_e4m3.token'}}\nunquantized",
        ),
    ],
)
def test_figures_of_a_recipe_that_was_edited_since_are_not_read(before: str, after: str) -> None:
    text = TEXT.replace(before, after)
    assert text != TEXT
    recipe = parse_recipe(text)
    assert recipe.is_edited
    assert recipe.result == RecipeResult()
    assert (recipe.bits_per_weight, recipe.kl_nats_per_token) == (None, None)
    # Where it came from stays, how its decisions were found does not.
    assert recipe.made_by == {"mofq": "0.1.0", "solver": "edited", "table_sha256": "b71e0452"}
    again = parse_recipe(recipe_text(recipe))
    assert again == recipe


def test_what_changes_no_decision_is_no_edit() -> None:
    groups = TEXT[TEXT.index("  layers.0.attn.qk:") : TEXT.index("unquantized:")]
    first, second = groups.split("  layers.0.attn.o:")
    swapped = TEXT.replace(groups, f"  layers.0.attn.o:{second}{first}")
    short = TEXT.replace(
        "1d84a281846fe491c87c9d89724f6c8926422393d07fe3c4267f7cc68933f8e6", "1d84a281"
    )
    named = TEXT.replace("layers.0.attn.o:", "attention output:")
    for text in (swapped, short, named, TEXT.replace("solver: exact", "note: mine, solver: exact")):
        assert text != TEXT
        recipe = parse_recipe(text)
        assert recipe.result.kl_nats_per_token == 1e-5
        assert recipe.made_by["solver"] == "exact"


def test_decisions_are_hashed_as_sorted_json_of_all_of_them() -> None:
    groups = (
        RecipeGroup("b", "int4.g32", ("z.é", 'a."b"')),
        RecipeGroup("a", "int8.channel", ("a.10", "a.9"), static_amax={"a.9": 1.5}),
    )
    recipe = dataclasses.replace(RECIPE, groups=groups, unquantized=("lm_head",))
    decided = [recipe.schemes, recipe.static_amax, {}]
    text = json.dumps(decided, sort_keys=True)
    assert recipe.decisions_sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_recipes_of_before_a_rewriting_said_its_inputs_keep_their_hash() -> None:
    site = SiteRewriting("awq", 0.5, 0.0)
    recipe = dataclasses.replace(
        RECIPE, rewriting=Rewriting("m", "a" * 64, "b" * 64, "c" * 64, {"layers.0.mlp.up": site})
    )
    rewriting = {
        "model": "m",
        "index_sha256": "a" * 64,
        "weights_sha256": "b" * 64,
        "stats_sha256": "c" * 64,
        "sites": {"layers.0.mlp.up": {"method": "awq", "alpha": 0.5, "beta": 0.0}},
    }

    def hashed(rewriting: dict[str, object]) -> str:
        text = json.dumps([recipe.schemes, recipe.static_amax, {}, rewriting], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    assert recipe.decisions_sha256 == hashed(rewriting)
    assert recipe.rewriting is not None
    now = dataclasses.replace(recipe, rewriting=dataclasses.replace(recipe.rewriting, inputs="all"))
    assert now.decisions_sha256 == hashed(rewriting | {"inputs": "all"})


def test_a_recipe_of_before_figures_had_a_hash_is_read_as_it_is() -> None:
    hashed = ", \\\n".replace("\\\n", "") + "decisions_sha256: " + RECIPE.decisions_sha256
    old = TEXT.replace(hashed, "").replace("nvfp4", "mxfp4")
    recipe = parse_recipe(old)
    assert "decisions_sha256" not in old
    assert not recipe.is_edited
    assert recipe.result.kl_nats_per_token == 1e-5
    # From now on they are of these decisions.
    assert parse_recipe(recipe_text(recipe).replace("mxfp4", "nvfp4")).is_edited


def test_decisions_that_are_changed_in_memory_keep_no_figures() -> None:
    changed = dataclasses.replace(RECIPE.groups[0], scheme="mxfp4")
    edited = dataclasses.replace(RECIPE, groups=(changed, RECIPE.groups[1]))
    assert edited.is_edited
    assert edited.result == RecipeResult()
    counted = dataclasses.replace(edited, result=RecipeResult(bits_per_weight=4.0))
    assert parse_recipe(recipe_text(counted)).bits_per_weight == 4.0


def test_another_yaml_reader_sees_the_same_values() -> None:
    value = yaml.safe_load(TEXT)
    assert value["model"]["index_sha256"] == "12345678"
    assert value["result"]["kl_nats_per_token"] == 1e-5
    assert value["groups"]["layers.0.attn.o"]["scheme"] == "int8.channel+int8.tensor"


def test_a_recipe_answers_for_every_layer() -> None:
    assert RECIPE.schemes == {
        "model.layers.0.q_proj": "nvfp4",
        "model.layers.0.k_proj": "nvfp4",
        "model.layers.0.o_proj": "int8.channel+int8.tensor",
        "lm_head": "bf16",
    }
    assert RECIPE.static_amax == {"model.layers.0.o_proj": 12.5}
    assert RECIPE.bits_per_weight == 4.981
    assert RECIPE.kl_nats_per_token == 1e-5


def test_a_recipe_written_by_hand_needs_no_table() -> None:
    text = (
        "version: 1\nmodel: {name: m}\ngroups:\n  a: {scheme: fp4_e2m1.g16.s-e4m3, layers: [x]}\n"
    )
    recipe = parse_recipe(text)
    assert recipe.schemes == {"x": "nvfp4"}
    assert (recipe.index_sha256, recipe.bits_per_weight, recipe.kl_nats_per_token) == (None,) * 3


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("version: 1", "version: 2", "has version 2, and this mofq reads version 1"),
        ("version: 1", "version: true", "has version True, and this mofq reads version 1"),
        ("version: 1\n", "", "the key 'version' is missing"),
        ("budget:", "bugdet:", "unknown key 'bugdet'. Did you mean 'budget'"),
        ("kl_nats", "kl_nast", "result: unknown key 'kl_nast_per_token'. Did you mean"),
        (
            "scheme: nvfp4",
            "scheme: nvpf4",
            "layers.0.attn.qk: scheme 'nvpf4'.*Did you mean 'nvfp4'",
        ),
        ("scheme: nvfp4", "schema: nvfp4", "Did you mean 'scheme'"),
        ("[lm_head]", "[lm_head, lm_head]", "'lm_head' stands in unquantized and in unquantized"),
        ("[lm_head]", "[model.layers.0.q_proj]", "stands in groups: layers.0.attn.qk and in unq"),
        ("[model.layers.0.o_proj]", "[]", r"layers: must have at least 1 item, found \[\]"),
        ("  layers.0.attn.o:", "  layers.0.attn.qk:", "the key 'layers.0.attn.qk' stands twice"),
        ("bytes: 274205184", "bytes: -1", "bytes: must be at least 0, found -1"),
        ("bytes: 274205184", "bytes: 1.5", "bytes: must be an integer, found 1.5"),
        ("b71e0452", "b71e", "table_sha256: must match pattern .*, found 'b71e'"),
        ("{model.layers.0.o_proj: 12.5}", "{model.layers.0.q_proj: 12.5}", "exactly the layers"),
        ("    static_amax: {model.layers.0.o_proj: 12.5}\n", "", "must name exactly the layers"),
        ("scheme: int8.channel+int8.tensor", "scheme: int8.channel", "be absent elsewhere"),
        ("12.5}", "-1}", "must be at least 0"),
        ("nvfp4", "&a nvfp4", "anchors and aliases are not accepted"),
        ("nvfp4", "!!str nvfp4", "tag .* is not accepted"),
        ("groups:", "groups: [", "is not valid YAML"),
    ],
)
def test_an_edited_recipe_is_refused_with_its_key(before: str, after: str, message: str) -> None:
    assert before in TEXT
    with pytest.raises(RecipeError, match=message):
        parse_recipe(TEXT.replace(before, after), where="recipe.yaml")


def test_an_empty_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)
    path.touch()
    with pytest.raises(RecipeError, match="is empty"):
        load_recipe(path)
    path.write_bytes(b"#" * 17_000_000)
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"result": RecipeResult(bits_per_weight=float("nan"))},
        {"groups": (RecipeGroup("a", "fp4_e2m1.g16.s-e4m3", ("x",)),)},
        {"groups": (RecipeGroup("a", "nvfp4", ("x",)), RecipeGroup("b", "nvfp4", ("x",)))},
        {"version": 2},
        {"unquantized": ("\ud800",)},
    ],
)
def test_what_would_not_read_back_is_not_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises((RecipeError, ValueError)):
        write_recipe(dataclasses.replace(RECIPE, **changes), tmp_path / "recipe.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MofqError, match="cannot be written: No such file or directory"):
        write_recipe(RECIPE, tmp_path / "no" / "recipe.yaml")


def test_a_recipe_that_covers_its_model_passes() -> None:
    check_recipe(RECIPE, model(), index_sha256="12345678" + "0" * 56)
    check_recipe(RECIPE, model())
    check_recipe(recipe_of(ALL), model(), index_sha256=HASH)
    check_recipe(recipe_of({**ALL, "lm_head": "int8.channel"}, unquantized=()), model())


@pytest.mark.parametrize(
    ("schemes", "unquantized", "message"),
    [
        (
            {**ALL, "model.layers.0.k_proj": "int8.g32"},
            ("lm_head",),
            r"layers\.0\.attn\.qk is served as one matrix .*int8\.channel and .*int8\.g32\. "
            r"Give both the same; .* measure into a new table",
        ),
        (
            {**ALL, "model.layers.0.p_proj": "int8.channel"},
            ("lm_head",),
            "no linear layer .*p_proj",
        ),
        (ALL, (), "the linear layer 'lm_head' is missing"),
        ({}, ("lm_head",), r"q_proj' is missing \(3 in all\)"),
        (
            dict.fromkeys(ALL, "int4.g128"),
            ("lm_head",),
            "needs in_features divisible by 128, got 64",
        ),
    ],
)
def test_a_recipe_that_does_not_cover_its_model_is_refused(
    schemes: dict[str, str], unquantized: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe_of(schemes, unquantized), model())


def test_a_layer_left_unquantized_splits_its_fusion_group() -> None:
    schemes = {name: scheme for name, scheme in ALL.items() if "k_proj" not in name}
    with pytest.raises(RecipeError, match="k_proj has bf16"):
        check_recipe(recipe_of(schemes, ("lm_head", "model.layers.0.k_proj")), model())


def test_the_recipe_of_another_model_is_refused_with_both_hashes() -> None:
    with pytest.raises(RecipeError, match=f"index_sha256 12345678, and the model has {HASH}"):
        check_recipe(RECIPE, model(), index_sha256=HASH)


_NAME = st.text(min_size=1, max_size=20).filter(str.isprintable) | st.sampled_from(
    [
        "no",
        "1e5",
        "0x1f",
        "12345678",
        "null",
        "y",
        "2026-01-01",
        "a: b",
        "<script>",
        "- x",
        "~",
        "=",
        "1_0",
    ]
)


@pytest.mark.long
@given(st.lists(_NAME, min_size=1, max_size=6, unique=True))
@settings(max_examples=200, deadline=None)
def test_any_name_survives_writing_and_reading(names: list[str]) -> None:
    recipe = Recipe(names[0], None, groups=(RecipeGroup(names[-1], "nvfp4", tuple(names)),))
    text = recipe_text(recipe)
    assert parse_recipe(text) == recipe
    assert yaml.safe_load(text)["groups"] == {names[-1]: {"scheme": "nvfp4", "layers": names}}


@given(st.floats(min_value=0, allow_infinity=False))
def test_any_number_survives_writing_and_reading(number: float) -> None:
    text = recipe_text(dataclasses.replace(RECIPE, result=RecipeResult(error=number)))
    assert parse_recipe(text).result.error == number
    assert yaml.safe_load(text)["result"]["error"] == number


@given(st.integers(0, len(TEXT)), st.integers(0, 8), st.text(max_size=8))
@settings(max_examples=300, deadline=None)
def test_no_damage_breaks_the_parser(start: int, length: int, text: str) -> None:
    with contextlib.suppress(RecipeError):
        parse_recipe(TEXT[:start] + text + TEXT[start + length :])
