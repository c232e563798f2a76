"""The linear layers of a checkpoint as a recipe divides them."""

from __future__ import annotations

from mofq.decision.recipe import Recipe, check_recipe, check_weights
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FUSION_RULES, ModelLayers, find_layers, layers_of


def checked_layers(checkpoint: Checkpoint, recipe: Recipe) -> ModelLayers:
    """The layers, once it is known that the recipe is for this checkpoint.

    Args:
        checkpoint: Of the model.
        recipe: Of that model.

    Raises:
        CheckpointError: As ``find_layers``.
        RecipeError: The recipe is not for this model or these weights, does not cover it, splits
            a fusion group, or gives a layer a scheme that its shape does not take.
    """
    layers = find_recipe_layers(checkpoint, recipe)
    check_recipe(recipe, layers, index_sha256=checkpoint.index_sha256)
    check_weights(recipe, checkpoint)
    return layers


def find_recipe_layers(checkpoint: Checkpoint, recipe: Recipe) -> ModelLayers:
    """What ``find_layers`` finds, with the lm_head in a fusion group where the recipe has it so.

    Raises:
        CheckpointError: As ``find_layers``.
    """
    family = FUSION_RULES.get(str(checkpoint.config.get("model_type")))
    grouped = set(layers_of(recipe.groups))
    return find_layers(
        checkpoint,
        include_lm_head=family is not None and not grouped.isdisjoint(family.lm_heads),
    )
