"""Why what is in no fusion group stays as it is, of any type: routers, and what is no decoder's."""

from __future__ import annotations

import re

from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers.families import ANY_HEADS
from mofq.model.layers.name_patterns import EMBEDDINGS, KEPT, NOT_LINEAR, TOWERS

#: Of Gemma 3n and 4.
_PER_LAYER = "a second table of words, read by each decoder layer: no stage measures its lookups"
_POSITIONS = re.compile(r"wpe|\w*(position|pos_emb)\w*")
_TOWER = "of another tower, or of what predicts further tokens"


def explain_outside(checkpoint: Checkpoint, stack: str, layers: int) -> dict[str, str]:
    """Say of every tensor of two or more dimensions that no decoder layer has what it is.

    Args:
        checkpoint: From ``open_checkpoint``.
        stack: The name of the list of decoder layers on disk.
        layers: How many of them run; those after predict further tokens.

    Returns:
        Tensor -> reason, of any number of dimensions in layers that predict further tokens.
    """
    reasons: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        index = layer_index(name, stack)
        if index is None and len(info.shape) > 1:
            reasons[name] = _reason_outside(name)
        elif index is not None and index >= layers:
            reasons[name] = "of a layer that predicts further tokens"
    return reasons


def kept_reason(path: str) -> str | None:
    """Why a matrix of a decoder layer is left as it is, by its name alone, or None.

    Args:
        path: Inside the decoder layer, ``mlp.gate.weight``.
    """
    return next((why for rule, why in KEPT if rule.fullmatch(path)), None)


def no_linear_reason(path: str) -> str | None:
    """What a tensor of a decoder layer is by its name, where that is no linear layer, or None.

    Args:
        path: As of `kept_reason`.
    """
    return next((why for rule, why in NOT_LINEAR if rule.fullmatch(path)), None)


def layer_index(name: str, stack: str) -> int | None:
    """The number of the decoder layer that a tensor is in, or None."""
    index, dot, _ = name.removeprefix(f"{stack}.").partition(".")
    is_inside = name.startswith(f"{stack}.") and dot and index.isascii() and index.isdigit()
    return int(index) if is_inside else None


def is_embedding(name: str) -> bool:
    """Whether a tensor outside of the decoder layers is the language model's embedding."""
    stem = name.removesuffix(".weight")
    is_named_so = stem != name and stem.rpartition(".")[2] in EMBEDDINGS
    return is_named_so and TOWERS.search(name) is None


def _reason_outside(name: str) -> str:
    stem = name.removesuffix(".weight")
    above, _, word = stem.rpartition(".")
    if is_embedding(name):
        return "the embedding"
    if stem in ANY_HEADS:
        return "the lm_head"
    if TOWERS.search(above):
        return _TOWER
    if word == "embed_tokens_per_layer":
        return _PER_LAYER
    return "positions" if _POSITIONS.fullmatch(word) else "outside of the decoder layers"
