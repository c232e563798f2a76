"""Writes a rewritten checkpoint: an ordinary model folder, and where it comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq import __version__
from mofq.delivery.rewriting.choose_scales import Choice
from mofq.evidence.calibration.stats import Stats
from mofq.exceptions import CheckpointError, RewriteError
from mofq.files.locks import new_folder
from mofq.files.progress import Progress, told
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint, open_checkpoint, read_json
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.checkpoint.tensors import read_rows
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.checkpoint.writer import PlannedTensor, ShardWriter, copy_other_files
from mofq.numbers.quantize.tiles import row_blocks

#: What the folder is and where it comes from.
LINEAGE_FILE = "rewrite.json"
VERSION = 1
#: Of the largest file [bytes].
_SHARD_BYTES = 5_000_000_000
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True)
class _Moved:
    """What a tensor is multiplied by, float64."""

    rows_R: Tensor | None = None  #: along its first dimension
    columns_I: Tensor | None = None  #: along its second


def write_rewritten(
    checkpoint: Checkpoint,
    choices: Sequence[Choice],
    out_folder: str | Path,
    *,
    method: str,
    stats: Stats,
    progress: Progress | None = None,
) -> Path:
    """Write a model folder in which scales have moved; it appears when it is complete.

    Args:
        checkpoint: The original; FP8 weights are written in bf16, those that no scale moves too.
        choices: One for each site.
        out_folder: A folder that does not exist yet, or is empty.
        method: For the lineage.
        stats: That was chosen by, for the lineage.
        progress: Called with ``"write"``, tensors done, and all of them.

    Returns:
        The folder.

    Raises:
        RewriteError: The folder is in the way, a dtype cannot be scaled, or what was written
            is not the original times its scales.
        CheckpointError: The disk is full.
    """
    moved = _moved_tensors(choices)
    plan = {name: PlannedTensor(i.kept_dtype, i.shape) for name, i in checkpoint.tensors.items()}
    return write_folder(
        checkpoint,
        out_folder,
        plan=plan,
        changed={name: _moved_rows(checkpoint, name, one) for name, one in moved.items()},
        config=checkpoint.config,
        lineage=lineage(checkpoint, method)
        | {
            "stats_sha256": stats.sha256,
            "sites": {one.site.group: _of_site(one) for one in choices},
        },
        check=lambda written: check_rewritten(checkpoint, written, choices),
        progress=progress,
    )


def write_folder(
    checkpoint: Checkpoint,
    out_folder: str | Path,
    *,
    plan: Mapping[str, PlannedTensor],
    changed: Mapping[str, Iterable[Tensor]],
    config: Mapping[str, Any],
    lineage: Mapping[str, Any],
    check: Callable[[Checkpoint], None],
    progress: Progress | None,
) -> Path:
    """Write a model folder with other weights; it appears when it is complete and checked.

    Args:
        checkpoint: The original.
        out_folder: A folder that does not exist yet, or is empty.
        plan: Every tensor that it will have; those that do not change as the original has them.
        changed: Tensor -> blocks of its rows, in order, in the dtype that is planned.
        config: Its ``config.json``.
        lineage: Its ``rewrite.json``.
        check: Raises where what was written is not what was to be.
        progress: Called with ``"write"``, tensors done, and all of them.

    Returns:
        The folder.

    Raises:
        RewriteError: The folder is in the way, a dtype cannot be scaled, or as ``check``.
        CheckpointError: The disk is full.
    """
    for name in changed:
        if plan[name].dtype not in ("BF16", "F16", "F32"):
            raise RewriteError(
                f"{checkpoint.folder}: {name!r} is stored as {plan[name].dtype}, which cannot be "
                f"scaled. Rewrite the unquantized model."
            )
    with new_folder(Path(out_folder), RewriteError, last=CONFIG_FILE) as folder:
        with ShardWriter(folder, plan, shard_bytes=_SHARD_BYTES) as writer:
            for name in told(plan, progress, "write", total=len(plan)):
                if name in changed:
                    for rows in changed[name]:
                        writer.add_rows(name, rows)
                else:
                    writer.keep(checkpoint.tensors[name])
        copy_other_files(checkpoint.folder, folder)
        _write_json(folder / CONFIG_FILE, config)
        _write_json(folder / LINEAGE_FILE, lineage)
        check(open_checkpoint(str(folder)))
    return Path(out_folder)


def lineage(checkpoint: Checkpoint, method: str) -> dict[str, Any]:
    """What every ``rewrite.json`` says: of which model, and by which method."""
    return {
        "version": VERSION,
        "mofq": __version__,
        "model": {
            "name": checkpoint.name,
            "index_sha256": checkpoint.index_sha256,
            "weights_sha256": hash_weights(checkpoint),
        },
        "method": method,
    }


def rewritten_from(folder: Path) -> str | None:
    """The name of the model that a folder was rewritten from; None where it says no such thing."""
    path = folder / LINEAGE_FILE
    if not path.is_file():
        return None
    try:
        model = read_json(path).get("model")
    except CheckpointError:  # a file of that name which mofq did not write
        return None
    name = model.get("name") if isinstance(model, dict) else None
    return name if isinstance(name, str) and name.isprintable() else None


def _of_site(choice: Choice) -> dict[str, Any]:
    return {
        "scheme": choice.scheme,
        "method": choice.method,
        "strength": None if choice.strength is None else asdict(choice.strength),
        "kl_nats_per_token_before": choice.nats_before,
        "kl_nats_per_token_after": choice.nats_after,
    }


def check_rewritten(
    checkpoint: Checkpoint, rewritten: Checkpoint, choices: Sequence[Choice]
) -> None:
    """Compare every tensor that was to change with the original times its scales.

    The scales of a site cancel, so that the model computes what it did.

    Raises:
        RewriteError: A tensor differs by more than the rounding of its dtype.
    """
    moved = _moved_tensors(choices)
    for name, info in checkpoint.tensors.items():
        if name not in moved:
            continue
        tolerance = torch.finfo(TORCH_DTYPES[info.kept_dtype]).eps
        start = 0
        for needed in _scaled_rows(checkpoint, name, moved[name]):
            found = read_rows(rewritten.tensors[name], start, start + len(needed)).double()
            start += len(needed)
            limit = needed.abs() * tolerance + torch.finfo(torch.float32).tiny
            if not bool(((found - needed).abs() <= limit).all()):
                raise RewriteError(
                    f"{rewritten.folder}: {name!r} is not the original times its scales. "
                    f"Remove the folder and rewrite again."
                )


def _moved_tensors(choices: Sequence[Choice]) -> dict[str, _Moved]:
    """Tensor -> what it is multiplied by; a linear layer may be divided and multiplied."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for choice in choices:
        if choice.strength is None:
            continue
        for name in choice.site.divided:
            rows[name] = 1 / choice.scale_P
        for layer in choice.site.consumers:
            columns[layer.tensor] = choice.scale_P[list(choice.site.scale_of_I)]
    return {name: _Moved(rows.get(name), columns.get(name)) for name in {**rows, **columns}}


def _scaled_rows(checkpoint: Checkpoint, name: str, moved: _Moved) -> Iterator[Tensor]:
    """Blocks of rows of a tensor times its scales, float64."""
    info = checkpoint.tensors[name]
    for start, stop in row_blocks(
        info.shape[0], math.prod(info.shape[1:]), elements=_BLOCK_ELEMENTS
    ):
        rows = read_rows(info, start, stop).double()
        if moved.columns_I is not None:
            rows = rows * moved.columns_I
        if moved.rows_R is not None:
            factor_R = moved.rows_R[start:stop]
            rows = rows * (factor_R if rows.ndim == 1 else factor_R[:, None])
        yield rows


def _moved_rows(checkpoint: Checkpoint, name: str, moved: _Moved) -> Iterator[Tensor]:
    dtype = TORCH_DTYPES[checkpoint.tensors[name].kept_dtype]
    for rows in _scaled_rows(checkpoint, name, moved):
        stored = rows.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise RewriteError(
                f"{checkpoint.folder}: {name!r} overflows {dtype} when it is scaled. Rewrite with "
                f"another method, or a model in bfloat16."
            )
        yield stored


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
