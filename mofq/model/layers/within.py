"""The part of a model's linear layers that one of its modules holds."""

from __future__ import annotations

from dataclasses import replace

from mofq.model.layers.kv_cache import find_loaded_module
from mofq.model.layers.linear import LinearLayer, ModelLayers, find_loaded_weight


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

    def holds(layer: LinearLayer) -> bool:
        return f"{find_loaded_weight(layer, layers.architecture).name}.".startswith(start)

    groups = (replace(one, layers=tuple(filter(holds, one.layers))) for one in layers.groups)
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
