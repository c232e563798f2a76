"""Quantizes weights: a block of rows gets the numbers that it has in the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.exceptions import SchemeError, option
from mofq.numbers.formats import FloatFormat, IntFormat
from mofq.numbers.quantize.descent import descend
from mofq.numbers.quantize.gptq import Feedback, round_with_feedback
from mofq.numbers.quantize.scale_rules import tile_scales
from mofq.numbers.quantize.scales import Scales, join_scales
from mofq.numbers.quantize.tiles import (
    check_shared_scales,
    decode_tiles,
    encode_tiles,
    from_tiles,
    row_blocks,
    tile_shape,
    to_tiles,
)
from mofq.numbers.schemes import TensorScheme

#: Elements worked on at a time: their float32 and float64 copies stay in the cache.
_CHUNK_ELEMENTS = 2**17
#: The same on a GPU, where each operation and each look at its result has its price.
_GPU_CHUNK_ELEMENTS = 2**24
#: Rows whose codes descend at once: in float64, several times.
_DESCENT_ROWS = 1024


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

    def to(self, device: str | torch.device) -> QuantizedWeight:
        """The same on a device."""
        others = (self.scale, self.zero_point, self.global_scale)
        return QuantizedWeight(
            self.codes_OI.to(device), *(None if one is None else one.to(device) for one in others)
        )


def quantize_weight(
    weight_OI: Tensor,
    scheme: TensorScheme,
    *,
    tensor_amax: float | Tensor | None = None,
    importance: Tensor | None = None,
    feedback: Feedback | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a weight, or a block of its rows.

    A block of rows gets the very codes and scales that it has in the whole
    matrix, if it starts and ends between tiles.

    Args:
        weight_OI: [out_features, in_features], any floating dtype; computed in
            float32.
        scheme: Of the weight.
        tensor_amax: Largest magnitude of the whole tensor, or of all tensors
            that share a global scale. Needed if ``scheme.needs_tensor_amax``,
            else ignored.
        importance: Weight of each element's squared error, [in_features] or
            [out_features, in_features], float32, at least 0. Needed by the rule
            ``nats`` where codes are rounded to nearest, and refused elsewhere.
        feedback: The layer's factorised Hessian. Needed by ``~gptq`` and ``~descent``,
            where it is the importance too, and refused elsewhere.
        name: Of the tensor, for messages.

    Returns:
        Codes and scales.

    Raises:
        SchemeError: The weight is empty or not finite, tiles do not divide it,
            or an argument is missing; the message names the tensor.
    """
    rows, columns = _check(weight_OI, scheme, tensor_amax, name=name)
    _check_statistics(scheme, importance, feedback, name=name)
    amax = _scalar(tensor_amax, weight_OI) if scheme.needs_tensor_amax else None
    if feedback is not None:
        codes_OI, found = round_with_feedback(
            _finite(weight_OI, 0, name=name), scheme, feedback, tile=(rows, columns), amax=amax
        )
        return _joined([_stored_codes(codes_OI, scheme)], [] if found is None else [found], scheme)
    codes, scales = [], []
    for start, stop in _chunks(weight_OI, scheme):
        rows_OI = _finite(weight_OI[start:stop], start, name=name)
        x_ARGK = to_tiles(rows_OI, min(rows, stop - start), columns)
        importance_ARGK = _importance_tiles(importance, x_ARGK, start, stop)
        chunk = tile_scales(x_ARGK, scheme, tensor_amax=amax, importance_ARGK=importance_ARGK)
        codes.append(_stored_codes(from_tiles(encode_tiles(x_ARGK, scheme, chunk)), scheme))
        scales += [] if chunk is None else [chunk]
    return _joined(codes, scales, scheme)


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
    for start, stop in _chunks(codes_OI, scheme):
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
    feedback: Feedback | None = None,
    name: str = "weight",
) -> Tensor:
    """Quantize and dequantize: what the layer computes with.

    Args:
        weight_OI: As for ``quantize_weight``, and so are all other arguments.
        scheme: Of the weight.
        tensor_amax: Largest magnitude of the whole tensor, where needed.
        importance: For the rule ``nats``.
        feedback: For ``~gptq`` and ``~descent``.
        name: Of the tensor, for messages.

    Returns:
        [out_features, in_features], float32; equal to
        ``dequantize_weight(quantize_weight(…), scheme)`` in every bit.

    Raises:
        SchemeError: As ``quantize_weight``.
    """
    quantized = quantize_weight(
        weight_OI,
        scheme,
        tensor_amax=tensor_amax,
        importance=importance,
        feedback=feedback,
        name=name,
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


def descend_from(
    quantized: QuantizedWeight,
    weight_OI: Tensor,
    scheme: TensorScheme,
    *,
    hessian_II: Tensor,
    moves_scales: bool = True,
) -> QuantizedWeight:
    """Lower what codes cost that are there already, as ``~descent`` does, whatever made them.

    Args:
        quantized: Codes and scales to begin with.
        weight_OI: What they are to stand for, [out_features, in_features], float32, finite.
        scheme: Whose grid and granularity are used.
        hessian_II: From ``damped_hessian``, on the weight's device.
        moves_scales: Whether scales in bf16, f32 and E4M3 of groups move too.

    Returns:
        Codes and scales. Zero points and global scales stay.
    """
    rows, columns = tile_shape(_shape(weight_OI), scheme.granularity, name="weight")
    scales = _tile_view(quantized.scale, quantized.zero_point, quantized.global_scale)
    codes, found = [], []
    for start, stop in row_blocks(
        *_shape(weight_OI),
        elements=_DESCENT_ROWS * weight_OI.shape[1],
        tile_rows=scheme.granularity.rows,
    ):
        codes_IO, block = descend(
            weight_OI[start:stop].T.double().contiguous(),
            quantized.codes_OI[start:stop].T.float().contiguous(),
            _part(scales, start // rows, -(-stop // rows)),
            scheme=scheme,
            hessian_II=hessian_II,
            tile=(min(rows, stop - start), columns),
            moves_scales=moves_scales,
        )
        codes.append(_stored_codes(codes_IO.T.contiguous(), scheme))
        found += [] if block is None else [block]
    return _joined(codes, found, scheme)


def _check(
    weight_OI: Tensor,
    scheme: TensorScheme,
    tensor_amax: float | Tensor | None,
    *,
    name: str,
) -> tuple[int, int]:
    if weight_OI.ndim != 2 or not weight_OI.numel() or not weight_OI.is_floating_point():
        raise SchemeError(
            f"{name}: needed a floating-point matrix with at least one element, got "
            f"{weight_OI.dtype} of shape {list(weight_OI.shape)}. List the layer under `exclude`."
        )
    if scheme.needs_tensor_amax and tensor_amax is None:
        raise SchemeError(
            f"{name}: this scheme has a scale for the whole tensor, and needs `tensor_amax`, its "
            f"largest magnitude, before the first block of rows."
        )
    check_shared_scales(_shape(weight_OI), scheme, name=name)
    return tile_shape(_shape(weight_OI), scheme.granularity, name=name)


def _check_statistics(
    scheme: TensorScheme, importance: Tensor | None, feedback: Feedback | None, *, name: str
) -> None:
    needs_feedback = scheme.rounds_by_hessian
    needs_importance = scheme.scale_rule == "nats" and not needs_feedback
    if (needs_importance, needs_feedback) == (importance is not None, feedback is not None):
        if scheme.rounding == "descent" and feedback is not None and feedback.hessian_II is None:
            raise SchemeError(
                f"{name}: '~descent' needs the Hessian itself beside its factors; factorise it "
                f"with keep=True."
            )
        return
    raise SchemeError(
        f"{name}: the rule 'nats' weighs errors by `importance`; '~gptq' and '~descent' need "
        f"calibration statistics as `feedback`; no other scheme takes either. Got "
        f"{'no' if importance is None else 'an'} importance and "
        f"{'no' if feedback is None else 'a'} feedback with rule {scheme.scale_rule!r} and "
        f"rounding {scheme.rounding!r}. Run `mofq calibrate` first and give its folder as "
        f"{option('stats')}."
    )


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


def _chunks(matrix: Tensor, scheme: TensorScheme) -> Iterator[tuple[int, int]]:
    """Ranges of rows that fit the processor's cache."""
    elements = _CHUNK_ELEMENTS if matrix.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    return row_blocks(*_shape(matrix), elements=elements, tile_rows=scheme.granularity.rows)


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


def _joined(codes: list[Tensor], scales: list[Scales], scheme: TensorScheme) -> QuantizedWeight:
    codes_OI = torch.cat(codes)
    if not scales:
        return QuantizedWeight(codes_OI, None, None, None)
    joined = join_scales(scales[:1] if scheme.granularity.kind == "tensor" else scales, 0)
    joined = joined.map(lambda value_A1G1: value_A1G1[:, 0, :, 0])
    dtype = torch.bfloat16 if scheme.scale.name == "bf16" else torch.float32
    point = None if joined.zero_point is None else joined.zero_point.to(torch.uint8)
    return QuantizedWeight(codes_OI, joined.scale.to(dtype), point, joined.global_scale)


def _tile_view(
    scale: Tensor | None, zero_point: Tensor | None, global_scale: Tensor | None
) -> Scales | None:
    if scale is None:
        return None
    scales = Scales(scale, zero_point, global_scale)
    return scales.map(lambda value_AG: value_AG.to(torch.float32)[:, None, :, None])


def _part(scales: Scales | None, start: int, stop: int) -> Scales | None:
    return None if scales is None else scales.map(lambda value_A1G1: value_A1G1[start:stop])
