"""What a loader does with the tensors of a checkpoint, seen at the operators of torch.

Runs in the venv, beside an engine's sources. Nothing of the engine's loader is replaced: each
tensor of the checkpoint is followed through views, copies and concatenations until it is written
into a parameter, and each element of a parameter that is written is marked.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Follows tensors of a checkpoint into the parameters of a model."""

    def __init__(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.parameters = {name: p.data for name, p in model.named_parameters() if p.numel()}
        self.written = {
            _storage(p): torch.zeros(p.untyped_storage().nbytes(), dtype=torch.bool)
            for p in self.parameters.values()
        }
        self.of = {_storage(tensor): {name} for name, tensor in tensors.items()}
        self.kept: list[torch.Tensor] = list(tensors.values())  # an address stays one tensor's
        self.read: dict[str, set[int]] = {name: set() for name in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        names = set().union(*(self.of.get(_storage(x), ()) for x in inputs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._write(value, names)
        for made in tree_leaves(result):
            if names and isinstance(made, torch.Tensor) and _storage(made) not in self.written:
                self.kept.append(made)
                self.of.setdefault(_storage(made), set()).update(names)
        return result

    def _write(self, target: torch.Tensor, names: set[str]) -> None:
        place, size = _storage(target), target.element_size()
        if place in self.written:
            elements = self.written[place].view(-1, size)[:, 0]
            strides = [size * stride for stride in target.stride()]
            elements.as_strided(target.shape, strides, size * target.storage_offset()).fill_(True)
            for name in names:
                self.read[name].add(place)

    def found(self) -> dict[str, Any]:
        """``read``: name -> parameters; ``unread`` names; ``unfilled`` parameters."""
        read, unfilled = {}, []
        for name, places in self.read.items():
            into = [p for p, value in self.parameters.items() if _storage(value) in places]
            read[name] = into
        for name, value in self.parameters.items():
            size = value.element_size()
            if not self.written[_storage(value)].view(-1, size)[:, 0].all():
                unfilled.append(name)
        return {
            "read": {name: into for name, into in read.items() if into},
            "unread": [name for name, into in read.items() if not into],
            "unfilled": unfilled,
        }


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record_loading(model: Any, folder: Path) -> dict[str, Any]:
    """Let a model load the tensors of a folder.

    Args:
        model: Of an engine, with parameters on the CPU.
        folder: A checkpoint of one file.

    Returns:
        As `Recorder.found`.
    """
    tensors = load_file(folder / "model.safetensors")
    recorder = Recorder(model, tensors)
    with recorder:
        model.load_weights(iter(tensors.items()))
    for name, parameter in model.named_parameters():
        if parameter.numel() and _storage(parameter.data) not in recorder.written:
            raise RuntimeError(f"{name} was replaced while it was loaded, which is not followed")
    return recorder.found()


def load_folders(build: Callable[[Path], Any], folders: Iterable[str]) -> list[dict[str, Any]]:
    """What becomes of each folder: as `Recorder.found`, or ``error``.

    Args:
        build: Makes the model of a folder.
        folders: Checkpoints of one file.
    """
    found = []
    for folder in map(Path, folders):
        try:
            found.append(record_loading(build(folder), folder))
        except Exception as error:  # whatever stops the engine is the answer
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())
            place = f"{Path(last.filename).name}, {last.name}"
            found.append({"error": f"{type(error).__name__} ({place}): {text}"})
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config
