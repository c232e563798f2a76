"""What each serving engine can run on which hardware, as data with a source.

An engine is a list of rules, first match wins. A rule names schemes and either
the kernel that serves them or the reason why nothing does. Nothing here needs
the engine, a GPU or torch: legality is known before anything is measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from mofq.engines.rules import (
    Engine,
    cache_refusal,
    matching_rule,
    model_problem,
    refusal,
    rule_refusal,
    storage_problem,
)
from mofq.engines.scheme_names import format_name
from mofq.engines.sglang import SGLANG
from mofq.engines.tensor_parallel import check_devices
from mofq.engines.tensorrt_llm import TENSORRT_LLM
from mofq.engines.torchao import TORCHAO_CPU, TORCHAO_GPU
from mofq.engines.transformers import TRANSFORMERS
from mofq.engines.vllm_cpu import VLLM_CPU
from mofq.engines.vllm_gpu import VLLM_GPU
from mofq.exceptions import EngineError, nearest_name
from mofq.model.layers import AnyGroup, CacheLayer
from mofq.numbers.schemes import Scheme

__all__ = [
    "ENGINES",
    "Engine",
    "cache_legality",
    "check_devices",
    "find_engine",
    "format_name",
    "is_read_transposed",
    "legality",
    "matching_rule",
    "model_problem",
    "rule_refusal",
    "serving_environment",
    "storage_problem",
]

#: A generation of GPUs -> CUDA compute capability of its oldest chip.
_GENERATIONS = {"ampere": (8, 0), "ada": (8, 9), "hopper": (9, 0), "blackwell": (10, 0)}


def _on(engine: Engine, *generations: str) -> dict[str, Engine]:
    """An engine for GPUs on each of some generations."""
    return {
        name: replace(engine, name=name, capability=_GENERATIONS[generation])
        for generation in generations
        for name in [f"{engine.name}-{generation}"]
    }


#: Every known engine by name.
ENGINES: dict[str, Engine] = {
    "vllm-cpu": VLLM_CPU,
    **_on(VLLM_GPU, "ampere", "ada", "hopper", "blackwell"),
    **_on(SGLANG, "ampere", "ada", "hopper", "blackwell"),
    **_on(TENSORRT_LLM, "hopper", "blackwell"),
    "transformers": TRANSFORMERS,
    "torchao-cpu": TORCHAO_CPU,
    **_on(TORCHAO_GPU, "ampere", "ada", "hopper", "blackwell"),
}

_DEVICES = re.compile(r"tp=([1-9][0-9]{0,3})")


def find_engine(name: str) -> Engine:
    """The engine of that name.

    Args:
        name: A key of ``ENGINES``; ``"vllm-hopper:tp=4"`` where 4 devices share every layer,
            ``"vllm-hopper@0.32"`` for the rules of a version that is not the newest.

    Returns:
        The engine, under the name as given.

    Raises:
        EngineError: No engine has that name, and the message suggests the nearest; or there are
            no rules for that version; or what follows the colon is no number of devices, or the
            engine cannot share a layer.
    """
    versioned, colon, rest = name.partition(":")
    plain, at, version = versioned.partition("@")
    if plain not in ENGINES:
        raise EngineError(f"unknown engine {plain!r}." + nearest_name(plain, ENGINES))
    engine = ENGINES[plain]
    if at:
        engine = _of_version(engine, name, version)
    if not colon:
        return engine
    devices = _DEVICES.fullmatch(rest)
    if devices is None:
        raise EngineError(
            f"engine {name!r}: devices that share a layer are written {versioned}:tp=4."
        )
    if not engine.can_cut:
        raise EngineError(
            f"engine {name!r}: {plain} has every layer on one device. Write {versioned!r}."
        )
    return replace(engine, name=name, devices=int(devices[1]))


def _of_version(engine: Engine, name: str, version: str) -> Engine:
    """The engine in the newest version whose first numbers are those."""
    known = engine.versions or (engine.version,)
    found = [one for one in known if f"{one}.".startswith(f"{version}.")]
    if not found:
        raise EngineError(
            f"engine {name!r}: mofq has rules for {engine.name} {' and '.join(known)}. "
            f"Write {engine.name}@{known[-1]}, or {engine.name} for the newest."
        )
    return replace(engine, name=name, version=found[-1])


def legality(
    engine_name: str, model_type: str | None = None
) -> Callable[[Scheme, AnyGroup], str | None]:
    """What an engine can serve, as a function.

    Args:
        engine_name: As for `find_engine`.
        model_type: Of the model's config; None: not known, and what holds for some models alone
            is not asked for.

    Returns:
        A function of a scheme and a fusion group that gives None where the
        engine serves the layers of the group in that scheme exactly as they
        were measured, and what it reads can say so, else the reason.

    Raises:
        EngineError: No engine has that name.
    """
    return partial(refusal, find_engine(engine_name), model_type=model_type)


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
    return partial(cache_refusal, find_engine(engine_name))


def is_read_transposed(layer: str, model_type: str | None) -> bool:
    """Whether engines take the ``weight`` of a layer in a compressed-tensors folder as [in, out].

    Args:
        layer: Its name.
        model_type: Of the folder's config.
    """
    engines = (one for one in ENGINES.values() if one.reads == "compressed-tensors")
    return model_type is not None and any(
        one.transposed.loads(layer, model_type) for one in engines
    )


def serving_environment(
    engine_name: str, choices: Iterable[tuple[Scheme, AnyGroup]]
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
    rules = {matching_rule(engine, scheme, group) for scheme, group in choices}
    return tuple(
        dict.fromkeys(
            setting for rule in engine.rules if rule in rules for setting in rule.settings
        )
    )
