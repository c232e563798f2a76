"""Layers that predict further tokens, which transformers leaves out: exports carry every bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import ok
from conftest import TinyCheckpoint
from exported import Exported
from families import copy_with_config, copy_with_tensors
from safetensors.torch import load_file
from tiny_types import write_type
from torch import Tensor

from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers

TEXT = ("--text", "demo-en", "--tokens", "64", "--sequence-length", "32", "--json")


def _after_the_last(tensors: dict[str, Tensor]) -> None:
    """As DeepSeek-V3 and GLM-4.5: one more decoder layer, with what joins its two inputs."""
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    last = max(layers)
    new = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): _noise(tensor)
        for name, tensor in tensors.items()
        if name.startswith(f"model.layers.{last}.")
    }
    prefix, embedding = f"model.layers.{last + 1}", tensors["model.embed_tokens.weight"]
    hidden = embedding.shape[1]
    new[f"{prefix}.eh_proj.weight"] = _noise(torch.empty(hidden, 2 * hidden).bfloat16())
    new[f"{prefix}.enorm.weight"] = _noise(torch.empty(hidden))  # float32
    new[f"{prefix}.shared_head.head.weight"] = _noise(embedding)
    tensors |= new


def _beside(tensors: dict[str, Tensor]) -> None:
    """As Qwen3-Next: under a name of their own."""
    first = "model.layers.0."
    new = {
        name.replace(first, "mtp.layers.0."): _noise(tensor)
        for name, tensor in tensors.items()
        if name.startswith(first)
    }
    tensors |= new | {"mtp.fc.weight": _noise(torch.empty(64, 128).half())}


def _noise(like: Tensor) -> Tensor:
    """Any finite bits: rounding, sorting or a cast on the way would show."""
    random = torch.Generator().manual_seed(like.numel())
    values = torch.randn(like.shape, generator=random) * 2.0 ** torch.randint(
        -30, 10, like.shape, generator=random
    )
    return values.to(like.dtype)


@pytest.mark.parametrize(
    ("name", "add", "reason"),
    [
        ("deepseek_v3", _after_the_last, "of a layer that predicts further tokens"),
        ("deepseek_v32", _after_the_last, "of a layer that predicts further tokens"),
        ("qwen3_next", _beside, "of another tower, or of what predicts further tokens"),
    ],
)
def test_what_predicts_further_tokens_is_exported_bit_for_bit(
    name: str,
    add: Callable[[dict[str, Tensor]], None],
    reason: str,
    tiny: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    made = tiny(name) if name == "deepseek_v3" else write_type(name, tmp_path / "made")
    model = copy_with_config(
        copy_with_tensors(made, tmp_path / "with-more", add),
        tmp_path / "model",
        lambda config: config.update(num_nextn_predict_layers=1),
    )
    source = load_file(model / "model.safetensors")
    ahead = set(source) - set(load_file(made / "model.safetensors"))
    layers = find_layers(open_checkpoint(str(model)))
    matrices = {tensor for tensor in ahead if source[tensor].ndim > 1}
    assert len(matrices) > 5
    assert {layers.left_out[tensor] for tensor in matrices} == {reason}
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    ok("recipe", "uniform", model, "int4.g32", "-o", recipe)
    ok("export", model, recipe, "--to", "compressed-tensors", "-o", out)
    exported = Exported(out)
    tensors = exported.tensors
    for tensor in ahead:
        kept, before = tensors[tensor], source[tensor]
        assert (kept.dtype, kept.shape) == (before.dtype, before.shape), tensor
        assert torch.equal(kept.view(torch.uint8), before.view(torch.uint8)), tensor
    groups = exported.config["quantization_config"]["config_groups"].values()
    modules = {tensor.removesuffix(".weight") for tensor in ahead}
    assert not modules.intersection(target for group in groups for target in group["targets"])
    assert ok("validate", model, out, *TEXT).json["enforced"] is True
