"""Fake-quantized weights bit for bit against other implementations of the same schemes."""

from __future__ import annotations

import math
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from gguf.quants import quantize as gguf_quantize
from number_cases import (
    adversarial_weight,
    multipliers,
    quantized,
    trained_like_weight,
    weight_scheme,
)
from torch import Tensor

from mofq.numbers.formats import NF4
from mofq.numbers.quantize import QuantizedWeight, dequantize_weight, fake_quantize_weight

ELEMENT_DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
WEIGHTS = {"trained-like": trained_like_weight, "adversarial": adversarial_weight}


def finite_weight(name: str) -> Tensor:
    """Without the rows whose own products overflow elsewhere."""
    weight_OI = WEIGHTS[name]()
    return weight_OI[weight_OI.abs().amax(dim=1) < 1e35][:48].clone()


def their_args(name: str) -> QuantizationArgs:
    scheme = weight_scheme(name)
    shape: dict[str, Any] = {"strategy": scheme.granularity.kind}
    if scheme.granularity.kind == "group":
        shape["group_size"] = scheme.granularity.columns
    if scheme.granularity.kind == "block":
        shape["block_structure"] = [scheme.granularity.rows, scheme.granularity.columns]
    kind = "int" if scheme.element.name.startswith("int") else "float"
    return QuantizationArgs(
        num_bits=scheme.element.bits, type=kind, symmetric=scheme.symmetric, **shape
    )


def their_scales(q: QuantizedWeight, scheme_name: str) -> tuple[Tensor, Tensor | None]:
    """Our scales in compressed-tensors' convention: zero points count from the middle code."""
    assert q.scale is not None
    scale = q.scale.to(torch.float32)
    if q.zero_point is None:
        return scale, None
    middle = 2 ** (weight_scheme(scheme_name).element.bits - 1)
    return scale, q.zero_point.to(torch.float32) - middle


@pytest.mark.parametrize("weight_name", WEIGHTS)
@pytest.mark.parametrize(
    "name",
    [
        *(f"int{bits}.channel" for bits in (4, 8)),
        *(f"int{bits}.g32" for bits in range(2, 9)),
        *(f"int{bits}.g32@fullrange" for bits in range(2, 9)),
        *(f"int{bits}.g32.asym" for bits in range(2, 9)),
        *("int4.g32@mse", "int8.channel.asym", "int8.tensor", "int4.block16", "int4.block16x32"),
        *("fp8_e4m3.channel", "fp8_e4m3.g32", "fp8_e4m3.block16", "fp8_e4m3.tensor", "mxfp8"),
        *("fp6_e2m3.channel", "mxfp6_e2m3", "fp4_e2m1.channel", "fp4_e2m1.g32", "mxfp4"),
    ],
)
def test_codes_and_weights_are_those_of_compressed_tensors(name: str, weight_name: str) -> None:
    weight_OI, scheme = finite_weight(weight_name), weight_scheme(name)
    q = quantized(name, weight_OI)
    scale, zero_point = their_scales(q, name)
    args = their_args(name)
    theirs_OI = fake_quantize(weight_OI, scale, zero_point, args)
    assert torch.equal(dequantize_weight(q, scheme), theirs_OI)
    codes_OI = quantize(weight_OI, scale, zero_point, args)
    if zero_point is not None:
        codes_OI = codes_OI + 2 ** (scheme.element.bits - 1)
    assert torch.equal(q.codes_OI.to(torch.float32), codes_OI)


@pytest.mark.parametrize(
    "name",
    [
        *("fp8_e4m3.channel.s-f32", "fp8_e4m3.g32.s-f32", "fp4_e2m1.g32.s-f32"),
        *("int8.channel.asym.s-f32", "int4.g32.asym.s-f32", "int4.channel.asym.s-f32"),
    ],
)
def test_absmax_scales_and_zero_points_are_those_of_compressed_tensors(name: str) -> None:
    # Not so for symmetric integers: there the divisor is 127.5 (7.5), here 127 (7).
    weight_OI = trained_like_weight(512, 128)
    columns = weight_scheme(name).granularity.columns or 128
    tiles = weight_OI.unflatten(1, (-1, columns))
    scale, point = calculate_qparams(tiles.amin(-1), tiles.amax(-1), their_args(name))
    q = quantized(name, weight_OI)
    assert q.scale is not None
    assert torch.equal(q.scale, scale)
    if q.zero_point is not None:
        middle = 2 ** (weight_scheme(name).element.bits - 1)
        assert torch.equal(q.zero_point.to(torch.int32), point.to(torch.int32) + middle)


def test_nvfp4_codes_and_scales_are_those_of_compressed_tensors() -> None:
    weight_OI = trained_like_weight(512, 256)
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )
    divisor = generate_gparam(weight_OI.min(), weight_OI.max())
    tiles = weight_OI.unflatten(1, (-1, 16))
    scale, _ = calculate_qparams(tiles.amin(-1), tiles.amax(-1), args, global_scale=divisor)
    q = quantized("nvfp4", weight_OI)
    assert q.global_scale is not None
    assert q.scale is not None
    assert q.global_scale.item() == pytest.approx(1 / divisor.item(), rel=2**-22)
    assert torch.equal(q.scale, scale)
    codes_OI = quantize(weight_OI, scale, None, args, global_scale=divisor)
    # They divide by a divisor where we multiply by its reciprocal: float32 roundings apart, which
    # decide a few exact ties.
    scaled_OI = (weight_OI / multipliers(q, weight_scheme("nvfp4"))).abs()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    to_tie_OI = (scaled_OI[..., None] - ties).abs().amin(-1)
    differs_OI = q.codes_OI != codes_OI
    assert (to_tie_OI[differs_OI] < 1e-6).all()
    assert differs_OI.double().mean() < 1e-3
    theirs_OI = fake_quantize(weight_OI, scale, None, args, global_scale=divisor)
    ours_OI = dequantize_weight(q, weight_scheme("nvfp4"))
    torch.testing.assert_close(ours_OI[~differs_OI], theirs_OI[~differs_OI], rtol=2**-21, atol=0)


def test_nvfp4_is_the_formula_of_modelopt() -> None:
    weight_OI = trained_like_weight(512, 256)
    x = weight_OI.numpy().reshape(512, 16, 16)
    level_two = np.abs(x).max() / np.float32(6.0 * 448.0)
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = (amax / (np.float32(6.0) * level_two)).astype(ml_dtypes.float8_e4m3fn)
    multiplier = scale.astype(np.float32) * level_two
    codes = (x / multiplier).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    q = quantized("nvfp4", weight_OI)
    assert q.global_scale is not None
    assert q.scale is not None
    assert q.global_scale.item() == level_two
    np.testing.assert_array_equal(q.scale.numpy(), scale[:, :, 0].astype(np.float32))
    ours = dequantize_weight(q, weight_scheme("nvfp4")).numpy()
    np.testing.assert_array_equal(ours, (codes * multiplier).reshape(512, 256))


def microscaling(x: np.ndarray, element: str) -> np.ndarray:
    """OCP MX v1.0, sections 5.3 and 6.3, block by block in float64."""
    dtype = ELEMENT_DTYPES[element]
    largest = float(ml_dtypes.finfo(dtype).max)
    emax = math.floor(math.log2(largest))
    out = np.zeros(x.shape)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[row, start : start + 32].astype(np.float64)
            amax = np.abs(block).max()
            if amax == 0:
                continue
            shared = max(math.frexp(amax)[1] - 1 - emax, -126)
            elements = (block / 2.0**shared).clip(-largest, largest).astype(dtype)
            out[row, start : start + 32] = elements.astype(np.float64) * 2.0**shared
    return out.astype(np.float32)


@pytest.mark.parametrize("weight_name", WEIGHTS)
@pytest.mark.parametrize("element", ELEMENT_DTYPES)
def test_microscaling_formats_are_those_of_the_specification(
    element: str, weight_name: str
) -> None:
    weight_OI = WEIGHTS[weight_name](48, 128)
    ours_OI = fake_quantize_weight(weight_OI, weight_scheme(f"{element}.g32.s-e8m0"))
    np.testing.assert_array_equal(ours_OI.numpy(), microscaling(weight_OI.numpy(), element))


def test_mxint8_is_that_of_the_specification_without_its_optional_code() -> None:
    weight_OI = trained_like_weight(48, 128)
    x = weight_OI.numpy().reshape(48, 4, 32).astype(np.float64)
    shared = np.exp2(np.frexp(np.abs(x).max(axis=-1, keepdims=True))[1] - 1.0)
    elements = np.round(x / shared * 64).clip(-127, 127) / 64
    ours_OI = fake_quantize_weight(weight_OI, weight_scheme("int8.g32.s-e8m0"))
    np.testing.assert_array_equal(ours_OI.numpy().reshape(48, 4, 32), elements * shared)


@pytest.mark.parametrize("ceiling", [False, True])
def test_e8m0_scales_are_the_codes_of_ml_dtypes(ceiling: bool) -> None:
    weight_OI = adversarial_weight(48, 128)
    q = quantized("fp4_e2m1.g32.s-e8m0ceil" if ceiling else "mxfp4", weight_OI)
    assert q.scale is not None
    stored = q.scale.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(q.scale.numpy(), stored)


def test_full_range_int4_has_the_scales_of_llama_cpp() -> None:
    weight_OI = trained_like_weight(256, 128)
    packed = gguf_quantize(weight_OI.numpy(), gguf.GGMLQuantizationType.Q4_0).reshape(-1, 18)
    theirs = packed[:, :2].copy().view(np.float16)[:, 0]
    q = quantized("int4.g32.s-f32@fullrange", weight_OI)
    assert q.scale is not None
    ours = q.scale.reshape(-1).numpy()
    np.testing.assert_array_equal(ours.astype(np.float16), theirs)
    # It rounds halves up, and with the reciprocal of the scale: equal but for those.
    nibbles = packed[:, 2:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.int8) - 8
    differs = codes.reshape(-1) != q.codes_OI.reshape(-1).numpy()
    scaled = (weight_OI.reshape(-1, 32) / q.scale.reshape(-1, 1)).reshape(-1).numpy()
    assert (np.abs(np.abs(scaled[differs] % 1) - 0.5) < 1e-5).all()
    assert differs.mean() < 0.02


def test_nf4_is_the_nearest_value_under_the_absolute_maximum() -> None:
    weight_OI = trained_like_weight(64, 128)
    tiles = weight_OI.reshape(64, 2, 64)
    amax = tiles.abs().amax(-1, keepdim=True)
    values = torch.tensor(NF4.values)
    nearest = values[((tiles / amax)[..., None] - values).abs().argmin(-1)]
    ours_OI = fake_quantize_weight(weight_OI, weight_scheme("nf4.g64.s-f32"))
    assert torch.equal(ours_OI, (nearest * amax).reshape(64, 128))
