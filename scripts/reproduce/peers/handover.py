"""What a script that runs a peer is given, and what it hands over.

Runs in the peer's environment, which has torch and safetensors and nothing of mofq. A script is
given the model, the windows of tokens to calibrate on, and settings in the peer's own words. It
hands over either the folder that the peer itself saved, in compressed-tensors, or float32 weights
and the size of every tensor that stands for them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: In the folder of an entry.
MADE, MODEL, WEIGHTS = "made.json", "model", "weights.safetensors"
#: In the folder of the calibration: the windows as token ids, and as a list of texts.
WINDOWS, TEXTS = "windows.safetensors", "windows.json"


@dataclass(frozen=True, slots=True)
class Task:
    """What a peer is asked to make."""

    model: str  #: folder
    windows_NT: Tensor  #: token ids to calibrate on, int64
    texts: str  #: file with the same windows as text, a JSON list
    output: Path  #: an empty folder
    settings: dict[str, Any]  #: in the peer's own words; see entries.py


def read_task(arguments: Sequence[str] | None = None) -> Task:
    """The task on the command line; None for this process's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    return Task(
        options.model,
        load_file(options.calibration / WINDOWS)["tokens"],
        str(options.calibration / TEXTS),
        options.output,
        options.settings,
    )


def batches(task: Task) -> list[dict[str, Tensor]]:
    """The windows one by one, as a forward pass takes them, [1, T]."""
    return [
        {"input_ids": window_T[None], "attention_mask": torch.ones_like(window_T[None])}
        for window_T in task.windows_NT
    ]


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended, all threads."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def hand_over_folder(task: Task, folder: str | Path, *packages: str) -> None:
    """A folder in compressed-tensors that the peer saved.

    Args:
        task: That it is for.
        folder: Wherever the peer saved it.
        packages: Whose versions are noted.
    """
    seconds = processor_seconds()
    os.replace(folder, task.output / MODEL)
    _note(task, seconds, packages, {})


def hand_over_weights(
    task: Task,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, Mapping[str, int]],
    *packages: str,
    seconds: float,
    inputs: str | None = None,
) -> None:
    """Weights that the peer's own tensors were turned into by the peer's own code.

    Args:
        task: That they are for.
        weights: Name of a tensor of the original -> its values.
        stored: Layer -> name -> bytes of each tensor that the peer keeps for its weight.
        packages: Whose versions are noted.
        seconds: `processor_seconds` when the model was quantized.
        inputs: How the inputs of these layers are rounded as they come, as in mofq's names of
            schemes; None: not at all.
    """
    single = {name: value.detach().float().contiguous() for name, value in weights.items()}
    save_file(single, task.output / WEIGHTS)
    _note(task, seconds, packages, {"stored_bytes": stored, "inputs": inputs})


def _note(task: Task, seconds: float, packages: Sequence[str], more: Mapping[str, object]) -> None:
    content = {
        "settings": task.settings,
        "versions": {name: version(name) for name in (*packages, "torch", "transformers")},
        "processor_seconds": seconds,
        **more,
    }
    (task.output / MADE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
