"""The KV cache of a model: what each attention layer keeps of the tokens that it has seen."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mofq.model.layers.families import FUSION_RULES
from mofq.model.layers.names_in_memory import as_pattern, find_in_memory, known_type

#: What attention's first layer may be called.
_FIRST = ("q_proj", "qkv_proj", "query_key_value")
#: The fusion group of queries, keys and values, in this order, and perhaps of a gate behind them.
_QKV = re.compile(r"(.*\battn)\.qkvg?")
#: The two tensors that a layer caches, in the order of schemes.
PARTS = ("k", "v")


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """Keys, after their norm and rotation, and values of one attention layer: one decision.

    Engines hold both in one format. What is cached is a row of ``kv_heads`` heads for each
    token, of keys and of values.
    """

    name: str  #: as fusion groups are named: "layers.0.attn.kv_cache"
    module: str  #: the attention's module, as a checkpoint names it
    kv_heads: int
    head_size: int  #: channels of one head
    decoder_layer: int

    @property
    def channels(self) -> int:
        """Of the keys, or of the values, of one token."""
        return self.kv_heads * self.head_size

    @property
    def numbers(self) -> int:
        """Cached for each token: keys and values."""
        return 2 * self.channels

    def part(self, part: str) -> str:
        """What statistics call the keys or the values, one of `PARTS`."""
        return f"{self.name}.{part}"


def attention_of(group: str) -> str | None:
    """The attention whose queries, keys and values a fusion group has, or None of other groups.

    Args:
        group: Its name: "layers.0.attn.qkv".

    Returns:
        "layers.0.attn".
    """
    found = _QKV.fullmatch(group)
    return None if found is None else found[1]


def find_loaded_module(cache: CacheLayer, architecture: str) -> str:
    """The path of a cache's attention in the model that transformers builds.

    Args:
        cache: From ``find_layers``.
        architecture: ``ModelLayers.architecture``.
    """
    family = FUSION_RULES.get(architecture)
    if family is None:
        known = known_type(architecture)
        weights = [f"{cache.module}.{word}.weight" for word in _FIRST]
        renamed = [one for one in weights if known and as_pattern(one) in known.names]
        return find_in_memory((renamed or weights)[0], architecture).name.rsplit(".", 2)[0]
    return family.loaded_body + cache.module.removeprefix(family.body)
