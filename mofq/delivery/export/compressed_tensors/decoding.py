"""Reads codes and scales of a compressed-tensors checkpoint back, whoever wrote it.

Source: compressed-tensors 0.20.0, ``compressors/``; see ``storage``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mofq.engines import is_read_transposed
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.checkpoint.unpacking import unpack_fp4, unpack_words
from mofq.numbers.formats import FP4_E2M1, IntFormat
from mofq.numbers.quantize.weights import QuantizedWeight
from mofq.numbers.schemes import TensorScheme


def read_quantized(stored: Checkpoint, layer: str, weight: TensorScheme) -> QuantizedWeight:
    """Codes and scales of one layer, as they are stored.

    Args:
        stored: The quantized checkpoint.
        layer: Name of the layer.
        weight: Its scheme, from ``recipe_from_compressed_tensors``.

    Returns:
        For ``dequantize_weight``.

    Raises:
        BackendError: A tensor of the layer is missing, or does not have the shape that the
            scheme gives it.
    """
    codes_OI = _read_codes(stored, layer, weight)
    scale = _read_scale(stored, layer, weight, codes_OI)
    zero_point = None if weight.symmetric else _read_zero_point(stored, layer, weight, scale)
    global_scale = None
    if weight.scale.global_scale_bits:
        divisor = _read(stored, f"{layer}.weight_global_scale").to(torch.float32)
        global_scale = (1.0 / divisor).reshape(())
    return QuantizedWeight(codes_OI, scale, zero_point, global_scale)


def _read_codes(stored: Checkpoint, layer: str, weight: TensorScheme) -> Tensor:
    element = weight.element
    packed = f"{layer}.weight_packed"
    if packed not in stored.tensors:
        codes = _read(stored, f"{layer}.weight")
        if is_read_transposed(layer, stored.config.get("model_type")):
            codes = codes.T.contiguous()
        if not isinstance(element, IntFormat):
            return codes.to(torch.float32)
        if weight.symmetric:
            return codes
        return (codes.to(torch.int16) + (1 << (element.bits - 1))).to(torch.uint8)
    if element is FP4_E2M1:
        return unpack_fp4(_read(stored, packed))
    if not isinstance(element, IntFormat):
        raise BackendError(
            f"{stored.folder}: {layer!r}: compressed-tensors packs no {element.name} into words."
        )
    columns = int(_read(stored, f"{layer}.weight_shape")[1])
    codes = unpack_words(_read(stored, packed), element.bits, columns)
    middle = 1 << (element.bits - 1)
    return (codes - middle).to(torch.int8) if weight.symmetric else codes.to(torch.uint8)


def _read_scale(stored: Checkpoint, layer: str, weight: TensorScheme, codes_OI: Tensor) -> Tensor:
    scale = _read(stored, f"{layer}.weight_scale")
    if scale.dtype is torch.uint8:
        scale = torch.ldexp(torch.ones(scale.shape), scale.to(torch.int32) - 127)
    elif scale.dtype is torch.float8_e4m3fn:
        scale = scale.to(torch.float32)
    rows, columns = codes_OI.shape
    tiles = weight.granularity
    shape = (rows // (tiles.rows or rows), columns // (tiles.columns or columns))
    if scale.numel() != shape[0] * shape[1] or (scale.ndim == 2 and tuple(scale.shape) != shape):
        raise BackendError(
            f"{stored.folder}: {layer}.weight_scale: needed {list(shape)} for "
            f"{weight.granularity.name} of {[rows, columns]}, found {list(scale.shape)}."
        )
    return scale.reshape(shape)


def _read_zero_point(stored: Checkpoint, layer: str, weight: TensorScheme, scale: Tensor) -> Tensor:
    point = _read(stored, f"{layer}.weight_zero_point")
    bits = weight.element.bits
    if point.dtype is torch.int32:  # packed down the rows
        point = unpack_words(point.T, bits, scale.shape[0]).T
        return point.to(torch.uint8).reshape(scale.shape)
    return (point.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).reshape(scale.shape)


def _read(stored: Checkpoint, name: str) -> Tensor:
    if name not in stored.tensors:
        raise BackendError(
            f"{stored.folder}: {name!r} is missing: the folder is incomplete. Export or "
            f"fetch it again."
        )
    return read_tensor(stored.tensors[name])
