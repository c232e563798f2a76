"""Layers whose errors would be predicted wrongly are refused while they are watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mofq.evidence.calibration.capture import capture_layers
from mofq.exceptions import StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import ModelLayers, find_layers


@pytest.fixture
def watched(tiny: TinyCheckpoint) -> Callable[[], tuple[Any, ModelLayers]]:
    """A tiny Llama, frozen, and its layers."""

    def load() -> tuple[PreTrainedModel, ModelLayers]:
        folder = tiny("llama")
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        model.requires_grad_(False)
        return model, find_layers(open_checkpoint(str(folder)))

    return load


def run(model: Any, layers: ModelLayers, **options: Any) -> None:
    with capture_layers(model, layers, **options):
        model(input_ids=torch.arange(8)[None] + 65, use_cache=False).logits.sum().backward()


def test_a_layer_that_runs_twice_for_a_token_is_refused(watched: Any) -> None:
    model, layers = watched()
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + plain(x + 1)
    with pytest.raises(StatsError, match=r"layers\.0\.mlp\.gate_proj: runs more than once"):
        run(model, layers)


def test_a_layer_that_sees_more_vectors_than_tokens_is_refused(watched: Any) -> None:
    model, layers = watched()
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(torch.cat([x, x], dim=1))[:, : x.shape[1]]
    with pytest.raises(StatsError, match=r"gate_proj: sees 16 vectors of a sequence of 8 tokens"):
        run(model, layers)


def test_a_weight_that_two_modules_have_is_refused(watched: Any) -> None:
    model, layers = watched()
    first, second = (layer.mlp.down_proj for layer in model.model.layers[:2])
    second.weight = first.weight
    with pytest.raises(StatsError, match=r"layers\.0\.mlp\.down_proj: several modules"):
        run(model, layers)


def test_a_module_that_computes_more_than_a_product_is_refused(watched: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    model, layers = watched()
    mlp = model.model.layers[1].mlp
    doubled = Doubled(256, 128, bias=False).requires_grad_(False)
    doubled.weight = mlp.down_proj.weight
    mlp.down_proj = doubled
    with pytest.raises(StatsError, match=r"down_proj: the loaded model's module is a Doubled"):
        run(model, layers)


def test_embeddings_may_be_scaled_in_place(watched: Any) -> None:
    model, layers = watched()
    plain = model.model.forward

    def scaled(input_ids: torch.Tensor, **_options: Any) -> Any:
        embeddings = model.model.embed_tokens(input_ids)
        embeddings *= 2  # as CTRL does
        return plain(inputs_embeds=embeddings, use_cache=False)

    model.model.forward = scaled
    run(model, layers)
