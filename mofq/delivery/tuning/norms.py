"""The norms of a model in memory, under the names that its checkpoint has them by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mofq.delivery.apply.loaded_model import loaded_tensor
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.streaming.weights import has_values

#: In the name of a class: RMSNorm, LayerNorm, and what families derive from them.
_NORM = "Norm"


@dataclass(frozen=True, slots=True)
class Norm:
    """A gain, or the bias, of a norm."""

    names: tuple[str, ...]  #: of its tensor in the checkpoint; several where they are one in memory
    path: str  #: of its parameter in the model
    parameter: nn.Parameter  #: of the model, [C]
    dtype: torch.dtype  #: of the checkpoint's tensor
    size_C: Tensor  #: magnitude of what a channel is multiplied by, float32; of a bias their mean


@dataclass(slots=True)
class TunedNorm:
    """A norm while it is tuned."""

    names: tuple[str, ...]  #: as `Norm` has them, and so the path
    path: str
    dtype: torch.dtype  #: of the checkpoint's tensor
    computed: torch.dtype  #: of the model's parameter
    size_C: Tensor
    start_C: Tensor  #: as it was, float32
    moved_C: Tensor  #: relative change of each channel, float32; its ``grad`` is what moves it

    @classmethod
    def of(cls, norm: Norm) -> TunedNorm:
        """Begin with a norm as it is."""
        start_C = norm.parameter.detach().float().clone()
        computed, moved_C = norm.parameter.dtype, torch.zeros_like(start_C)
        return cls(norm.names, norm.path, norm.dtype, computed, norm.size_C, start_C, moved_C)

    @property
    def value_C(self) -> Tensor:
        """What computes by now, which is what is stored of it."""
        value_C = self.start_C + self.size_C * self.moved_C
        return value_C.to(self.dtype).to(self.computed)

    def take_gradient(self, gradient_C: Tensor | None) -> None:
        """Leave the gradient of the relative change behind.

        Args:
            gradient_C: Of the norm; None: of a tower that got no input.
        """
        if gradient_C is None:
            self.moved_C.grad = None
        else:
            self.moved_C.grad = gradient_C.float() * self.size_C

    def changed(self) -> dict[str, Tensor]:
        """Name in the checkpoint -> the norm by now, on the CPU; empty where it is as it was."""
        value_C = self.value_C
        if torch.equal(value_C.float(), self.start_C):
            return {}
        return dict.fromkeys(self.names, value_C.to(self.dtype).cpu())


def find_norms(model: nn.Module, checkpoint: Checkpoint, architecture: str) -> tuple[Norm, ...]:
    """Gains and biases of all norms whose values the checkpoint holds as they are.

    Args:
        model: As transformers loads it.
        checkpoint: Of the model.
        architecture: ``ModelLayers.architecture``.

    Returns:
        In the checkpoint's order. Norms of a tower that gets no input are among them; those of a
        model that is run layer by layer, where they have values now.
    """
    sizes: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for module in model.modules():
        if _NORM in type(module).__name__:
            sizes |= {id(one): (one, size_C) for one, size_C in _sizes(module)}
    every = model.named_parameters(remove_duplicate=False)
    loaded = {path: one for path, one in every if id(one) in sizes}
    paths = {id(one): path for path, one in reversed(loaded.items())}
    found: dict[int, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        tensor = loaded_tensor(loaded, name, architecture)
        if id(tensor) in sizes and not info.decoded and info.dtype in TORCH_DTYPES:
            found.setdefault(id(tensor), []).append(name)
    return tuple(
        Norm(
            tuple(names),
            paths[key],
            sizes[key][0],
            TORCH_DTYPES[checkpoint.tensors[names[0]].dtype],
            sizes[key][1],
        )
        for key, names in found.items()
    )


def _sizes(module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of a norm, each with the magnitude of the module's gains."""
    gain = getattr(module, "weight", None)
    if not isinstance(gain, nn.Parameter) or gain.dim() != 1 or not has_values(gain):
        return []
    gain_C = gain.detach().float()
    size_C = (1 + gain_C if _adds_one(module, gain_C) else gain_C).abs()
    bias = getattr(module, "bias", None)
    if not isinstance(bias, nn.Parameter) or bias.shape != gain.shape:
        return [(gain, size_C)]
    return [(gain, size_C), (bias, size_C.mean().expand_as(size_C))]


def _adds_one(module: nn.Module, gain_C: Tensor) -> bool:
    """Whether a norm multiplies by 1 + weight, as GEMMA's do: with a weight of 0 it is not 0."""
    x_TC = torch.linspace(-1, 1, gain_C.numel(), device=gain_C.device)[None, None].to(
        next(module.parameters()).dtype
    )
    parameters = {name: torch.zeros_like(one) for name, one in module.named_parameters()}
    try:
        with torch.no_grad():
            return bool(functional_call(module, parameters, (x_TC,)).any())
    # It takes a gate too, or images or groups of channels: none of these adds 1.
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return False
