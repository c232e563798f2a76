"""What a user should know of a checkpoint beside its sizes, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mofq.exceptions import Remark, option
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FUSION_RULES, ModelLayers
from mofq.model.layers.model_class import computes_hidden_states
from mofq.model.layers.names_in_memory import known_type

_HALF = ("bfloat16", "float16")


def notes_on(checkpoint: Checkpoint, layers: ModelLayers) -> tuple[str, ...]:
    """What is unusual about a checkpoint, and what follows from it.

    Args:
        checkpoint: The model.
        layers: Of it.
    """
    notes = (
        _left_over(checkpoint),
        _headless(checkpoint, layers),
        wider_dtype(checkpoint),
        _unheard_of(layers),
    )
    return tuple(note for note in notes if note is not None)


def _left_over(checkpoint: Checkpoint) -> str | None:
    key = checkpoint.left_over
    if key is None:
        return None
    return (
        f"config.json has a {key!r}, and no tensor is quantized: it is taken for left over, and"
        " exports are without it. Delete the key before serving the original: engines believe it."
    )


def _headless(checkpoint: Checkpoint, layers: ModelLayers) -> str | None:
    has_head = layers.tied_lm_head or any(
        layer.module == "lm_head" for layer in layers.linear_layers
    )
    if has_head and not computes_hidden_states(checkpoint.config):
        return None
    return Remark(
        "It is stored as an embedding model, which predicts no tokens: what needs them (calibrate,"
        f" validate, run) refuses it. measure without {option('stats')}, recipe uniform and export"
        " do without."
    )


def _unheard_of(layers: ModelLayers) -> str | None:
    if layers.architecture in FUSION_RULES or known_type(layers.architecture) is not None:
        return None
    return (
        f"Nothing is known of model_type {layers.architecture!r}: its layers are inferred from the"
        " names and shapes of its tensors alone. See that they are all, and joined as your engine"
        " joins them; what `inspect --json` lists as left_out stays as it is."
    )


def wider_dtype(checkpoint: Checkpoint) -> str | None:
    """That tensors are stored in float32 under a config of a dtype half as wide, or None."""
    dtype = _stated_dtype(checkpoint.config)
    # Not the biases of routers, which are kept wider on purpose.
    matrices = (info for info in checkpoint.tensors.values() if len(info.shape) > 1)
    wide = sum(info.nbytes for info in matrices if info.dtype == "F32")
    if dtype not in _HALF or not wide:
        return None
    return (
        f"{wide:,} bytes of matrices are stored in float32, although the config's dtype is {dtype}:"
        " what no scheme quantizes (embedding, norms) keeps float32 in exports and in every size."
        f" Engines round it to {dtype}; to have it smaller, save the model in {dtype} first."
    )


def _stated_dtype(config: Mapping[str, Any]) -> str | None:
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(stated := part.get(key), str):
                return stated.removeprefix("torch.")
    return None
