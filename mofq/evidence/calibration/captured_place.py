"""Where what layers see in one sequence is kept until it is summed up and written.

Their inputs, outputs and gradients are far more numbers than a pass through the model reads: of
Llama-3-8B and 2,048 tokens 15 GB in bfloat16. To the host and back they would take many times as
long as the passes themselves, so they stay on a GPU that has room, and only what is written of a
sequence goes to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mofq.evidence.calibration.disk_needs import caches_bytes, experts_per_token, samples_bytes
from mofq.evidence.calibration.stats import Plan
from mofq.model.layers import ModelLayers
from mofq.model.streaming.execution import free_bytes

#: Of a GPU's free memory: what autograd keeps needs the most of it.
_SHARE = 0.25


def captured_place(
    model: PreTrainedModel, parts: Sequence[ModelLayers], plan: Plan
) -> torch.device:
    """The model's device where all of one sequence fits beside autograd, else the CPU.

    Args:
        model: With its weights where they are.
        parts: Layers that are watched at a time: those of the whole model, or of a unit each.
        plan: Of the run.
    """
    device: torch.device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        return torch.device("cpu")
    experts = experts_per_token(model.config.get_text_config().to_dict())
    needed = max(_captured_bytes(one, plan, experts_per_token=experts) for one in parts)
    free = free_bytes(str(device))
    return device if free is not None and needed <= _SHARE * free else torch.device("cpu")


def _captured_bytes(layers: ModelLayers, plan: Plan, *, experts_per_token: int) -> int:
    """Of one sequence, of all that is watched at a time."""
    caches = layers.caches if plan.kv_cache else ()
    return samples_bytes(
        layers,
        tokens=plan.sequence_length,
        draws=plan.draws + 1,  # the outputs themselves are as many as a draw of their gradients
        experts_per_token=experts_per_token,
    ) + caches_bytes(caches, tokens=plan.sequence_length, draws=plan.draws)
