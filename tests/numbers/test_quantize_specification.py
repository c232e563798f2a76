"""Fake-quantized numbers bit for bit against torchao, and against the formulas in NumPy.

The formulas are those of the module ``scales``, written once more with NumPy's float32 and
the casts of ``ml_dtypes``; nothing of mofq's arithmetic is in them. Weights are trained-like,
and adversarial: zeros, subnormals, the largest floats, ties, ratios of 1e30.

Where others differ on such weights, and why:

- torchao's MX scales below 2**-126 and above what float32 can multiply: there mofq stops
  at the smallest normal and at the largest product that is finite.
- torchao's NVFP4 raises block scales that underflow to 2**-6, mofq to 2**-9, the smallest
  E4M3 number; so only blocks above both are compared.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from number_cases import (
    activation_scheme,
    adversarial_weight,
    quantized,
    trained_like_weight,
    weight_scheme,
)
from torch import Tensor
from torchao.float8.float8_utils import tensor_to_scale
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from mofq.numbers.quantize import dequantize_weight, fake_quantize_activation, fake_quantize_weight

WEIGHTS = {"trained-like": trained_like_weight, "adversarial": adversarial_weight}
MX_DTYPES = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp6_e3m2": "fp6_e3m2",
    "fp6_e2m3": "fp6_e2m3",
    "fp4_e2m1": torch.float4_e2m1fn_x2,
}
NUMPY_DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
SMALLEST = np.float32(2.0**-126)


def ordinary_rows(weight_OI: Tensor) -> Tensor:
    """Rows whose scales, of any block, are far from what float32 cannot hold."""
    amax_OG = weight_OI.unflatten(1, (-1, 16)).abs().amax(-1)
    return ((amax_OG == 0) | ((amax_OG > 2.0**-100) & (amax_OG < 2.0**100))).all(1)


@pytest.mark.parametrize("weight_name", WEIGHTS)
@pytest.mark.parametrize("element", MX_DTYPES)
@pytest.mark.parametrize(("mode", "scale"), [("floor", "e8m0"), ("rceil", "e8m0ceil")])
def test_microscaling_is_that_of_torchao(
    mode: str, scale: str, element: str, weight_name: str
) -> None:
    weight_OI = WEIGHTS[weight_name]()
    weight_OI = weight_OI[ordinary_rows(weight_OI)].contiguous()
    assert len(weight_OI) > 55
    dtype = MX_DTYPES[element]
    their_scale, data = to_mx(weight_OI, dtype, 32, ScaleCalculationMode(mode))
    theirs_OI = to_dtype(data, their_scale, dtype, 32, torch.float32).reshape(weight_OI.shape)
    name = f"{element}.g32.s-{scale}"
    q = quantized(name, weight_OI)
    assert torch.equal(dequantize_weight(q, weight_scheme(name)), theirs_OI)


def test_nvfp4_block_scales_are_those_of_torchao() -> None:
    weight_OI = trained_like_weight(256, 128)
    amax = weight_OI.abs().max()
    scale_OG, _ = nvfp4_quantize(weight_OI, 16, per_tensor_amax_to_scale(amax))
    q = quantized("nvfp4", weight_OI)
    assert q.scale is not None
    assert q.global_scale is not None
    assert q.global_scale.item() == per_tensor_amax_to_scale(amax).item()
    assert (scale_OG.float() > 2.0**-6).all()
    assert torch.equal(q.scale, scale_OG.float())


def test_fp8_scales_are_the_reciprocals_of_torchaos() -> None:
    weight_OI = trained_like_weight(256, 128)
    theirs = tensor_to_scale(weight_OI, torch.float8_e4m3fn)
    q = quantized("fp8_e4m3.tensor.s-f32", weight_OI)
    assert q.scale is not None
    assert q.scale.item() == pytest.approx(1 / theirs.item(), rel=2**-23)


def bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def largest_scale(code: float, bits: int) -> np.float32:
    """The largest number of so many bits that, multiplied by a code, stays finite."""
    mantissa, exponent = math.frexp(float(np.finfo(np.float32).max) / code)
    return np.float32(math.ldexp(math.floor(math.ldexp(mantissa, bits)), exponent - bits))


def rounded_scale(scale: np.ndarray, code: float, kind: str) -> np.ndarray:
    limit = largest_scale(code, 8 if kind == "bf16" else 24)
    clipped = scale.clip(SMALLEST, limit).astype(np.float32)
    return bfloat16(clipped) if kind == "bf16" else clipped


def tiles(x: np.ndarray, granularity: str) -> np.ndarray:
    """[rows of tiles, tiles, elements], whichever way a tile lies."""
    rows, columns = x.shape
    if granularity.startswith("block"):
        side = int(granularity.removeprefix("block"))
        cut = x.reshape(rows // side, side, columns // side, side).swapaxes(1, 2)
        return cut.reshape(rows // side, columns // side, side * side)
    size = columns if granularity == "channel" else int(granularity.removeprefix("g"))
    return x.reshape(rows, columns // size, size)


def absmax_int(x: np.ndarray, bits: int, kind: str) -> np.ndarray:
    largest = np.float32(2 ** (bits - 1) - 1)
    amax = np.abs(x).max(-1, keepdims=True)
    scale = np.where(amax == 0, np.float32(1), rounded_scale(amax / largest, float(largest), kind))
    return np.rint((x / scale).clip(-largest, largest)) * scale


def fullrange_int(x: np.ndarray, bits: int, kind: str) -> np.ndarray:
    most = np.float32(2 ** (bits - 1))
    place = np.abs(x).argmax(-1)[..., None]
    extreme = np.take_along_axis(x, place, -1)
    amax = np.abs(extreme)
    scale = rounded_scale(amax / most, float(most), kind)
    scale = np.where(amax == 0, np.float32(1), np.where(extreme > 0, -scale, scale))
    return np.rint((x / scale).clip(-most, most - 1)) * scale


def asymmetric_int(x: np.ndarray, bits: int, kind: str) -> np.ndarray:
    steps, middle = np.float32(2**bits - 1), np.float32(2 ** (bits - 1))
    low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(-1, keepdims=True), np.float32(0))
    with np.errstate(over="ignore"):
        extent = high - low
    scale = np.where(extent == 0, np.float32(1), rounded_scale(extent / steps, float(steps), kind))
    point = np.rint((-middle - low / scale).clip(-middle, middle - 1)) + middle
    codes = np.rint((x / scale + (point - middle)).clip(-middle, middle - 1)) + middle
    return (codes - point) * scale


def absmax_float(x: np.ndarray, element: str, kind: str) -> np.ndarray:
    dtype = NUMPY_DTYPES[element]
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    amax = np.abs(x).max(-1, keepdims=True)
    scale = np.where(amax == 0, np.float32(1), rounded_scale(amax / largest, float(largest), kind))
    codes = (x / scale).clip(-largest, largest).astype(dtype).astype(np.float32)
    return codes * scale


_INT, _FULL = ("channel", "g32"), ("g32", "block16")
_FLOAT = ("channel", "g32", "block16")
FORMULAS = {
    **{f"int{b}.{g}": (absmax_int, b, g) for b in range(2, 9) for g in _INT},
    **{
        f"int{b}.{g}@fullrange": (fullrange_int, b, g)
        for b in (3, 4, 8)
        for g in ("g32", "block16")
    },
    **{f"int{b}.{g}.asym": (asymmetric_int, b, g) for b in range(2, 9) for g in _INT},
    **{
        f"{e}.{g}": (absmax_float, e, g)
        for e in NUMPY_DTYPES
        for g in ("channel", "g32", "block16")
    },
}


@pytest.mark.parametrize("weight_name", WEIGHTS)
@pytest.mark.parametrize("kind", ["bf16", "f32"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_weight_is_rounded_as_the_formula_says(name: str, kind: str, weight_name: str) -> None:
    rule, argument, granularity = FORMULAS[name]
    weight_OI = WEIGHTS[weight_name]()
    element, at, scale_rule = name.partition("@")
    scheme = weight_scheme(f"{element}{'' if kind == 'bf16' else '.s-f32'}{at}{scale_rule}")
    ours = tiles(fake_quantize_weight(weight_OI, scheme).numpy(), granularity)
    theirs = rule(tiles(weight_OI.numpy(), granularity), argument, kind)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("weight_name", WEIGHTS)
@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3", "fp4_e2m1"])
def test_tokens_are_rounded_as_the_formula_says(name: str, weight_name: str) -> None:
    x_TI = WEIGHTS[weight_name](48, 128)
    ours = fake_quantize_activation(x_TI, activation_scheme(f"{name}.token")).numpy()
    rule = absmax_int if name.startswith("int") else absmax_float
    argument = int(name[3:]) if name.startswith("int") else name
    theirs = rule(tiles(x_TI.numpy(), "channel"), argument, "f32")  # type: ignore[operator]
    np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))


@pytest.mark.parametrize("amax", [1e-37, 1e-3, 1.0, 37.5, 1e37])
def test_two_level_scales_are_as_the_formula_says(amax: float) -> None:
    weight_OI = adversarial_weight()
    weight_OI = weight_OI.clamp(-amax, amax)
    level_two = np.float32(amax) / np.float32(448 * 6)
    level_two = np.clip(level_two, SMALLEST, np.float32(np.finfo(np.float32).max))
    x = tiles(weight_OI.numpy(), "g16")
    largest = np.abs(x).max(-1, keepdims=True)
    block = (largest / (np.float32(6) * level_two)).clip(0, 448)
    block = block.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    block = np.where(largest == 0, np.float32(1), np.maximum(block, np.float32(2.0**-9)))
    multiplier = block * level_two
    codes = (x / multiplier).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    ours = fake_quantize_weight(weight_OI, weight_scheme("nvfp4"), tensor_amax=amax)
    np.testing.assert_array_equal(tiles(ours.numpy(), "g16"), codes * multiplier)
