"""Quantizes weights, the whole matrix or a block of its rows, to the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.exceptions import SchemeError
from mofq.formats import FloatFormat, IntFormat
from mofq.quantize.scales import (
    Scales,
    choose_scales,
    global_scale_of,
    symmetric_scale,
)
from mofq.quantize.search import search_scales
from mofq.quantize.tiles import (
    check_shared_scales,
    decode_tiles,
    encode_tiles,
    from_tiles,
    tile_shape,
    to_tiles,
)
from mofq.schemes import TensorScheme

#: Elements worked on at a time: their float32 and float64 copies stay in the cache.
_CHUNK_ELEMENTS = 2**17


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Codes and scales of a weight, as they are stored.

    ``weight = (code - zero_point) * (scale * global_scale)``, the products in
    float32. ``A`` and ``G`` count the tiles down and across: [O, G] for groups,
    [O, 1] for channels, [1, 1] for a tensor, [O/rows, I/columns] for blocks.
    """

    codes_OI: Tensor
    """int8 where symmetric, uint8 where asymmetric or an index into a codebook; for
    float formats the values on the element's grid, float32."""
    scale: Tensor | None
    """[A, G], multiplier; bfloat16, or float32 for the other scale formats."""
    zero_point: Tensor | None
    """[A, G], uint8; asymmetric only."""
    global_scale: Tensor | None
    """Multiplier, float32 scalar; scale formats with two levels only."""


def quantize_weight(
    weight_OI: Tensor,
    scheme: TensorScheme,
    *,
    tensor_amax: float | Tensor | None = None,
    importance: Tensor | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a weight, or a block of its rows.

    A block of rows gets the very codes and scales that it has in the whole
    matrix, if it starts and ends between tiles.

    Args:
        weight_OI: [out_features, in_features], any floating dtype; computed in
            float32.
        scheme: Rounded to nearest.
        tensor_amax: Largest magnitude of the whole tensor, or of all tensors
            that share a global scale. Needed if ``scheme.needs_tensor_amax``,
            else ignored.
        importance: Weight of each element's squared error, [in_features] or
            [out_features, in_features], float32, at least 0. Needed by the rule
            ``nats`` and refused by all others.
        name: Of the tensor, for messages.

    Returns:
        Codes and scales.

    Raises:
        SchemeError: The weight is empty or not finite, tiles do not divide it,
            or an argument is missing; the message names the tensor.
    """
    rows, columns = _check(weight_OI, scheme, tensor_amax, importance, name=name)
    amax = _scalar(tensor_amax, weight_OI) if scheme.needs_tensor_amax else None
    codes, scales = [], []
    for start, stop in _chunks(weight_OI, rows):
        rows_OI = _finite(weight_OI[start:stop], start, name=name)
        x_ARGK = to_tiles(rows_OI, min(rows, stop - start), columns)
        importance_ARGK = _importance_tiles(importance, x_ARGK, start, stop)
        chunk = tile_scales(x_ARGK, scheme, tensor_amax=amax, importance_ARGK=importance_ARGK)
        codes.append(_stored_codes(from_tiles(encode_tiles(x_ARGK, scheme, chunk)), scheme))
        scales.append(chunk)
    return _joined(codes, scales, scheme)


def tile_scales(
    x_ARGK: Tensor,
    scheme: TensorScheme,
    *,
    tensor_amax: Tensor | None = None,
    importance_ARGK: Tensor | None = None,
) -> Scales | None:
    """Scales of tiles by the scheme's own rule; nothing is checked.

    Args:
        x_ARGK: Tiles (see ``scales``), float32, finite.
        scheme: Any.
        tensor_amax: float32 scalar; needed if ``scheme.needs_tensor_amax``.
        importance_ARGK: Broadcastable to the tiles; for the rule ``nats``.

    Returns:
        The scales, or None where the scheme is unscaled.
    """
    if not scheme.has_scale:
        return None
    global_scale = None if tensor_amax is None else global_scale_of(scheme, tensor_amax)
    if scheme.granularity.kind == "tensor":
        assert tensor_amax is not None
        amax = tensor_amax.reshape(1, 1, 1, 1)
        return Scales(symmetric_scale(amax, scheme, global_scale=global_scale), None, global_scale)
    if scheme.scale_rule in ("mse", "nats", "fouroversix"):
        return search_scales(
            x_ARGK, scheme, global_scale=global_scale, importance_ARGK=importance_ARGK
        )
    return choose_scales(x_ARGK, scheme, global_scale=global_scale)


def dequantize_weight(quantized: QuantizedWeight, scheme: TensorScheme) -> Tensor:
    """Codes and scales back to a weight.

    Args:
        quantized: Of ``quantize_weight``, or read from a checkpoint.
        scheme: That it was quantized with.

    Returns:
        [out_features, in_features], float32.
    """
    codes_OI = quantized.codes_OI
    rows, columns = tile_shape(_shape(codes_OI), scheme.granularity, name="codes")
    scales = _tile_view(quantized.scale, quantized.zero_point, quantized.global_scale)
    weight_OI = torch.empty(codes_OI.shape, dtype=torch.float32, device=codes_OI.device)
    for start, stop in _chunks(codes_OI, rows):
        tiles = to_tiles(codes_OI[start:stop], min(rows, stop - start), columns)
        part = _part(scales, start // rows, -(-stop // rows))
        weight_OI[start:stop] = from_tiles(decode_tiles(tiles, scheme, part))
    return weight_OI


def fake_quantize_weight(
    weight_OI: Tensor,
    scheme: TensorScheme,
    *,
    tensor_amax: float | Tensor | None = None,
    importance: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """Quantize and dequantize: what the layer computes with.

    Args:
        weight_OI: As for ``quantize_weight``, and so are all other arguments.
        scheme: Rounded to nearest.
        tensor_amax: Largest magnitude of the whole tensor, where needed.
        importance: For the rule ``nats``.
        name: Of the tensor, for messages.

    Returns:
        [out_features, in_features], float32; equal to
        ``dequantize_weight(quantize_weight(…), scheme)`` in every bit.

    Raises:
        SchemeError: As ``quantize_weight``.
    """
    quantized = quantize_weight(
        weight_OI, scheme, tensor_amax=tensor_amax, importance=importance, name=name
    )
    return dequantize_weight(quantized, scheme)


def quantize_with_scales(
    weight_OI: Tensor,
    scheme: TensorScheme,
    *,
    scale: Tensor | None,
    zero_point: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Round a weight to codes under scales that are already known.

    Args:
        weight_OI: [out_features, in_features], any floating dtype, finite.
        scheme: Whose elements, granularity and code range are used.
        scale: As in ``QuantizedWeight``; None where the scheme is unscaled.
        zero_point: As in ``QuantizedWeight``.
        global_scale: As in ``QuantizedWeight``.

    Returns:
        Codes, as in ``QuantizedWeight``. A weight that was dequantized under
        the same scales gets the codes it was made from.

    Raises:
        SchemeError: Tiles do not divide the weight.
    """
    rows, columns = tile_shape(_shape(weight_OI), scheme.granularity, name="weight")
    tiles = to_tiles(weight_OI.to(torch.float32), rows, columns)
    codes_ARGK = encode_tiles(tiles, scheme, _tile_view(scale, zero_point, global_scale))
    return _stored_codes(from_tiles(codes_ARGK), scheme)


def _check(
    weight_OI: Tensor,
    scheme: TensorScheme,
    tensor_amax: float | Tensor | None,
    importance: Tensor | None,
    *,
    name: str,
) -> tuple[int, int]:
    if weight_OI.ndim != 2 or not weight_OI.numel() or not weight_OI.is_floating_point():
        raise SchemeError(
            f"{name}: needed a floating-point matrix with at least one element, got "
            f"{weight_OI.dtype} of shape {list(weight_OI.shape)}. List the layer under `exclude`."
        )
    if scheme.rounding != "nearest":
        raise SchemeError(
            f"{name}: rounding {scheme.rounding!r} needs calibration statistics; "
            f"quantize_weight rounds to nearest."
        )
    if scheme.needs_tensor_amax and tensor_amax is None:
        raise SchemeError(
            f"{name}: this scheme has a scale for the whole tensor, and needs `tensor_amax`, its "
            f"largest magnitude, before the first block of rows."
        )
    if (scheme.scale_rule == "nats") != (importance is not None):
        raise SchemeError(
            f"{name}: scale rule 'nats', and no other, weighs errors by `importance`; got "
            f"{'none' if importance is None else 'one'} with rule {scheme.scale_rule!r}. "
            f"Run `mofq calibrate` first and give its folder to `measure --stats`."
        )
    check_shared_scales(_shape(weight_OI), scheme, name=name)
    return tile_shape(_shape(weight_OI), scheme.granularity, name=name)


def _finite(rows_OI: Tensor, start: int, *, name: str) -> Tensor:
    rows_OI = rows_OI.to(torch.float32)
    finite_OI = torch.isfinite(rows_OI)
    if not bool(finite_OI.all()):
        row, column = (~finite_OI).nonzero()[0].tolist()
        raise SchemeError(
            f"{name}: needed finite weights, found {rows_OI[row, column].item()} at "
            f"[{start + row}, {column}]. The checkpoint is damaged, or was saved after training "
            f"diverged; nothing was quantized."
        )
    return rows_OI


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _scalar(value: float | Tensor | None, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=like.device).reshape(())


def _chunks(matrix: Tensor, tile_rows: int) -> list[tuple[int, int]]:
    """Ranges of rows that fit the cache; whole tiles, unless one tile is the whole tensor."""
    total, columns = _shape(matrix)
    step = max(1, _CHUNK_ELEMENTS // columns)
    if tile_rows < total:
        step = max(1, step // tile_rows) * tile_rows
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _importance_tiles(
    importance: Tensor | None, x_ARGK: Tensor, start: int, stop: int
) -> Tensor | None:
    if importance is None:
        return None
    _, rows, _, columns = x_ARGK.shape
    if importance.ndim == 1:
        return importance.to(torch.float32).reshape(1, 1, -1, columns)
    return to_tiles(importance[start:stop].to(torch.float32), rows, columns)


def _stored_codes(codes_OI: Tensor, scheme: TensorScheme) -> Tensor:
    if isinstance(scheme.element, FloatFormat):
        return codes_OI
    signed = scheme.symmetric and isinstance(scheme.element, IntFormat)
    return codes_OI.to(torch.int8 if signed else torch.uint8)


def _joined(
    codes: list[Tensor], scales: list[Scales | None], scheme: TensorScheme
) -> QuantizedWeight:
    codes_OI = torch.cat(codes)
    known = [each for each in scales if each is not None]
    if not known:
        return QuantizedWeight(codes_OI, None, None, None)
    if scheme.granularity.kind == "tensor":
        known = known[:1]
    dtype = torch.bfloat16 if scheme.scale.name == "bf16" else torch.float32
    scale = torch.cat([each.scale[:, 0, :, 0] for each in known]).to(dtype)
    points = [each.zero_point[:, 0, :, 0] for each in known if each.zero_point is not None]
    zero_point = torch.cat(points).to(torch.uint8) if points else None
    return QuantizedWeight(codes_OI, scale, zero_point, known[0].global_scale)


def _tile_view(
    scale: Tensor | None, zero_point: Tensor | None, global_scale: Tensor | None
) -> Scales | None:
    if scale is None:
        return None
    return Scales(
        scale.to(torch.float32)[:, None, :, None],
        None if zero_point is None else zero_point.to(torch.float32)[:, None, :, None],
        global_scale,
    )


def _part(scales: Scales | None, start: int, stop: int) -> Scales | None:
    if scales is None:
        return None
    point = scales.zero_point
    return Scales(
        scales.scale[start:stop], None if point is None else point[start:stop], scales.global_scale
    )
