"""The part of a model's linear layers that one of its modules holds."""

from __future__ import annotations

from dataclasses import replace

from mofq.model.layers.kv_cache import find_loaded_module
from mofq.model.layers.linear import (
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

    def holds(layer: LinearLayer) -> bool:
        return f"{find_loaded_weight(layer, layers.architecture).name}.".startswith(start)

    groups = (
        replace(
            group,
            layers=tuple(
                one for layer in group.layers for one in _apart(layer, head) if holds(one)
            ),
        )
        for group in layers.groups
    )
    return replace(
        layers,
        groups=tuple(group for group in groups if group.layers),
        unquantized=tuple(filter(holds, layers.unquantized)),
        caches=tuple(
            one
            for one in layers.caches
            if f"{find_loaded_module(one, layers.architecture)}.".startswith(start)
        ),
    )


def _apart(layer: LinearLayer, head: str | None) -> tuple[LinearLayer, ...]:
    """The layer, or the two that a tied embedding is."""
    if head is None or layer.role != "tied":
        return (layer,)
    at_head = LoadedWeight(f"{head}.weight", None, 0, transposed=False)
    return replace(layer, role="lookup"), replace(layer, role="linear", loaded=at_head)
