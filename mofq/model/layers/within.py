"""The part of a model's linear layers that one of its modules holds."""

from __future__ import annotations

from dataclasses import replace

from mofq.model.layers.kv_cache import find_loaded_module
from mofq.model.layers.linear import (
    FusionGroup,
    LinearLayer,
    LoadedWeight,
    ModelLayers,
    find_loaded_weight,
)


def layers_within(layers: ModelLayers, path: str, *, head: str | None = None) -> ModelLayers:
    """The linear layers and caches inside a module of the loaded model.

    Args:
        layers: Of the checkpoint.
        path: Of the module, for example ``model.layers.0`` or ``lm_head``.
        head: Path of the lm_head, where an embedding that it is tied to is to be two layers: one
            that is looked up in its own module, and one that multiplies in the lm_head's.

    Returns:
        The same with fewer groups, unquantized layers and caches; a fusion group that has
        layers inside and outside has those inside.
    """
    start = f"{path}."

    def is_inside(name: str) -> bool:
        return f"{name}.".startswith(start)

    groups = []
    for group in layers.groups:
        inside = tuple(
            one
            for layer in group.layers
            for one in _apart(layer, head)
            if is_inside(find_loaded_weight(one, layers.architecture).name)
        )
        if inside:
            groups.append(FusionGroup(group.name, inside))
    return replace(
        layers,
        groups=tuple(groups),
        unquantized=tuple(
            one
            for one in layers.unquantized
            if is_inside(find_loaded_weight(one, layers.architecture).name)
        ),
        caches=tuple(
            one for one in layers.caches if is_inside(find_loaded_module(one, layers.architecture))
        ),
    )


def _apart(layer: LinearLayer, head: str | None) -> tuple[LinearLayer, ...]:
    """The layer, or the two that a tied embedding is."""
    if head is None or layer.role != "tied":
        return (layer,)
    at_head = LoadedWeight(f"{head}.weight", None, 0, transposed=False)
    return replace(layer, role="lookup"), replace(layer, role="linear", loaded=at_head)
