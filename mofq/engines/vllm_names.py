"""What vLLM calls layers where it asks how they are quantized, if not as the checkpoint does.

vLLM looks a layer up by the ``prefix`` that its model class gives it, which some classes build
from other words than those that their weights are loaded by: the layer then stays unquantized and
the loader finds no parameter for its scales. An export names layers by these prefixes too.

Source: vLLM 0.32.0 and 0.33.0 ``model_executor/models/{falcon_h1,granitemoehybrid,jamba}.py``;
exports were loaded (docs/reference/served.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_MAMBA_OF_LAYER = re.compile(r"\.layers\.(\d+)\.mamba\.")


def _falcon_h1(name: str, decoder_layers: int) -> str:
    """Its state-space layers are numbered behind the attention, and lie outside of ``layers``."""
    found = _MAMBA_OF_LAYER.search(name)
    if found is not None:
        number = decoder_layers + int(found[1])
        return f"{name[: found.start()]}.{number}.mixer.{name[found.end() :]}"
    return name.replace(".self_attn.", ".")


def _granite_hybrid(name: str, _: int) -> str:
    return name.replace(".mamba.", ".mixer.")


def _jamba(name: str, _: int) -> str:
    return name.replace(".mamba.", ".mixer.").replace(".self_attn.", ".")


#: Architecture -> of a layer's name and the number of decoder layers, its prefix.
_PREFIX_OF: Mapping[str, Callable[[str, int], str]] = {
    "falcon_h1": _falcon_h1,
    "granitemoehybrid": _granite_hybrid,
    "jamba": _jamba,
}


def vllm_prefix(name: str, architecture: str, *, decoder_layers: int) -> str | None:
    """By what vLLM looks a layer up, if that is not its name.

    Args:
        name: Of the layer in the checkpoint, or of several that vLLM joins.
        architecture: The model's.
        decoder_layers: How many it has.
    """
    prefix_of = _PREFIX_OF.get(architecture)
    if prefix_of is None:
        return None
    prefix = prefix_of(name, decoder_layers)
    return None if prefix == name else prefix
