"""The linear layers of a checkpoint as a recipe divides them, and the schemes it gives them."""

from __future__ import annotations

from mofq.decision.recipe import Recipe, check_recipe, check_weights
from mofq.exceptions import RecipeError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import (
    EXPERTS_BY,
    FusionGroup,
    ModelLayers,
    find_layers,
    included,
    layers_of,
    share_amax,
    split_experts,
)
from mofq.numbers.schemes import Scheme, parse_scheme


def checked_layers(
    checkpoint: Checkpoint, recipe: Recipe, *, experts_apart: bool = False
) -> ModelLayers:
    """The layers, once it is known that the recipe is for this checkpoint.

    Args:
        checkpoint: Of the model.
        recipe: Of that model.
        experts_apart: Whether experts of one decoder layer may have several schemes, which
            engines do not serve.

    Raises:
        CheckpointError: As ``find_layers``.
        RecipeError: The recipe is not for this model or these weights, does not cover it, splits
            a fusion group, or gives a layer a scheme that its shape does not take.
    """
    layers = find_recipe_layers(checkpoint, recipe, experts_apart=experts_apart)
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


def find_recipe_layers(
    checkpoint: Checkpoint, recipe: Recipe, *, experts_apart: bool = True
) -> ModelLayers:
    """What ``find_layers`` finds, divided as the recipe has it.

    Args:
        checkpoint: Of the model.
        recipe: Has the lm_head and the embedding in fusion groups, or not; gives experts one
            scheme, or several.
        experts_apart: Whether it may give them several.

    Returns:
        The fewest groups of experts of which each has one scheme in the recipe; where there are
        none, those of ``find_layers``.

    Raises:
        CheckpointError: As ``find_layers``.
    """
    asked = included(layers_of(recipe.groups), str(checkpoint.config.get("model_type")))
    layers = find_layers(checkpoint, **asked, stated=recipe.layers)
    divided = (split_experts(layers, by) for by in (EXPERTS_BY if experts_apart else ()))
    return next((one for one in divided if _has_one_scheme_each(one, recipe)), layers)


def _has_one_scheme_each(layers: ModelLayers, recipe: Recipe) -> bool:
    schemes = recipe.schemes
    return all(
        len({schemes.get(layer.name) for layer in group.layers}) == 1 for group in layers.groups
    )
