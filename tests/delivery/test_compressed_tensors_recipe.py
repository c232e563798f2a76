"""Recipes read back from compressed-tensors checkpoints, ours and others'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from exported import STORABLE, Stored, export, mixed_recipe, uniform_recipe
from families import copy_with_config
from safetensors.torch import load_file, save_file

from mofq.decision.recipe import check_recipe
from mofq.delivery.export.compressed_tensors import recipe_from_compressed_tensors
from mofq.engines import format_name
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.numbers.schemes import parse_scheme


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("name", STORABLE)
def test_the_schemes_of_an_export_are_read_back(name: str, stored: Callable[[str], Stored]) -> None:
    one = stored(name)
    recipe = one.recipe
    found = recipe_from_compressed_tensors(one.exported.folder)
    written = format_name(parse_scheme(name))
    assert {group.scheme for group in found.groups} == {written}
    check_recipe(found, find_layers(one.checkpoint))
    for group, original in zip(found.groups, recipe.groups, strict=True):
        assert (group.static_amax is None) == (original.static_amax is None)
        for layer, amax in (original.static_amax or {}).items():
            assert group.static_amax is not None
            assert group.static_amax[layer] == pytest.approx(amax, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe", "phi3"])
def test_a_mixture_is_read_back(family: str, tiny: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny(family)
    recipe = mixed_recipe(folder)
    export(folder, recipe, tmp_path / "out", shard_bytes=200_000)
    found = recipe_from_compressed_tensors(tmp_path / "out")
    for group, original in zip(found.groups, recipe.groups, strict=True):
        assert (group.name, group.layers) == (original.name, original.layers)
        assert group.scheme == format_name(parse_scheme(original.scheme))


def test_class_names_and_expressions_are_understood(tiny_llama: Path, tmp_path: Path) -> None:
    # As llm-compressor writes a uniform scheme; strategies inferred from the group size.
    checkpoint = open_checkpoint(str(tiny_llama))
    export(tiny_llama, uniform_recipe(checkpoint, "int8.channel+int8.token"), tmp_path / "out")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": -1}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    edit_config(tmp_path / "out", config_groups={"group_0": group}, ignore=["re:.*lm_head"])
    found = recipe_from_compressed_tensors(tmp_path / "out")
    assert {group.scheme for group in found.groups} == {"int8.channel+int8.token"}
    by_name = {**group, "targets": ["re:.*self_attn.*"]}
    others = {**group, "targets": ["Linear"], "input_activations": None}
    edit_config(tmp_path / "out", config_groups={"a": others, "b": by_name})
    found = recipe_from_compressed_tensors(tmp_path / "out")
    assert {g.scheme for g in found.groups if ".attn." in g.name} == {"int8.channel+int8.token"}
    assert {g.scheme for g in found.groups if ".mlp." in g.name} == {"int8.channel"}


def test_a_split_fusion_group_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    exported = export(tiny_llama, uniform_recipe(checkpoint, "int8.channel"), tmp_path / "out")
    groups = exported.config["quantization_config"]["config_groups"]
    other = json.loads(json.dumps(groups["group_0"]))
    other["targets"] = ["model.layers.1.self_attn.k_proj"]
    other["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}
    groups["group_0"]["targets"].remove(other["targets"][0])
    edit_config(tmp_path / "out", config_groups={**groups, "group_1": other})
    with pytest.raises(BackendError, match=r"layers\.1\.attn\.qkv is served as one matrix"):
        recipe_from_compressed_tensors(tmp_path / "out")


def test_scales_that_no_group_targets_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    export(tiny_llama, uniform_recipe(checkpoint, "int8.channel"), tmp_path / "out")
    edit_config(tmp_path / "out", config_groups={})
    with pytest.raises(BackendError, match="no config group targets it"):
        recipe_from_compressed_tensors(tmp_path / "out")


def test_a_scale_without_a_name_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    export(tiny_llama, uniform_recipe(checkpoint, "int8.channel"), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    tensors[name] = tensors[name].to(torch.float16)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BackendError, match=r"q_proj.*F16 scales"):
        recipe_from_compressed_tensors(tmp_path / "out")


def test_other_methods_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="found one that is not quantized"):
        recipe_from_compressed_tensors(tiny_llama)
    checkpoint = open_checkpoint(str(tiny_llama))
    export(tiny_llama, uniform_recipe(checkpoint, "int8.channel"), tmp_path / "out")
    edit_config(tmp_path / "out", quant_method="gptq")
    with pytest.raises(BackendError, match="found quant_method 'gptq'"):
        recipe_from_compressed_tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "int4.g128 -o"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": True}, "int8.channel -o"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "int4.g64.asym"),
    ],
)
def test_the_scheme_of_a_gptq_or_awq_checkpoint_is_named(
    config: dict[str, Any], scheme: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_with_config(
        tiny_llama, tmp_path / "m", lambda edited: edited.update(quantization_config=config)
    )
    with pytest.raises(BackendError, match=f"mofq recipe uniform MODEL {scheme}"):
        recipe_from_compressed_tensors(folder)
