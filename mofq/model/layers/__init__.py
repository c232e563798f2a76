"""The linear layers of a model, joined into fusion groups. Needs headers only, no torch."""

from __future__ import annotations

from mofq.model.layers.checkpoint_layers import find_layers
from mofq.model.layers.experts import EXPERTS_BY, ExpertsBy, is_expert, split_experts
from mofq.model.layers.families import FUSION_RULES, lm_heads_of
from mofq.model.layers.kv_cache import PARTS, CacheLayer, attention_of, find_loaded_module
from mofq.model.layers.linear import (
    AnyGroup,
    AnyLayer,
    FusionGroup,
    LinearLayer,
    LoadedWeight,
    ModelLayers,
    Role,
    find_exported_name,
    find_loaded_names,
    find_loaded_weight,
    layers_of,
    share_amax,
    stored_amax,
)
from mofq.model.layers.stated_layers import CONFIG_KEY, StatedLayers, load_layers
from mofq.model.layers.vocabulary import (
    Included,
    included,
    included_groups,
    vocabulary_names,
    vocabulary_rejection,
)

__all__ = [
    "CONFIG_KEY",
    "EXPERTS_BY",
    "FUSION_RULES",
    "PARTS",
    "AnyGroup",
    "AnyLayer",
    "CacheLayer",
    "ExpertsBy",
    "FusionGroup",
    "Included",
    "LinearLayer",
    "LoadedWeight",
    "ModelLayers",
    "Role",
    "StatedLayers",
    "attention_of",
    "find_exported_name",
    "find_layers",
    "find_loaded_module",
    "find_loaded_names",
    "find_loaded_weight",
    "included",
    "included_groups",
    "is_expert",
    "layers_of",
    "lm_heads_of",
    "load_layers",
    "share_amax",
    "split_experts",
    "stored_amax",
    "vocabulary_names",
    "vocabulary_rejection",
]
