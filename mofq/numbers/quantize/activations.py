"""Fake-quantizes activations and what attention caches, on the fly or under a calibrated scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mofq.exceptions import SchemeError
from mofq.numbers.formats import CacheKernel
from mofq.numbers.quantize.cache_kernels import round_by_kernel
from mofq.numbers.quantize.scale_rules import tile_scales
from mofq.numbers.quantize.scales import Scales
from mofq.numbers.quantize.tiles import (
    check_shared_scales,
    decode_tiles,
    encode_tiles,
    from_tiles,
    tile_shape,
    to_tiles,
)
from mofq.numbers.schemes import Granularity, TensorScheme


def fake_quantize_activation(
    x: Tensor,
    scheme: TensorScheme,
    *,
    static_amax: float | Tensor | None = None,
    name: str = "input",
) -> Tensor:
    """Quantize and dequantize the input of a layer.

    Token and group scales are found in ``x`` itself; a tensor's scale, and the
    global scale above E4M3 group scales, come from calibration. Outlier columns,
    where the scheme keeps them, and ranges, where it sorts columns by them, are those of a
    sequence, the last dimension but one.

    Args:
        x: [..., tokens, in_features], any floating dtype; computed in float32.
        scheme: Of the activations.
        static_amax: Largest magnitude seen in calibration. Needed if
            ``scheme.needs_tensor_amax``; larger inputs saturate.
        name: Of the layer, for messages.

    Returns:
        As ``x``, same shape and dtype. A NaN stays a NaN.

    Raises:
        SchemeError: ``static_amax`` is missing, or groups do not divide
            ``in_features``; the message names the layer.
    """
    _check_static(scheme, static_amax, name)
    if not x.numel():
        return x
    if scheme.granularity.kind == "peg":
        return _by_range(x, scheme, name)
    is_outlier = _outlier_columns(x, scheme)
    kept = x if is_outlier is None else torch.where(is_outlier, 0.0, x)
    tiles, scales = _tiles(kept, scheme, static_amax, name)
    quantized = decode_tiles(encode_tiles(tiles, scheme, scales), scheme, scales)
    rounded = from_tiles(quantized).reshape(x.shape).to(x.dtype)
    return rounded if is_outlier is None else torch.where(is_outlier, x, rounded)


def fake_quantize_cache(
    x_BTHD: Tensor,
    scheme: TensorScheme,
    *,
    by_head: bool = False,
    kernel: CacheKernel | None = None,
    static_amax: Sequence[float] = (),
    name: str = "cache",
) -> Tensor:
    """Quantize and dequantize the keys, or the values, of an attention layer.

    Args:
        x_BTHD: [..., tokens, kv_heads, head_size], any floating dtype; computed in float32.
        scheme: Of one row: all heads of a token after one another, or one head.
        by_head: Whether a row is one head.
        kernel: Whose rules hold in the place of the scheme's, where a kernel defines the format.
        static_amax: Largest magnitudes in calibration, where the scheme needs them: one, or
            with ``by_head`` one for each head. Larger numbers saturate.
        name: Of the cache, for messages.

    Returns:
        As ``x_BTHD``, same shape and dtype.

    Raises:
        SchemeError: ``static_amax`` is missing, or groups do not divide the channels.
    """
    if kernel is not None:
        return round_by_kernel(x_BTHD, kernel, scheme.element)
    amax: list[float | None] = list(static_amax) or [None]
    if not by_head:
        flat_BTI = fake_quantize_activation(
            x_BTHD.flatten(-2), scheme, static_amax=amax[0], name=name
        )
        return flat_BTI.reshape(x_BTHD.shape)
    if not scheme.needs_tensor_amax:
        return fake_quantize_activation(x_BTHD, scheme, name=name)
    heads = amax * x_BTHD.shape[-2] if len(amax) == 1 else amax
    return torch.stack(
        [
            fake_quantize_activation(x_BTD, scheme, static_amax=one, name=name)
            for x_BTD, one in zip(x_BTHD.unbind(-2), heads, strict=True)
        ],
        dim=-2,
    )


def _by_range(x: Tensor, scheme: TensorScheme, name: str) -> Tensor:
    """Columns sorted by the largest magnitude that the sequence has in each, then cut into groups.

    Source: per-embedding-group quantization with range-based permutation, arXiv:2109.12948,
    section 4. There ranges, and scales, are those of calibration; here both are the sequence's
    own, so that nothing saturates and no statistics are needed.
    """
    count = scheme.granularity.columns
    if x.shape[-1] % count:
        raise SchemeError(
            f"{name}: {scheme.granularity.name} needs in_features divisible by {count}, got "
            f"{x.shape[-1]}. Take a number of groups that divides."
        )
    range_1I = x.abs().amax(dim=-2, keepdim=True)
    order = torch.argsort(range_1I, dim=-1, stable=True).expand_as(x)
    grouped = replace(scheme, granularity=Granularity("group", 1, x.shape[-1] // count))
    rounded = fake_quantize_activation(x.gather(-1, order), grouped, name=name)
    return torch.empty_like(x).scatter_(-1, order, rounded)


def quantize_activation(
    x: Tensor,
    scheme: TensorScheme,
    *,
    static_amax: float | Tensor | None = None,
    name: str = "input",
) -> tuple[Tensor, Scales | None]:
    """Codes and scales of the input of a layer: what a kernel multiplies.

    Args:
        x: As for ``fake_quantize_activation``, and so are all other arguments;
            not empty.
        scheme: Of the activations, without outlier columns or sorted ones.
        static_amax: Where needed.
        name: Of the layer, for messages.

    Returns:
        Codes [T, in_features], float32 (of float formats the values on the
        element's grid), and their scales [T or 1, 1, G, 1]. Multiplied they are
        what ``fake_quantize_activation`` returns, before its last cast.

    Raises:
        SchemeError: As ``fake_quantize_activation``.
    """
    assert not scheme.outliers
    assert scheme.granularity.kind != "peg"
    _check_static(scheme, static_amax, name)
    tiles, scales = _tiles(x, scheme, static_amax, name)
    return from_tiles(encode_tiles(tiles, scheme, scales)), scales


def _check_static(scheme: TensorScheme, static_amax: float | Tensor | None, name: str) -> None:
    if scheme.needs_tensor_amax and static_amax is None:
        raise SchemeError(
            f"{name}: static activations need `static_amax`, their largest magnitude in "
            f"calibration; found none. Run `mofq calibrate`, and give its folder to `measure`."
        )


def _tiles(
    x: Tensor, scheme: TensorScheme, static_amax: float | Tensor | None, name: str
) -> tuple[Tensor, Scales | None]:
    """Tiles of an input, and their scales."""
    x_TI = x.reshape(-1, x.shape[-1]).to(torch.float32)
    shape = (x_TI.shape[0], x_TI.shape[1])
    rows, columns = tile_shape(shape, scheme.granularity, name=name)
    check_shared_scales(shape, scheme, name=name)
    amax = None
    if scheme.needs_tensor_amax:
        amax = _on_device_of(x, static_amax)
    tiles = to_tiles(x_TI, rows, columns)
    return tiles, tile_scales(tiles, scheme, tensor_amax=amax)


def _on_device_of(x: Tensor, static_amax: float | Tensor | None) -> Tensor:
    """A number, float32; a plain one is made there, not sent, which a GPU would be waited for."""
    if isinstance(static_amax, Tensor):
        return static_amax.to(x.device, torch.float32).reshape(())
    assert static_amax is not None
    return torch.full((), static_amax, dtype=torch.float32, device=x.device)


def _outlier_columns(x: Tensor, scheme: TensorScheme) -> Tensor | None:
    """Columns that stay as they are: [..., 1, in_features], bool; None where the scheme has none.

    Source: LLM.int8(), arXiv:2208.07339: the feature dimensions in which an input of the
    sequence reaches the threshold. What bitsandbytes multiplies them with are the quantized
    weights, as here.
    """
    if not scheme.outliers:
        return None
    return (x.abs() >= scheme.outliers).any(dim=-2, keepdim=True)
