"""Decoder layers of different widths and head counts, as pruning and architecture search leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ok, refused
from exported import Exported, whole_weight
from safetensors.torch import load_file, save_file
from tiny_types import tiny_config, write_type
from type_flow import run_flow

from mofq.decision.recipe import load_recipe
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.numbers.quantize import dequantize_weight, quantize_weight
from mofq.numbers.schemes import parse_scheme

AS_THEY_ARE = "version: 1\n"
SHORT = ("--corpus", "a=demo-en-calibration", "--sequences", "4", "--sequence-length", "32")


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A Llama whose second layer has a narrower MLP, and the third half of the heads."""
    folder = write_type("llama", tmp_path / "pruned")
    tensors = load_file(folder / "model.safetensors")
    rows: dict[tuple[int, str], int] = {
        (1, "mlp.gate_proj"): 96,
        (1, "mlp.up_proj"): 96,
        (2, "self_attn.q_proj"): 32,
        (2, "self_attn.k_proj"): 16,
        (2, "self_attn.v_proj"): 16,
    }
    for (index, path), count in rows.items():
        name = f"model.layers.{index}.{path}.weight"
        tensors[name] = tensors[name][:count].clone()
    for name, count in (("1.mlp.down_proj", 96), ("2.self_attn.o_proj", 32)):
        tensors[f"model.layers.{name}.weight"] = tensors[f"model.layers.{name}.weight"][
            :, :count
        ].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def searched(folder: Path) -> Path:
    """The same as an architecture search writes it: code of its own, blocks without a half.

    The first layer has no MLP, the last but one no attention, a matrix takes the place of
    attention in one, and of the last nothing is left.
    """
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.startswith(("model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.3.")):
            del tensors[name]
    linear = "model.layers.1.self_attn.linear_attn.weight"
    tensors[linear] = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    gone, kept = {"no_op": True}, {"no_op": False}
    blocks = [{"attention": kept, "ffn": gone}, *[{"attention": kept, "ffn": kept}] * 2]
    config |= {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "intermediate_size": None,
        "block_configs": [*blocks, {"attention": gone, "ffn": gone}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_decilm.py").write_text("raise SystemExit('never run')\n")
    return folder


def test_a_known_type_with_a_width_for_each_layer_goes_through_the_whole_flow(
    tmp_path: Path,
) -> None:
    config = tiny_config("gemma3n_text", intermediate_size=[128, 64, 192, 128])
    model = write_type("gemma3n_text", tmp_path / "m", config=config)
    widths = [
        group.layers[0].in_features
        for group in find_layers(open_checkpoint(str(model))).groups
        if group.name.endswith("mlp.down")
    ]
    assert widths == [128, 64, 192, 128]
    (work := tmp_path / "work").mkdir()
    assert run_flow(model, work) > 0


def test_a_pruned_llama_is_decided_and_exported_by_names_and_shapes(
    pruned: Path, tmp_path: Path
) -> None:
    assert "a file of `version: 1` alone for --layers" in refused("inspect", pruned)
    said = tmp_path / "layers.yaml"
    said.write_text(AS_THEY_ARE)
    shapes = _decide_and_export(pruned, tmp_path, "--layers", said)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 96)
    assert shapes["model.layers.2.self_attn.k_proj"] == (16, 64)
    message = refused("calibrate", pruned, *SHORT, "--layers", said, "-o", tmp_path / "stats")
    assert "its tensors have other shapes than config.json says" in message


def test_what_an_architecture_search_left_is_decided_and_exported(
    pruned: Path, tmp_path: Path
) -> None:
    model = searched(pruned)
    shapes = _decide_and_export(model, tmp_path)
    assert shapes["model.layers.1.self_attn.linear_attn"] == (64, 64)
    assert {name.split(".")[2] for name in shapes} == {"0", "1", "2"}
    assert "model.layers.0.mlp.down_proj" not in shapes
    assert (tmp_path / "out" / "configuration_decilm.py").is_file()
    message = refused("calibrate", model, *SHORT, "-o", tmp_path / "stats")
    assert "it needs code that comes with it, which is never run here" in message
    assert "`mofq measure` without --stats" in message
    config = json.loads((model / "config.json").read_text())
    del config["block_configs"]
    (model / "config.json").write_text(json.dumps(config))
    assert "needed 4 decoder layers as the config says, found 3" in refused("inspect", model)


def _decide_and_export(model: Path, work: Path, *options: Any) -> dict[str, tuple[int, int]]:
    """Measure without statistics, search, export, and compare each layer; returns their shapes."""
    space, table, recipe = work / "space.yaml", work / "table.jsonl", work / "recipe.yaml"
    space.write_text("version: 1\nschemes: [int4.g32, int8.channel]\n")
    ok("measure", model, "--space", space, *options, "-o", table)
    ok("search", table, "--max-bits", "7", "-o", recipe)
    schemes = load_recipe(recipe).schemes
    assert {"int4.g32", "int8.channel"} <= set(schemes.values())
    ok("export", model, recipe, "--to", "compressed-tensors", "-o", work / "out")
    exported, checkpoint = Exported(work / "out"), open_checkpoint(str(model))
    tensors, shapes = exported.tensors, {}
    stated = load_recipe(recipe).layers
    for layer in find_layers(checkpoint, stated=stated).grouped_layers:
        scheme = parse_scheme(schemes[layer.name])
        assert scheme.weight is not None
        quantized = quantize_weight(whole_weight(checkpoint, layer), scheme.weight)
        decoded = exported.decode(layer.name, tensors)
        assert torch.equal(
            decoded.float(), dequantize_weight(quantized, scheme.weight).bfloat16().float()
        )
        shapes[layer.name] = (layer.out_features, layer.in_features)
    return shapes
