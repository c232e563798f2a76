"""Recipes of one scheme for tiny checkpoints, and what the models that they are applied to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.decision import recipe_from_layers
from mofq.decision.recipe import Recipe
from mofq.delivery.validation import Validation, validate_many
from mofq.evidence.corpora import Corpus
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import find_layers

TOKENS = torch.arange(40).reshape(2, 20) * 5 % 256


def recipe_of(checkpoint: Checkpoint, scheme: str, **others: str) -> Recipe:
    """A recipe with one scheme, and others for the fusion groups named (dots as underscores)."""
    layers = find_layers(checkpoint)
    schemes = {
        group.name: others.get(group.name.replace(".", "_"), scheme) for group in layers.groups
    }
    return recipe_from_layers(layers, schemes, checkpoint=checkpoint)


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def validate(
    model: str, candidate: Recipe | str | Path, text: Corpus, **options: Any
) -> Validation:
    """One candidate against the original."""
    (validation,) = validate_many(model, [candidate], text, **options)
    return validation
