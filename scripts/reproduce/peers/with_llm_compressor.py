"""Quantizes a model with llm-compressor, whose settings are its recipe.

The recipe is that of a YAML file: names of modifiers and their arguments, in the order in which
they are applied.
"""

from __future__ import annotations

import datasets
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

from scripts.reproduce.peers.handover import Task, hand_over_folder, read_task


def quantize(task: Task) -> str:
    """Quantize and save; returns the folder."""
    if not torch.accelerator.is_available():
        # AWQModifier of 0.14.0 pins what it will copy to an accelerator, whether or not there is
        # one, which torch refuses. It changes no number.
        IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    sequences, length = task.windows_NT.shape
    rows = {
        "input_ids": task.windows_NT.tolist(),
        "attention_mask": [[1] * length] * sequences,
    }
    folder = str(task.output / "saved")
    oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict(rows),
        recipe=yaml.safe_dump(
            {"default_stage": {"default_modifiers": task.settings}}, sort_keys=False
        ),
        num_calibration_samples=sequences,
        max_seq_length=length,
    )
    model.save_pretrained(folder, save_compressed=True)
    return folder


def main() -> None:
    """Quantize and hand over."""
    task = read_task()
    hand_over_folder(task, quantize(task), "llmcompressor", "compressed-tensors")


if __name__ == "__main__":
    main()
