"""What vLLM calls layers where it asks how they are quantized, if not as the checkpoint does.

vLLM looks a layer up by the ``prefix`` that its model class gives it, which some classes build
from other words than those that their weights are loaded by: the layer then stays unquantized and
the loader finds no parameter for its scales. An export names layers by these prefixes too.

Source: vLLM 0.32.0 and 0.33.0 ``model_executor/models/{falcon_h1,granitemoehybrid,jamba}.py``,
0.32.0 ``zamba2.py``, whose exports were served (docs/reference/served.md), of Jamba loaded; 0.33.0
``cosmos3_edge.py``, read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from mofq.model.layers.names_in_memory import known_type

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_MAMBA_OF_LAYER = re.compile(r"\.layers\.(\d+)\.mamba\.")


def _falcon_h1(name: str, decoder_layers: int) -> str:
    """Its state-space layers are numbered behind the attention, and lie outside of ``layers``."""
    found = _MAMBA_OF_LAYER.search(name)
    if found is not None:
        number = decoder_layers + int(found[1])
        return f"{name[: found.start()]}.{number}.mixer.{name[found.end() :]}"
    return name.replace(".self_attn.", ".")


def _zamba2(name: str, hybrid_layers: int) -> str:
    """Its decoder layers are numbered behind those that have attention too."""
    found = _LAYER.search(name)
    if found is None:
        return name
    path = re.sub(r"^(mamba_decoder\.)?mamba\.", "mixer.", name[found.end() :])
    return f"{hybrid_layers + int(found[1])}.{path}"


def _cosmos3_edge(name: str, _: int) -> str:
    """Attention and MLP are layers of their own, one behind the other, in the words of others."""
    found = re.search(r"\blayers\.(\d+)\.(self_attn|mlp)\.(?:to_)?(\w+)$", name)
    if found is None:
        return name
    number, is_mlp, word = 2 * int(found[1]), found[2] == "mlp", found[3]
    word = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}.get(word, word)
    return f"language_model.model.layers.{number + is_mlp}.mixer.{word}"


def _granite_hybrid(name: str, _: int) -> str:
    return name.replace(".mamba.", ".mixer.")


def _jamba(name: str, _: int) -> str:
    return name.replace(".mamba.", ".mixer.").replace(".self_attn.", ".")


#: Architecture -> of a layer's name and a number of decoder layers (of Zamba2 those of both kinds,
#: else all), its prefix.
_PREFIX_OF: Mapping[str, Callable[[str, int], str]] = {
    "cosmos3_edge": _cosmos3_edge,
    "falcon_h1": _falcon_h1,
    "granitemoehybrid": _granite_hybrid,
    "jamba": _jamba,
    "zamba2": _zamba2,
}
#: Where transformers has a language model beside towers; vLLM has its lm_head in it too.
#: Source: vLLM 0.32.0 ``models/qwen2_5_vl.py`` and 46 others, ``hf_to_vllm_mapper``.
_WITH_TOWERS = "model.language_model."
_OF_BOTH_KINDS = {"zamba2": ".mamba_decoder."}


def vllm_prefixes(names: Iterable[str], architecture: str, *, every: Iterable[str]) -> list[str]:
    """By what vLLM looks layers up, those that it looks up by their names left out.

    Args:
        names: Of layers in the checkpoint, or of several that vLLM joins.
        architecture: The model's.
        every: Names of all of its layers.
    """
    names = list(names)
    known = known_type(architecture)
    stacks = () if known is None else (*known.stacks, *known.with_towers)
    if "lm_head" in names and any(one.startswith(_WITH_TOWERS) for one in stacks):
        return ["language_model.lm_head"]
    prefix_of = _PREFIX_OF.get(architecture)
    if prefix_of is None:
        return []
    word = _OF_BOTH_KINDS.get(architecture, "")
    numbers = {int(found[1]) for one in every if word in one and (found := _LAYER.search(one))}
    count = len(numbers) if word else 1 + max(numbers, default=0)
    return [prefix for name in names if (prefix := prefix_of(name, count)) != name]
