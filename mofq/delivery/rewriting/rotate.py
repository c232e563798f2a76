"""Rotates the residual stream of a checkpoint, and the values of its attention heads.

Why the model computes the same: `residual_stream`. Each tensor is read, multiplied in float64 and
rounded once to the dtype that it is stored in. One is in memory at a time: blocks of its rows where
these stay apart, else the tensor as it is stored, of which blocks of columns are multiplied. An
lm_head that is tied to the embedding is stored apart: the gain of the last norm is folded into it,
and not into the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.decision.rewriting import ROTATE, RotatedModel
from mofq.delivery.rewriting.orthogonal import Rotation, random_rotation
from mofq.delivery.rewriting.residual_stream import Place, Stream, find_stream
from mofq.delivery.rewriting.write import lineage, write_folder
from mofq.exceptions import RewriteError
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.checkpoint.tensors import read_rows, read_tensor
from mofq.model.checkpoint.writer import PlannedTensor
from mofq.model.layers import find_layers
from mofq.numbers.quantize.tiles import row_blocks

_TIED = "tie_word_embeddings"
_BLOCK_ELEMENTS = 2**22
#: Dtypes of whose numbers sums are exact in float64.
_FEW_BITS = ("BF16", "F16")


@dataclass(frozen=True, slots=True)
class Turning:
    """A model, and the matrices that it is rotated by."""

    checkpoint: Checkpoint
    stream: Stream
    hidden: Rotation  #: of the residual stream
    head: Rotation  #: of each head's values
    gains: Mapping[str, Tensor]  #: norm -> what it multiplies by, float64

    @property
    def untied_bytes(self) -> int:
        """What the lm_head takes that was tied to the embedding, 0 where it was not [bytes]."""
        stream, tensors = self.stream, self.checkpoint.tensors
        return 0 if stream.lm_head in tensors else tensors[stream.embedding].kept_bytes

    def turn(self, values: Tensor, place: Place) -> Tensor:
        """A tensor, or rows of one whose rows are not mixed, after the rotation.

        Args:
            values: [..., rows, columns], or a bias [rows].
            place: What it touches.

        Returns:
            Of the same shape, float64.
        """
        turned, scale = values.double(), 1.0
        if place.norm is not None:
            turned = turned * self.gains[place.norm]
        if place.reads:
            turned = self.hidden.turn(turned, is_scaled=False)
            scale *= self.hidden.scale
        if place.reads_values:
            turned = self.head.turn(turned, is_scaled=False)
            scale *= self.head.scale
        if place.writes:
            scale *= self.hidden.scale
        hidden = partial(self.hidden.turn, is_scaled=False)
        return _on_rows(turned, place, hidden=hidden, head=self.head.turn) * scale

    def turn_outputs(self, values_TO: Tensor, place: Place) -> Tensor:
        """Gradients at what a layer gives, [..., out_features], after the rotation, float64."""
        values_OT = values_TO.double().mT
        return _on_rows(values_OT, place, hidden=self.hidden.turn, head=self.head.turn).mT

    def turn_inputs(self, x_TI: Tensor, place: Place) -> Tensor:
        """What a layer reads, [..., in_features], after the rotation, float64."""
        turned = x_TI.double()
        if place.norm is not None:
            turned = turned / self.gains[place.norm]
        return self.turn(turned, Place(reads=place.reads, reads_values=place.reads_values))

    def turn_back(self, turned: Tensor, place: Place) -> Tensor:
        """What `turn` was given, times the gain that is folded, float64."""
        hidden, head = self.hidden.turn_back, self.head.turn_back
        values = _on_rows(turned.double(), place, hidden=hidden, head=head)
        if place.reads_values:
            values = head(values)
        return hidden(values) if place.reads else values


def _on_rows(
    values: Tensor,
    place: Place,
    *,
    hidden: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
) -> Tensor:
    """Mix the rows of [..., rows, columns], or of a bias, that are of the stream or of heads."""
    rows = values if values.ndim > 1 else values[:, None]
    if place.writes:
        rows = hidden(rows.mT).mT
    for start, stop in place.values:
        turned = head(rows[..., start:stop, :].mT).mT
        rows = torch.cat([rows[..., :start, :], turned, rows[..., stop:, :]], dim=-2)
    return rows if values.ndim > 1 else rows[:, 0]


def plan_rotation(checkpoint: Checkpoint, seed: int) -> Turning:
    """Find what is rotated in a model.

    Args:
        checkpoint: The model, unquantized.
        seed: Of the random signs.

    Raises:
        RewriteError: As `find_stream`.
    """
    stream = find_stream(checkpoint, find_layers(checkpoint))
    return Turning(
        checkpoint,
        stream,
        random_rotation(stream.hidden, seed),
        random_rotation(stream.head, seed),
        {name: read_tensor(checkpoint.tensors[name]).double() for name in stream.norms},
    )


def rotated_model(turning: Turning, seed: int) -> RotatedModel:
    """What a recipe notes of a rotation."""
    return RotatedModel(seed=seed, hidden=turning.hidden.width, head=turning.head.width)


def write_rotated(
    turning: Turning,
    out_folder: str | Path,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Path:
    """Write the model folder of a rotated model; it appears when it is complete.

    Args:
        turning: From `plan_rotation`.
        out_folder: A folder that does not exist yet, or is empty.
        seed: That ``turning`` was planned with, for the lineage.
        progress: Called with ``"write"``, tensors done, and all of them.

    Returns:
        The folder.

    Raises:
        RewriteError: The folder is in the way, a tensor overflows its dtype, or what was written is
            not the original after the rotation.
        CheckpointError: The disk is full.
    """
    checkpoint, stream = turning.checkpoint, turning.stream
    plan = {name: PlannedTensor(i.kept_dtype, i.shape) for name, i in checkpoint.tensors.items()}
    plan.setdefault(stream.lm_head, plan[stream.embedding])
    return write_folder(
        checkpoint,
        out_folder,
        plan=plan,
        changed={name: _stored_blocks(turning, name) for name in (*stream.places, *stream.norms)},
        config=_untied(checkpoint.config) if stream.is_tied else checkpoint.config,
        lineage=lineage(checkpoint, ROTATE) | {"rotation": asdict(rotated_model(turning, seed))},
        check=lambda written: check_rotated(turning, written),
        progress=progress,
    )


def check_rotated(turning: Turning, rotated: Checkpoint) -> None:
    """Rotate every tensor that was written back, and compare it with the original.

    Raises:
        RewriteError: One differs by more than the rounding of its dtype.
    """
    for name in turning.stream.places:
        place = turning.stream.places[name]
        info = rotated.tensors[name]
        dtype = torch.finfo(TORCH_DTYPES[info.dtype])
        half_ulp = dtype.eps / 2
        gain = 1.0 if place.norm is None else turning.gains[place.norm]
        for (start, stop), columns in _blocks(turning, name):
            original = read_rows(_source(turning, name), start, stop)
            written = read_rows(info, start, stop)
            for part in columns:
                needed = original[..., part].double() * gain
                found = turning.turn_back(written[..., part], place)
                # Below the smallest normal number the steps are no finer than there.
                size = float(needed.norm()) + dtype.smallest_normal * math.sqrt(needed.numel())
                if not float((found - needed).norm()) <= 1.01 * half_ulp * size:
                    raise RewriteError(
                        f"{rotated.folder}: {name!r} is not the original after the rotation. "
                        f"Remove the folder and rewrite again."
                    )
    for name in turning.stream.norms:
        if not bool((read_tensor(rotated.tensors[name]) == 1).all()):
            raise RewriteError(
                f"{rotated.folder}: {name!r} does not multiply by 1. Remove the folder and "
                f"rewrite again."
            )


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    text = {
        key: {**part, _TIED: False}
        for key, part in config.items()
        if isinstance(part, dict) and _TIED in part
    }
    return {**config, **text, _TIED: False}


def _stored_blocks(turning: Turning, name: str) -> Iterator[Tensor]:
    """What is written of a tensor, in its stored dtype."""
    stream = turning.stream
    if name in stream.norms:
        info = turning.checkpoint.tensors[name]
        yield torch.ones(info.shape, dtype=TORCH_DTYPES[info.kept_dtype])
        return
    info = _source(turning, name)
    for (start, stop), columns in _blocks(turning, name):
        block = read_rows(info, start, stop)
        stored = torch.empty(block.shape, dtype=TORCH_DTYPES[info.kept_dtype])
        for part in columns:
            stored[..., part] = turning.turn(block[..., part], stream.places[name])
        if not bool(torch.isfinite(stored).all()):
            raise RewriteError(
                f"{turning.checkpoint.folder}: {name!r} overflows {stored.dtype} when it is "
                f"rotated. Rewrite a model in bfloat16."
            )
        yield stored


def _blocks(turning: Turning, name: str) -> Iterator[tuple[tuple[int, int], list[slice]]]:
    """The blocks of a tensor of the original that a rotation does not mix with one another.

    Yields:
        From and to which row, and blocks of the columns of these rows: several where all rows are
        in one, and columns stay apart.
    """
    info, place = _source(turning, name), turning.stream.places[name]
    is_mixed = len(info.shape) < 3 and (place.writes or bool(place.values))
    if not is_mixed:
        for rows in row_blocks(info.shape[0], math.prod(info.shape[1:]), elements=_BLOCK_ELEMENTS):
            yield rows, [slice(None)]
        return
    columns = [slice(None)]
    # Sums in another order have other last digits, unless they are exact.
    is_exact = info.dtype in _FEW_BITS and turning.hidden.is_exact and turning.head.is_exact
    if len(info.shape) == 2 and not place.reads and is_exact:
        tile = turning.stream.head if place.reads_values else 1
        blocks = row_blocks(info.shape[1], info.shape[0], elements=_BLOCK_ELEMENTS, tile_rows=tile)
        columns = [slice(*block) for block in blocks]
    yield (0, info.shape[0]), columns


def _source(turning: Turning, name: str) -> TensorInfo:
    tensors = turning.checkpoint.tensors
    return tensors[name if name in tensors else turning.stream.embedding]
