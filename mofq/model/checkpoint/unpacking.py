"""Values of packed weights: codes, less zero points, times scales, in float32, row by row.

What each layout is, is in `mofq.model.checkpoint.packed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.safetensors_header import PACKED_BITS, Packed, TensorInfo
from mofq.model.checkpoint.stored_bytes import (
    read_matrix_columns,
    read_matrix_rows,
    read_whole,
    torch_dtype,
)

_WORD_BITS = 32
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Column of eight -> where AWQ has it in a word, counted in codes from the low end.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_E8M0_NAN = 255
_E8M0_BIAS = 127


def read_unpacked(info: TensorInfo, start: int, stop: int, *, expert: int | None = None) -> Tensor:
    """Values of a packed weight.

    Args:
        info: A weight with ``packed``: [out, in], or of experts [experts, in, out].
        start: First row of a weight [out, in]; of experts, first expert, or with ``expert`` the
            first row of its matrix [out, in].
        stop: One past the last.
        expert: Of which to read rows, as [rows, in].

    Returns:
        float32, of the shape that the range has, contiguous.

    Raises:
        CheckpointError: The file got shorter, or a scale is no positive number.
    """
    packed = _packed(info)
    if packed.layout != "experts":
        return _read_matrix(info, packed, start, stop)
    if expert is not None:
        return _read_expert(info, packed, expert, start, stop)
    rows = info.shape[2]
    matrices = [_read_expert(info, packed, e, 0, rows).T for e in range(start, stop)]
    return torch.stack(matrices) if matrices else torch.empty(0, *info.shape[1:])


def check_packed_scales(info: TensorInfo) -> None:
    """Read every scale of a packed weight.

    Raises:
        CheckpointError: One is no positive number, or a file got shorter.
    """
    scale = _packed(info).scale
    _read_scale(scale, read_whole(scale))


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unsigned codes from 32-bit words, low bits first, without gaps.

    Args:
        words: int32 [rows, words].
        bits: Of one code, 1 to 31; a code may lie in two words.
        columns: Codes in a row; what follows them is padding.

    Returns:
        int64 [rows, columns], ``0 .. 2**bits - 1``.
    """
    first_bit = torch.arange(columns) * bits
    word, shift = first_bit // _WORD_BITS, first_bit % _WORD_BITS
    unsigned = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    low, high = unsigned[:, word] >> shift, unsigned[:, word + 1] << (_WORD_BITS - shift)
    return (low | high) & ((1 << bits) - 1)


def unpack_fp4(packed: Tensor) -> Tensor:
    """FP4 E2M1 values from bytes, the even column in the low half.

    Args:
        packed: uint8 [rows, columns / 2].

    Returns:
        float32 [rows, columns].
    """
    halves = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1)
    values = torch.tensor(_FP4_VALUES)[(halves & 0x7).to(torch.int64)]
    return torch.where(halves >= 8, -values, values)


def _packed(info: TensorInfo) -> Packed:
    if info.packed is None:
        raise ValueError(f"{info.name}: is not packed")
    return info.packed


def _read_matrix(info: TensorInfo, packed: Packed, start: int, stop: int) -> Tensor:
    columns, bits = info.shape[1], PACKED_BITS[info.dtype]
    group_I = torch.arange(columns) // packed.group_size
    if packed.group_of_I is not None:
        group_I = read_whole(packed.group_of_I).to(torch.int64)
        groups = columns // packed.group_size
        if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
            raise CheckpointError(
                f"{packed.group_of_I.file}: {packed.group_of_I.name!r} needs numbers of {groups}"
                f" groups, found {int(group_I.min())} to {int(group_I.max())}. Fetch it again."
            )
    if packed.layout in ("gptq", "awq"):
        code_RI = _codes_in_columns(info, packed, bits, start, stop)
        stored, dtype = packed.scale, torch_dtype(packed.scale)
        scale_RG = read_matrix_columns(stored, dtype, stored.shape, start, stop).T
    else:
        code_RI = _codes_in_rows(info, packed, bits, start, stop)
        scale_RG = _rows_of(packed.scale, start, stop)
    scale_RG = _read_scale(packed.scale, scale_RG)
    if packed.global_scale is not None:
        whole = read_whole(packed.global_scale).float().reshape(())
        if not bool(torch.isfinite(whole)) or float(whole) <= 0:
            raise _no_scale(packed.global_scale, float(whole))
        scale_RG = scale_RG / whole if packed.is_divisor else scale_RG * whole
    point_RG = _zero_points(info, packed, bits, start, stop)
    if point_RG is not None:
        code_RI -= point_RG[:, group_I if point_RG.shape[1] > 1 else group_I * 0]
    return code_RI.mul_(scale_RG[:, group_I if scale_RG.shape[1] > 1 else group_I * 0])


def _codes_in_rows(info: TensorInfo, packed: Packed, bits: int, start: int, stop: int) -> Tensor:
    """Signed codes, or FP4 values, [rows, in] in float32."""
    data = read_matrix_rows(info, torch.uint8, info.nbytes // info.shape[0], start, stop)
    if packed.layout == "fp4":
        return unpack_fp4(data)
    if packed.layout == "bytes":
        return data.view(torch.int8).float()
    codes = unpack_words(data.view(torch.int32), bits, info.shape[1])
    return (codes - (1 << (bits - 1))).float()


def _codes_in_columns(info: TensorInfo, packed: Packed, bits: int, start: int, stop: int) -> Tensor:
    """Unsigned codes of weights that are stored [in, out], as [rows, in] in float32."""
    rows, columns = info.shape
    if packed.layout == "awq":
        return _awq_columns(info, columns, rows * bits // _WORD_BITS, start, stop).T.float()
    shape = (columns * bits // _WORD_BITS, rows)
    words = read_matrix_columns(info, torch.int32, shape, start, stop)
    return unpack_words(words.T.contiguous(), bits, columns).float()


def _awq_columns(info: TensorInfo, height: int, width: int, start: int, stop: int) -> Tensor:
    """Columns of a matrix [height, width] of words, each of eight codes of 4 bits."""
    first, last = start // 8, -(-stop // 8)
    words = read_matrix_columns(info, torch.int32, (height, width), first, last)
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    codes = (unsigned[:, :, None] >> (4 * torch.tensor(_AWQ_PLACES))) & 0xF
    return codes.reshape(height, -1)[:, start - 8 * first : stop - 8 * first]


def _zero_points(
    info: TensorInfo, packed: Packed, bits: int, start: int, stop: int
) -> Tensor | None:
    """What codes are too large by, [rows, groups] or [rows, 1], float32."""
    point, middle = packed.zero_point, 1 << (bits - 1)
    if packed.layout == "gptq" and point is not None:
        words = read_whole(point)
        codes = unpack_words(words, bits, info.shape[0])[:, start:stop]
        return (codes + packed.zero_offset).T.float()
    if packed.layout == "awq":
        if point is None:
            return torch.full((stop - start, 1), float(middle))
        height, width = point.shape
        return _awq_columns(point, height, width, start, stop).T.float()
    if point is None:
        return None
    if packed.layout == "bytes":
        return _rows_of(point, start, stop).float()
    # Packed down the rows, [words, groups].
    first, last = start * bits // _WORD_BITS, -(-stop * bits // _WORD_BITS)
    words = read_matrix_rows(point, torch.int32, point.shape[1], first, last)
    skipped = start - first * _WORD_BITS // bits
    if first * _WORD_BITS % bits:  # a code that lies in two words
        words, skipped = read_whole(point), start
    codes = unpack_words(words.T.contiguous(), bits, skipped + stop - start)
    return (codes[:, skipped:] - middle).T.float()


def _rows_of(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows of a matrix of scales; where one stands for all rows, that one, [rows, columns]."""
    if len(info.shape) < 2 and info.shape in ((), (1,)):
        return read_whole(info).reshape(1, 1).expand(stop - start, 1)
    columns = info.shape[1] if len(info.shape) > 1 else 1
    return read_matrix_rows(info, torch_dtype(info), columns, start, stop)


def _read_expert(info: TensorInfo, packed: Packed, expert: int, start: int, stop: int) -> Tensor:
    """Rows of one expert's matrix [out, in] in MXFP4."""
    _, columns, rows = info.shape
    groups = columns // packed.group_size
    first, last = (expert * rows + row for row in (start, stop))
    value_RI = unpack_fp4(read_matrix_rows(info, torch.uint8, columns // 2, first, last))
    scales = read_matrix_rows(packed.scale, torch.uint8, groups, first, last)
    scale_RG = _read_scale(packed.scale, scales)
    value_RI.unflatten(1, (groups, -1)).mul_(scale_RG[:, :, None])
    return value_RI


def _read_scale(info: TensorInfo, stored: Tensor) -> Tensor:
    """Stored scales as float32.

    Raises:
        CheckpointError: One is no positive number.
    """
    if info.dtype in ("U8", "F8_E8M0"):
        codes = stored.view(torch.uint8)
        if bool((codes == _E8M0_NAN).any()):
            raise _no_scale(info, float("nan"))
        return torch.ldexp(torch.ones(codes.shape), codes.to(torch.int32) - _E8M0_BIAS)
    scale = stored.float()
    wrong = ~(torch.isfinite(scale) & (scale > 0))
    if info.dtype == "F8_E4M3" or info.dtype in ("F16", "BF16"):
        # A group of zeros may have a scale of zero, which stands for zeros.
        wrong &= scale != 0
    if bool(wrong.any()):
        raise _no_scale(info, float(scale[wrong][0]))
    return scale


def _no_scale(info: TensorInfo, value: float) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: {info.name!r} holds {value} as a scale; needed positive numbers. The file is"
        " damaged, or was written by a tool that failed: fetch it again, or give the checkpoint"
        " before it was quantized."
    )
