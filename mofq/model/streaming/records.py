"""What the modules of a model returned for one sequence, a file for each call.

A file has its header (a length of 8 bytes and JSON, padded) and then the tensors, each at a
multiple of 64 bytes. It is mapped when it is read: what nobody looks at is not read, and pages
belong to the system's cache. A file is complete when it has its name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.exceptions import MofqError
from mofq.files.documents import renamed_when_written

_ALIGN = 64
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}
_Described = Sequence[tuple[str, Sequence[int], int]]  # dtype, shape, offset
_written = partial(
    renamed_when_written,
    error=MofqError,
    remedy="Free some space, or look at the folder, and run the same command again.",
)


def write_tensors(path: Path, content: Any, tensors: Sequence[Tensor]) -> None:
    """Write tensors, and what JSON says of them, beside the final name; then rename.

    Args:
        path: Final name.
        content: For the header.
        tensors: Of any shape, on any device.

    Raises:
        MofqError: The disk is full, or the file cannot be written.
    """
    described, position = [], 0
    for one in tensors:
        described.append((str(one.dtype).removeprefix("torch."), list(one.shape), position))
        position += -(-one.nbytes // _ALIGN) * _ALIGN
    beginning = _encode_header(content, described, position)
    with _written(path) as temporary, temporary.open("wb", buffering=0) as file:
        file.write(beginning)
        for one, (_, _, offset) in zip(tensors, described, strict=True):
            file.seek(len(beginning) + offset)
            flat = one.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            written, data = 0, flat.numpy().data
            while written < len(data):
                written += file.write(data[written:])
        file.truncate(len(beginning) + position)


def read_content(path: Path) -> tuple[Any, list[Tensor]]:
    """Read a header, and map the tensors; they may be changed, and the file does not change.

    Args:
        path: Of a file that `write_tensors` wrote; of one whose tensors were dropped, as
            `read_placeholders`.
    """
    content, described, start = _header(path)
    if described and path.stat().st_size == start:
        return read_placeholders(path)
    return content, _mapped(path, described, start)


def read_placeholders(path: Path) -> tuple[Any, list[Tensor]]:
    """As `read_content`, with tensors of the same shapes that take no space and hold no number."""
    content, described, _ = _header(path)
    return content, [_placeholder(_DTYPES[dtype], shape) for dtype, shape, _ in described]


def drop_tensors(path: Path) -> None:
    """Keep only what `read_placeholders` needs."""
    content, described, start = _header(path)
    if path.stat().st_size == start:
        return
    with _written(path) as temporary:
        temporary.write_bytes(_encode_header(content, described, 0))


def _encode_header(content: Any, described: _Described, size: int) -> bytes:
    """The beginning of a file, up to the first of so many bytes of tensors."""
    raw = json.dumps({"content": content, "tensors": described, "bytes": size}).encode()
    raw += b" " * (-(len(raw) + 8) % _ALIGN)
    return len(raw).to_bytes(8, "little") + raw


def _header(path: Path) -> tuple[Any, _Described, int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
        if header is None or size != 8 + length + header["bytes"]:
            raise MofqError(
                f"{path}: was cut short. Delete all that was kept between layers, the folder "
                f"that it lies in, and run the same command."
            )
    return header["content"], header["tensors"], 8 + length


def _mapped(path: Path, described: _Described, start: int) -> list[Tensor]:
    if not described:
        return []
    size = path.stat().st_size
    # Private: written pages are copies.
    bytes_B = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = []
    for name, shape, offset in described:
        dtype = _DTYPES[name]
        count = math.prod(shape) * dtype.itemsize
        part_B = bytes_B[start + offset : start + offset + count]
        tensors.append(part_B.view(dtype).reshape(shape))
    return tensors


def _placeholder(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    value = math.nan if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype).expand(tuple(shape))
