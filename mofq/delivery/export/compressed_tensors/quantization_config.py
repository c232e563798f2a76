"""The ``quantization_config`` of an exported checkpoint.

One config group per scheme, each with its own ``format``, and every layer
named in full: engines try the fused name against regular expressions first,
match class names by substring, and take a missing format from the top level,
which a mixed checkpoint has not got.

Source: vLLM 0.32.0 ``compressed_tensors/utils.py`` (``find_matched_target``);
compressed-tensors 0.20.0 ``quantization/quant_config.py``, ``utils/match.py``.
"""

from __future__ import annotations

from typing import Any

from mofq.delivery.export.compressed_tensors.plan import ExportPlan, PlannedGroup
from mofq.model.layers import FUSION_RULES, LinearLayer, find_loaded_weight


def quantization_config(plan: ExportPlan) -> dict[str, Any] | None:
    """What goes into ``config.json``.

    Args:
        plan: Of the export.

    Returns:
        The mapping, or None where nothing is quantized.
    """
    if not plan.quantized and plan.cache.scheme is None:
        return None
    by_scheme: dict[str, list[PlannedGroup]] = {}
    for planned in plan.quantized:
        by_scheme.setdefault(planned.scheme.name, []).append(planned)
    groups = {
        f"group_{number}": _config_group(plan, members)
        for number, members in enumerate(by_scheme.values())
    }
    formats = list(dict.fromkeys(planned.storage.format for planned in plan.quantized))
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(plan.ignored),
        "kv_cache_scheme": plan.cache.scheme,
        "global_compression_ratio": None,
    }


def _config_group(plan: ExportPlan, members: list[PlannedGroup]) -> dict[str, Any]:
    storage = members[0].storage
    architecture = plan.model_layers.architecture
    layers = [layer for planned in members for layer in planned.group.layers]
    names = dict.fromkeys(name for layer in layers for name in _names(layer, architecture))
    return {
        "targets": list(names),
        "weights": storage.weights,
        "input_activations": storage.input_activations,
        "output_activations": None,
        "format": storage.format,
    }


def _names(layer: LinearLayer, architecture: str) -> list[str]:
    """Under which names engines look a layer up: on disk, and in transformers' model.

    SGLang looks the experts of any family up as ``experts.0.gate_proj``, ``up_proj`` and
    ``down_proj``, and takes them for unquantized where that names nothing.

    Source: SGLang 0.5.23 ``compressed_tensors/compressed_tensors.py:883-898``.
    """
    loaded = find_loaded_weight(layer, architecture)
    if loaded.expert is not None or ".experts." in layer.name:
        # transformers has no module for one expert
        experts = FUSION_RULES[architecture].experts
        parent, _, word = layer.name.rpartition(".")
        if experts is None or not parent.endswith(".experts.0"):
            return [layer.name]
        words = {experts.gate: "gate_proj", experts.up: "up_proj", experts.down: "down_proj"}
        return list(dict.fromkeys([layer.name, f"{parent}.{words[word]}"]))
    return list(dict.fromkeys([layer.name, loaded.name.removesuffix(".weight")]))
