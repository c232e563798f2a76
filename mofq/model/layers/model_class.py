"""What the class that ``architectures`` names computes: next tokens, hidden states, or else.

Engines choose the model that they build by that name, so it decides what is served, whatever
else the weights could be used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mofq.exceptions import CheckpointError, option
from mofq.model.layers.names_in_memory import known_type

#: Ends of the names of classes that predict next tokens.
_CAUSAL = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "WithLMHead",
    "GenerationDecoder",
)


def computes_hidden_states(config: Mapping[str, Any]) -> bool:
    """Whether a config names a base class, such as ``MistralModel``: an embedding model.

    Args:
        config: Of a checkpoint.
    """
    name = _class_name(config) or ""
    is_other = "For" in name or name.endswith(("HeadModel", "HeadsModel"))
    return name.endswith("Model") and not is_other


def check_class(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse classes that compute neither next tokens nor hidden states.

    Args:
        config: Of a checkpoint. One that names no class is of a causal language model, as
            transformers takes it.
        where: The config's path, for messages.

    Raises:
        CheckpointError: As said; the message names the class.
    """
    name, known = _class_name(config), known_type(str(config.get("model_type")))
    if name is None or name.endswith(_CAUSAL) or computes_hidden_states(config):
        return
    if known is not None and name == known.kind:
        return
    raise CheckpointError(
        f"{where}: 'architectures' names {name!r}, which is no causal language model: engines serve"
        " its scores (of classes, rewards or answers), and mofq measures next tokens, which it does"
        " not predict. If the folder holds a language model after all, name its class there, e.g."
        " 'LlamaForCausalLM'; else quantize the language model that this one was made from."
    )


def check_next_tokens(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse to run a base class for its next tokens.

    Args:
        config: Of a checkpoint.
        where: The config's path, for messages.

    Raises:
        CheckpointError: As said; the message says what can be done without running it.
    """
    if computes_hidden_states(config):
        raise CheckpointError(
            f"{where}: 'architectures' names {_class_name(config)!r}, an embedding model: engines"
            " serve its hidden states, and mofq measures next tokens, which it does not predict."
            f" `mofq measure` without {option('stats')}, `mofq recipe uniform` and `mofq export` do"
            " without."
            " If it is served as a language model, name that class there, e.g."
            " 'LlamaForCausalLM'."
        )


def _class_name(config: Mapping[str, Any]) -> str | None:
    """The first class that is named, or None."""
    stated = config.get("architectures")
    first = stated[0] if isinstance(stated, list) and stated else stated
    return first if isinstance(first, str) else None
