"""Weights read from safetensors files, a block of rows at a time."""

from __future__ import annotations

from io import FileIO
from typing import Protocol

import torch
from torch import Tensor

from mofq.checkpoint.headers import Checkpoint, TensorInfo
from mofq.exceptions import CheckpointError

#: safetensors' dtype to torch's. The sub-byte dtypes have no torch dtype of the same shape.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


class StoredLayer(Protocol):
    """What must be known of a linear layer to find its rows on disk."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def tensor(self) -> str:
        """Name of the stored tensor."""

    @property
    def out_features(self) -> int:
        """Rows of the layer's weight."""

    @property
    def in_features(self) -> int:
        """Columns of the layer's weight."""

    @property
    def transposed(self) -> bool:
        """Whether it is stored as [in_features, out_features]."""

    @property
    def expert(self) -> int | None:
        """Index into the first of three dimensions, or None for two."""

    @property
    def row_start(self) -> int:
        """The layer's first row in the stored matrix."""


def read_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Read entries ``start`` to ``stop`` of a tensor's first dimension.

    Args:
        info: The tensor; it has at least one dimension.
        start: First entry.
        stop: One past the last entry.

    Returns:
        [stop - start, …] in the stored dtype. Nothing else is read.

    Raises:
        CheckpointError: The file got shorter, or torch has no such dtype.
        ValueError: The range does not lie in the tensor.
    """
    if not info.shape or not 0 <= start <= stop <= info.shape[0]:
        raise ValueError(f"{info.name}: rows {start} to {stop} of shape {list(info.shape)}")
    row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
    data = _read_strided(
        info, offset=start * row_bytes, count=1, nbytes=(stop - start) * row_bytes, stride=0
    )
    return data.view(_torch_dtype(info)).reshape(stop - start, *info.shape[1:])


def read_tensor(info: TensorInfo) -> Tensor:
    """Read a whole tensor, in the stored dtype.

    Raises:
        CheckpointError: The file got shorter, or torch has no such dtype.
    """
    data = _read_strided(info, offset=0, count=1, nbytes=info.nbytes, stride=0)
    return data.view(_torch_dtype(info)).reshape(info.shape)


def read_layer_rows(checkpoint: Checkpoint, layer: StoredLayer, start: int, stop: int) -> Tensor:
    """Read output rows ``start`` to ``stop`` of a linear layer, however it is stored.

    Args:
        checkpoint: Holds the layer's tensor.
        layer: Where the layer lies in its tensor.
        start: First output row.
        stop: One past the last output row.

    Returns:
        [stop - start, in_features], contiguous, in the stored dtype. At most twice
        its size is held in memory.

    Raises:
        CheckpointError: The file got shorter, or torch has no such dtype.
        ValueError: The range does not lie in the layer, or the layer not in the tensor.
    """
    info = checkpoint.tensors[layer.tensor]
    if not 0 <= start <= stop <= layer.out_features:
        raise ValueError(f"{layer.name}: rows {start} to {stop} of {layer.out_features}")
    dtype = _torch_dtype(info)
    rows, columns = _matrix_shape(info, layer)
    matrix_at = (layer.expert or 0) * rows * columns
    first, count = layer.row_start + start, stop - start
    if layer.transposed:
        data = _read_strided(
            info,
            offset=(matrix_at + first) * dtype.itemsize,
            count=rows,
            nbytes=count * dtype.itemsize,
            stride=columns * dtype.itemsize,
        )
        return data.view(dtype).reshape(rows, count).T.contiguous()
    data = _read_strided(
        info,
        offset=(matrix_at + first * columns) * dtype.itemsize,
        count=1,
        nbytes=count * columns * dtype.itemsize,
        stride=0,
    )
    return data.view(dtype).reshape(count, columns)


def _matrix_shape(info: TensorInfo, layer: StoredLayer) -> tuple[int, int]:
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


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has dtype {info.dtype}, needed one of"
            f" {', '.join(TORCH_DTYPES)}."
        )
    return TORCH_DTYPES[info.dtype]


def _read_strided(info: TensorInfo, *, offset: int, count: int, nbytes: int, stride: int) -> Tensor:
    """``count`` runs of ``nbytes`` bytes, ``stride`` apart, as one row of bytes, uint8."""
    data = torch.empty(count * nbytes, dtype=torch.uint8)
    memory = data.numpy().data
    try:
        # Unbuffered: a buffer would read ahead what the caller did not ask for.
        with open(info.file, "rb", buffering=0) as file:
            for run in range(count):
                file.seek(info.start + offset + run * stride)
                _fill(file, memory[run * nbytes : (run + 1) * nbytes], info)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot be read: {error.strerror}.") from error
    return data


def _fill(file: FileIO, memory: memoryview, info: TensorInfo) -> None:
    while memory:
        read = file.readinto(memory)
        if not read:
            raise CheckpointError(
                f"{info.file}: ends inside tensor {info.name!r}: needed {len(memory):,} more bytes."
                " It changed while it was read. Fetch the file again and start over."
            )
        memory = memory[read:]
