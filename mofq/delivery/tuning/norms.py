"""The norms of a model in memory, under the names that its checkpoint has them by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mofq.delivery.apply.loaded_model import loaded_tensor
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES

#: In the name of a class: RMSNorm, LayerNorm, and what families derive from them.
_NORM = "Norm"


@dataclass(frozen=True, slots=True)
class Norm:
    """A gain, or the bias, of a norm."""

    names: tuple[str, ...]  #: of its tensor in the checkpoint; several where they are one in memory
    parameter: nn.Parameter  #: of the model, [C]
    dtype: torch.dtype  #: of the checkpoint's tensor
    size_C: Tensor  #: magnitude of what a channel is multiplied by, float32; of a bias their mean


def find_norms(model: nn.Module, checkpoint: Checkpoint, architecture: str) -> tuple[Norm, ...]:
    """Gains and biases of all norms whose values the checkpoint holds as they are.

    Args:
        model: As transformers loads it.
        checkpoint: Of the model.
        architecture: ``ModelLayers.architecture``.

    Returns:
        In the checkpoint's order. Norms of a tower that gets no input are among them.
    """
    sizes: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for module in model.modules():
        if _NORM in type(module).__name__:
            sizes |= {id(one): (one, size_C) for one, size_C in _sizes(module)}
    loaded = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        tensor = loaded_tensor(loaded, name, architecture)
        if id(tensor) in sizes and not info.decoded and info.dtype in TORCH_DTYPES:
            found.setdefault(id(tensor), []).append(name)
    return tuple(
        Norm(tuple(names), sizes[key][0], TORCH_DTYPES[checkpoint.tensors[names[0]].dtype], size_C)
        for key, names in found.items()
        for size_C in [sizes[key][1]]
    )


def _sizes(module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of a norm, each with the magnitude of the module's gains."""
    gain = getattr(module, "weight", None)
    if not isinstance(gain, nn.Parameter) or gain.dim() != 1:
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
