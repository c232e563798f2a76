"""The ``quantization_config`` of an exported checkpoint.

One config group per scheme, each with its own ``format``, and every layer
named in full, under each name that an engine looks it up by: engines try the
fused name against regular expressions first, match class names by substring,
and take a missing format from the top level, which a mixed checkpoint has not got.

Source: vLLM 0.32.0 ``compressed_tensors/utils.py`` (``find_matched_target``);
compressed-tensors 0.20.0 ``quantization/quant_config.py``, ``utils/match.py``;
what both engines look up when they load an export was executed (``mofq/engines/facts/loading``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mofq.delivery.export.compressed_tensors.plan import ExportPlan, PlannedGroup
from mofq.engines.vllm_names import vllm_prefixes
from mofq.model.layers import FUSION_RULES, FusionGroup, find_loaded_weight, layers_of

#: Last words of layers that engines join -> last words of the module that they make of them. Most
#: classes of SGLang 0.5.23, and vLLM's ``Qwen3MoeForCausalLM`` for ``gate_up_proj``, do not say
#: which layers they join: what they look up is the joined module.
_JOINED = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj",),
    ("gate_proj", "up_proj"): ("gate_up_proj",),
    ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"): ("in_proj_qkvz",),
    ("in_proj_b", "in_proj_a"): ("in_proj_ba",),
    ("w1", "w3"): ("w13",),
}
#: What SGLang calls the matrices of an expert that have other words.
_EXPERT_WORDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
#: Families whose modules SGLang 0.5.23 names without ``model.`` (``models/mixtral.py:303``).
_WITHOUT_BODY = {"mixtral"}


def quantization_config(
    plan: ExportPlan, *, names_of_engines: bool = True
) -> dict[str, Any] | None:
    """What goes into ``config.json``.

    Args:
        plan: Of the export.
        names_of_engines: Whether layers are named too as only engines call them.

    Returns:
        The mapping, or None where nothing is quantized.
    """
    if not plan.quantized and plan.cache.scheme is None:
        return None
    by_scheme: dict[str, list[PlannedGroup]] = {}
    for planned in plan.quantized:
        by_scheme.setdefault(planned.scheme.name, []).append(planned)
    groups = {
        f"group_{number}": _config_group(plan, members, names_of_engines)
        for number, members in enumerate(by_scheme.values())
    }
    formats = list(dict.fromkeys(planned.storage.format for planned in plan.quantized))
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored_names(plan) if names_of_engines else list(plan.ignored),
        "kv_cache_scheme": plan.cache.scheme,
        "global_compression_ratio": None,
    }


def _config_group(
    plan: ExportPlan, members: list[PlannedGroup], names_of_engines: bool
) -> dict[str, Any]:
    storage = members[0].storage
    architecture = plan.model_layers.architecture
    groups = [planned.group for planned in members]
    names = _names(groups, architecture)
    if names_of_engines:
        names += _engine_names(groups, plan)
    return {
        "targets": list(dict.fromkeys(names)),
        "weights": storage.weights,
        "input_activations": storage.input_activations,
        "output_activations": None,
        "format": storage.format,
    }


def _ignored_names(plan: ExportPlan) -> list[str]:
    quantized = {planned.group.name for planned in plan.quantized}
    rest = [group for group in plan.model_layers.groups if group.name not in quantized]
    engines = _engine_names(rest, plan)
    return list(dict.fromkeys([*plan.ignored, *engines]))


def _names(groups: Iterable[FusionGroup], architecture: str) -> list[str]:
    """Under which names layers are looked up: on disk, and in transformers' model."""
    names = []
    for layer in layers_of(groups):
        names.append(layer.name)
        if layer.expert is None and ".experts." not in layer.name:
            # transformers has no module for one expert
            loaded = find_loaded_weight(layer, architecture)
            names.append(loaded.name.removesuffix(".weight"))
    return names


def _joined_words(words: Sequence[str]) -> Iterator[str]:
    """What engines call the joined module of a group, which others may join with more layers."""
    for first, joined in _JOINED.items():
        if tuple(words[: len(first)]) == first:
            yield from joined


def _engine_names(groups: Iterable[FusionGroup], plan: ExportPlan) -> list[str]:
    """Names that only engines have: of joined layers, of the first expert, and prefixes of vLLM.

    SGLang looks the experts of any family up as ``experts.0.gate_proj``, ``up_proj`` and
    ``down_proj``.

    Source: SGLang 0.5.23 ``compressed_tensors/compressed_tensors.py:883-898``.
    """
    architecture, names, on_disk = plan.model_layers.architecture, [], []
    for group in groups:
        on_disk += [layer.name for layer in group.layers]
        parents = [layer.name.rpartition(".")[0] for layer in group.layers]
        words = [layer.name.rpartition(".")[2] for layer in group.layers]
        if ".experts." not in parents[0]:
            names += [f"{parents[0]}.{word}" for word in _joined_words(words)]
        if parents[0].endswith(".experts.0"):
            known = {word: _EXPERT_WORDS.get(word, word) for word in words}
            first = zip(parents, words, strict=True)
            names += [f"{parent}.{known[w]}" for parent, w in first if parent == parents[0]]
        elif architecture in _WITHOUT_BODY:
            names += [layer.name for layer in group.layers]
    if architecture in _WITHOUT_BODY:
        body = FUSION_RULES[architecture].body
        names += [name.removeprefix(body) for name in names]
    every = [layer.name for layer in layers_of(plan.model_layers.groups)]
    return names + vllm_prefixes([*on_disk, *names], architecture, every=every)
