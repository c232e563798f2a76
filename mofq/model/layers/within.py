"""The part of a model's linear layers that one of its modules holds."""

from __future__ import annotations

from dataclasses import replace

from mofq.model.layers.kv_cache import find_loaded_module
from mofq.model.layers.linear import FusionGroup, ModelLayers, find_loaded_weight


def layers_within(layers: ModelLayers, path: str) -> ModelLayers:
    """The linear layers and caches inside a module of the loaded model.

    Args:
        layers: Of the checkpoint.
        path: Of the module, for example ``model.layers.0`` or ``lm_head``.

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
            for one in group.layers
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
