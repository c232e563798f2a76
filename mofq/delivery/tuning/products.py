"""Matrix products of tuning steps in bfloat16, where the device has instructions for them.

The gradient of a step is noise for the most part, of the few sequences that it takes, and bfloat16
adds little to it. What judges computes in the dtype that was asked for.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.streaming.execution import model_bytes
from mofq.numbers.processor import multiplies_bfloat16

#: Types whose code in transformers puts what products give into tensors of the model's own dtype.
_ONE_DTYPE = {"dbrx", "xmod"}


def in_bfloat16(model: PreTrainedModel, device: torch.device) -> torch.autocast:
    """A context in which a float32 model multiplies matrices in bfloat16, where that is faster.

    Args:
        model: In no other dtype than float32 anything changes.
        device: That it computes on.
    """
    helps = (
        model.dtype == torch.float32
        and multiplies_bfloat16(device)
        and model.config.model_type not in _ONE_DTYPE
    )
    # Weights move between passes: what was cast before is no longer them.
    return torch.autocast(device.type, torch.bfloat16, enabled=helps, cache_enabled=False)


def copies_bytes(checkpoint: Checkpoint, *, dtype: str, device: str) -> int:
    """What a step takes for its products beside a model that is in memory whole, at most.

    Autograd keeps each matrix as it multiplied, until it runs backward through it.

    Args:
        checkpoint: The model.
        dtype: Of the arithmetic that was asked for.
        device: Where it runs.
    """
    if dtype != "float32" or not multiplies_bfloat16(torch.device(device)):
        return 0
    return model_bytes(checkpoint, "bfloat16")
