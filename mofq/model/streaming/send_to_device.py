"""Sends a tensor to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the host goes on to what the device will do with it.

    Through pinned memory: of what lies elsewhere CUDA's copies are waited for, whatever is asked.

    Args:
        tensor: Of any shape, on the host or on the device; without gradients.
        device: Where it goes; where it is there already it is the tensor itself.

    Source: CUDA Runtime API, "API synchronization behavior".
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
