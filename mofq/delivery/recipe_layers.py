"""The linear layers of a checkpoint as a recipe divides them, and the schemes it gives them."""

from __future__ import annotations

from mofq.decision.recipe import Recipe, check_recipe, check_weights
from mofq.exceptions import RecipeError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import (
    FusionGroup,
    ModelLayers,
    find_layers,
    layers_of,
    lm_heads_of,
    share_amax,
)
from mofq.numbers.schemes import Scheme, parse_scheme


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


def group_schemes(layers: ModelLayers, recipe: Recipe) -> dict[str, Scheme]:
    """Fusion group -> the scheme that a recipe gives it.

    Args:
        layers: Of the model.
        recipe: That was checked against them, so that a group has one scheme.
    """
    schemes = recipe.schemes
    return {group.name: parse_scheme(schemes[group.layers[0].name]) for group in layers.groups}


def static_amax(group: FusionGroup, scheme: Scheme, recipe: Recipe) -> dict[str, float]:
    """Largest input magnitude of each layer, empty where the scheme of the group needs none.

    Raises:
        RecipeError: The recipe has none for a layer.
    """
    if not scheme.has_static_inputs:
        return {}
    known = recipe.static_amax
    for layer in group.layers:
        if layer.name not in known:
            raise RecipeError(
                f"{recipe.title}: {layer.name}: scheme {scheme.name!r} has static activations, "
                f"and the recipe has no static_amax for the layer. Run `mofq calibrate`, measure "
                f"and search again."
            )
    return share_amax(group, known)


def find_recipe_layers(checkpoint: Checkpoint, recipe: Recipe) -> ModelLayers:
    """What ``find_layers`` finds, with the lm_head in a fusion group where the recipe has it so.

    Raises:
        CheckpointError: As ``find_layers``.
    """
    heads = lm_heads_of(str(checkpoint.config.get("model_type")))
    grouped = set(layers_of(recipe.groups))
    return find_layers(
        checkpoint, include_lm_head=not grouped.isdisjoint(heads), stated=recipe.layers
    )
