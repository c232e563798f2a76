"""What stored parts of a layer are called: ``LAYER.weight_packed``, and otherwise in GPT-OSS."""

from __future__ import annotations

import re
from dataclasses import replace

from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import LinearLayer

#: Types of which vLLM reads an expert's parts as ``experts.0.w13_weight_packed``, gates and ups in
#: turn, and unquantized experts all in one tensor, [E, I, O].
#: Source: vLLM 0.33.0 ``models/gpt_oss.py:73, 239, 1261``.
IN_TURN = frozenset({"gpt_oss"})
_WRITTEN = {"gate_up_proj": "w13", "down_proj": "w2"}
_EXPERT = re.compile(r"(?P<at>.*\.experts\.[0-9]{1,6})\.(?P<word>gate_up_proj|down_proj)")
_PART = re.compile(r"(?P<at>.*\.experts\.[0-9]{1,6})\.(?P<word>w13|w2)_(?P<part>weight\w*)")


def part_name(layer: LinearLayer, part: str, architecture: str) -> str:
    """What an export calls a part of a layer.

    Args:
        layer: From ``find_layers``.
        part: ``weight_packed``, ``weight_scale`` …
        architecture: ``ModelLayers.architecture``.
    """
    match = _EXPERT.fullmatch(layer.name)
    if architecture in IN_TURN and match is not None:
        return f"{match['at']}.{_WRITTEN[match['word']]}_{part}"
    return f"{layer.name}.{part}"


def name_by_layers(stored: Checkpoint) -> Checkpoint:
    """A folder's headers with every part called ``LAYER.PART``, as layers are named."""
    if stored.config.get("model_type") not in IN_TURN:
        return stored
    words = {written: word for word, written in _WRITTEN.items()}
    tensors = {
        f"{m['at']}.{words[m['word']]}.{m['part']}" if (m := _PART.fullmatch(name)) else name: info
        for name, info in stored.tensors.items()
    }
    return replace(stored, tensors=tensors)
