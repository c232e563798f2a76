"""TorchAO's tensor classes, made from measured codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.delivery.export.compressed_tensors.encoding import encode_scale, pack_fp4
from mofq.numbers.formats import FP4_E2M1
from mofq.numbers.quantize import QuantizedWeight
from mofq.numbers.quantize.scales import global_scale_of
from mofq.numbers.schemes import Scheme, TensorScheme


@dataclass(frozen=True, slots=True)
class Target:
    """What a weight is made for."""

    tensor: str  #: TorchAO's class, a key of ``MAKERS``
    dtype: torch.dtype  #: of the layer's inputs and outputs
    emulates_product: bool  #: microscaling operands are dequantized first: no such kernel here
    static_amax: float | None  #: of the inputs


def make_weight(quantized: QuantizedWeight, scheme: Scheme, target: Target) -> Tensor:
    """A weight of TorchAO's.

    Args:
        quantized: Codes and scales of the whole weight.
        scheme: That it was quantized with.
        target: Class, dtype and kernel.

    Returns:
        A tensor subclass on the device of the codes, whose ``dequantize`` is ``quantized``
        dequantized and rounded once to the dtype.
    """
    return MAKERS[target.tensor](quantized, scheme, target)


def _int8(quantized: QuantizedWeight, scheme: Scheme, target: Target) -> Tensor:
    from torchao.quantization import Int8Tensor

    scale = _scale(quantized)
    tensor: Tensor = Int8Tensor(
        quantized.codes_OI,
        scale,
        _block(quantized, scheme.quantized_weight),
        target.dtype,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
    )
    return tensor


def _intx(quantized: QuantizedWeight, scheme: Scheme, target: Target) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    weight = scheme.quantized_weight
    scale = _scale(quantized)
    codes, zero_point = quantized.codes_OI, torch.zeros_like(scale, dtype=torch.int8)
    if quantized.zero_point is not None:
        middle = 1 << (weight.element.bits - 1)
        codes, zero_point = (
            (each.to(torch.int16) - middle).to(torch.int8) for each in (codes, quantized.zero_point)
        )
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        codes,
        scale,
        zero_point,
        getattr(torch, f"int{weight.element.bits}"),
        tuple(_block(quantized, weight)),
        target.dtype,
        None,
    )
    return tensor


def _int4_cpu(quantized: QuantizedWeight, scheme: Scheme, target: Target) -> Tensor:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    unsigned_OI = quantized.codes_OI.to(torch.int32) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned_OI, 1)
    scale = _scale(quantized).to(target.dtype)  # exact: bf16 numbers
    tensor: Tensor = Int4OpaqueTensor(
        packed,
        pack_tinygemm_scales_and_zeros(scale, torch.zeros_like(scale), target.dtype),
        _block(quantized, scheme.quantized_weight),
        quantized.codes_OI.shape,
    )
    return tensor


def _float8(quantized: QuantizedWeight, scheme: Scheme, target: Target) -> Tensor:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor

    tensor: Tensor = Float8Tensor(
        quantized.codes_OI.to(torch.float8_e4m3fn),
        _scale(quantized),
        block_size=_block(quantized, scheme.quantized_weight),
        mm_config=Float8MMConfig(use_fast_accum=False),
        dtype=target.dtype,
    )
    return tensor


def _nvfp4(quantized: QuantizedWeight, scheme: Scheme, target: Target) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import (
        NVFP4Tensor,
        QuantizeTensorToNVFP4Kwargs,
    )

    assert quantized.global_scale is not None
    assert quantized.scale is not None
    inputs, input_scale = None, None
    if scheme.activation is not None:
        assert target.static_amax is not None
        amax = torch.tensor(target.static_amax, device=quantized.codes_OI.device)
        input_scale = global_scale_of(scheme.activation, amax)
        inputs = QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=False)
    tensor: Tensor = NVFP4Tensor(
        pack_fp4(quantized.codes_OI),
        quantized.scale.to(torch.float8_e4m3fn),
        16,
        target.dtype,
        per_tensor_scale=quantized.global_scale.reshape(()),
        act_per_tensor_scale=input_scale,
        act_quant_kwargs=inputs,
    )
    return tensor


def _mx(quantized: QuantizedWeight, scheme: Scheme, target: Target) -> Tensor:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.quantization.quantize_.common import KernelPreference

    weight = scheme.quantized_weight
    assert quantized.scale is not None
    is_fp4 = weight.element is FP4_E2M1
    element = torch.float4_e2m1fn_x2 if is_fp4 else torch.float8_e4m3fn
    kernel = KernelPreference.EMULATED if target.emulates_product else KernelPreference.AUTO
    inputs = QuantizeTensorToMXKwargs(
        elem_dtype=element,
        block_size=32,
        kernel_preference=kernel,
        scaling_mode=ScaleCalculationMode.FLOOR,
    )
    codes_OI = quantized.codes_OI
    tensor: Tensor = MXTensor(
        pack_fp4(codes_OI) if is_fp4 else codes_OI.to(torch.float8_e4m3fn),
        encode_scale(quantized.scale, weight).view(torch.float8_e8m0fnu),
        element,
        32,
        target.dtype,
        kernel,
        inputs,
        False,
    )
    return tensor


#: TorchAO's class -> how it is made; the classes that ``mofq.engines`` names.
MAKERS: dict[str, Callable[[QuantizedWeight, Scheme, Target], Tensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4OpaqueTensor": _int4_cpu,
    "Float8Tensor": _float8,
    "NVFP4Tensor": _nvfp4,
    "MXTensor": _mx,
}


def _scale(quantized: QuantizedWeight) -> Tensor:
    assert quantized.scale is not None
    return quantized.scale.to(torch.float32)


def _block(quantized: QuantizedWeight, weight: TensorScheme) -> list[int]:
    rows, columns = quantized.codes_OI.shape
    return [weight.granularity.rows or rows, weight.granularity.columns or columns]
