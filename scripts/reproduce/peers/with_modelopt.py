"""Quantizes the weights of a model with ModelOpt, whose settings are its configurations.

`config` names one of ModelOpt's, `block_size` replaces the size of its blocks; `auto_quantize` has
the arguments of that function instead, whose formats are given in the same way. Weights are read by
running each quantized layer on the identity, so that what the layer does to its inputs (AWQ's
scales) is in them.
"""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from scripts.reproduce.peers.handover import (
    Task,
    batches,
    hand_over_weights,
    processor_seconds,
    read_task,
)


def quantize(task: Task) -> nn.Module:
    """The model with ModelOpt's quantizers."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    inputs = batches(task)

    def run(model: nn.Module) -> None:
        for batch in inputs:
            model(**batch)

    settings = dict(task.settings)
    if "auto_quantize" not in settings:
        return mtq.quantize(model, _config(settings), run)
    arguments = dict(settings["auto_quantize"])
    formats = [_config(one) for one in arguments.pop("formats")]
    found, _ = mtq.auto_quantize(
        model,
        quantization_formats=formats,
        data_loader=inputs,
        forward_step=lambda model, batch: model(**batch, labels=batch["input_ids"]),
        loss_func=lambda output, _batch: output.loss,
        disabled_layers=["*lm_head*"],
        num_calib_steps=len(inputs),
        num_score_steps=len(inputs),
        **arguments,
    )
    return found


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(getattr(mtq, settings["config"]))
    for rule in config["quant_cfg"]:
        sizes = (rule.get("cfg") or {}).get("block_sizes")
        if sizes and "block_size" in settings:
            sizes[-1] = settings["block_size"]
    return config


@torch.no_grad()
def decoded(layer: nn.Module) -> Tensor:
    """The weight that the layer multiplies its inputs by, [out_features, in_features], float32."""
    single = copy.deepcopy(layer).float()
    single.bias = None
    return single(torch.eye(layer.in_features)).T


def stored_bytes(layer: nn.Module) -> dict[str, int]:
    """Bytes of what stands for a weight: codes, their scales in bf16, AWQ's scales of inputs."""
    quantizer, count = layer.weight_quantizer, layer.weight.numel()
    block = (quantizer.block_sizes or {}).get(-1, layer.in_features)
    padded = layer.weight.shape[0] * -(-layer.in_features // block)
    sizes = {"codes": count * quantizer.num_bits // 8, "scales": 2 * padded}
    if getattr(layer.input_quantizer, "pre_quant_scale", None) is not None:
        sizes["input_scales"] = 2 * layer.in_features
    return sizes


def main() -> None:
    """Quantize and hand over."""
    task = read_task()
    model = quantize(task)
    seconds = processor_seconds()
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }
    hand_over_weights(
        task,
        {f"{name}.weight": decoded(layer) for name, layer in layers.items()},
        {name: stored_bytes(layer) for name, layer in layers.items()},
        "nvidia-modelopt",
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
