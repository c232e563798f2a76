"""Lets a function see and change what the attention of a model caches.

transformers passes keys (after their norm and rotation) and values to the ``update`` of a cache,
and attention reads what that returns, prompt tokens included. So an object in the place of the
cache sees and decides what is cached, whatever implementation of attention is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

#: Keys and values [batch, kv_heads, tokens, head_size] -> what attention reads instead.
Through = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_ARGUMENT = "past_key_values"


class PassedCache:
    """Takes the place of a layer's cache; there may be none."""

    def __init__(self, through: Through, cache: Any | None) -> None:
        self._through = through
        self._cache = cache

    def update(
        self, keys: Tensor, values: Tensor, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what attention reads; the model's own cache, where it has one, keeps the same."""
        keys, values = self._through(keys, values)
        if self._cache is None:
            return keys, values
        kept: tuple[Tensor, Tensor] = self._cache.update(keys, values, *more, **named)
        return kept

    def get_seq_length(self, *layer: Any) -> int:
        """Return how many tokens the model's own cache has: none where there is no cache."""
        return 0 if self._cache is None else int(self._cache.get_seq_length(*layer))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Passage:
    """A hook that gives a `PassedCache` to an attention layer."""

    def __init__(self, through: Through) -> None:
        self.through = through

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, _ARGUMENT: PassedCache(self.through, kwargs.get(_ARGUMENT))}


def pass_cache(attention: nn.Module, through: Through) -> RemovableHandle:
    """Let a function see, and change, what an attention layer caches.

    Args:
        attention: Of transformers: its ``forward`` takes ``past_key_values`` by name.
        through: Called once for each run of the layer, with the tokens of that run.

    Returns:
        What removes it.
    """
    return attention.register_forward_pre_hook(_Passage(through), with_kwargs=True)


def cache_passages(attention: nn.Module) -> list[Through]:
    """The functions that `pass_cache` put before an attention layer, in order."""
    hooks = attention._forward_pre_hooks.values()
    return [hook.through for hook in hooks if isinstance(hook, _Passage)]
