"""Checks that an exported folder holds what its recipe says, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.decision.recipe import Recipe
from mofq.delivery.export.compressed_tensors.plan import (
    ExportPlan,
    encoded_parts,
    plan_export,
    split_rows,
)
from mofq.delivery.export.compressed_tensors.quantization_config import quantization_config
from mofq.evidence.fits import Fits
from mofq.exceptions import EnforcementError
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo, open_stored
from mofq.model.checkpoint.tensors import read_kept_rows, read_rows

_COPY_BYTES = 16 * 2**20
_REMEDY = "The folder is not what the recipe says; export it again."


def check_compressed_tensors(
    checkpoint: Checkpoint, recipe: Recipe, folder: str | Path, *, fits: Fits | None = None
) -> None:
    """Compare an exported folder with the original weights and the recipe.

    Every code, scale, zero point and shape is made again from the original
    weights and compared byte for byte; so are all other tensors and the
    ``quantization_config``.

    Args:
        checkpoint: The original model.
        recipe: That the folder is said to follow.
        folder: The exported checkpoint.
        fits: Of the recipe's own stats; where a scheme is fitted.

    Raises:
        EnforcementError: The first deviation, with layer, tensor and row.
        MofqError: As ``plan_export`` and ``open_stored``.
    """
    plan = plan_export(checkpoint, recipe)
    exported = open_stored(str(folder))
    _check_config(plan, exported)
    _check_names(plan, exported)
    for planned in plan.quantized:
        for layer, word, first_row, rows in encoded_parts(checkpoint, planned, fits=fits):
            info = exported.tensors[f"{layer.name}.{word}"]
            _check_rows(info, first_row, rows, f"{layer.name} in {planned.scheme.name}")
    for name, scale in plan.cache.tensors.items():
        _check_rows(exported.tensors[name], 0, scale, "the KV cache")
    for name, first_row, rows in split_rows(plan):
        _check_rows(exported.tensors[name], first_row, rows, "an expert of the original")
    for info in plan.kept:
        if info.decoded:
            for first_row, rows in read_kept_rows(info):
                _check_rows(exported.tensors[info.name], first_row, rows, "rounded to bf16")
        else:
            _check_copy(info, exported.tensors[info.name])


def _check_config(plan: ExportPlan, exported: Checkpoint) -> None:
    needed = json.loads(json.dumps({"quantization_config": quantization_config(plan)}))
    found = {"quantization_config": exported.config.get("quantization_config")}
    if (difference := _difference(needed, found, "config.json")) is not None:
        raise EnforcementError(f"{exported.folder}: {difference}. {_REMEDY}")


def _difference(needed: Any, found: Any, where: str) -> str | None:
    if isinstance(needed, dict) and isinstance(found, dict):
        for key in [*needed, *(key for key in found if key not in needed)]:
            if (key in needed) != (key in found):
                return f"{where}: {key!r} is {'missing' if key in needed else 'not known'}"
            if (inner := _difference(needed[key], found[key], f"{where}: {key}")) is not None:
                return inner
        return None
    if isinstance(needed, list) and isinstance(found, list) and set(needed) != set(found):
        missing = [item for item in needed if item not in found]
        extra = [item for item in found if item not in needed]
        return f"{where}: missing {missing[:3]}, not known {extra[:3]}"
    if needed != found and not isinstance(needed, list):
        return f"{where}: needed {needed!r}, found {found!r}"
    return None


def _check_names(plan: ExportPlan, exported: Checkpoint) -> None:
    for name, planned in plan.tensors.items():
        info = exported.tensors.get(name)
        if info is None:
            raise EnforcementError(f"{exported.folder}: {name!r} is missing. {_REMEDY}")
        if (info.dtype, info.shape) != (planned.dtype, planned.shape):
            raise EnforcementError(
                f"{info.file}: {name!r}: needed {planned.dtype} {list(planned.shape)}, found "
                f"{info.dtype} {list(info.shape)}. {_REMEDY}"
            )
    for name, info in exported.tensors.items():
        if name not in plan.tensors:
            raise EnforcementError(f"{info.file}: {name!r} belongs to nothing. {_REMEDY}")


def _check_rows(info: TensorInfo, first_row: int, needed: Tensor, where: str) -> None:
    found = read_rows(info, first_row, first_row + needed.shape[0])
    same = _bytes(found) == _bytes(needed)
    if not bool(same.all()):
        row = int((~same).any(dim=1).nonzero()[0])
        raise EnforcementError(
            f"{info.file}: {where}: {info.name!r} differs from row {first_row + row} on: needed "
            f"{needed[row].reshape(-1)[:4].tolist()}…, found "
            f"{found[row].reshape(-1)[:4].tolist()}…. {_REMEDY}"
        )


def _bytes(rows: Tensor) -> Tensor:
    """One row of bytes for each row, so that NaN and signed zeros compare too."""
    # Flat first: a matrix of one column may be contiguous and yet have another stride.
    return rows.contiguous().reshape(-1).view(torch.uint8).reshape(rows.shape[0], -1)


def _check_copy(needed: TensorInfo, found: TensorInfo) -> None:
    with needed.file.open("rb") as ours, found.file.open("rb") as theirs:
        ours.seek(needed.start)
        theirs.seek(found.start)
        left = needed.nbytes
        while left:
            size = min(left, _COPY_BYTES)
            if ours.read(size) != theirs.read(size):
                raise EnforcementError(
                    f"{found.file}: {found.name!r} is not the original's, and no scheme is "
                    f"meant to change it. {_REMEDY}"
                )
            left -= size
