"""The whole flow from an FP8 checkpoint: what is measured, run, written, enforced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from command_line import ok, refused
from conftest import TinyCheckpoint
from emulated import validate
from exported import export, make_recipe, uniform_recipe
from families import copy_with_tensors
from fp8_sources import read_all, write_fp8
from rounding import apart
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from mofq.decision.recipe import load_recipe
from mofq.delivery.backends import apply_recipe
from mofq.delivery.export.compressed_tensors import check_compressed_tensors
from mofq.delivery.validation.enforcement import find_deviations
from mofq.delivery.validation.measured_kl import MeasuredKl
from mofq.evidence.corpora import load_text
from mofq.evidence.table import read_table
from mofq.exceptions import EnforcementError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows, read_tensor
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.model.sizes import group_bytes, source_bytes
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.schemes import parse_scheme

SPACE = """version: 1
schemes: [int4.g32, int8.channel, fp8_e4m3.channel+fp8_e4m3.token, bf16]
base: [int4.g32]
"""
SHORT = ("--corpus", "a=demo-en-calibration", "--sequences", "4", "--sequence-length", "32")
TEXT = ("--text", "demo-en", "--tokens", "96", "--sequence-length", "32")
FUSED = ("attn.qkv", "mlp.gate_up")
TO = ("--to", "compressed-tensors")
EDGES = {"hidden_size": 192, "intermediate_size": 320}


def calibrate_and_measure(model: Path, folder: Path) -> Path:
    """The table of `SPACE`, in nats."""
    stats, space, table = (folder / n for n in ("stats", "space.yaml", "table.jsonl"))
    space.write_text(SPACE)
    ok("calibrate", model, *SHORT, "-o", stats)
    ok("measure", model, "--space", space, "--stats", stats, "-o", table)
    return table


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "convention", "options"),
    [
        ("llama", "fp8 blocks", EDGES),
        ("llama", "compressed-tensors channel", {"tie_word_embeddings": True}),
        ("qwen3_moe", "fp8 blocks, bf16 scales", {"moe_intermediate_size": 96}),
        ("qwen3_moe", "modelopt tensor", {"fused": True}),
        ("deepseek_v3", "fp8 blocks", {}),
        ("mixtral", "compressed-tensors block", {}),
        ("gpt2", "cast", {}),
    ],
)
def test_an_fp8_checkpoint_goes_through_the_whole_flow(
    family: str,
    convention: str,
    options: dict[str, object],
    tiny: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    source = tiny(family, **options)
    model = write_fp8(source, tmp_path / "m", convention, scales_apart=True, with_inputs=True)
    recipe, exported = tmp_path / "recipe.yaml", tmp_path / "exported"
    ok("inspect", model)
    table = calibrate_and_measure(model, tmp_path)
    ok("search", table, "--max-bits", "8.5", "-o", recipe)
    assert set(load_recipe(recipe).schemes.values()) != {"bf16"}
    layers = find_layers(open_checkpoint(str(model)))
    header = read_table(table).header
    assert header.source_bytes_of_groups == sum(map(source_bytes, layers.groups))
    emulated = ok("validate", model, recipe, *TEXT, "--json").json
    assert emulated["enforced"] is True
    assert emulated["kl_nats_per_token"] > 0
    written = ok("export", model, recipe, *TO, "-o", exported, "--json").json
    reloaded = ok("validate", model, exported, *TEXT, "--json").json
    assert reloaded["enforced"] is True
    assert reloaded["kl_nats_per_token"] == emulated["kl_nats_per_token"]
    assert written["checkpoint_bytes"] == load_recipe(recipe).result.checkpoint_bytes


def mixture(checkpoint: Checkpoint, *kept: str) -> object:
    """INT8 everywhere but in fusion groups whose names end as said."""
    return make_recipe(
        checkpoint, lambda _, group: "bf16" if group.name.endswith(kept) else "int8.channel"
    )


def test_what_is_kept_is_written_in_bf16_and_no_scale_is_left(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = write_fp8(tiny("llama", **EDGES), tmp_path / "m", "fp8 blocks", with_inputs=True)
    checkpoint = open_checkpoint(str(model))
    recipe = mixture(checkpoint, "attn.qkv", "mlp.down")
    exported = export(model, recipe, tmp_path / "out")
    tensors = exported.tensors
    assert not [n for n in tensors if n.endswith(("scale_inv", "input_scale", "k_scale"))]
    assert not [n for n, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    assert exported.config["quantization_config"]["quant_method"] == "compressed-tensors"
    card = (exported.folder / "README.md").read_text("utf-8")
    assert "The original is quantized (fp8, a scale for each block of 128 x 128)" in card
    layers = find_layers(checkpoint)
    for group in layers.groups:
        for layer in group.layers:
            exact_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
            if group.name.endswith(("attn.qkv", "mlp.down")):
                rounded = exact_OI.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
                assert torch.equal(tensors[layer.tensor].float(), torch.from_numpy(rounded))
            else:
                scheme = parse_scheme("int8.channel")
                assert scheme.weight is not None
                needed = fake_quantize_weight(exact_OI, scheme.weight).bfloat16()
                assert torch.equal(exported.decode(layer.name, tensors), needed)
    untouched = [n for n in read_all(model) if "norm" in n or "embed" in n]
    assert untouched
    assert all(torch.equal(tensors[n], read_all(model)[n]) for n in untouched)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_the_export_is_reloaded_by_transformers(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = write_fp8(tiny("llama"), tmp_path / "m", "compressed-tensors channel")
    checkpoint = open_checkpoint(str(model))
    recipe = mixture(checkpoint, "attn.qkv")
    export(model, recipe, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    ours = apply_recipe(load_model(model, dtype="bfloat16"), recipe, checkpoint=checkpoint)
    token_NT = torch.arange(64)[None]
    with torch.inference_mode():
        assert torch.equal(theirs(token_NT).logits, ours(token_NT).logits)


def test_a_model_runs_with_what_an_export_writes(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = write_fp8(tiny("qwen3_moe"), tmp_path / "m", "fp8 blocks")
    checkpoint = open_checkpoint(str(model))
    recipe = uniform_recipe(checkpoint, "bf16")
    applied = apply_recipe(load_model(model), recipe, checkpoint=checkpoint).state_dict()
    exact, rounded = load_model(model).state_dict(), export(model, recipe, tmp_path / "out")
    again = load_model(tmp_path / "out").state_dict()
    assert rounded.config.get("quantization_config") is None
    assert all(torch.equal(applied[name], again[name]) for name in applied)
    assert any(not torch.equal(applied[name], exact[name]) for name in applied)


def test_a_kept_layer_that_is_not_rounded_is_a_deviation(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = write_fp8(tiny("llama"), tmp_path / "m", "fp8 blocks")
    checkpoint = open_checkpoint(str(model))
    recipe = mixture(checkpoint, "attn.o")
    applied = apply_recipe(load_model(model), recipe, checkpoint=checkpoint)
    assert find_deviations(applied, recipe, checkpoint=checkpoint) == ()
    name = "model.layers.0.self_attn.o_proj"
    exact_OI = read_tensor(checkpoint.tensors[f"{name}.weight"])
    applied.get_parameter(f"{name}.weight").copy_(exact_OI)
    (deviation,) = find_deviations(applied, recipe, checkpoint=checkpoint)
    assert deviation.layer == name


def test_an_export_whose_kept_layer_is_another_is_found(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = write_fp8(tiny("llama"), tmp_path / "m", "fp8 blocks")
    checkpoint = open_checkpoint(str(model))
    recipe = mixture(checkpoint, "attn.o")
    export(model, recipe, tmp_path / "out")
    check_compressed_tensors(checkpoint, recipe, tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj.weight"
    changed = copy_with_tensors(tmp_path / "out", tmp_path / "bad", lambda t: t[name][5].neg_())
    with pytest.raises(EnforcementError, match=r"o_proj.weight: differs from row 5 on"):
        check_compressed_tensors(checkpoint, recipe, changed)


def test_the_measured_objective_says_what_validate_says(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = write_fp8(tiny("qwen3_moe"), tmp_path / "m", "fp8 blocks")
    checkpoint, text = open_checkpoint(str(model)), load_text("demo-en")
    recipes = [uniform_recipe(checkpoint, "bf16"), mixture(checkpoint, "moe.experts")]
    with MeasuredKl(str(model), text, tokens=64, sequence_length=32) as objective:
        for recipe in [*recipes, recipes[0]]:
            expected = validate(str(model), recipe, text, tokens=64, sequence_length=32)
            assert expected.enforced
            assert tuple(objective.evaluate(recipe)) == expected.windows


@pytest.mark.parametrize(
    ("convention", "scheme"),
    [
        ("fp8 blocks", "fp8_e4m3.block128.s-f32"),
        ("compressed-tensors channel", "fp8_e4m3.channel.s-f32"),
        ("modelopt tensor", "fp8_e4m3.tensor.s-f32"),
    ],
)
def test_the_sources_own_scheme_costs_nothing(
    convention: str, scheme: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = write_fp8(tiny("llama", num_key_value_heads=4), tmp_path / "m", convention)
    space, table = tmp_path / "space.yaml", tmp_path / "table.jsonl"
    space.write_text(f"version: 1\nschemes: [{scheme}, int8.channel]\nbase: [{scheme}]\n")
    ok("measure", model, "--space", space, "-o", table)
    for row in read_table(table).rows:
        # Engines give q, k, v and gate, up one scale for the tensor, which is not the source's.
        is_shared = ".tensor" in scheme and row.group.endswith(FUSED)
        if row.scheme == "int8.channel" or (row.scheme == scheme and is_shared):
            assert row.error > 1e-6
        elif row.scheme == scheme:
            assert row.error < 1e-13


@pytest.mark.parametrize(("convention", "is_exact"), [("fp8 blocks", False), ("cast", True)])
def test_rounding_to_bf16_is_in_the_table_and_not_nothing(
    convention: str, is_exact: bool, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = write_fp8(tiny("llama"), tmp_path / "m", convention)
    table = calibrate_and_measure(model, tmp_path)
    checkpoint = open_checkpoint(str(model))
    weights = {
        group.name: read_layer_rows(checkpoint, group.layers[0], 0, group.layers[0].out_features)
        for group in find_layers(checkpoint).groups
        if len(group.layers) == 1
    }
    rows = [row for row in read_table(table).rows if row.scheme == "bf16"]
    for row in rows:
        if row.unit == "relative_weight_error" and row.group in weights:
            weight_OI = weights[row.group].numpy().astype(np.float64)
            delta_OI = weight_OI.astype(ml_dtypes.bfloat16).astype(np.float64) - weight_OI
            needed = ((delta_OI**2).sum(0) / (weight_OI**2).sum(0)).mean()
            assert row.error == pytest.approx(needed, rel=2 * apart(len(weight_OI)))
        assert (row.error == 0) is is_exact


def test_bytes_of_a_recipe_are_those_of_what_is_written(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = write_fp8(tiny("llama", **EDGES), tmp_path / "m", "modelopt channel")
    checkpoint = open_checkpoint(str(model))
    recipe = mixture(checkpoint, "attn.qkv")
    exported = export(model, recipe, tmp_path / "out")
    groups = find_layers(checkpoint).groups
    schemes = {group.name: parse_scheme(group.scheme) for group in recipe.groups}
    of_layers = sum(
        tensor.nbytes
        for name, tensor in exported.tensors.items()
        if ".layers." in name and "norm" not in name
    )
    assert sum(group_bytes(group, schemes[group.name]) for group in groups) == of_layers


def test_a_rewritten_fp8_model_is_one_in_bf16(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = write_fp8(tiny("llama"), tmp_path / "m", "fp8 blocks")
    ok("calibrate", model, *SHORT, "-o", tmp_path / "stats")
    rewritten = tmp_path / "rewritten"
    ok("rewrite", model, "--method", "smoothquant", "--stats", tmp_path / "stats", "-o", rewritten)
    assert "quantization_config" not in json.loads((rewritten / "config.json").read_text())
    tensors = read_all(rewritten)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not [name for name in tensors if "scale" in name]
    token_NT = torch.arange(64)[None]
    with torch.inference_mode():
        ours, theirs = (load_model(folder)(token_NT).logits for folder in (rewritten, model))
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_a_recipe_of_another_source_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = write_fp8(tiny("llama"), tmp_path / "m", "fp8 blocks")
    other = write_fp8(tiny("llama"), tmp_path / "n", "fp8 tensor")
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", model, "int8.channel", "-o", recipe)
    assert "index_sha256" in refused("export", other, recipe, *TO, "-o", tmp_path / "out")
    assert replace(load_recipe(recipe), index_sha256=None).weights_sha256 is not None
