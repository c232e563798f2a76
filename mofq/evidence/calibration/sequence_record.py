"""What a sequence leaves behind on its way through a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor


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
    #: Layer with inputs of its own -> a number a draw; see `mofq.evidence.calibration.gains`.
    input_gains: dict[str, list[float]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the sequence."""
        for part in (self.x, self.source, self.grads, self.tokens, self.input_gains):
            part.clear()

    def see(self, layer: str, x: Tensor, y: Tensor) -> None:
        """Keep a layer's input, and the gradients of its output and input when they come."""
        x_TI = x.detach().reshape(-1, x.shape[-1])
        self.x[layer] = x_TI.to(device="cpu", dtype=torch.bfloat16)
        self.answer(layer, x)
        self.share(layer, layer, y)

    def answer(self, layer: str, x: Tensor) -> None:
        """Note what noise in a layer's input would do, when the gradient comes."""
        amax_T = x.detach().abs().amax(-1).float()
        x.register_hook(partial(self._keep_gain, layer, amax_T))

    def share(self, layer: str, source: str, y_TO: Tensor) -> None:
        """Keep only the gradient of a layer that reads the same input as another."""
        self.source[layer] = source
        y_TO.register_hook(partial(self._keep_gradient, layer))

    def _keep_gain(self, layer: str, amax_T: Tensor, grad: Tensor) -> None:
        square_T = grad.float().square().sum(-1, dtype=torch.float64)
        gain = float((square_T * amax_T.square()).sum())
        self.input_gains.setdefault(layer, []).append(gain)

    def _keep_gradient(self, layer: str, grad: Tensor) -> None:
        grad_TO = grad.reshape(-1, grad.shape[-1]).to(device="cpu", dtype=torch.bfloat16)
        self.grads.setdefault(layer, []).append(grad_TO)
