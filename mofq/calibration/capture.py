"""Takes the input and the output gradient of every linear layer while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.hooks import RemovableHandle

from mofq.exceptions import StatsError


@dataclass(slots=True)
class Captured:
    """What one sequence left behind; filled by hooks, emptied by `clear`.

    Everything is moved to the CPU as bfloat16 when it is seen, so that a device holds the
    activations of autograd and no more.
    """

    x: dict[str, Tensor] = field(default_factory=dict)  #: layer -> [tokens, in_features]
    source: dict[str, str] = field(default_factory=dict)  #: layer -> layer whose x it shares
    grads: dict[str, list[Tensor]] = field(default_factory=dict)  #: layer -> [tokens, out] a draw
    tokens: dict[str, Tensor] = field(default_factory=dict)  #: expert -> its tokens' positions

    def clear(self) -> None:
        """Forget the sequence."""
        for part in (self.x, self.source, self.grads, self.tokens):
            part.clear()

    def see(self, layer: str, x_TI: Tensor, y_TO: Tensor, token_T: Tensor | None = None) -> None:
        """Keep a layer's input, and its output's gradient when it comes."""
        self.x[layer] = x_TI.detach().to(device="cpu", dtype=torch.bfloat16)
        self.source[layer] = layer
        if token_T is not None:
            self.tokens[layer] = token_T.to("cpu")
        y_TO.register_hook(partial(self._keep_gradient, layer))

    def share(self, layer: str, source: str, y_TO: Tensor) -> None:
        """Keep only the gradient of a layer that reads the same input as another."""
        self.source[layer] = source
        y_TO.register_hook(partial(self._keep_gradient, layer))

    def _keep_gradient(self, layer: str, grad: Tensor) -> None:
        grad_TO = grad.reshape(-1, grad.shape[-1]).to(device="cpu", dtype=torch.bfloat16)
        self.grads.setdefault(layer, []).append(grad_TO)


@contextmanager
def capture_layers(
    model: nn.Module, layer_names: Sequence[str], *, activation_checkpointing: bool = False
) -> Iterator[Captured]:
    """Hook the named linear layers of a model for as long as the context lasts.

    Args:
        model: Frozen (no parameter requires a gradient), in eval mode.
        layer_names: Module names of the layers to watch.
        activation_checkpointing: Run each decoder layer again in the backward pass instead
            of keeping its activations.

    Yields:
        What the last sequence left; call `Captured.clear` before each sequence.

    Raises:
        StatsError: The model has no module of one of the names.
    """
    captured = Captured()
    modules = dict(model.named_modules())
    missing = [name for name in layer_names if name not in modules]
    if missing:
        raise StatsError(
            f"the loaded model has no layer {missing[0]!r} ({len(missing)} missing in all). "
            f"The checkpoint's names and the model's class disagree."
        )
    last_input: list[tuple[Tensor, str]] = []
    handles = [
        modules[name].register_forward_hook(partial(_on_forward, captured, last_input, name))
        for name in layer_names
    ]
    handles.append(_start_gradient_at_embeddings(model))
    restore = _recompute_decoder_layers(model) if activation_checkpointing else lambda: None
    try:
        yield captured
    finally:
        restore()
        for handle in handles:
            handle.remove()


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
    captured.see(name, x.reshape(-1, x.shape[-1]), output)


def _start_gradient_at_embeddings(model: nn.Module) -> RemovableHandle:
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))


def _recompute_decoder_layers(model: nn.Module) -> Callable[[], None]:
    """Wrap each decoder layer's forward; the result undoes it.

    transformers' own gradient checkpointing works in training mode only, where dropout
    would change the numbers.
    """
    wrapped: list[tuple[nn.Module, Any]] = []
    for stack in model.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        for layer in stack:
            if hasattr(layer, "self_attn") or hasattr(layer, "attn"):
                wrapped.append((layer, layer.forward))
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)

    def restore() -> None:
        for layer, forward in wrapped:
            layer.forward = forward

    return restore
