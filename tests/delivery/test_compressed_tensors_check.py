"""Deviations planted in an exported folder: the check names each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exported import export, mixed_recipe
from safetensors.torch import load_file, save_file

from mofq.delivery.export.compressed_tensors import check_compressed_tensors
from mofq.exceptions import EnforcementError
from mofq.model.checkpoint.headers import open_checkpoint


def test_a_true_export_passes_its_check(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = mixed_recipe(tiny_llama)
    export(tiny_llama, recipe, tmp_path / "out", shard_bytes=100_000)
    check_compressed_tensors(open_checkpoint(str(tiny_llama)), recipe, tmp_path / "out")


def _edit_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight_scale"][7] *= 1.01


def _swap_scales(tensors: dict[str, torch.Tensor]) -> None:
    scale = tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    scale[[2, 3]] = scale[[3, 2]].clone()


def _edit_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.gate_proj.weight_packed"][9, 1] += 16


def _transpose_scales(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.gate_proj.weight_scale"
    tensors[name] = tensors[name].T.contiguous().reshape(tensors[name].shape)


def _other_group_size(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.gate_proj.weight_scale"
    tensors[name] = tensors[name][:, ::2].contiguous()


def _left_in_bf16(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj"
    del tensors[f"{name}.weight_scale"]
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.bfloat16)


def _edit_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] += 1


def _add_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight_zero_point"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_edit_scale, r"q_proj\.weight_scale: differs from row 7"),
        (_swap_scales, r"q_proj\.weight_scale: differs from row 2"),
        (_edit_code, r"gate_proj\.weight_packed: differs from row 9"),
        (_transpose_scales, r"gate_proj\.weight_scale: differs"),
        (_other_group_size, r"gate_proj\.weight_scale: needed BF16"),
        (_left_in_bf16, r"q_proj\.weight"),
        (_edit_norm, r"model\.norm\.weight: is not the original's"),
        (_add_tensor, r"weight_zero_point: belongs to nothing"),
    ],
)
def test_a_planted_deviation_is_named(
    tiny_llama: Path, tmp_path: Path, edit: object, words: str
) -> None:
    recipe = mixed_recipe(tiny_llama)
    exported = export(tiny_llama, recipe, tmp_path / "out")
    tensors = load_file(exported.folder / "model.safetensors")
    assert callable(edit)
    edit(tensors)
    save_file(tensors, exported.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EnforcementError, match=words):
        check_compressed_tensors(open_checkpoint(str(tiny_llama)), recipe, tmp_path / "out")


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config["config_groups"]["group_0"]["targets"].pop(),
        lambda config: config["config_groups"]["group_2"]["weights"].update(group_size=64),
        lambda config: config["config_groups"]["group_0"].update(input_activations=None),
        lambda config: config.update(ignore=["lm_head"]),
        lambda config: config["config_groups"].pop("group_1"),
    ],
)
def test_an_edited_config_is_caught(tiny_llama: Path, tmp_path: Path, edit: object) -> None:
    recipe = mixed_recipe(tiny_llama)
    exported = export(tiny_llama, recipe, tmp_path / "out")
    config = exported.config
    assert callable(edit)
    edit(config["quantization_config"])
    (exported.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EnforcementError, match=r"config\.json"):
        check_compressed_tensors(open_checkpoint(str(tiny_llama)), recipe, tmp_path / "out")
