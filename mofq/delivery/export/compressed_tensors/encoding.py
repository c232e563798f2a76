"""Codes and scales as the tensors that compressed-tensors stores, by format."""

from __future__ import annotations

import torch
from torch import Tensor

from mofq.model.checkpoint.writer import PlannedTensor
from mofq.numbers.formats import FP4_E2M1, FP8_E4M3, IntFormat
from mofq.numbers.quantize.scales import global_scale_of, symmetric_scale
from mofq.numbers.quantize.weights import QuantizedWeight
from mofq.numbers.schemes import Scheme, TensorScheme

_WORD_BITS = 32
_SCALE_DTYPES = {"bf16": "BF16", "f32": "F32", "e8m0": "U8", "e8m0ceil": "U8", "e4m3": "F8_E4M3"}


def plan_layer(out_features: int, in_features: int, scheme: Scheme) -> dict[str, PlannedTensor]:
    """Dtype and shape of every tensor of a quantized layer.

    Args:
        out_features: Rows of the weight, divided by the scheme's tiles.
        in_features: Columns, likewise.
        scheme: That ``storage_of`` accepts.

    Returns:
        Last word of the tensor's name (``weight_scale``) to what it will be. The
        sizes add up to ``sizes.layer_bytes``.
    """
    weight = scheme.quantized_weight
    plan = _plan_codes(out_features, in_features, scheme)
    scale_shape = _scale_shape(out_features, in_features, weight)
    plan["weight_scale"] = PlannedTensor(_SCALE_DTYPES[weight.scale.name], scale_shape)
    if weight.scale.global_scale_bits:
        plan["weight_global_scale"] = PlannedTensor("F32", (1,))
    if not weight.symmetric:
        plan["weight_zero_point"] = _plan_zero_point(scale_shape, scheme)
    if scheme.has_static_inputs:
        plan[_static_name(scheme)] = PlannedTensor("F32", (1,))
    return plan


def encode_rows(quantized: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The rows of the stored tensors that a block of quantized rows makes.

    Args:
        quantized: A block of whole tiles.
        scheme: That it was quantized with.

    Returns:
        Codes and scales under the names of ``plan_layer``; of a scale for the
        whole tensor, that scale.
    """
    weight = scheme.quantized_weight
    assert quantized.scale is not None
    name, codes = _encode_codes(quantized.codes_OI, scheme)
    scale = encode_scale(quantized.scale, weight)
    return {name: codes, "weight_scale": scale.reshape(-1) if _is_tensor(weight) else scale}


def encode_once(
    out_features: int,
    in_features: int,
    scheme: Scheme,
    *,
    weight_amax: float | None,
    input_amax: float | None,
    zero_point_AG: Tensor | None,
) -> dict[str, Tensor]:
    """The stored tensors that do not come row by row.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        scheme: Of the layer.
        weight_amax: What ``quantize_weight`` was given as ``tensor_amax``.
        input_amax: Largest magnitude of the layer's inputs, for a static scale.
        zero_point_AG: Of all rows, uint8; asymmetric schemes only.

    Returns:
        Under the names of ``plan_layer``, those not in ``encode_rows``.
    """
    weight = scheme.quantized_weight
    tensors: dict[str, Tensor] = {}
    if _is_packed_int(scheme):
        tensors["weight_shape"] = torch.tensor([out_features, in_features], dtype=torch.int64)
    if weight.scale.global_scale_bits:
        assert weight_amax is not None
        tensors["weight_global_scale"] = _divisor(weight, weight_amax)
    if zero_point_AG is not None:
        tensors["weight_zero_point"] = _encode_zero_point(zero_point_AG, scheme)
    if scheme.has_static_inputs:
        assert scheme.activation is not None
        assert input_amax is not None
        tensors[_static_name(scheme)] = (
            _divisor(scheme.activation, input_amax)
            if scheme.activation.scale.global_scale_bits
            else symmetric_scale(_float32(input_amax), scheme.activation).reshape(1)
        )
    return tensors


def pack_words(codes_OI: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes along the rows into 32-bit words, without gaps, low bits first.

    Args:
        codes_OI: [rows, columns], integers in ``0 .. 2**bits - 1``.
        bits: Of one code.

    Returns:
        int32 [rows, ceil(columns * bits / 32)].

    Source: compressed-tensors 0.20.0, ``compressors/pack_quantized/helpers.py``.
    """
    rows, columns = codes_OI.shape
    padded = torch.nn.functional.pad(codes_OI.to(torch.int64), (0, -columns % _WORD_BITS))
    runs = padded.reshape(rows, -1, _WORD_BITS)
    words = torch.zeros(rows, runs.shape[1], bits, dtype=torch.int64)
    for place in range(_WORD_BITS):
        word, shift = divmod(place * bits, _WORD_BITS)
        words[..., word] |= (runs[..., place] << shift) & 0xFFFFFFFF
        if shift + bits > _WORD_BITS:
            words[..., word + 1] |= runs[..., place] >> (_WORD_BITS - shift)
    kept = words.reshape(rows, -1)[:, : -(-columns * bits // _WORD_BITS)]
    return kept.to(torch.int32).contiguous()  # wraps: the top bit is the sign


def pack_fp4(values_OI: Tensor) -> Tensor:
    """Pack FP4 E2M1 values by two: the even column in the low half of the byte.

    Args:
        values_OI: [rows, columns], float32 on the format's grid, columns even.

    Returns:
        uint8 [rows, columns / 2]; each half is sign, two exponent bits, mantissa.

    Source: compressed-tensors 0.20.0, ``compressors/nvfp4/helpers.py``.
    """
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    magnitude = torch.searchsorted(grid, values_OI.abs().contiguous()).to(torch.uint8)
    codes = magnitude | (torch.signbit(values_OI).to(torch.uint8) << 3)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def encode_scale(scale: Tensor, operand: TensorScheme) -> Tensor:
    """Scales in their stored dtype, exactly.

    Args:
        scale: Multipliers that the scale format holds exactly, any shape.
        operand: Whose scales they are.

    Returns:
        bfloat16, float32, float8_e4m3fn, or uint8 exponents with bias 127.
    """
    if operand.scale.name.startswith("e8m0"):
        return ((scale.to(torch.float32).view(torch.int32) >> 23) & 0xFF).to(torch.uint8)
    if operand.scale.name == "e4m3":
        return scale.to(torch.float8_e4m3fn)
    return scale


def _encode_codes(codes_OI: Tensor, scheme: Scheme) -> tuple[str, Tensor]:
    weight = scheme.quantized_weight
    element = weight.element
    if element is FP4_E2M1:
        return "weight_packed", pack_fp4(codes_OI)
    if element is FP8_E4M3:
        return "weight", codes_OI.to(torch.float8_e4m3fn)
    assert isinstance(element, IntFormat)
    middle = 2 ** (element.bits - 1)
    if _is_packed_int(scheme):
        unsigned = codes_OI.to(torch.int16) + (middle if weight.symmetric else 0)
        return "weight_packed", pack_words(unsigned, element.bits)
    signed = codes_OI if weight.symmetric else (codes_OI.to(torch.int16) - middle).to(torch.int8)
    return "weight", signed


def _encode_zero_point(zero_point_AG: Tensor, scheme: Scheme) -> Tensor:
    weight = scheme.quantized_weight
    if _is_packed_int(scheme):
        return pack_words(zero_point_AG.T, weight.element.bits).T.contiguous()
    return (zero_point_AG.to(torch.int16) - (1 << (weight.element.bits - 1))).to(torch.int8)


def _divisor(operand: TensorScheme, amax: float) -> Tensor:
    multiplier = global_scale_of(operand, _float32(amax))
    assert multiplier is not None
    divisor: Tensor = 1.0 / multiplier
    return divisor.reshape(1)


def _float32(amax: float) -> Tensor:
    return torch.tensor(amax, dtype=torch.float32)


def _plan_codes(out_features: int, in_features: int, scheme: Scheme) -> dict[str, PlannedTensor]:
    weight = scheme.quantized_weight
    bits = weight.element.bits
    if _is_packed_int(scheme):
        words = -(-in_features * bits // _WORD_BITS)
        return {
            "weight_packed": PlannedTensor("I32", (out_features, words)),
            "weight_shape": PlannedTensor("I64", (2,)),
        }
    if weight.element is FP4_E2M1:
        return {"weight_packed": PlannedTensor("U8", (out_features, in_features // 2))}
    dtype = "I8" if isinstance(weight.element, IntFormat) else "F8_E4M3"
    return {"weight": PlannedTensor(dtype, (out_features, in_features))}


def _plan_zero_point(scale_shape: tuple[int, ...], scheme: Scheme) -> PlannedTensor:
    if not _is_packed_int(scheme):
        return PlannedTensor("I8", scale_shape)
    rows, columns = scale_shape
    return PlannedTensor(
        "I32", (-(-rows * scheme.quantized_weight.element.bits // _WORD_BITS), columns)
    )


def _scale_shape(out_features: int, in_features: int, weight: TensorScheme) -> tuple[int, ...]:
    if _is_tensor(weight):
        return (1,)
    rows = weight.granularity.rows or out_features
    columns = weight.granularity.columns or in_features
    return out_features // rows, in_features // columns


def _is_tensor(operand: TensorScheme) -> bool:
    return operand.granularity.kind == "tensor"


def _is_packed_int(scheme: Scheme) -> bool:
    weight = scheme.quantized_weight
    if not isinstance(weight.element, IntFormat):
        return False
    return weight.element.bits != 8 or scheme.activation is None


def _static_name(scheme: Scheme) -> str:
    assert scheme.activation is not None
    return "input_global_scale" if scheme.activation.scale.global_scale_bits else "input_scale"
