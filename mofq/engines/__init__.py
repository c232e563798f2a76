"""What each serving engine can run on which hardware, as data with a source.

An engine is a list of rules, first match wins. A rule names schemes and either
the kernel that serves them or the reason why nothing does. Nothing here needs
the engine, a GPU or torch: legality is known before anything is measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from mofq.engines.kv_cache import (
    VLLM_CPU_CACHE,
    VLLM_GPU_CACHE,
    cache_refusal,
    matching_cache_rule,
)
from mofq.engines.others import TENSORRT_LLM, TRANSFORMERS
from mofq.engines.rules import (
    CacheRule,
    Engine,
    Rule,
    format_name,
    matching_rule,
    refusal,
)
from mofq.engines.sglang import SGLANG
from mofq.engines.tensor_parallel import check_devices
from mofq.engines.torchao import TORCHAO_CPU, TORCHAO_GPU
from mofq.engines.vllm_cpu import VLLM_CPU
from mofq.engines.vllm_gpu import VLLM_GPU
from mofq.exceptions import EngineError, nearest_name
from mofq.model.layers import CacheLayer, FusionGroup
from mofq.numbers.schemes import Scheme

__all__ = [
    "ENGINES",
    "CacheRule",
    "Engine",
    "Rule",
    "cache_legality",
    "check_devices",
    "find_engine",
    "format_name",
    "legality",
    "matching_cache_rule",
    "matching_rule",
    "serving_environment",
]

#: Every known engine by name. A GPU engine is one generation: the oldest chip of it.
ENGINES: dict[str, Engine] = {
    "vllm-cpu": Engine("vllm-cpu", "0.32.0", None, "compressed-tensors", VLLM_CPU, VLLM_CPU_CACHE),
    "vllm-ampere": Engine(
        "vllm-ampere", "0.32.0", (8, 0), "compressed-tensors", VLLM_GPU, VLLM_GPU_CACHE
    ),
    "vllm-ada": Engine(
        "vllm-ada", "0.32.0", (8, 9), "compressed-tensors", VLLM_GPU, VLLM_GPU_CACHE
    ),
    "vllm-hopper": Engine(
        "vllm-hopper", "0.32.0", (9, 0), "compressed-tensors", VLLM_GPU, VLLM_GPU_CACHE
    ),
    "vllm-blackwell": Engine(
        "vllm-blackwell", "0.32.0", (10, 0), "compressed-tensors", VLLM_GPU, VLLM_GPU_CACHE
    ),
    "sglang-ampere": Engine("sglang-ampere", "0.5.23", (8, 0), "compressed-tensors", SGLANG),
    "sglang-ada": Engine("sglang-ada", "0.5.23", (8, 9), "compressed-tensors", SGLANG),
    "sglang-hopper": Engine("sglang-hopper", "0.5.23", (9, 0), "compressed-tensors", SGLANG),
    "sglang-blackwell": Engine("sglang-blackwell", "0.5.23", (10, 0), "compressed-tensors", SGLANG),
    "tensorrt-llm-hopper": Engine("tensorrt-llm-hopper", "1.2.0", (9, 0), "modelopt", TENSORRT_LLM),
    "tensorrt-llm-blackwell": Engine(
        "tensorrt-llm-blackwell", "1.2.0", (10, 0), "modelopt", TENSORRT_LLM
    ),
    "transformers": Engine(
        "transformers", "5.23.0", None, "compressed-tensors", TRANSFORMERS, can_cut=False
    ),
    "torchao-cpu": Engine("torchao-cpu", "0.18.0", None, "torchao", TORCHAO_CPU, can_cut=False),
    "torchao-ampere": Engine(
        "torchao-ampere", "0.18.0", (8, 0), "torchao", TORCHAO_GPU, can_cut=False
    ),
    "torchao-ada": Engine("torchao-ada", "0.18.0", (8, 9), "torchao", TORCHAO_GPU, can_cut=False),
    "torchao-hopper": Engine(
        "torchao-hopper", "0.18.0", (9, 0), "torchao", TORCHAO_GPU, can_cut=False
    ),
    "torchao-blackwell": Engine(
        "torchao-blackwell", "0.18.0", (10, 0), "torchao", TORCHAO_GPU, can_cut=False
    ),
}

_DEVICES = re.compile(r"tp=([1-9][0-9]{0,3})")


def find_engine(name: str) -> Engine:
    """The engine of that name.

    Args:
        name: A key of ``ENGINES``; ``"vllm-hopper:tp=4"`` where 4 devices share every layer.

    Returns:
        The engine, under the name as given.

    Raises:
        EngineError: No engine has that name, and the message suggests the nearest; or what
            follows the colon is no number of devices, or the engine cannot share a layer.
    """
    plain, colon, rest = name.partition(":")
    if plain not in ENGINES:
        raise EngineError(f"unknown engine {plain!r}." + nearest_name(plain, ENGINES))
    engine = ENGINES[plain]
    if not colon:
        return engine
    devices = _DEVICES.fullmatch(rest)
    if devices is None:
        raise EngineError(f"engine {name!r}: devices that share a layer are written {plain}:tp=4.")
    if not engine.can_cut:
        raise EngineError(
            f"engine {name!r}: {plain} has every layer on one device. Write {plain!r}."
        )
    return replace(engine, name=name, devices=int(devices[1]))


def legality(engine_name: str) -> Callable[[Scheme, FusionGroup], str | None]:
    """What an engine can serve, as a function.

    Args:
        engine_name: As for `find_engine`.

    Returns:
        A function of a scheme and a fusion group that gives None where the
        engine serves the layers of the group in that scheme exactly as they
        were measured, else the reason.

    Raises:
        EngineError: No engine has that name.
    """
    engine = find_engine(engine_name)

    def check(scheme: Scheme, group: FusionGroup) -> str | None:
        return refusal(engine, scheme, group)

    return check


def cache_legality(engine_name: str) -> Callable[[str, CacheLayer], str | None]:
    """What an engine can hold of the KV cache, as a function.

    Args:
        engine_name: As for `find_engine`.

    Returns:
        A function of a format's name and a layer's cache that gives None where the engine
        holds it as it was measured, else the reason.

    Raises:
        EngineError: No engine has that name.
    """
    engine = find_engine(engine_name)

    def check(scheme: str, cache: CacheLayer) -> str | None:
        return cache_refusal(engine, scheme, cache)

    return check


def serving_environment(
    engine_name: str, choices: list[tuple[Scheme, FusionGroup]]
) -> tuple[str, ...]:
    """Environment variables and flags under which the engine serves what was measured.

    Args:
        engine_name: As for `find_engine`.
        choices: The scheme of each fusion group of a recipe.

    Returns:
        Each one once, in the order of the rules: ``NAME=VALUE`` or ``--flag value``.

    Raises:
        EngineError: No engine has that name.
    """
    engine = find_engine(engine_name)
    needed = {
        setting
        for scheme, group in choices
        if (rule := matching_rule(engine, scheme, group)) is not None
        for setting in rule.settings
    }
    return tuple(dict.fromkeys(s for rule in engine.rules for s in rule.settings if s in needed))
