from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from emulated import logits_of, recipe_of
from families import TINY_FAMILIES
from rounding import apart
from torch import Tensor

from mofq.decision.recipe import Recipe, RecipeGroup
from mofq.delivery.apply import emulate
from mofq.delivery.apply.fake_quant_experts import FakeQuantExperts
from mofq.delivery.apply.loaded_model import find_loaded_layers
from mofq.exceptions import BackendError, RecipeError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import FusionGroup, find_layers, find_loaded_weight
from mofq.model.loading import load_model
from mofq.numbers.quantize import FakeQuantLinear, fake_quantize_activation, fake_quantize_weight
from mofq.numbers.schemes import parse_scheme


def expected_weights(checkpoint: Checkpoint, scheme: str) -> dict[str, Tensor]:
    """Fake-quantized weights, computed from the files and not from a model."""
    operand = parse_scheme(scheme).weight
    assert operand is not None
    weights = {}
    for layer in find_layers(checkpoint).grouped_layers:
        source = read_layer_rows(checkpoint, layer, 0, layer.out_features)
        weights[layer.name] = fake_quantize_weight(source, operand)
    return weights


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_layer_of_every_family_gets_the_fake_quantized_weight_of_its_checkpoint(
    tiny: TinyCheckpoint, family: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    model = emulate.apply(load_model(checkpoint.folder), recipe_of(checkpoint, "int4.g32"))
    layers = find_layers(checkpoint)
    by_name = {layer.name: layer for layer in layers.grouped_layers}
    for name, expected_OI in expected_weights(checkpoint, "int4.g32").items():
        at = find_loaded_weight(by_name[name], layers.architecture)
        found = model.get_parameter(at.name)
        if at.expert is not None:
            found = found[at.expert, at.row_start : at.row_start + expected_OI.shape[0]]
        assert torch.equal(found, expected_OI), name
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_recipe_that_quantizes_nothing_changes_no_module_and_no_bit(
    tiny: TinyCheckpoint, family: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    model = load_model(checkpoint.folder)
    before, modules = logits_of(model), [id(module) for module in model.modules()]
    emulate.apply(model, recipe_of(checkpoint, "bf16"))
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_in_our_module_compute_exactly_what_transformers_computes(
    tiny: TinyCheckpoint, family: str, fused: bool
) -> None:
    checkpoint = open_checkpoint(str(tiny(family, fused=fused)))
    model = load_model(checkpoint.folder)
    before = logits_of(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    parent = model.get_submodule("model.layers.0.mlp")
    parent.experts = FakeQuantExperts(experts)
    assert torch.equal(logits_of(model), before)


def test_experts_quantize_the_inputs_of_both_matrices(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    experts: Any = load_model(checkpoint.folder).get_submodule("model.layers.0.mlp.experts")
    scheme = parse_scheme("bf16+int4.token")
    assert scheme.activation is not None
    ours = FakeQuantExperts(experts)
    for parameter in ("gate_up_proj", "down_proj"):
        ours.set_scheme(parameter, 2, scheme)
    x_TI = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    gate_up = fake_quantize_activation(x_TI, scheme.activation) @ experts.gate_up_proj[2].T
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = fake_quantize_activation(torch.nn.functional.silu(gate) * up, scheme.activation)
    expected = 0.25 * (hidden @ experts.down_proj[2].T)
    found = ours(x_TI, torch.tensor([[2]]), torch.tensor([[0.25]]))
    torch.testing.assert_close(found, expected)


def test_a_linear_layer_computes_with_rounded_weights_and_rounded_inputs(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    scheme = parse_scheme("int8.channel+int4.token")
    assert scheme.weight is not None
    assert scheme.activation is not None
    model = emulate.apply(load_model(tiny_llama), recipe_of(checkpoint, scheme.name))
    x_TI = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    weight = expected_weights(checkpoint, "int8.channel")["model.layers.1.mlp.up_proj"]
    found = model.get_submodule("model.layers.1.mlp.up_proj")(x_TI)
    expected = fake_quantize_activation(x_TI, scheme.activation) @ weight.T
    atol = apart(weight.shape[1]) * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_layers_that_an_engine_concatenates_share_the_scale_of_the_tensor(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    model = emulate.apply(load_model(tiny_llama), recipe_of(checkpoint, "int8.tensor"))
    group = find_layers(checkpoint).groups[0]
    sources = [
        read_layer_rows(checkpoint, layer, 0, layer.out_features).float() for layer in group.layers
    ]
    # One scale for q, k and v: the largest of all three, in bfloat16.
    scale = (torch.cat(sources).abs().max() / 127).bfloat16().float()
    for layer, source in zip(group.layers, sources, strict=True):
        expected = (source / scale).round().clamp(-127, 127) * scale
        assert torch.equal(model.get_parameter(layer.tensor), expected)


def test_gate_and_up_of_one_expert_share_a_scale_and_different_experts_do_not(
    tiny: TinyCheckpoint,
) -> None:
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    model = load_model(checkpoint.folder)
    gate_up_EOI = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").clone()
    emulate.apply(model, recipe_of(checkpoint, "int8.tensor"))
    for expert, source in enumerate(gate_up_EOI):
        scale = (source.abs().max() / 127).bfloat16().float()
        expected = (source / scale).round().clamp(-127, 127) * scale
        found = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")[expert]
        assert torch.equal(found, expected)


def test_static_activations_take_the_largest_input_of_the_layers_that_share_it(
    tiny_llama: Path,
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    plain = recipe_of(checkpoint, "int8.channel+int8.tensor")
    groups = tuple(
        RecipeGroup(g.name, g.scheme, g.layers, {name: 2.0 + i for i, name in enumerate(g.layers)})
        for g in plain.groups
    )
    recipe = Recipe(plain.model_name, plain.index_sha256, groups, plain.unquantized)
    model = emulate.apply(load_model(tiny_llama), recipe)
    found = [
        getattr(model.get_submodule(f"model.layers.0.{name}"), "static_amax", None)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    ]
    assert found == [4.0, 4.0, 2.0, 3.0]


def test_a_missing_static_scale_is_an_error_and_leaves_the_model_alone(tiny_llama: Path) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "int8.channel+int8.tensor")
    model = load_model(tiny_llama)
    with pytest.raises(RecipeError, match=r"self_attn\.q_proj: .*no static_amax"):
        emulate.apply(model, recipe)
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_16_bits_keeps_its_dtype_and_rounds_each_weight_once(
    tiny_llama: Path, dtype: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "fp8_e4m3.channel+fp8_e4m3.token")
    model = emulate.apply(load_model(tiny_llama, dtype=dtype), recipe, checkpoint=checkpoint)
    expected = expected_weights(checkpoint, "fp8_e4m3.channel")["model.layers.0.mlp.down_proj"]
    found = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, expected.to(found.dtype))
    assert logits_of(model).dtype == getattr(torch, dtype)


def test_the_checkpoints_own_weights_are_quantized_where_it_is_given(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    model = load_model(tiny_llama)
    model.get_parameter("model.layers.0.mlp.down_proj.weight").zero_()
    emulate.apply(model, recipe_of(checkpoint, "int8.channel"), checkpoint=checkpoint)
    expected = expected_weights(checkpoint, "int8.channel")["model.layers.0.mlp.down_proj"]
    assert torch.equal(model.get_parameter("model.layers.0.mlp.down_proj.weight"), expected)


def test_the_lm_head_is_quantized_where_the_recipe_asks_for_it(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    plain = recipe_of(checkpoint, "bf16")
    groups = (*plain.groups, RecipeGroup("lm_head", "int8.channel", ("lm_head",)))
    recipe = Recipe(plain.model_name, plain.index_sha256, groups)
    model = emulate.apply(load_model(tiny_llama), recipe, checkpoint=checkpoint)
    assert isinstance(model.get_submodule("lm_head"), FakeQuantLinear)


def test_a_layer_that_the_recipe_leaves_out_or_invents_is_named(tiny_llama: Path) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "int8.channel")
    model = load_model(tiny_llama)
    short = Recipe(recipe.model_name, recipe.index_sha256, recipe.groups[1:], recipe.unquantized)
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.self_attn\.q_proj' is missing"):
        emulate.apply(model, short)
    invented = RecipeGroup("layers.9.attn.o", "int8.channel", ("model.layers.9.self_attn.o_proj",))
    long = Recipe(
        recipe.model_name, recipe.index_sha256, (*recipe.groups, invented), recipe.unquantized
    )
    with pytest.raises(RecipeError, match=r"no linear layer 'model\.layers\.9\.self_attn\.o_proj"):
        emulate.apply(model, long)


def test_a_recipe_of_another_checkpoint_is_refused(tiny: TinyCheckpoint, tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    other = open_checkpoint(str(tiny("llama", dtype=torch.float32)))
    with pytest.raises(RecipeError, match="made for"):
        emulate.apply(
            load_model(tiny_llama), recipe_of(other, "int8.channel"), checkpoint=checkpoint
        )


def test_a_group_that_does_not_divide_a_layer_is_refused_before_anything_changes(
    tiny_llama: Path,
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int8.channel", layers_1_mlp_down="int4.g96")
    model = load_model(tiny_llama)
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.down_proj.*96.*256"):
        emulate.apply(model, recipe)
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())


def test_a_second_recipe_on_the_same_model_is_refused(tiny_llama: Path) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "int8.channel")
    model = emulate.apply(load_model(tiny_llama), recipe)
    with pytest.raises(BackendError, match="applied to this model already"):
        emulate.apply(model, recipe)


def test_experts_with_biases_are_refused_by_name() -> None:
    with pytest.raises(BackendError, match=r"layers\.3\.experts: experts of class Linear"):
        FakeQuantExperts(torch.nn.Linear(2, 2), name="layers.3.experts")


def test_progress_counts_fusion_groups(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    seen: list[tuple[str, int, int]] = []
    emulate.apply(
        load_model(tiny_llama),
        recipe_of(checkpoint, "int8.channel", layers_0_attn_o="bf16"),
        progress=lambda *call: seen.append(call),
    )
    assert seen == [("emulate", done, 7) for done in range(8)]


def group_names(groups: tuple[FusionGroup, ...]) -> list[str]:
    return [group.name for group in groups]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_model_in_memory_has_the_layers_of_its_checkpoint(
    tiny: TinyCheckpoint, family: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    stored = find_layers(checkpoint)
    loaded = find_loaded_layers(load_model(checkpoint.folder), recipe_of(checkpoint, "bf16"))
    assert group_names(loaded.groups) == group_names(stored.groups)
    for found, expected in zip(
        (*loaded.unquantized, *(layer for g in loaded.groups for layer in g.layers)),
        (*stored.unquantized, *(layer for g in stored.groups for layer in g.layers)),
        strict=True,
    ):
        at = find_loaded_weight(expected, stored.architecture)
        assert found.name == expected.name
        assert (found.tensor, found.expert, found.row_start, found.transposed) == (
            at.name,
            at.expert,
            at.row_start,
            at.transposed,
        )
