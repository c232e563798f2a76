"""Takes the input and the output gradient of every linear layer while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.hooks import RemovableHandle

from mofq.evidence.calibration.experts import put_forward_back, watch_experts
from mofq.evidence.calibration.sequence_record import Captured
from mofq.exceptions import StatsError
from mofq.model.attention import pass_cache
from mofq.model.layers import (
    PARTS,
    CacheLayer,
    LinearLayer,
    ModelLayers,
    find_loaded_module,
    find_loaded_weight,
)


@contextmanager
def capture_layers(
    model: nn.Module,
    layers: ModelLayers,
    *,
    kv_cache: bool = False,
    activation_checkpointing: bool = False,
) -> Iterator[Captured]:
    """Watch every linear layer of the fusion groups for as long as the context lasts.

    Args:
        model: Frozen (no parameter requires a gradient), in eval mode.
        layers: Of its checkpoint.
        kv_cache: Watch what is cached of keys and values too.
        activation_checkpointing: Run each decoder layer again in the backward pass instead
            of keeping its activations.

    Yields:
        What the last sequence left; call `Captured.clear` before each sequence.

    Raises:
        StatsError: The model has no module for one of the layers.
    """
    captured = Captured()
    last_input: list[tuple[Tensor, str]] = []
    handles = [_start_gradient_at_embeddings(model)]
    restore: list[Callable[[], None]] = []
    experts: dict[str, dict[tuple[int, str], list[tuple[LinearLayer, int]]]] = {}
    for layer in layers.grouped_layers:
        loaded = find_loaded_weight(layer, layers.architecture)
        path, _, parameter = loaded.name.rpartition(".")
        module = _module(model, path, layer)
        if loaded.expert is None:
            hook = partial(_on_forward, captured, last_input, layer.name)
            handles.append(module.register_forward_hook(hook))
        else:
            parts = experts.setdefault(path, {})
            rows = parts.setdefault((loaded.expert, parameter), [])
            rows.append((layer, loaded.row_start))
    for cache in layers.caches if kv_cache else ():
        path = find_loaded_module(cache, layers.architecture)
        see = partial(_see_cache, captured, cache)
        handles.append(pass_cache(_module(model, path, cache), see))
    for path, parts in experts.items():
        restore.append(watch_experts(model.get_submodule(path), parts, captured))
    if activation_checkpointing:
        restore.append(_recompute_decoder_layers(model))
    try:
        yield captured
    finally:
        for undo in reversed(restore):
            undo()
        for handle in handles:
            handle.remove()


def _module(model: nn.Module, path: str, layer: LinearLayer | CacheLayer) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise StatsError(
            f"{layer.name}: the loaded model has no module {path!r}. "
            f"The checkpoint's names and the model's class disagree."
        ) from None


def _on_forward(
    captured: Captured,
    last_input: list[tuple[Tensor, str]],
    name: str,
    _module: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    if not output.requires_grad or (name in captured.source):
        return  # the second run of an activation-checkpointed decoder layer
    x = inputs[0]
    if last_input and last_input[0][0] is x and last_input[0][1] in captured.x:
        captured.share(name, last_input[0][1], output)
        return
    last_input[:] = [(x, name)]
    captured.see(name, x, output)


def _see_cache(captured: Captured, cache: CacheLayer, *states: Tensor) -> tuple[Tensor, Tensor]:
    """Keep what is cached and its gradient, as a layer's whose output is its input."""
    seen = []
    for part, state_BHTD in zip(PARTS, states, strict=True):
        state_BTI = state_BHTD.transpose(1, 2).flatten(2)
        name = cache.part(part)
        if state_BTI.requires_grad and name not in captured.source:
            captured.see(name, state_BTI, state_BTI)
        seen.append(state_BTI.unflatten(2, (-1, cache.head_size)).transpose(1, 2))
    return seen[0], seen[1]


def _start_gradient_at_embeddings(model: nn.Module) -> RemovableHandle:
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))


def _recompute_decoder_layers(model: nn.Module) -> Callable[[], None]:
    """Wrap each decoder layer's forward; the result undoes it.

    transformers' own gradient checkpointing works in training mode only, where dropout
    would change the numbers.
    """
    wrapped: list[tuple[nn.Module, Any]] = []  # with what stood in the layer's own dictionary
    for stack in model.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        for layer in stack:
            if hasattr(layer, "self_attn") or hasattr(layer, "attn"):
                wrapped.append((layer, vars(layer).get("forward")))
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)

    def restore() -> None:
        for layer, forward in wrapped:
            put_forward_back(layer, forward)

    return restore
