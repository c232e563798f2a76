"""Compares an exported folder with what its recipe makes of the original, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.decision.recipe import Recipe
from mofq.delivery.deviation import Deviation
from mofq.delivery.export.compressed_tensors.check_files import (
    find_file_deviations,
    json_differences,
)
from mofq.delivery.export.compressed_tensors.plan import (
    ExportPlan,
    encoded_parts,
    plan_export,
    split_rows,
)
from mofq.delivery.export.compressed_tensors.quantization_config import quantization_config
from mofq.delivery.export.compressed_tensors.recipe_from_folder import (
    QUANTIZATION_KEY,
    config_fault,
    config_group,
)
from mofq.evidence.fits import Fits
from mofq.exceptions import EnforcementError
from mofq.files.documents import shown
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint, TensorInfo, open_stored
from mofq.model.checkpoint.tensors import read_kept_rows, read_rows

_COPY_BYTES = 16 * 2**20


def check_compressed_tensors(
    checkpoint: Checkpoint, recipe: Recipe, folder: str | Path, *, fits: Fits | None = None
) -> None:
    """Refuse a folder that is not what its recipe makes of the original.

    Args:
        checkpoint: The original model.
        recipe: That the folder is said to follow.
        folder: The exported checkpoint.
        fits: Of the recipe's own stats; where a scheme is fitted.

    Raises:
        EnforcementError: The first deviation of ``find_folder_deviations``.
        MofqError: As ``plan_export`` and ``open_stored``.
    """
    exported = open_stored(str(folder))
    for deviation in find_folder_deviations(checkpoint, recipe, exported, fits=fits):
        raise EnforcementError(
            f"{exported.folder}: {deviation.layer}: {deviation.reason}. "
            f"The folder is not what the recipe says; export it again."
        )


def find_folder_deviations(
    checkpoint: Checkpoint, recipe: Recipe, exported: Checkpoint, *, fits: Fits | None = None
) -> Iterator[Deviation]:
    """Compare an exported folder with the original and the recipe.

    Every code, scale, zero point and shape is made again from the original
    weights and compared byte for byte; so are all other tensors. Config, tokenizer and
    generation config are compared key by key.

    Args:
        checkpoint: The original model.
        recipe: That the folder is said to follow.
        exported: The folder, from ``open_stored``.
        fits: Of the recipe's own stats; where a scheme is fitted.

    Yields:
        Every deviation: of a tensor the first row that differs.

    Raises:
        MofqError: As ``plan_export``.
    """
    plan = plan_export(checkpoint, recipe)
    yield from _check_config(plan, exported)
    yield from find_file_deviations(checkpoint, exported)
    misshapen = list(_check_names(plan, exported))
    yield from misshapen
    skipped = {deviation.layer for deviation in misshapen}
    for planned in plan.quantized:
        for layer, word, first_row, rows in encoded_parts(checkpoint, planned, fits=fits):
            name = f"{layer.name}.{word}"
            if name in skipped:
                continue
            reason = _rows_deviation(exported.tensors[name], first_row, rows)
            if reason is not None:
                skipped.add(name)
                yield Deviation(name, f"{reason} ({planned.scheme.name})")
    for name, scale in plan.cache.tensors.items():
        if name not in skipped and (reason := _rows_deviation(exported.tensors[name], 0, scale)):
            yield Deviation(name, f"{reason} (the KV cache)")
    for name, first_row, rows in split_rows(plan):
        if name in skipped:
            continue
        if reason := _rows_deviation(exported.tensors[name], first_row, rows):
            skipped.add(name)
            yield Deviation(name, f"{reason} (an expert of the original)")
    for name, tensor in plan.tuned.items():
        if name not in skipped and (reason := _rows_deviation(exported.tensors[name], 0, tensor)):
            yield Deviation(name, f"{reason} (a norm that the recipe tuned)")
    for info in plan.kept:
        if info.name in skipped:
            continue
        if reason := _copy_deviation(info, exported.tensors[info.name]):
            yield Deviation(info.name, reason)


def _check_config(plan: ExportPlan, exported: Checkpoint) -> Iterator[Deviation]:
    needed, found = dict(plan.checkpoint.config), dict(exported.config)
    # As JSON gives it back.
    wanted = json.loads(json.dumps(quantization_config(plan)))
    stated = found.pop(QUANTIZATION_KEY, None)
    needed.pop(QUANTIZATION_KEY, None)
    yield from json_differences(needed, found, CONFIG_FILE)
    where = f"{CONFIG_FILE}: {QUANTIZATION_KEY}"
    yield from json_differences(_in_order(wanted), _in_order(stated), where)
    if wanted is None or config_fault(stated) is not None:
        return
    for layer in plan.model_layers.linear_layers:
        ours, theirs = (_served(config, layer.name) for config in (wanted, stated))
        if ours != theirs:
            yield Deviation(
                layer.name,
                f"the recipe's scheme is {shown(ours)}, engines read {shown(theirs)}",
            )


def _in_order(value: Any) -> Any:
    """Without the order of names, which says nothing in targets and ignore."""
    if isinstance(value, dict):
        return {key: _in_order(inner) for key, inner in value.items()}
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value


def _served(config: Any, layer: str) -> dict[str, Any] | None:
    """How engines read a layer's config group; None: they leave the layer unquantized."""
    group = config_group(config, layer)
    return None if group is None else {k: v for k, v in group.items() if k != "targets"}


def _check_names(plan: ExportPlan, exported: Checkpoint) -> Iterator[Deviation]:
    for name, planned in plan.tensors.items():
        info = exported.tensors.get(name)
        if info is None:
            yield Deviation(name, "is missing")
        elif (info.dtype, info.shape) != (planned.dtype, planned.shape):
            yield Deviation(
                name,
                f"needed {planned.dtype} {list(planned.shape)}, found {info.dtype} "
                f"{list(info.shape)}",
            )
    for name in exported.tensors:
        if name not in plan.tensors:
            yield Deviation(name, "belongs to nothing")


def _rows_deviation(info: TensorInfo, first_row: int, needed: Tensor) -> str | None:
    found = read_rows(info, first_row, first_row + needed.shape[0])
    same = _bytes(found) == _bytes(needed)
    if bool(same.all()):
        return None
    row = int((~same).any(dim=1).nonzero()[0])
    return (
        f"differs from row {first_row + row} on: needed "
        f"{needed[row].reshape(-1)[:4].tolist()}…, found {found[row].reshape(-1)[:4].tolist()}…"
    )


def _bytes(rows: Tensor) -> Tensor:
    """One row of bytes for each row, so that NaN and signed zeros compare too."""
    # Flat first: a matrix of one column may be contiguous and yet have another stride.
    return rows.contiguous().reshape(-1).view(torch.uint8).reshape(rows.shape[0], -1)


def _copy_deviation(needed: TensorInfo, found: TensorInfo) -> str | None:
    """How a tensor that no scheme changes is not the original's, if it is not."""
    if needed.decoded:
        reasons = (_rows_deviation(found, start, rows) for start, rows in read_kept_rows(needed))
        reason = next((each for each in reasons if each is not None), None)
        return None if reason is None else f"{reason} (rounded to bf16)"
    with needed.file.open("rb") as ours, found.file.open("rb") as theirs:
        ours.seek(needed.start)
        theirs.seek(found.start)
        left = needed.nbytes
        while left:
            size = min(left, _COPY_BYTES)
            if ours.read(size) != theirs.read(size):
                return "is not the original's, and no scheme is meant to change it"
            left -= size
    return None
