"""Emulates the KV cache of a recipe: attention reads keys and values as a cache would keep them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mofq.decision.recipe import Recipe
from mofq.model.attention import pass_cache
from mofq.model.kv_schemes import CacheScheme, part_amax
from mofq.model.layers import PARTS, ModelLayers, find_loaded_module
from mofq.numbers.quantize import fake_quantize_cache
from mofq.numbers.quantize.straight_through import straight_through


@dataclass(frozen=True, slots=True)
class RoundedCache:
    """What stands between an attention layer and what it caches."""

    name: str  #: of the `CacheLayer`
    scheme: CacheScheme
    static_amax: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Every position as it is kept, those of this very run included."""
        keys, values = (
            self._rounded(part, state_BHTD)
            for part, state_BHTD in zip(PARTS, (keys_BHTD, values_BHTD), strict=True)
        )
        return keys, values

    def _rounded(self, part: str, state_BHTD: Tensor) -> Tensor:
        how = self.scheme.parts[part]
        if how is None:
            return state_BHTD
        state_BTHD = state_BHTD.transpose(1, 2)
        round_to = partial(
            fake_quantize_cache,
            scheme=how.scheme,
            by_head=how.by_head,
            kernel=how.kernel,
            static_amax=part_amax(part, self.static_amax),
            name=self.name,
        )
        return straight_through(round_to, state_BTHD).transpose(1, 2)


def apply_caches(model: nn.Module, recipe: Recipe, layers: ModelLayers) -> list[RemovableHandle]:
    """Emulate what a recipe says of the cache, in place.

    Args:
        model: As transformers loads it.
        recipe: That was checked against the model.
        layers: Of the model.

    Returns:
        What undoes it, of each layer whose cache is quantized.
    """
    chosen = {cache.name: cache for cache in recipe.kv_cache}
    handles = []
    for cache in layers.caches:
        one = chosen.get(cache.name)
        if one is None or one.parsed.is_unquantized:
            continue
        attention = model.get_submodule(find_loaded_module(cache, layers.architecture))
        rounded = RoundedCache(cache.name, one.parsed, one.static_amax or {})
        handles.append(pass_cache(attention, rounded))
    return handles
