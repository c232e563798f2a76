"""Element formats: every value, every tie, against ml_dtypes and tables written by hand."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch

from mofq.numbers.formats import (
    ELEMENT_FORMATS,
    FP4_E2M1,
    FP4_E2M1_IEEE,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    INT4,
    INT8,
    NF4,
    SCALE_FORMATS,
    ElementFormat,
    FloatFormat,
    IntFormat,
)
from mofq.numbers.quantize import round_to_format
from mofq.numbers.quantize.rounding import (
    codebook_values,
    nearest_code,
    power_of_two_floor,
    round_to_bfloat16,
)

ML_DTYPES = {
    FP8_E4M3: ml_dtypes.float8_e4m3fn,
    FP8_E5M2: ml_dtypes.float8_e5m2,
    FP6_E3M2: ml_dtypes.float6_e3m2fn,
    FP6_E2M3: ml_dtypes.float6_e2m3fn,
    FP4_E2M1: ml_dtypes.float4_e2m1fn,
}
#: name: exponent bits, mantissa bits, bias, largest finite (OCP OFP8, OCP MX v1.0 tables).
FLOATS = {
    "fp8_e4m3": (4, 3, 7, 448.0),
    "fp8_e5m2": (5, 2, 15, 57344.0),
    "fp6_e3m2": (3, 2, 3, 28.0),
    "fp6_e2m3": (2, 3, 1, 7.5),
    "fp4_e2m1": (2, 1, 1, 6.0),
    "fp4_e2m1_ieee": (2, 1, 1, 3.0),
}
SPECIALS = [0.0, 1e-45, 2.0**-149, 2.0**-127, 2.0**-126, 1.1754942e-38, 3.4028235e38, math.inf]


def values_of(element: FloatFormat) -> list[float]:
    """All non-negative finite values, from the formula in the class's docstring."""
    values = []
    for e in range(2**element.exponent_bits):
        for m in range(2**element.mantissa_bits):
            significand = Fraction(m, 2**element.mantissa_bits) + min(e, 1)
            value = float(significand * Fraction(2) ** (max(e, 1) - element.bias))
            if value <= element.max:
                values.append(value)
    return values


def all_values_of_ml_dtype(dtype: type) -> np.ndarray:
    bits = ml_dtypes.finfo(dtype).bits
    return np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float32)


def near_every_tie(element: FloatFormat) -> torch.Tensor:
    """Every value, every midpoint, and both float32 neighbours of each, with both signs."""
    values = np.array(values_of(element), dtype=np.float32)
    midpoints = (values[1:] + values[:-1]) / 2
    assert (midpoints.astype(np.float64) * 2 == values[1:].astype(np.float64) + values[:-1]).all()
    points = np.concatenate([values, midpoints, np.array(SPECIALS, dtype=np.float32)])
    x = torch.from_numpy(np.concatenate([points, -points]))
    neighbours = [torch.nextafter(x, torch.full_like(x, way)) for way in (-math.inf, math.inf)]
    return torch.cat([x, *neighbours])


def test_the_constants_are_those_of_the_standards() -> None:
    found = {
        f.name: (f.exponent_bits, f.mantissa_bits, f.bias, f.max)
        for f in ELEMENT_FORMATS.values()
        if isinstance(f, FloatFormat)
    }
    assert found == FLOATS


def test_every_format_is_listed_under_its_own_name() -> None:
    assert all(element.name == name for name, element in ELEMENT_FORMATS.items())
    assert all(scale.name == name for name, scale in SCALE_FORMATS.items())
    assert {name: f.bits for name, f in ELEMENT_FORMATS.items()} == {
        **{f"int{bits}": bits for bits in range(2, 9)},
        **{"fp8_e4m3": 8, "fp8_e5m2": 8, "fp6_e3m2": 6, "fp6_e2m3": 6},
        **{"fp4_e2m1": 4, "fp4_e2m1_ieee": 4, "nf4": 4},
    }


def test_scale_formats_have_the_bits_that_are_stored() -> None:
    assert {name: (s.bits, s.global_scale_bits) for name, s in SCALE_FORMATS.items()} == {
        "bf16": (16, 0),
        "f32": (32, 0),
        "e8m0": (8, 0),
        "e8m0ceil": (8, 0),
        "micro16": (1, 0),
        "e4m3": (8, 32),
    }


@pytest.mark.parametrize("element", ML_DTYPES, ids=lambda f: f.name)
def test_the_values_of_a_float_format_are_those_of_ml_dtypes(element: FloatFormat) -> None:
    theirs = all_values_of_ml_dtype(ML_DTYPES[element])
    theirs = sorted(set(theirs[np.isfinite(theirs) & (theirs >= 0)].tolist()))
    assert values_of(element) == theirs
    assert ml_dtypes.finfo(ML_DTYPES[element]).max == element.max


@pytest.mark.parametrize("element", ML_DTYPES, ids=lambda f: f.name)
def test_every_value_tie_and_neighbour_rounds_as_in_ml_dtypes(element: FloatFormat) -> None:
    x = near_every_tie(element)
    # ml_dtypes makes NaN or Inf of what is too large in FP8; ours saturates.
    inside = np.clip(x.numpy(), -element.max, element.max)
    expected = inside.astype(ML_DTYPES[element]).astype(np.float32)
    ours = round_to_format(x, element).numpy()
    np.testing.assert_array_equal(ours.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("element", ML_DTYPES, ids=lambda f: f.name)
def test_a_sweep_of_float32_bit_patterns_rounds_as_in_ml_dtypes(element: FloatFormat) -> None:
    patterns = np.arange(-(2**31), 2**31, 3571, dtype=np.int64).astype(np.int32)
    x = patterns.view(np.float32)
    x = x[np.isfinite(x)]
    inside = np.clip(x, -element.max, element.max)
    expected = inside.astype(ML_DTYPES[element]).astype(np.float32)
    ours = round_to_format(torch.from_numpy(x), element).numpy()
    np.testing.assert_array_equal(ours.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(
    ("x", "nearest"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)],
)
def test_every_e2m1_tie_goes_to_the_even_code(x: float, nearest: float) -> None:
    assert round_to_format(torch.tensor([x, -x]), FP4_E2M1).tolist() == [nearest, -nearest]


@pytest.mark.parametrize(
    ("x", "nearest"),
    [
        (0.25, 0.0),
        (0.75, 1.0),
        (1.25, 1.0),
        (1.75, 2.0),
        (2.5, 2.0),
        (2.6, 3.0),
        (3.5, 3.0),
        (9.0, 3.0),
    ],
)
def test_the_ieee_like_e2m1_ends_at_three(x: float, nearest: float) -> None:
    assert round_to_format(torch.tensor([x, -x]), FP4_E2M1_IEEE).tolist() == [nearest, -nearest]
    assert values_of(FP4_E2M1_IEEE) == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    assert values_of(FP4_E2M1) == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("element", list(ELEMENT_FORMATS.values()), ids=lambda f: f.name)
def test_infinities_saturate_and_a_nan_stays(element: ElementFormat) -> None:
    expected = [float(element.max), -float(element.max)]
    assert round_to_format(torch.tensor([math.inf, -math.inf]), element).tolist() == expected
    assert round_to_format(torch.tensor([1e30, -1e30]), element).tolist() == expected
    if element is not NF4:  # every comparison with a NaN is false: a codebook has no code for it
        assert round_to_format(torch.tensor([math.nan]), element).isnan().all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_round_ties_to_even_and_saturate_symmetrically(bits: int) -> None:
    element = ELEMENT_FORMATS[f"int{bits}"]
    assert isinstance(element, IntFormat)
    largest = 2 ** (bits - 1) - 1
    assert element.max == largest
    halves = [i / 2 for i in range(-4 * largest, 4 * largest + 1)]
    expected = [float(max(-largest, min(largest, round(h)))) for h in halves]
    assert round_to_format(torch.tensor(halves), element).tolist() == expected


@pytest.mark.parametrize(
    ("x", "code"),
    [(0.5, 0), (1.5, 2), (2.5, 2), (-2.5, -2), (6.5, 6), (7.4, 7), (7.6, 7), (-9, -7)],
)
def test_int4_ties_by_hand(x: float, code: int) -> None:
    assert round_to_format(torch.tensor([x]), INT4).item() == code


def test_nf4_is_the_table_of_its_paper() -> None:
    published = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
        -0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534
        0.16093020141124725 0.24611230194568634 0.33791524171829224 0.44070982933044434
        0.5626170039176941 0.7229568362236023 1.0"""
    assert list(NF4.values) == [float(word) for word in published.split()]


def test_nf4_takes_the_nearest_value_and_of_two_the_lower() -> None:
    values = [Fraction(float(np.float32(value))) for value in NF4.values]
    midpoints = np.array([float(a + b) / 2 for a, b in pairwise(values)])
    points = np.concatenate([midpoints.astype(np.float32), np.linspace(-1.2, 1.2, 4001)])
    points = points.astype(np.float32)
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(2)), np.nextafter(points, np.float32(-2))]
    )
    nearest = [
        float(min(values, key=lambda v, x=Fraction(float(x)): (abs(v - x), v))) for x in points
    ]
    assert round_to_format(torch.from_numpy(points), NF4).tolist() == nearest
    codes = nearest_code(torch.from_numpy(points), NF4)
    assert codebook_values(codes, NF4).tolist() == nearest


def test_scales_round_to_bfloat16_as_ml_dtypes_does() -> None:
    patterns = np.arange(-(2**31), 2**31, 2**12, dtype=np.int64)
    patterns = np.concatenate([patterns, patterns + 1, patterns - 1]).astype(np.int32)
    x = patterns.view(np.float32)
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    x = x[np.abs(x) <= largest]
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    ours = round_to_bfloat16(torch.from_numpy(x))
    np.testing.assert_array_equal(ours.numpy().view(np.int32), expected.view(np.int32))
    assert torch.equal(ours.to(torch.bfloat16).to(torch.float32), ours)


def test_the_power_of_two_below_a_number_is_exact() -> None:
    x = torch.tensor([1.0, 1.999, 2.0, -3.0, 0.75, 2.0**-126, 3.4e38, 0.0, 1e-40])
    below = [1.0, 1.0, 2.0, 2.0, 0.5, 2.0**-126, 2.0**127, 0.0, 0.0]
    assert power_of_two_floor(x).tolist() == below


def test_rounding_takes_any_floating_dtype_and_returns_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rounded = round_to_format(torch.tensor([[1.3, -200.0]], dtype=dtype), INT8)
        assert rounded.dtype == torch.float32
        assert rounded.tolist() == [[1.0, -127.0]]
