"""Bytes of a stored tensor, read into memory of their own size.

The safetensors library slices a tensor through a memory map, whose pages count as the process's
memory.
"""

from __future__ import annotations

from io import FileIO

import torch
from torch import Tensor

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.safetensors_header import TensorInfo

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


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The dtype of a stored tensor.

    Raises:
        CheckpointError: torch has no such dtype.
    """
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} has dtype {info.dtype}, needed one of"
            f" {', '.join(TORCH_DTYPES)}."
        )
    return TORCH_DTYPES[info.dtype]


def read_strided(info: TensorInfo, *, offset: int, count: int, nbytes: int, stride: int) -> Tensor:
    """Read ``count`` runs of ``nbytes`` bytes, ``stride`` apart, as one row of bytes, uint8.

    Args:
        info: The tensor.
        offset: Of the first run, from the tensor's first byte [bytes].
        count: Of runs.
        nbytes: Of one run [bytes].
        stride: From one run to the next [bytes].

    Raises:
        CheckpointError: The file got shorter, or cannot be read.
    """
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


def read_matrix_rows(
    info: TensorInfo, dtype: torch.dtype, columns: int, start: int, stop: int
) -> Tensor:
    """Rows of a matrix of so many columns that lies in a tensor, [stop - start, columns].

    Args:
        info: The tensor.
        dtype: Of the matrix; that of codes is not the weight's.
        columns: Of the matrix.
        start: First row.
        stop: One past the last.

    Raises:
        CheckpointError: As `read_strided`.
    """
    size = columns * dtype.itemsize
    data = read_strided(info, offset=start * size, count=1, nbytes=(stop - start) * size, stride=0)
    return data.view(dtype).reshape(stop - start, columns)


def read_matrix_columns(
    info: TensorInfo,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    start: int,
    stop: int,
    *,
    matrix: int = 0,
) -> Tensor:
    """Columns of a matrix [rows, columns] that lies in a tensor, [rows, stop - start].

    Args:
        info: The tensor.
        dtype: Of the matrix.
        shape: Of the matrix.
        start: First column.
        stop: One past the last.
        matrix: Which, where the tensor holds several of this shape.

    Raises:
        CheckpointError: As `read_strided`.
    """
    (rows, columns), size = shape, dtype.itemsize
    data = read_strided(
        info,
        offset=(matrix * rows * columns + start) * size,
        count=rows,
        nbytes=(stop - start) * size,
        stride=columns * size,
    )
    return data.view(dtype).reshape(rows, stop - start)


def read_whole(info: TensorInfo) -> Tensor:
    """A tensor as it is stored.

    Raises:
        CheckpointError: As `read_strided` and `torch_dtype`.
    """
    data = read_strided(info, offset=0, count=1, nbytes=info.nbytes, stride=0)
    return data.view(torch_dtype(info)).reshape(info.shape)


def _fill(file: FileIO, memory: memoryview, info: TensorInfo) -> None:
    while memory:
        read = file.readinto(memory)
        if not read:
            raise CheckpointError(
                f"{info.file}: ends inside tensor {info.name!r}: needed {len(memory):,} more bytes."
                " It changed while it was read. Fetch the file again and start over."
            )
        memory = memory[read:]
