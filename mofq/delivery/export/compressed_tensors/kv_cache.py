"""How an exported checkpoint asks an engine for a format of the KV cache.

``kv_cache_scheme`` in the ``quantization_config`` and the scales ``k_scale`` and ``v_scale`` of
each attention, multipliers in float32; what a checkpoint cannot say are flags of the server.

Source: vLLM 0.32.0 ``compressed_tensors.py:1088-1230`` (``CompressedTensorsKVCacheMethod``),
``attention.py:285-315``; compressed-tensors 0.20.0 ``quantization/quant_config.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mofq.decision.recipe import Recipe, RecipeCache
from mofq.exceptions import BackendError, option
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.checkpoint.writer import PlannedTensor
from mofq.model.kv_schemes import CacheScheme, parse_cache_scheme, part_amax
from mofq.model.layers import PARTS, CacheLayer, ModelLayers
from mofq.numbers.quantize.scales import symmetric_scale

#: Formats that a checkpoint asks for -> the strategy of its scales.
_STRATEGIES = {
    "kv:fp8_e4m3.tensor": "tensor",
    "kv:fp8_e4m3.unscaled": "tensor",
    "kv:fp8_e4m3.head": "attn_head",
}
#: Formats that vLLM is asked for by ``--kv-cache-dtype`` alone.
CACHES_BY_FLAG = {
    "kv:int8.token_head": "int8_per_token_head",
    "kv:fp8_e4m3.token_head": "fp8_per_token_head",
    "kv:int4.token_head.asym.rht": "int4_per_token_head",
    "kv:nvfp4.unscaled": "nvfp4",
    "kv:nvfp4.unscaled@fouroversix": "nvfp4_4over6",
}


@dataclass(frozen=True, slots=True)
class PlannedCache:
    """What an export says of the KV cache."""

    scheme: dict[str, Any] | None  #: ``kv_cache_scheme``; None: a flag says it, or nothing
    tensors: dict[str, Tensor]  #: scales, float32
    flags: tuple[str, ...]  #: of the server

    @property
    def planned(self) -> dict[str, PlannedTensor]:
        """The tensors as the writer wants to know them."""
        return {name: PlannedTensor("F32", tuple(t.shape)) for name, t in self.tensors.items()}


NO_CACHE = PlannedCache(None, {}, ())


def plan_cache(recipe: Recipe, layers: ModelLayers) -> PlannedCache:
    """Check that a recipe's cache can be written down, and write it down.

    Args:
        recipe: That was checked against the model.
        layers: Of the model.

    Raises:
        BackendError: No engine holds the cache so; the message says what one does.
    """
    chosen = {cache.name: cache for cache in recipe.kv_cache if not cache.parsed.is_unquantized}
    if not chosen:
        return NO_CACHE
    names = list(dict.fromkeys(cache.scheme for cache in chosen.values()))
    if len(names) > 1:
        raise BackendError(
            f"kv_cache: {', '.join(names)} in one model: engines hold one format of the cache for "
            f"all layers but those that stay as they are. Search again with "
            f"{option('engine')}, or with {option('kv_formats', names[0])}."
        )
    (name,) = names
    left = [cache.decoder_layer for cache in layers.caches if cache.name not in chosen]
    skip = f"--kv-cache-dtype-skip-layers {' '.join(map(str, left))}"
    flags = (skip,) if left else ()
    if name in CACHES_BY_FLAG:
        return PlannedCache(None, {}, (f"--kv-cache-dtype {CACHES_BY_FLAG[name]}", *flags))
    if name not in _STRATEGIES:
        known = ", ".join([*_STRATEGIES, *CACHES_BY_FLAG])
        raise BackendError(
            f"kv_cache: no engine that reads compressed-tensors holds the cache in {name}; it is "
            f"emulated only. Formats that are held: {known}. Search again with "
            f"{option('engine')}."
        )
    tensors: dict[str, Tensor] = {}
    for cache in layers.caches:
        if cache.name in chosen:
            tensors |= _scales(cache, chosen[cache.name])
    return PlannedCache(_arguments(_STRATEGIES[name]), tensors, flags)


def _arguments(strategy: str) -> dict[str, Any]:
    """Of a ``QuantizationArgs``."""
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": False,
        "group_size": None,
        "observer": "minmax",
    }


def _scales(cache: CacheLayer, one: RecipeCache) -> dict[str, Tensor]:
    """Scales as engines multiply by them; of heads [heads, 1, 1], as llm-compressor stores them."""
    scheme: CacheScheme = one.parsed
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        how = scheme.parts[part]
        if how is not None and how.is_static:
            amax = torch.tensor(part_amax(part, one.static_amax or {}), dtype=torch.float32)
            scale = symmetric_scale(amax, how.scheme)
            name = f"{cache.module}.{part}_scale"
            tensors[name] = scale.reshape(-1, 1, 1) if how.by_head else scale
    return tensors


def read_caches(
    stored: Checkpoint, scheme: dict[str, Any] | None, caches: Sequence[CacheLayer]
) -> tuple[RecipeCache, ...]:
    """What a checkpoint says of the KV cache, as a recipe's section.

    Args:
        stored: The quantized checkpoint.
        scheme: Its ``kv_cache_scheme``.
        caches: Of the model.

    Raises:
        BackendError: It asks for a format that mofq does not know, or a scale is missing.
    """
    if not scheme:
        return ()
    kind = (scheme.get("type"), scheme.get("num_bits"), scheme.get("strategy"))
    known = {("float", 8, "tensor"): "tensor", ("float", 8, "attn_head"): "head"}
    if kind not in known or scheme.get("dynamic") or not scheme.get("symmetric", True):
        raise BackendError(
            f"{stored.folder}: kv_cache_scheme: mofq has no scheme for {scheme}. Known are FP8 "
            f"under static scales of the strategies tensor and attn_head."
        )
    parsed = parse_cache_scheme(f"fp8_e4m3.{known[kind]}")
    return tuple(_read_cache(stored, parsed, cache) for cache in caches)


def _read_cache(stored: Checkpoint, scheme: CacheScheme, cache: CacheLayer) -> RecipeCache:
    amax: dict[str, float] = {}
    for part in PARTS:
        info = stored.tensors.get(f"{cache.module}.{part}_scale")
        how = scheme.parts[part]
        assert how is not None
        if info is None:  # engines take a scale of 1
            return RecipeCache(cache.name, "kv:fp8_e4m3.unscaled")
        scales = read_tensor(info).flatten().double() * how.scheme.element.max
        keys = [f"{part}.{head}" for head in range(len(scales))] if how.by_head else [part]
        amax |= dict(zip(keys, scales.tolist(), strict=True))
    return RecipeCache(cache.name, scheme.name, amax)
