"""What statistics take on the disk, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mofq.evidence.calibration.stats import Plan
from mofq.model.layers import CacheLayer, LinearLayer, ModelLayers, is_expert

_BYTES = 2  #: of a number, bfloat16
_NORM_BYTES = 8  #: of a gradient's norm at one token, float64


def experts_per_token(config: Mapping[str, Any]) -> int:
    """Of a mixture; where its configuration does not say so in the usual word, as many as usual."""
    inner = config.get("text_config")
    found = (inner if isinstance(inner, dict) else config).get("num_experts_per_tok")
    return found if isinstance(found, int) else 8


def kept_bytes(
    layers: ModelLayers, plan: Plan, *, kept: int, others: int, experts_per_token: int
) -> int:
    """Bytes of all that a calibration keeps of some sequences.

    Args:
        layers: Of the model, or of a part of it.
        plan: Of the run.
        kept: Sequences whose samples are kept.
        others: Sequences of which at most the inputs are.
        experts_per_token: Of a mixture.
    """
    length = plan.sequence_length
    caches = layers.caches if plan.kv_cache else ()
    inputs = inputs_bytes(
        layers, tokens=others * length if plan.inputs else 0, experts_per_token=experts_per_token
    )
    samples = samples_bytes(
        layers, tokens=kept * length, draws=plan.draws, experts_per_token=experts_per_token
    )
    return samples + inputs + caches_bytes(caches, tokens=kept * length, draws=plan.draws)


def fits_bytes(layers: ModelLayers, plan: Plan, *, experts_per_token: int) -> int:
    """Bytes of what fitted schemes need of a calibration whose samples are not stored.

    Args:
        layers: With the fusion groups alone that a fitted scheme is offered to.
        plan: Of the run.
        experts_per_token: Of a mixture.

    Returns:
        Inputs of the sequences whose inputs are kept, as `inputs_bytes`, and of each layer the norm
        of the gradient at each of their tokens.
    """
    sequences = sum(one.sequences if plan.inputs else len(one.kept_indices) for one in plan.corpora)
    tokens = sequences * plan.sequence_length
    norms = 0.0
    for group in layers.groups:
        experts = [layer for layer in group.layers if is_expert(layer)]
        norms += len(group.layers) - len(experts)
        if experts:
            norms += len(experts) * min(1.0, experts_per_token / _count(experts))
    inputs = inputs_bytes(layers, tokens=tokens, experts_per_token=experts_per_token)
    return inputs + int(tokens * norms * _NORM_BYTES)


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
            count = _count(experts)
            read = {layer.shares_input or _word(layer): layer.in_features for layer in experts}
            numbers = float(sum(read.values()))
            numbers += draws * sum(layer.out_features for layer in experts) / count
            channels += numbers * min(experts_per_token, count)
    return int(tokens * channels * _BYTES)


def caches_bytes(caches: Iterable[CacheLayer], *, tokens: int, draws: int) -> int:
    """Bytes of what is kept of cached keys and values of some tokens: these and their gradients."""
    return sum(one.numbers for one in caches) * tokens * (1 + draws) * _BYTES


def _count(experts: Sequence[LinearLayer]) -> float:
    """How many experts some layers are of."""
    return len(experts) / len(set(map(_word, experts)))


def _word(expert: LinearLayer) -> str:
    return expert.name.rpartition(".")[2]
