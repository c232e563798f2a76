"""The linear layers of a model, joined into fusion groups. Needs headers only, no torch."""

from __future__ import annotations

from mofq.layers.caches import PARTS, CacheLayer, find_loaded_module
from mofq.layers.families import FUSION_RULES, Experts, Family
from mofq.layers.find import find_layers
from mofq.layers.linear import (
    FusionGroup,
    LinearLayer,
    LoadedWeight,
    ModelLayers,
    find_loaded_names,
    find_loaded_weight,
)

__all__ = [
    "FUSION_RULES",
    "PARTS",
    "CacheLayer",
    "Experts",
    "Family",
    "FusionGroup",
    "LinearLayer",
    "LoadedWeight",
    "ModelLayers",
    "find_layers",
    "find_loaded_module",
    "find_loaded_names",
    "find_loaded_weight",
]
