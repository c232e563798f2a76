"""TorchAO's ``FqnToConfig``, read by torchao and transformers themselves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from emulated import recipe_of
from exported import make_recipe, uniform_recipe
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from mofq.decision.recipe import RecipeGroup
from mofq.delivery.export.torchao_config import torchao_config
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.numbers.schemes import parse_scheme

#: Scheme -> the class of the weight that torchao makes, and the tile that shares a scale in it.
CLASSES = {
    "int8.channel+int8.token": ("Int8Tensor", [1, 128]),
    "int8.g32@mse": ("Int8Tensor", [1, 32]),
    "int4.g64": ("IntxUnpackedToInt8Tensor", [1, 64]),
    "int4.channel.asym": ("IntxUnpackedToInt8Tensor", [1, 128]),
    "fp8_e4m3.channel": ("Float8Tensor", [1, 128]),
    "nvfp4": ("NVFP4Tensor", 16),
    "mxfp8+mxfp8": ("MXTensor", 32),
}


def weights_of(model: nn.Module) -> dict[str, tuple[str, Any]]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            block = getattr(module.weight, "block_size", None)
            kind = type(module.weight.data).__name__
            found[name] = (kind, list(block) if isinstance(block, tuple) else block)
    return found


@pytest.mark.parametrize("scheme", CLASSES)
def test_transformers_loads_quantizes_saves_and_loads_again(
    tiny_llama: Path, tmp_path: Path, scheme: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, scheme, layers_1_mlp_gate_up="bf16", layers_1_mlp_down="bf16",
                       layers_0_mlp_down="bf16")  # fmt: skip
    text = torchao_config(checkpoint, recipe)
    config = TorchAoConfig.from_dict(json.loads(text))
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, quantization_config=config
    )
    found = weights_of(model)
    for name, written in recipe.schemes.items():
        if name in found:
            assert found[name] == (("Tensor", None) if written == "bf16" else CLASSES[scheme])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert weights_of(again) == found
    for name, written in recipe.schemes.items():
        if name in found and written != "bf16":
            ours, theirs = (each.get_submodule(name).weight.dequantize() for each in (model, again))
            assert torch.equal(ours, theirs)
    if scheme != "mxfp8+mxfp8":  # its kernel is for GPUs
        tokens = torch.arange(32).reshape(1, 32)
        with torch.inference_mode():
            assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("scheme", "mapping"), [("int4.g64", "SYMMETRIC"), ("int4.g64.asym", "ASYMMETRIC")]
)
def test_integers_with_zero_points_are_mapped_asymmetrically(
    tiny_llama: Path, scheme: str, mapping: str
) -> None:
    from torchao.core.config import config_from_dict

    checkpoint = open_checkpoint(str(tiny_llama))
    document = json.loads(torchao_config(checkpoint, uniform_recipe(checkpoint, scheme)))
    configs = config_from_dict(document["quant_type"]["default"]).fqn_to_config
    assert {config.mapping_type.name for config in configs.values() if config is not None} == {
        mapping
    }


def test_every_key_is_an_expression_for_the_layers_and_for_what_they_are_fused_into(
    tiny_llama: Path,
) -> None:
    from torchao.core.config import config_from_dict
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    checkpoint = open_checkpoint(str(tiny_llama))
    choices = ("fp8_e4m3.channel@mse+fp8_e4m3.token", "bf16")
    recipe = make_recipe(checkpoint, lambda number, group: choices[number % 2])
    text = torchao_config(checkpoint, recipe)
    document = json.loads(text)
    configs = config_from_dict(document["quant_type"]["default"]).fqn_to_config
    assert configs.pop(r"re:.*\.bias") is None
    assert all(
        isinstance(each, Float8DynamicActivationFloat8WeightConfig) for each in configs.values()
    )
    keys = [key.removeprefix("re:") for key in configs]
    assert len(keys) == 4
    for name in (*recipe.schemes, "model.layers.1.self_attn.qkv_proj"):
        matching = [key for key in keys if re.fullmatch(key, name)]
        quantized = "qkv" in name or recipe.schemes.get(name, "bf16") != "bf16"
        assert len(matching) == int(quantized), name
    assert not any(re.fullmatch(key, "model.layers.11.self_attn.q_proj") for key in keys)


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_biases_and_layers_in_bf16_stay_as_they_are(tiny: TinyCheckpoint, family: str) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    for scheme in ("int8.channel", "bf16"):
        config = json.loads(torchao_config(checkpoint, uniform_recipe(checkpoint, scheme)))
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=torch.bfloat16,
            quantization_config=TorchAoConfig.from_dict(config),
        )
        kinds = {
            (name.rpartition(".")[2], type(parameter.data).__name__)
            for name, parameter in model.named_parameters()
        }
        assert ("bias", "Tensor") in kinds
        assert ("bias", "Int8Tensor") not in kinds
        assert (("weight", "Int8Tensor") in kinds) == (scheme != "bf16")


def test_what_torchao_has_no_config_for_is_refused(tiny: TinyCheckpoint, tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    for scheme in ("fp4_e2m1.g32", "int8.g32+int8.token", "fp8_e4m3.block64"):
        assert parse_scheme(scheme).name == scheme
        with pytest.raises(
            BackendError, match=rf"q_proj: TorchAO has no config for .*{scheme[:8]}"
        ):
            torchao_config(checkpoint, uniform_recipe(checkpoint, scheme))
    head = find_layers(checkpoint, include_lm_head=True).groups[-1]
    names = tuple(layer.name for layer in head.layers)
    recipe = uniform_recipe(checkpoint, "bf16")
    with_head = replace(
        recipe,
        groups=(*recipe.groups, RecipeGroup("lm_head", "int8.channel", names)),
        unquantized=(),
    )
    with pytest.raises(BackendError, match="lm_head: TorchAO is told by transformers to leave"):
        torchao_config(checkpoint, with_head)
    experts = open_checkpoint(str(tiny("mixtral")))
    with pytest.raises(BackendError, match="keeps experts as one tensor"):
        torchao_config(experts, uniform_recipe(experts, "int8.channel"))
