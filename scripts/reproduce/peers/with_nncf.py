"""Quantizes weights with NNCF, whose settings are the arguments of `compress_weights`.

Weights are those that NNCF's own decompressors make of its packed codes.
"""

from __future__ import annotations

import nncf
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import BaseWeightsDecompressor
from torch import nn
from transformers import AutoModelForCausalLM

from scripts.reproduce.peers.handover import (
    Task,
    batches,
    hand_over_weights,
    processor_seconds,
    read_task,
)


def quantize(task: Task) -> nn.Module:
    """The model with codes for weights, and decompressors of them; the lm_head stays as it is."""
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto").eval()
    model.config.use_cache = False
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode[task.settings["mode"]],
        backup_mode=nncf.BackupMode.NONE,
        dataset=nncf.Dataset(batches(task)),
        subset_size=len(task.windows_NT),
        **{name: value for name, value in task.settings.items() if name != "mode"},
    )


def decompressors(model: nn.Module) -> dict[str, BaseWeightsDecompressor]:
    """Name of a weight -> what decodes it.

    Raises:
        SystemExit: Something else was hooked into the model: its weights alone are not the model.
    """
    found = {}
    for name, hook in get_hook_storage(model).named_hooks():
        if not isinstance(hook, BaseWeightsDecompressor):
            raise SystemExit(f"{name}: {type(hook).__name__} is hooked in, beside decompressors.")
        kind, place, _ = name.split(".")
        assert kind == "post_hooks"
        found[place.removesuffix("__0").replace(":", ".")] = hook
    return found


def main() -> None:
    """Quantize and hand over."""
    task = read_task()
    model = quantize(task)
    seconds = processor_seconds()
    weights, stored = {}, {}
    for name, decompressor in decompressors(model).items():
        codes = model.get_parameter(name)
        parts = dict(decompressor.named_buffers())
        stored[name.removesuffix(".weight")] = {
            "codes": codes.nbytes,
            **{part: value.nbytes for part, value in parts.items()},
        }
        for part, value in parts.items():
            if value.is_floating_point():  # so that decoding rounds nothing
                setattr(decompressor, part, value.float())
        decompressor.result_dtype = None
        weights[name] = decompressor(codes)
    hand_over_weights(task, weights, stored, "nncf", seconds=seconds)


if __name__ == "__main__":
    main()
