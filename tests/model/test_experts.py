"""How the experts of a decoder layer are divided into decisions."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TinyCheckpoint

from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import EXPERTS_BY, ExpertsBy, ModelLayers, find_layers, split_experts

#: What a tiny Mixtral's four experts become in the first decoder layer.
PARTS: dict[ExpertsBy, list[str]] = {
    "layer": [""],
    "projection": [".gate_up", ".down"],
    "expert": [".0", ".1", ".2", ".3"],
    "matrix": [f".{expert}.{half}" for expert in range(4) for half in ("gate_up", "down")],
}


def layers_of(folder: Path) -> ModelLayers:
    return find_layers(open_checkpoint(str(folder)))


@pytest.mark.parametrize("by", EXPERTS_BY)
def test_experts_are_divided_into_the_parts_that_are_asked_for(
    by: ExpertsBy, tiny: TinyCheckpoint
) -> None:
    layers = layers_of(tiny("mixtral"))
    divided = split_experts(layers, by)
    whole = "layers.0.moe.experts"
    names = [group.name for group in divided.groups if group.name.startswith(whole)]
    assert names == [whole + part for part in PARTS[by]]
    assert sorted(map(str, divided.grouped_layers)) == sorted(map(str, layers.grouped_layers))
    others = [group for group in layers.groups if "experts" not in group.name]
    assert [group for group in divided.groups if "experts" not in group.name] == others


@pytest.mark.parametrize("by", EXPERTS_BY)
def test_gate_and_up_of_an_expert_stay_together(by: ExpertsBy, tiny: TinyCheckpoint) -> None:
    for group in split_experts(layers_of(tiny("qwen3_moe")), by).groups:
        names = {layer.name for layer in group.layers}
        gates = {name for name in names if name.endswith("gate_proj")}
        assert {name.replace("gate_proj", "up_proj") for name in gates} <= names


def test_a_dense_model_has_the_same_decisions_however_experts_are_divided(
    tiny_llama: Path,
) -> None:
    layers = layers_of(tiny_llama)
    assert split_experts(layers, "matrix") == layers


def test_an_expert_that_no_token_reached_is_decided_with_the_next_one(
    tiny: TinyCheckpoint,
) -> None:
    layers = layers_of(tiny("mixtral"))
    unseen = {
        layer.name
        for layer in layers.grouped_layers
        if layer.name.startswith("model.layers.0.block_sparse_moe.experts.2.")
    }
    found = {one.name: one for one in split_experts(layers, "matrix", unseen=unseen).groups}
    assert "layers.0.moe.experts.2.down" not in found
    assert [layer.module for layer in found["layers.0.moe.experts.1.down"].layers] == [
        "experts.w2",
        "experts.w2",
    ]
    assert "layers.1.moe.experts.2.down" in found
