"""Quantizes a model with TorchAO, whose settings are a configuration and its arguments.

Arguments that are no numbers are written as their names: `int4` for `torch.int4`, a number for the
size of groups, `hqq_scale_only` for a way to choose scales. TorchAO looks at weights alone, and
takes no calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchao import quantization
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerGroup, quantize_
from torchao.quantization.quant_primitives import dequantize_affine
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm
from transformers import AutoModelForCausalLM

from scripts.reproduce.peers.handover import Task, hand_over_weights, processor_seconds, read_task

_READ: Mapping[str, Callable[[Any], object]] = {
    "weight_dtype": lambda name: getattr(torch, name),
    "granularity": PerGroup,
    "intx_choose_qparams_algorithm": IntxChooseQParamsAlgorithm,
}


def quantize(task: Task) -> nn.Module:
    """The model, all linear layers but the lm_head quantized."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    arguments = {
        name: _READ.get(name, lambda value: value)(value)
        for name, value in task.settings["arguments"].items()
    }
    quantize_(model, getattr(quantization, task.settings["config"])(**arguments), _is_decoders)
    return model


def _is_decoders(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def stored_bytes(weight: Tensor) -> dict[str, int]:
    """Bytes of the tensors that stand for a weight.

    Codes of fewer than 8 bits lie in bytes in memory until an engine packs them, and are counted
    packed; zero points that are all zero are not stored then.
    """
    assert isinstance(weight, Int8Tensor | IntxUnpackedToInt8Tensor)
    bits = 8
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        bits = int(str(weight.target_dtype).removeprefix("torch.int"))
    sizes = {"codes": weight.qdata.numel() * bits // 8, "scales": weight.scale.nbytes}
    zeros = getattr(weight, "zero_point", None)
    if zeros is not None and bool(zeros.any()):
        sizes["zero_points"] = zeros.numel() * bits // 8
    return sizes


def decoded(weight: Tensor) -> Tensor:
    """As `weight.dequantize` does, in float32, so that nothing is rounded."""
    assert isinstance(weight, Int8Tensor | IntxUnpackedToInt8Tensor)
    block, zeros = list(weight.block_size), weight.zero_point
    return dequantize_affine(weight.qdata, block, weight.scale.float(), zeros, torch.int8)


def main() -> None:
    """Quantize and hand over."""
    task = read_task()
    model = quantize(task)
    seconds = processor_seconds()
    layers = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    hand_over_weights(
        task,
        {f"{name}.weight": decoded(weight) for name, weight in layers.items()},
        {name: stored_bytes(weight) for name, weight in layers.items()},
        "torchao",
        seconds=seconds,
        inputs=task.settings.get("inputs"),
    )


if __name__ == "__main__":
    main()
