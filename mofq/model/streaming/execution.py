"""Whether a model is run whole or layer by layer: by what fits into free memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mofq.exceptions import Remark, StreamingError, option
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import ModelLayers

Execution = Literal["auto", "resident", "spread", "streamed"]

#: Of what is free; the rest is for all that is not counted.
_SHARE = 0.8
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Chosen:
    """How a model is run."""

    is_streamed: bool
    remark: str | None  #: what a user should know of it


def choose_execution(
    asked: Execution,
    checkpoint: Checkpoint,
    *,
    dtype: str,
    device: str,
    more_bytes: int = 0,
    unless: str | None = None,
    free: Callable[[str], int | None] | None = None,
) -> Chosen:
    """Run a model whole where it fits, else layer by layer.

    Args:
        asked: ``auto``, or what a user forces.
        checkpoint: The model.
        dtype: Of the arithmetic.
        device: Where it runs.
        more_bytes: That are needed beside the weights, where the model is run whole.
        unless: Why the model has to be run whole, if it has to.
        free: What tells the memory that is free on the device; None: `free_bytes`, of this
            machine.

    Raises:
        StreamingError: It has to be run whole, and layer by layer is asked for.
    """
    if unless is not None:
        if asked == "streamed":
            raise StreamingError(f"{unless}: leave {option('execution', 'streamed')} out.")
        return Chosen(False, None)
    if asked != "auto":
        return Chosen(asked == "streamed", None)
    needed = model_bytes(checkpoint, dtype) + more_bytes
    found = (free or free_bytes)(device)
    if found is None or needed <= _SHARE * found:
        return Chosen(False, None)
    place = device if free is None else f"{device} for each worker"
    return Chosen(
        True,
        Remark(
            f"The whole model would need {needed / 1e9:.1f} GB in {dtype}, and "
            f"{found / 1e9:.1f} GB are free on {place}: it is run layer by layer "
            f"({option('execution', 'streamed')}); {option('execution', 'resident')} keeps it "
            "whole."
        ),
    )


def model_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of all tensors of a checkpoint in a dtype."""
    numbers = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    itemsize: int = getattr(torch, dtype).itemsize
    return numbers * itemsize


def pass_bytes(checkpoint: Checkpoint, layers: ModelLayers, sequence_length: int) -> int:
    """What a sequence takes at most that gradients are taken of; of the bundled models, half.

    That is what autograd keeps of layers that every token visits, and logits with their gradient.
    """
    config = checkpoint.config
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else config
    vocabulary = int(inner.get("vocab_size") or config.get("vocab_size") or 0)
    dense = [layer for layer in layers.grouped_layers if layer.expert is None]
    numbers = sum(2 * (layer.in_features + layer.out_features) for layer in dense) + 4 * vocabulary
    return 4 * sequence_length * numbers


def free_bytes(device: str) -> int | None:
    """Memory that is free on a device; None where the system does not say.

    On the CPU, what the kernel calls available, and no more than a container may have. On a GPU,
    what torch holds for tensors to come is free too.

    Source: Linux, ``Documentation/filesystems/proc.rst`` and
    ``Documentation/admin-guide/cgroup-v2.rst``.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        held = torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
        return int(torch.cuda.mem_get_info(kind)[0]) + held
    if kind.type != "cpu" or not _MEMINFO.exists():
        return None
    lines = (line.split() for line in _MEMINFO.read_text().splitlines())
    free = next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), None)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if limit == "max":
        return free
    left = int(limit) - used + int(cached.get("file", 0))
    return left if free is None else min(free, left)
