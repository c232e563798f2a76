"""The KV cache in a recipe: one scheme for every attention layer, or no word of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mofq.exceptions import RecipeError, SchemeError, nearest_name
from mofq.files.documents import strict_object, yaml_scalar
from mofq.model.kv_schemes import (
    CacheScheme,
    cache_bits,
    cache_rejection,
    parse_cache_scheme,
    static_keys,
)
from mofq.model.layers import CacheLayer

CACHE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "attention layer -> how its keys and values are kept; all of them, or none",
    "additionalProperties": strict_object(
        {
            "scheme": {"type": "string", "pattern": "."},
            "static_amax": {
                "type": "object",
                "additionalProperties": {"type": "number", "minimum": 0},
                "description": "k, v, or each head's k.0, k.1 … -> largest magnitude cached, "
                "where a scale is static",
            },
        },
        optional=("static_amax",),
    ),
}


@dataclass(frozen=True, slots=True)
class RecipeCache:
    """The scheme of one attention layer's cache."""

    name: str  #: of the `CacheLayer`
    scheme: str  #: canonical
    static_amax: dict[str, float] | None = None

    @property
    def parsed(self) -> CacheScheme:
        """The scheme itself."""
        return parse_cache_scheme(self.scheme)


def parse_caches(value: Mapping[str, Any], where: str) -> tuple[RecipeCache, ...]:
    """The section of a recipe that its schema has seen.

    Raises:
        RecipeError: A scheme does not parse.
    """
    caches = []
    for name, one in value.items():
        try:
            scheme = parse_cache_scheme(one["scheme"])
        except SchemeError as problem:
            raise RecipeError(f"{where}: kv_cache: {name}: {problem}") from problem
        amax = one.get("static_amax")
        amax = None if amax is None else {key: float(number) for key, number in amax.items()}
        caches.append(RecipeCache(name, scheme.name, amax))
    return tuple(caches)


def cache_lines(caches: Sequence[RecipeCache]) -> list[str]:
    """The YAML of the section; nothing where the recipe says nothing of the cache."""
    if not caches:
        return []
    lines = ["kv_cache:  # how each attention layer keeps its keys and values"]
    for cache in caches:
        lines.append(f"  {yaml_scalar(cache.name)}:")
        lines.append(f"    scheme: {yaml_scalar(cache.scheme)}")
        if cache.static_amax is not None:
            amax = ", ".join(f"{k}: {yaml_scalar(v)}" for k, v in cache.static_amax.items())
            lines.append(f"    static_amax: {{{amax}}}")
    return lines


def check_caches(
    recipe_caches: Sequence[RecipeCache], caches: Sequence[CacheLayer], *, model: str
) -> None:
    """Check the section against a model: every attention layer once, or none.

    Args:
        recipe_caches: Of a recipe.
        caches: Of the model.
        model: Its name, for messages.

    Raises:
        RecipeError: A layer is unknown or missing, or a scheme does not fit it, or has not
            exactly the static scales that it needs.
    """
    if not recipe_caches:
        return
    known = {cache.name: cache for cache in caches}
    chosen = {cache.name: cache for cache in recipe_caches}
    where = f"recipe of {model}: kv_cache"
    for name in chosen:
        if name not in known:
            raise RecipeError(
                f"{where}: the model has no attention layer {name!r}." + nearest_name(name, known)
            )
    for name, cache in known.items():
        if name not in chosen:
            raise RecipeError(f"{where}: {name!r} is missing. Give it a scheme, e.g. bf16.")
        scheme = chosen[name].parsed
        reason = cache_rejection(scheme, cache)
        if reason is not None:
            raise RecipeError(f"{where}: {reason}. Give it another scheme.")
        needed, found = static_keys(scheme, cache), chosen[name].static_amax or {}
        if set(needed) != set(found):
            raise RecipeError(
                f"{where}: {name}: static_amax must name exactly {', '.join(needed) or 'nothing'} "
                f"under {scheme.name}, found {', '.join(found) or 'nothing'}."
            )


def bits_per_number(recipe_caches: Sequence[RecipeCache], caches: Sequence[CacheLayer]) -> float:
    """True bits of a cached number, over all layers of a model."""
    chosen = {cache.name: cache.parsed for cache in recipe_caches}
    bits = sum(cache_bits(chosen[cache.name], cache) for cache in caches)
    return bits / sum(cache.numbers for cache in caches)
