"""Rounds keys and values as the kernels of vLLM that write a KV cache do.

A head of a token is a row. What is here is what the source of a kernel says, in its order of
operations, so that codes are those of the engine also at ties and in rows that are nearly zero:

``token_head``
    ``scale = max(amax / max, 1e-6)`` with ``max`` 127 or 448; codes are ``x * (1 / scale)``,
    of integers rounded with ties away from zero, of FP8 to nearest with ties to even.
``rotated``
    Each row is rotated first: signs, then a Hadamard transform (a randomized Hadamard transform),
    and kept in the dtype of the model. ``scale = max((high - low) / 15, 1e-6)`` over the rotated
    row, zero point ``-low / scale`` and codes ``x * (1 / scale) + zero_point``, both rounded with
    ties away from zero and clamped to 0 .. 15. The range need not contain 0: a rotated row
    without negative numbers saturates, and is lost where all its numbers are alike. The zero
    point is stored in the last 4 bits of the float32 scale, which codes are multiplied without.
``nvfp4``
    16 channels share ``scale = round_e4m3(amax / 6)``, without a scale of the tensor above it;
    codes are ``round_e2m1(x * (1 / scale))``, zeros where the scale is 0.
``nvfp4_fouroversix``
    The same, or with ``amax / 4`` where that has the smaller sum of squared errors in float32.

GPUs take two liberties with the last bit, which are not reproduced: approximate reciprocals and
divisions, and a multiplication fused with an addition. They rotate in bfloat16.

Source: vLLM 0.33.0, the same in 0.32.0: ``v1/attention/ops/triton_reshape_and_cache_flash.py:
168-275``; ``v1/attention/ops/int4_per_token_head.py:64-255, 856-879, 910-951, 1075-1167``;
``csrc/libtorch_stable/nvfp4_kv_cache_kernels.cu`` and ``quantization/fp4/nvfp4_utils.cuh``;
FlashInfer 0.7.2.post1 ``include/flashinfer/page.cuh:287-346``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mofq.numbers.formats import FP4_E2M1, FP8_E4M3, CacheKernel, ElementFormat, IntFormat
from mofq.numbers.quantize.rounding import divide, round_to_format

_SMALLEST_SCALE = 1e-6
_LARGEST_INT4 = 15
#: What seeds the signs of the rotation.
_SIGNS_SEED = 0x9E3779B9
#: The bits of a float32 scale that do not hold the zero point.
_SCALE_BITS = -16
_NVFP4_CHANNELS = 16


def round_by_kernel(x: Tensor, kernel: CacheKernel, element: ElementFormat) -> Tensor:
    """Quantize and dequantize the heads of keys or values.

    Args:
        x: [..., head_size], any floating dtype, finite; computed in float32.
        kernel: Which rules hold.
        element: Of ``token_head``, INT8 or FP8; the other kernels have their own.

    Returns:
        As ``x``, same shape and dtype.
    """
    if not x.numel():
        return x
    if kernel == "rotated":
        return _rotated(x)
    x_float = x.to(torch.float32)
    if kernel == "token_head":
        return _token_head(x_float, element).to(x.dtype)
    groups = x_float.unflatten(-1, (-1, _NVFP4_CHANNELS))
    return _nvfp4(groups, four_over_six=kernel == "nvfp4_fouroversix").flatten(-2).to(x.dtype)


def _token_head(x_D: Tensor, element: ElementFormat) -> Tensor:
    largest = float(element.max)
    amax_1 = x_D.abs().amax(-1, keepdim=True)
    scale_1 = divide(amax_1, largest).clamp(min=_SMALLEST_SCALE)
    scaled_D = x_D * scale_1.reciprocal()
    if isinstance(element, IntFormat):
        return _round_away(scaled_D, -largest - 1, largest) * scale_1
    return round_to_format(scaled_D, element) * scale_1


def _round_away(x: Tensor, low: float, high: float) -> Tensor:
    """The nearest integer in ``[low, high]``, ties away from zero in float32 arithmetic."""
    return torch.trunc(torch.where(x >= 0, x + 0.5, x - 0.5).clamp(low, high))


def _rotated(x_D: Tensor) -> Tensor:
    size = _block_size(x_D.shape[-1])
    block = (*x_D.shape[:-1], -1, size)
    signs = _signs(size).to(x_D.device)
    rotated_D = _hadamard(x_D.to(torch.float32).reshape(block) * signs).reshape(x_D.shape)
    row_D = rotated_D.to(x_D.dtype).to(torch.float32)
    low_1, high_1 = row_D.amin(-1, keepdim=True), row_D.amax(-1, keepdim=True)
    scale_1 = divide(high_1 - low_1, _LARGEST_INT4).clamp(min=_SMALLEST_SCALE)
    zero_1 = _round_away(-low_1 / scale_1, 0, _LARGEST_INT4)
    code_D = _round_away(row_D * scale_1.reciprocal() + zero_1, 0, _LARGEST_INT4)
    stored_1 = (scale_1.view(torch.int32) & _SCALE_BITS).view(torch.float32)
    back = _hadamard(((code_D - zero_1) * stored_1).reshape(block)) / size * signs
    return back.reshape(x_D.shape).to(x_D.dtype)


def _block_size(channels: int) -> int:
    """Channels that are rotated together: the largest power of two that divides a head."""
    return channels & -channels


@lru_cache(maxsize=16)
def _signs(size: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(_SIGNS_SEED)
    return 2.0 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1.0


def _hadamard(x_D: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, without a factor."""
    size, half = x_D.shape[-1], 1
    while half < size:
        pairs = x_D.reshape(*x_D.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x_D = torch.stack([first + second, first - second], dim=-2).reshape(x_D.shape)
        half *= 2
    return x_D


def _nvfp4(x_GK: Tensor, *, four_over_six: bool) -> Tensor:
    code_GK, scale_G1, error_G1 = _under_largest(x_GK, FP4_E2M1.max)
    if not four_over_six:
        return code_GK * scale_G1
    finer_code_GK, finer_scale_G1, finer_error_G1 = _under_largest(x_GK, 4.0)
    is_better = finer_error_G1 < error_G1
    return torch.where(is_better, finer_code_GK * finer_scale_G1, code_GK * scale_G1)


def _under_largest(x_GK: Tensor, largest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and squared errors where the largest number of a group gets that code."""
    amax_G1 = x_GK.abs().amax(-1, keepdim=True)
    scale_G1 = round_to_format(divide(amax_G1, largest), FP8_E4M3)
    is_zero = scale_G1 == 0
    inverse_G1 = torch.where(is_zero, 0.0, scale_G1.reciprocal())
    code_GK = round_to_format(x_GK * inverse_G1, FP4_E2M1)
    # The search multiplies by the reciprocal of the reciprocal, as the kernel does.
    again_G1 = torch.where(is_zero, 0.0, inverse_G1.reciprocal())
    squared_GK = (code_GK * again_G1 - x_GK).square()
    error_G1 = torch.zeros_like(amax_G1)
    for pair_G1 in (squared_GK[..., 0::2] + squared_GK[..., 1::2]).split(1, dim=-1):
        error_G1 = error_G1 + pair_G1
    return code_GK, scale_G1, error_G1
