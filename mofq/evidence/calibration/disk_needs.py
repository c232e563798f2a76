"""What statistics take on the disk, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mofq.model.layers import CacheLayer, ModelLayers, is_expert

_BYTES = 2  #: of a number, bfloat16


def experts_per_token(config: Mapping[str, Any]) -> int:
    """Of a mixture; where its configuration does not say so in the usual word, as many as usual."""
    inner = config.get("text_config")
    found = (inner if isinstance(inner, dict) else config).get("num_experts_per_tok")
    return found if isinstance(found, int) else 8


def inputs_bytes(layers: ModelLayers, *, tokens: int, experts_per_token: int) -> int:
    """Bytes of the inputs of some tokens without gradients; arguments as `samples_bytes`."""
    return samples_bytes(layers, tokens=tokens, draws=0, experts_per_token=experts_per_token)


def samples_bytes(layers: ModelLayers, *, tokens: int, draws: int, experts_per_token: int) -> int:
    """Bytes of the samples of some tokens.

    Args:
        layers: Of the model.
        tokens: Of all sequences that are kept.
        draws: Of the gradient, for each sequence.
        experts_per_token: Of a mixture; a token is with no other expert.

    Returns:
        Inputs, once for the layers of a fusion group that read the same number of channels, and
        gradients of outputs.
    """
    channels = 0.0
    for group in layers.groups:
        experts = [layer for layer in group.layers if is_expert(layer)]
        looked_up = [layer for layer in group.layers if layer.role != "linear"]
        channels += sum(draws * layer.in_features for layer in looked_up)
        dense = [la for la in group.layers if not is_expert(la) and la.role != "lookup"]
        channels += sum({layer.in_features for layer in dense})
        channels += sum(draws * layer.out_features for layer in dense)
        if experts:
            count = len(experts) / len({layer.name.rpartition(".")[2] for layer in experts})
            numbers = sum(layer.in_features + draws * layer.out_features for layer in experts)
            channels += numbers / count * min(experts_per_token, count)
    return int(tokens * channels * _BYTES)


def caches_bytes(caches: Iterable[CacheLayer], *, tokens: int, draws: int) -> int:
    """Bytes of what is kept of cached keys and values of some tokens: these and their gradients."""
    return sum(one.numbers for one in caches) * tokens * (1 + draws) * _BYTES
