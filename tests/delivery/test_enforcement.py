from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from emulated import recipe_of
from families import TINY_FAMILIES, long_but
from torch import nn

from mofq.decision import uniform_recipe
from mofq.decision.recipe import Recipe, RecipeGroup
from mofq.delivery.apply import emulate
from mofq.delivery.validation import find_deviations
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import FakeQuantLinear
from mofq.numbers.schemes import parse_scheme

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "family", long_but(TINY_FAMILIES, "llama", "gemma3", "gpt2", "mixtral", "deepseek_v3")
)
@pytest.mark.parametrize("scheme", ["int4.g32+fp8_e4m3.token", "int8.tensor", "nvfp4", "bf16"])
def test_a_recipe_as_applied_is_enforced_in_every_family(
    tiny: TinyCheckpoint, family: str, scheme: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    recipe = recipe_of(checkpoint, scheme, layers_1_attn_o="bf16")
    model = emulate.apply(load_model(checkpoint.folder), recipe, checkpoint=checkpoint)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


def test_a_recipe_in_bfloat16_of_a_float32_checkpoint_is_enforced(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("llama", dtype=torch.float32)))
    recipe = recipe_of(checkpoint, "int4.g32", layers_1_attn_o="bf16")
    model = load_model(checkpoint.folder, dtype="bfloat16")
    emulate.apply(model, recipe, checkpoint=checkpoint)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


def test_enforcement_by_blocks_of_rows_is_enforcement_of_the_whole(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mofq.delivery.validation.enforcement._BLOCK_ELEMENTS", 5000)
    checkpoint = open_checkpoint(str(tiny_llama))
    for scheme in ("int4.g32", "fp8_e4m3.block32", "nvfp4"):
        recipe = recipe_of(checkpoint, scheme)
        model = emulate.apply(load_model(tiny_llama), recipe)
        assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


def test_a_model_quantized_by_blocks_of_rows_is_one_quantized_whole(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: dict[str, torch.Tensor]
    checkpoint = open_checkpoint(str(tiny_llama))
    for scheme in ("int4.g32@mse", "fp8_e4m3.block32", "nvfp4", "int8.tensor"):
        for elements in (2**40, 5000):
            monkeypatch.setattr(emulate, "_BLOCK_ELEMENTS", elements)
            model = emulate.apply(load_model(tiny_llama), recipe_of(checkpoint, scheme))
            if elements == 2**40:
                whole = model.state_dict()
        assert all(bool((one == whole[name]).all()) for name, one in model.state_dict().items())


def test_an_embedding_is_compared_by_blocks_of_rows_to_its_last_value(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mofq.delivery.validation.enforcement._BLOCK_ELEMENTS", 5000)
    monkeypatch.setattr("mofq.delivery.validation.enforcement.read_tensor", pytest.fail)
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int8.channel")
    model: Any = emulate.apply(load_model(tiny_llama), recipe)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()
    weight = model.get_input_embeddings().weight
    assert weight.numel() > 2 * 5000
    weight[-1, -1] += 1
    (found,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert (found.layer, "no recipe touches" in found.reason) == ("model.embed_tokens.weight", True)


def edit_one_weight(model: nn.Module) -> None:
    weight_OI = model.get_parameter(f"{UP}.weight")
    weight_OI[200, 100] = torch.nextafter(weight_OI[200, 100], torch.tensor(9.0))


def flip_the_sign_of_a_zero(model: nn.Module) -> None:
    weight_OI = model.get_parameter(f"{UP}.weight")
    row, column = (weight_OI == 0).nonzero()[0].tolist()
    weight_OI[row, column] = -0.0 if math.copysign(1, weight_OI[row, column].item()) > 0 else 0.0


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def leave_unquantized(model: nn.Module) -> None:
    original: Any = load_model(Path(model.name_or_path))  # type: ignore[arg-type]
    put(model, UP, original.get_submodule(UP))


def replace_by_scheme(name: str) -> Callable[[nn.Module], None]:
    def plant(model: nn.Module) -> None:
        folder = Path(model.name_or_path)  # type: ignore[arg-type]
        other = emulate.apply(load_model(folder), recipe_of(open_checkpoint(str(folder)), name))
        put(model, UP, other.get_submodule(UP))

    return plant


def change_only_the_scheme_of_the_inputs(model: nn.Module) -> None:
    module = model.get_submodule(UP)
    assert isinstance(module, FakeQuantLinear)
    module.scheme = parse_scheme("int4.g32+fp8_e4m3.token")


def take_away_the_quantization_of_the_inputs(model: nn.Module) -> None:
    module = model.get_submodule(UP)
    linear = nn.Linear(module.in_features, module.out_features, bias=False)  # type: ignore[arg-type]
    linear.weight = nn.Parameter(model.get_parameter(f"{UP}.weight"), requires_grad=False)
    put(model, UP, linear)


def swap_two_scales(model: nn.Module) -> None:
    weight_OI = model.get_parameter(f"{UP}.weight")
    scale_OG = weight_OI.reshape(256, 4, 32).abs().amax(-1)
    weight_OI[5, :32] *= scale_OG[9, 0] / scale_OG[5, 0]
    weight_OI[9, :32] *= scale_OG[5, 0] / scale_OG[9, 0]


def transpose_the_scales(model: nn.Module) -> None:
    weight_OI = model.get_parameter(f"{UP}.weight")
    scale_OG = weight_OI.reshape(256, 4, 32).abs().amax(-1)
    swapped = scale_OG.T.reshape(256, 4)
    weight_OI.copy_(
        (weight_OI.reshape(256, 4, 32) / scale_OG[..., None] * swapped[..., None]).reshape(256, 128)
    )


def remove_the_layer(model: nn.Module) -> None:
    put(model, UP, nn.Identity())


def cut_the_layer(model: nn.Module) -> None:
    module = model.get_submodule(UP)
    module.weight = nn.Parameter(model.get_parameter(f"{UP}.weight")[:128], requires_grad=False)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (edit_one_weight, r"1 of 32768 weights .*first at \[200, 100\]"),
        (flip_the_sign_of_a_zero, "1 of 32768 weights"),
        (leave_unquantized, "found a plain Linear|found the layer left unquantized"),
        (replace_by_scheme("int4.g64+int8.token"), "weights are not those of scheme 'int4.g32"),
        (replace_by_scheme("fp4_e2m1.g32+int8.token"), "weights are not those of scheme 'int4.g32"),
        (replace_by_scheme("bf16+int8.token"), "found the layer left unquantized"),
        (change_only_the_scheme_of_the_inputs, "'int4.g32\\+int8.token', found inputs"),
        (take_away_the_quantization_of_the_inputs, "found a plain Linear"),
        (swap_two_scales, r"weights are not those of scheme 'int4.g32.*first at \[5, "),
        (transpose_the_scales, "weights are not those of scheme"),
        (remove_the_layer, "the model has no weight"),
        (cut_the_layer, r"needed a weight of shape \[256, 128\], found \[128, 128\]"),
    ],
)
def test_a_planted_deviation_is_caught_and_named(
    tiny_llama: Path, plant: Callable[[nn.Module], None], reason: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int4.g32+int8.token")
    model = emulate.apply(load_model(tiny_llama), recipe)
    plant(model)
    deviations = find_deviations(model, recipe, checkpoint=checkpoint)
    assert {deviation.layer for deviation in deviations} == {UP}

    assert any(re.search(reason, deviation.reason) for deviation in deviations)


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", UP),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_change_to_what_the_recipe_leaves_alone_is_caught(
    tiny_llama: Path, parameter: str, named: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int4.g32", layers_1_mlp_gate_up="bf16")
    model = emulate.apply(load_model(tiny_llama), recipe)
    model.get_parameter(parameter).view(-1)[7] += 0.5
    deviations = find_deviations(model, recipe, checkpoint=checkpoint)
    assert [deviation.layer for deviation in deviations] == [named]


@pytest.mark.parametrize("change", ["left alone", "one weight", "untied"])
def test_a_tied_embedding_is_compared_in_both_roles(tiny: TinyCheckpoint, change: str) -> None:
    checkpoint = open_checkpoint(str(tiny("llama", tie_word_embeddings=True)))
    layers = find_layers(checkpoint, include_embeddings=True)
    recipe = uniform_recipe(checkpoint, layers, "int8.channel")
    model = emulate.apply(load_model(checkpoint.folder), recipe)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    original = load_model(checkpoint.folder).get_input_embeddings().weight
    if change == "left alone":
        embedding.weight.data = original
        head.weight = embedding.weight
        reason = "found the layer left unquantized"
    elif change == "one weight":
        embedding.weight.view(-1)[7] += 0.5
        reason = "1 of 32768 weights"
    else:
        head.weight = torch.nn.Parameter(original)
        reason = "the lm_head has another weight"
    (deviation,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert deviation.layer == "model.embed_tokens"
    assert reason in deviation.reason


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen2"])
def test_a_changed_bias_is_caught(tiny: TinyCheckpoint, family: str) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    recipe = recipe_of(checkpoint, "int8.channel")
    model = emulate.apply(load_model(checkpoint.folder), recipe)
    names = [n for n, _ in model.named_parameters() if "1." in n and n.endswith(".bias")]
    name = next(n for n in names if "q_proj" in n or "c_attn" in n)
    model.get_parameter(name)[3] += 1
    (deviation,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert deviation.layer.endswith(name.rpartition("layers")[2])


def test_one_edited_expert_is_caught_among_all(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    recipe = recipe_of(checkpoint, "int8.channel+int8.token")
    model = emulate.apply(load_model(checkpoint.folder), recipe)
    # gate first, then up: row 256 is the first of up, which Mixtral calls w3.
    model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2, 256, 0] += 1
    (deviation,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert deviation.layer == "model.layers.1.block_sparse_moe.experts.2.w3"
    assert "first at [0, 0]" in deviation.reason


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_changed_static_scale_is_caught(tiny: TinyCheckpoint, family: str) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    plain = recipe_of(checkpoint, "int8.channel+int8.tensor")
    groups = tuple(
        RecipeGroup(g.name, g.scheme, g.layers, dict.fromkeys(g.layers, 2.0)) for g in plain.groups
    )
    recipe = Recipe(plain.model_name, plain.index_sha256, groups, plain.unquantized)
    model: Any = emulate.apply(load_model(checkpoint.folder), recipe)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()
    if family == "llama":
        model.get_submodule(UP).static_amax = 3.0
        named = UP
    else:
        model.get_submodule("model.layers.1.mlp.experts").static_amax["down_proj", 3] = 3.0
        named = "model.layers.1.block_sparse_moe.experts.3.w2"
    (deviation,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert deviation.layer == named
    assert deviation.reason == "needed the static input maximum 2.0, found 3.0"
