"""Weights read from safetensors files, a block of rows at a time; quantized sources as float32.

One expert, or rows of a transposed matrix, are read alone too.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo
from mofq.model.checkpoint.safetensors_header import Scaling
from mofq.model.checkpoint.stored_bytes import (
    read_matrix_columns,
    read_matrix_rows,
    read_whole,
    torch_dtype,
)
from mofq.model.checkpoint.unpacking import check_packed_scales, read_unpacked
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers, share_amax, stored_amax
from mofq.numbers.quantize.tiles import row_blocks
from mofq.numbers.schemes import TensorScheme

_E4M3_MAX = 448.0
#: Elements of a tensor that are decoded at once on their way into an export.
_KEPT_ELEMENTS = 2**22
#: Elements of a weight whose largest magnitude is looked for at once.
_AMAX_ELEMENTS = 2**20
#: Of glibc's mallopt: memory is given back from this size on, and mapped by itself [bytes]; and
#: how many arenas there are. Those of threads are given back whenever they are empty.
_MALLOC_OPTIONS = {-1: 256_000_000, -3: 32_000_000, -8: 1}

#: Gives rows of a weight: the first, one past the last -> [rows, in_features].
RowReader = Callable[[int, int], Tensor]


def read_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Read entries ``start`` to ``stop`` of a tensor's first dimension.

    Args:
        info: The tensor; it has at least one dimension.
        start: First entry.
        stop: One past the last entry.

    Returns:
        [stop - start, …] in the stored dtype, of a quantized source in float32. Nothing else is
        read but the scales of these rows.

    Raises:
        CheckpointError: The file got shorter, torch has no such dtype, or a scale is no
            positive number.
        ValueError: The range does not lie in the tensor.
    """
    if not info.shape or not 0 <= start <= stop <= info.shape[0]:
        raise ValueError(f"{info.name}: rows {start} to {stop} of shape {list(info.shape)}")
    if info.packed is not None:
        return read_unpacked(info, start, stop)
    values = read_matrix_rows(info, torch_dtype(info), math.prod(info.shape[1:]), start, stop)
    values = values.reshape(stop - start, *info.shape[1:])
    if not info.decoded:
        return values
    if len(info.shape) < 3:
        return _decode(info, values, start=start)
    experts = [_decode(info, one, expert=start + e) for e, one in enumerate(values)]
    return torch.stack(experts) if experts else decode_codes(values)


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a whole tensor, in the stored dtype, of a quantized source in float32.

    Raises:
        CheckpointError: As `read_rows`.
    """
    if info.decoded and info.shape:
        return read_rows(info, 0, info.shape[0])
    values = read_whole(info)
    return decode_codes(values) if info.decoded else values


def read_layer_rows(checkpoint: Checkpoint, layer: LinearLayer, start: int, stop: int) -> Tensor:
    """Read output rows ``start`` to ``stop`` of a linear layer, however it is stored.

    Args:
        checkpoint: Holds the layer's tensor.
        layer: Where the layer lies in its tensor.
        start: First output row.
        stop: One past the last output row.

    Returns:
        [stop - start, in_features], contiguous, in the stored dtype, of a quantized source in
        float32. At most twice its size is held in memory.

    Raises:
        CheckpointError: As `read_rows`.
        ValueError: The range does not lie in the layer, or the layer not in the tensor.
    """
    info = checkpoint.tensors[layer.tensor]
    if not 0 <= start <= stop <= layer.out_features:
        raise ValueError(f"{layer.name}: rows {start} to {stop} of {layer.out_features}")
    rows, columns = _matrix_shape(info, layer)
    if info.packed is not None:
        first = layer.row_start + start
        return read_unpacked(info, first, first + stop - start, expert=layer.expert)
    dtype, matrix = torch_dtype(info), layer.expert or 0
    first, count = layer.row_start + start, stop - start
    if layer.transposed:
        values_IR = read_matrix_columns(
            info, dtype, (rows, columns), first, first + count, matrix=matrix
        )
        return _decode(info, values_IR.T.contiguous())
    at = matrix * rows + first
    values_RI = read_matrix_rows(info, dtype, columns, at, at + count)
    return _decode(info, values_RI, expert=matrix, start=first)


def read_kept_rows(info: TensorInfo) -> Iterator[tuple[int, Tensor]]:
    """A tensor of a quantized source as it is written where no scheme quantizes it: in bf16.

    The float32 products are rounded to nearest, ties to even; exact where scales are powers
    of two.

    Yields:
        First row and rows, [any number, …], in order, of a bounded size.

    Raises:
        CheckpointError: As `read_rows`.
    """
    row = math.prod(info.shape[1:])
    for start, stop in row_blocks(info.shape[0], row, elements=_KEPT_ELEMENTS):
        yield start, read_rows(info, start, stop).to(torch.bfloat16)


def read_kept_layer(checkpoint: Checkpoint, layer: LinearLayer, start: int, stop: int) -> Tensor:
    """As `read_layer_rows`, rounded as an export rounds a layer that stays unquantized."""
    rows_RI = read_layer_rows(checkpoint, layer, start, stop)
    return rows_RI.to(torch.bfloat16) if checkpoint.tensors[layer.tensor].decoded else rows_RI


def read_shared_amax(
    checkpoint: Checkpoint, group: FusionGroup, weight: TensorScheme
) -> dict[str, float]:
    """The largest magnitude that the global scale of each weight of a fusion group is made from.

    Args:
        checkpoint: Holds the weights, which are read block by block.
        group: Of its layers.
        weight: What they are quantized by.

    Returns:
        Layer name -> the largest among the layers that it shares the scale with, or what stands
        for the global scale that the source has.

    Raises:
        CheckpointError: As `read_rows`.
    """
    amax = read_amax(checkpoint, group)
    return (stored_amax if weight.has_stored_global_scale else share_amax)(group, amax)


def read_amax(checkpoint: Checkpoint, group: FusionGroup) -> dict[str, float]:
    """Layer name -> its own largest magnitude; as `read_shared_amax`."""
    return {layer.name: _read_amax(checkpoint, layer) for layer in group.layers}


def _read_amax(checkpoint: Checkpoint, layer: LinearLayer) -> float:
    largest = 0.0
    for block in row_blocks(layer.out_features, layer.in_features, elements=_AMAX_ELEMENTS):
        # One pass, where abs() and max() are three.
        low, high = torch.aminmax(read_layer_rows(checkpoint, layer, *block))
        largest = max(largest, -float(low), float(high))
    return largest


def keep_freed_memory() -> None:
    """Have glibc keep the pages of blocks, all of a size, that are freed and asked for again.

    It would give each back to the system and have it cleared again: a third of the time of
    scoring, and half of the time of an export.
    """
    with suppress(OSError, AttributeError):  # another C library
        for option, size in _MALLOC_OPTIONS.items():
            ctypes.CDLL(None).mallopt(option, size)


def check_scales(checkpoint: Checkpoint) -> None:
    """Read every scale of a quantized source, before the long work.

    Raises:
        CheckpointError: One is no positive number, or a file got shorter.
    """
    for info in checkpoint.tensors.values():
        scaling = info.scaling
        if info.packed is not None:
            check_packed_scales(info)
        if scaling is not None:
            for expert in range(scaling.scale.shape[0] if len(info.shape) == 3 else 1):
                _read_scales(scaling, expert, 0, scaling.rows)


def check_finite(checkpoint: Checkpoint, layers: ModelLayers) -> None:
    """Refuse norms, biases, embeddings and whatever else no scheme touches that are not finite.

    Weights of fusion groups are checked where they are quantized.

    Args:
        checkpoint: The model; what is checked is read.
        layers: Of it.

    Raises:
        CheckpointError: The message names file, tensor and element; or a file got shorter.
    """
    grouped = {layer.tensor for layer in layers.grouped_layers}
    for name, info in checkpoint.tensors.items():
        # Others are buffers such as masks, which transformers computes itself.
        is_loaded = name not in grouped and name.endswith((".weight", ".bias"))
        if not is_loaded or not info.shape:
            continue
        if info.packed is None and not torch_dtype(info).is_floating_point:
            continue
        row = math.prod(info.shape[1:])
        for start, stop in row_blocks(info.shape[0], row, elements=_KEPT_ELEMENTS):
            values = read_rows(info, start, stop)
            if not bool(torch.isfinite(values).all()):
                at = (~torch.isfinite(values)).nonzero()[0].tolist()
                index = [start + at[0], *at[1:]]
                raise CheckpointError(
                    f"{info.file}: {name!r} holds {float(values[tuple(at)])} at {index}, and the"
                    " model's outputs are not finite with it. The file is damaged, or was written"
                    " in a dtype that cannot hold the number: fetch it again, or repair the tensor."
                )


def decode_codes(codes: Tensor) -> Tensor:
    """The values of FP8 codes, a dozen times faster than torch's own conversion on a CPU.

    Either format is float16 with bits left out: E5M2 its upper byte, E4M3 the same with a
    shorter exponent, whose bias is less by 8, and with a NaN where float16 has 480 / 256.

    Args:
        codes: float8_e4m3fn or float8_e5m2, contiguous, any shape.

    Returns:
        float32 of the same shape.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign, extended, is where it belongs
    if codes.dtype == torch.float8_e5m2:
        return (bits << 8).view(torch.float16).float()
    values = ((bits << 7) & ~0x4000).view(torch.float16).float().mul_(2.0**8)
    if values.numel():
        low, high = torch.aminmax(values)
        if float(low) < -_E4M3_MAX or float(high) > _E4M3_MAX:
            values[values.abs() > _E4M3_MAX] = torch.nan
    return values


def _decode(info: TensorInfo, values_RI: Tensor, *, expert: int = 0, start: int = 0) -> Tensor:
    """Codes times scales: whole rows of a matrix from ``start`` on, float32.

    A tensor that is not decoded comes back as it is. The product of a code of 4 bits and
    a scale of 24 is rounded once, to float32.
    """
    if not info.decoded:
        return values_RI
    weight_RI = decode_codes(values_RI)
    scaling = info.scaling
    if scaling is None or not len(weight_RI):
        return weight_RI
    first = start // scaling.tile_rows
    last = (start + len(weight_RI) - 1) // scaling.tile_rows
    scale_GC = _read_scales(scaling, expert, first, last + 1)
    row_R = torch.arange(start, start + len(weight_RI)) // scaling.tile_rows - first
    scale_RC = scale_GC[row_R]
    whole = weight_RI.shape[1] // scaling.tile_columns  # tiles that are not cut at the edge
    edge = whole * scaling.tile_columns
    if whole:
        weight_RI[:, :edge].unflatten(1, (whole, -1)).mul_(scale_RC[:, :whole, None])
    weight_RI[:, edge:].mul_(scale_RC[:, whole:])
    return weight_RI


def _read_scales(scaling: Scaling, expert: int, start: int, stop: int) -> Tensor:
    """Rows of the matrix of scales of one expert, [stop - start, columns], float32."""
    info = scaling.scale
    first, last = (expert * scaling.rows + row for row in (start, stop))
    scale_GC = read_matrix_rows(info, torch_dtype(info), scaling.columns, first, last).float()
    is_scale_GC = torch.isfinite(scale_GC) & (scale_GC > 0)
    if not bool(is_scale_GC.all()):
        row, column = (~is_scale_GC).nonzero()[0].tolist()
        raise CheckpointError(
            f"{info.file}: {info.name!r} holds {float(scale_GC[row, column])} as the scale in row"
            f" {start + row}, column {column}{f' of expert {expert}' if expert else ''}; needed"
            " positive numbers. The file is damaged, or was written by a tool that failed:"
            " fetch it again, or give the checkpoint before it was quantized."
        )
    return scale_GC


def _matrix_shape(info: TensorInfo, layer: LinearLayer) -> tuple[int, int]:
    """Shape of the stored matrix, as stored, once it is known to hold the layer."""
    fits = len(info.shape) == (2 if layer.expert is None else 3)
    if fits:
        rows, columns = info.shape[-2:]
        out_stored, in_stored = (columns, rows) if layer.transposed else (rows, columns)
        fits = in_stored == layer.in_features
        fits &= 0 <= layer.row_start <= out_stored - layer.out_features
        fits &= layer.expert is None or 0 <= layer.expert < info.shape[0]
    if not fits:
        raise ValueError(
            f"{layer.name}: [{layer.out_features}, {layer.in_features}] from row {layer.row_start}"
            f" of expert {layer.expert} does not lie in {info.name!r} of {list(info.shape)}"
        )
    return rows, columns
