"""Schemes and weights that several tests of the numbers share."""

from __future__ import annotations

import torch
from torch import Tensor

from mofq.numbers.formats import CodebookFormat, FloatFormat, IntFormat
from mofq.numbers.quantize import QuantizedWeight, quantize_weight
from mofq.numbers.schemes import TensorScheme, parse_scheme

#: One of every element, granularity, scale format and rule that a weight may have.
WEIGHT_SCHEMES = (
    *(f"int{bits}.channel" for bits in range(2, 9)),
    *(f"int{bits}.g32@fullrange" for bits in range(2, 9)),
    *(f"int{bits}.g32.asym" for bits in range(2, 9)),
    *("int2.g32@mse", "int4.g32@mse", "int8.channel@mse", "int4.channel.asym@mse"),
    *("int8.tensor", "int8.tensor.s-f32", "int4.block16", "int4.block8x32@fullrange"),
    *("int4.block16x32@mse", "int8.g32.s-e8m0", "int4.g32.s-e8m0ceil", "int4.g16.s-e4m3"),
    *("int4.g16.s-e4m3@fullrange", "int4.g16.s-e4m3@mse", "int3.g32.asym.s-f32"),
    *("fp8_e4m3.tensor", "fp8_e4m3.channel", "fp8_e4m3.block32", "fp8_e4m3.unscaled"),
    *("fp8_e5m2.channel", "fp8_e5m2.unscaled", "fp8_e4m3.channel@mse", "mxfp8"),
    *("fp6_e3m2.g32", "fp6_e2m3.channel.s-f32", "mxfp6_e3m2", "mxfp6_e2m3@mse"),
    *("fp4_e2m1.channel", "fp4_e2m1.g32", "fp4_e2m1.g32@mse", "fp4_e2m1_ieee.g32"),
    *("mxfp4", "mxfp4@mse", "fp4_e2m1.g32.s-e8m0ceil", "nvfp4", "nvfp4@mse"),
    *("mxint8", "mxfp8_e5m2", "mx9", "mx6", "mx4", "nvfp4@fouroversix", "nvfp4@stored"),
    *("fp4_e2m1.block16.s-e4m3", "int8.g16.s-e4m3", "nf4.g64", "nf4.channel@mse", "nf4.g32.s-e4m3"),
)


def weight_scheme(name: str) -> TensorScheme:
    """The weights' half of a scheme."""
    scheme = parse_scheme(name).weight
    assert scheme is not None
    return scheme


def activation_scheme(name: str) -> TensorScheme:
    """A scheme of activations by its own name."""
    scheme = parse_scheme(f"bf16+{name}").activation
    assert scheme is not None
    return scheme


def trained_like_weight(rows: int = 64, columns: int = 128, *, seed: int = 0) -> Tensor:
    """Heavy-tailed numbers on the bf16 grid, as in a checkpoint, float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    spread = torch.exp(torch.randn(rows, columns, generator=generator) * 0.7)
    return (normal * spread * 0.02).to(torch.bfloat16).to(torch.float32)


def adversarial_weight(rows: int = 64, columns: int = 128) -> Tensor:
    """Zeros, subnormals, the largest floats, ties, huge ratios, constants; float32."""
    weight_OI = trained_like_weight(rows, columns, seed=1)
    largest = torch.finfo(torch.float32).max
    ties = torch.arange(columns, dtype=torch.float32) - columns / 2
    weight_OI[0] = 0
    weight_OI[1, : columns // 2] = 0
    weight_OI[2] *= 2.0**-140
    weight_OI[3] = 2.0**-149
    weight_OI[4] = largest
    weight_OI[5] = torch.where(ties.remainder(2) == 0, largest, -largest)
    weight_OI[6] = ties / 2
    weight_OI[7] = ties / 4 + 0.125
    weight_OI[8] = 0.37
    weight_OI[9] = -weight_OI[10].abs()
    weight_OI[11] = weight_OI[11].abs()
    weight_OI[12, 0] = 1e30
    weight_OI[13] *= 1e-30
    weight_OI[13, -1] = -1.0
    weight_OI[14] = 0
    weight_OI[14, 5] = 2.0**-149
    weight_OI[15] = 2.0**-126
    weight_OI[16, ::2] = -0.0
    weight_OI[17, :] = torch.exp2(ties.clamp(-120, 120))
    weight_OI[18] = torch.tensor(448.0) * torch.exp2(ties.clamp(-20, 20).round())
    return weight_OI


def quantized(name: str, weight_OI: Tensor, *, amax: float | None = None) -> QuantizedWeight:
    """Quantize with whatever amax the scheme asks for, by default the weight's own."""
    amax = float(weight_OI.abs().max()) if amax is None else amax
    return quantize_weight(weight_OI, weight_scheme(name), tensor_amax=amax)


def all_code_values(scheme: TensorScheme) -> Tensor:
    """Every value that a symmetric scheme can multiply its scale by, ascending, float64."""
    element = scheme.element
    if isinstance(element, CodebookFormat):
        return torch.tensor(element.values, dtype=torch.float32).double()
    if isinstance(element, IntFormat):
        low = -element.max - (scheme.scale_rule != "absmax")
        return torch.arange(low, element.max + 1).double()
    assert isinstance(element, FloatFormat)
    positive = [
        2.0 ** (max(e, 1) - element.bias) * (min(e, 1) + m / 2**element.mantissa_bits)
        for e in range(2**element.exponent_bits)
        for m in range(2**element.mantissa_bits)
    ]
    positive = [value for value in positive if value <= element.max]
    return torch.tensor(sorted({*positive, *(-v for v in positive)}), dtype=torch.float64)


def multipliers(q: QuantizedWeight, scheme: TensorScheme) -> Tensor:
    """What each element's code is multiplied by, [out_features, in_features], float64."""
    if q.scale is None:
        return torch.ones(q.codes_OI.shape, dtype=torch.float64)
    scale = q.scale.to(torch.float32)
    if q.global_scale is not None:
        scale = scale * q.global_scale
    return spread(scale, q.codes_OI).double()


def spread(per_tile: Tensor, like_OI: Tensor) -> Tensor:
    """One number a tile to one number an element."""
    rows, columns = (like_OI.shape[d] // per_tile.shape[d] for d in (0, 1))
    return per_tile.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
