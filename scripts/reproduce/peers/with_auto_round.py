"""Quantizes a model with AutoRound, whose settings are the arguments of `AutoRound`.

`auto_scheme` in them holds the arguments of `AutoScheme`, which then chooses the scheme of each
layer. The model is saved in compressed-tensors, without zero points where codes are symmetric.
"""

from __future__ import annotations

from typing import Any

from auto_round import AutoRound, AutoScheme
from transformers import AutoTokenizer

from scripts.reproduce.peers.handover import Task, batches, hand_over_folder, read_task


def quantize(task: Task) -> str:
    """Quantize and save; returns the folder."""
    sequences, length = task.windows_NT.shape
    settings: dict[str, Any] = dict(task.settings)
    dataset: Any = batches(task)
    if "auto_scheme" in settings:
        sizes = {"nsamples": sequences, "seqlen": length, "batch_size": 1}
        settings["scheme"] = AutoScheme(**settings.pop("auto_scheme"), **sizes, dataset=task.texts)
        dataset = task.texts  # it takes names of files only
    quantizer = AutoRound(
        task.model,
        AutoTokenizer.from_pretrained(task.model),
        dataset=dataset,
        nsamples=sequences,
        seqlen=length,
        device_map="cpu",
        **settings,
    )
    _, folder = quantizer.quantize_and_save(str(task.output), format="llm_compressor")
    return str(folder[0] if isinstance(folder, list) else folder)


def main() -> None:
    """Quantize and hand over."""
    task = read_task()
    hand_over_folder(task, quantize(task), "auto-round", "compressed-tensors")


if __name__ == "__main__":
    main()
