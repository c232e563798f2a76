"""Quantized weights: what is stored, what comes back, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from number_cases import (
    WEIGHT_SCHEMES,
    adversarial_weight,
    all_code_values,
    multipliers,
    quantized,
    spread,
    trained_like_weight,
    weight_scheme,
)

from mofq.exceptions import SchemeError
from mofq.numbers.quantize import (
    QuantizedWeight,
    dequantize_weight,
    fake_quantize_weight,
    quantize_weight,
)
from mofq.numbers.quantize.tiles import row_blocks

WEIGHTS = {"trained-like": trained_like_weight(), "adversarial": adversarial_weight()}


def assert_same(ours: QuantizedWeight, theirs: QuantizedWeight) -> None:
    for a, b in (
        (ours.codes_OI, theirs.codes_OI),
        (ours.scale, theirs.scale),
        (ours.zero_point, theirs.zero_point),
        (ours.global_scale, theirs.global_scale),
    ):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("weight_name", WEIGHTS)
@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_no_other_code_is_nearer(name: str, weight_name: str) -> None:
    weight_OI, scheme = WEIGHTS[weight_name], weight_scheme(name)
    q = quantized(name, weight_OI)
    multiplier_OI = multipliers(q, scheme)
    error_OI = (dequantize_weight(q, scheme).double() - weight_OI.double()).abs()
    if scheme.symmetric:
        values = all_code_values(scheme)
    else:
        values = torch.arange(1 - 2**8, 2**8).double()
    best_OI = torch.full_like(error_OI, math.inf)
    for value in values:
        distance_OI = (value * multiplier_OI - weight_OI.double()).abs()
        if not scheme.symmetric:
            assert q.zero_point is not None
            code_OI = value + spread(q.zero_point, weight_OI).double()
            distance_OI[(code_OI < 0) | (code_OI >= 2**scheme.element.bits)] = math.inf
        best_OI = torch.minimum(best_OI, distance_OI)
    # The float32 division, sum and product each round once.
    slack_OI = 2.0**-22 * (weight_OI.abs().double() + multiplier_OI.abs() * scheme.element.max)
    assert (error_OI <= best_OI + slack_OI).all()


@pytest.mark.parametrize("weight_name", WEIGHTS)
@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_nothing_finite_becomes_infinite_or_nan(name: str, weight_name: str) -> None:
    q = quantized(name, WEIGHTS[weight_name])
    assert dequantize_weight(q, weight_scheme(name)).isfinite().all()
    for scale in (q.scale, q.global_scale):
        assert scale is None or (scale.isfinite().all() and (scale != 0).all())


@pytest.mark.parametrize("rows", [128, 256])
def test_a_block_of_128_rows_has_one_scale_however_wide_the_matrix_is(rows: int) -> None:
    # Wider than what is worked on at a time, which is then less than one block.
    weight_OI = trained_like_weight(rows, 2048)
    q = quantize_weight(weight_OI, weight_scheme("fp8_e4m3.block128.s-f32"))
    amax_AG = weight_OI.abs().unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).amax((1, 3))
    assert q.scale is not None
    assert torch.equal(q.scale, amax_AG / 448)


@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_blocks_of_rows_give_the_codes_and_scales_of_the_whole(name: str) -> None:
    weight_OI, scheme = adversarial_weight(), weight_scheme(name)
    amax = float(weight_OI.abs().max())
    whole = quantize_weight(weight_OI, scheme, tensor_amax=amax)
    parts = [
        quantize_weight(weight_OI[start : start + 32], scheme, tensor_amax=amax)
        for start in (0, 32)
    ]
    scales = [part.scale for part in parts if part.scale is not None]
    points = [part.zero_point for part in parts if part.zero_point is not None]
    one_scale = scheme.granularity.kind == "tensor"
    joined = QuantizedWeight(
        torch.cat([part.codes_OI for part in parts]),
        torch.cat(scales[:1] if one_scale else scales) if scales else None,
        torch.cat(points) if points else None,
        parts[0].global_scale,
    )
    assert_same(joined, whole)
    assert_same(parts[1], quantize_weight(weight_OI[32:].clone(), scheme, tensor_amax=amax))


def test_a_weight_of_many_chunks_is_quantized_like_its_rows() -> None:
    weight_OI = trained_like_weight(1040, 320)
    for name in ("int4.g32@fullrange", "int8.tensor", "int4.block16", "int4.g32.asym"):
        scheme = weight_scheme(name)
        amax = float(weight_OI.abs().max())
        whole = quantize_weight(weight_OI, scheme, tensor_amax=amax)
        last = quantize_weight(weight_OI[1024:], scheme, tensor_amax=amax)
        assert torch.equal(whole.codes_OI[1024:], last.codes_OI)
        dequantized_OI = dequantize_weight(whole, scheme)
        assert torch.equal(dequantized_OI[1024:], dequantize_weight(last, scheme))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_that_holds_the_weight_does_not_matter(dtype: torch.dtype) -> None:
    weight_OI = trained_like_weight().to(torch.float16).to(torch.bfloat16)
    for name in ("int4.g32", "nvfp4", "fp8_e4m3.channel"):
        assert_same(quantized(name, weight_OI.to(dtype)), quantized(name, weight_OI.float()))


@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_fake_quantize_is_quantize_and_dequantize_in_every_bit(name: str) -> None:
    weight_OI, scheme = adversarial_weight(), weight_scheme(name)
    amax = float(weight_OI.abs().max())
    fake_OI = fake_quantize_weight(weight_OI, scheme, tensor_amax=amax)
    both_OI = dequantize_weight(quantize_weight(weight_OI, scheme, tensor_amax=amax), scheme)
    assert fake_OI.dtype == torch.float32
    assert torch.equal(fake_OI.view(torch.int32), both_OI.view(torch.int32))


@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_zeros_stay_zeros_under_scale_one(name: str) -> None:
    scheme = weight_scheme(name)
    q = quantize_weight(torch.zeros(32, 64), scheme, tensor_amax=0.0)
    assert torch.equal(dequantize_weight(q, scheme), torch.zeros(32, 64))
    assert q.scale is None or (q.scale == 1).all()
    assert q.global_scale is None or q.global_scale == 1
    assert q.zero_point is None or (q.zero_point == 0).all()


@pytest.mark.parametrize(
    ("name", "codes", "scale", "shape"),
    [
        ("int8.channel", torch.int8, torch.bfloat16, (64, 1)),
        ("int8.tensor.s-f32", torch.int8, torch.float32, (1, 1)),
        ("int4.g32", torch.int8, torch.bfloat16, (64, 4)),
        ("int4.g32.asym", torch.uint8, torch.bfloat16, (64, 4)),
        ("int4.block16x32", torch.int8, torch.bfloat16, (4, 4)),
        ("fp8_e4m3.channel", torch.float32, torch.bfloat16, (64, 1)),
        ("nf4.g64", torch.uint8, torch.bfloat16, (64, 2)),
        ("mxfp4", torch.float32, torch.float32, (64, 4)),
        ("nvfp4", torch.float32, torch.float32, (64, 8)),
    ],
)
def test_codes_and_scales_have_the_dtype_and_shape_that_is_stored(
    name: str, codes: torch.dtype, scale: torch.dtype, shape: tuple[int, int]
) -> None:
    q = quantized(name, trained_like_weight())
    assert q.scale is not None
    assert (q.codes_OI.dtype, q.scale.dtype, tuple(q.scale.shape)) == (codes, scale, shape)
    assert (q.zero_point is not None) == (".asym" in name)
    assert q.zero_point is None or tuple(q.zero_point.shape) == shape
    assert (q.global_scale is not None) == (name == "nvfp4")


@pytest.mark.parametrize(
    ("bits", "rule"), [(b, r) for b in range(2, 9) for r in ("", "@fullrange")]
)
def test_integer_codes_stay_in_their_range_and_reach_its_end(bits: int, rule: str) -> None:
    codes_OI = quantized(f"int{bits}.g32{rule}", trained_like_weight(256, 128)).codes_OI
    high = 2 ** (bits - 1) - 1
    assert codes_OI.min().item() == (-high - 1 if rule else -high)
    assert codes_OI.max().item() == high


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_place(bad: float) -> None:
    weight_OI = trained_like_weight(4, 64)
    weight_OI[2, 7] = bad
    for name in ("int4.g32", "fp8_e4m3.unscaled", "nf4.channel"):
        with pytest.raises(SchemeError, match=r"model\.up_proj: .*at \[2, 7\]"):
            quantize_weight(weight_OI, weight_scheme(name), name="model.up_proj")


def test_the_place_of_a_bad_weight_counts_from_the_first_row() -> None:
    weight_OI = trained_like_weight(3000, 64)
    weight_OI[2999, 63] = math.nan
    with pytest.raises(SchemeError, match=r"found nan at \[2999, 63\]"):
        quantize_weight(weight_OI, weight_scheme("int4.g32"))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("int4.g96", (8, 128), "columns divisible by 96, got 128"),
        ("int4.block16x32", (24, 64), "rows divisible by 16, got 24"),
        ("int4.block16x32", (32, 48), "columns divisible by 32, got 48"),
        ("int4.g32", (0, 32), "at least one element"),
        ("int4.channel", (3, 0), "at least one element"),
        ("int4.g32", (32,), "floating-point matrix"),
        ("int4.g32", (2, 2, 32), "floating-point matrix"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_by_name(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(SchemeError, match=r"^layer: ") as caught:
        quantize_weight(torch.zeros(shape), weight_scheme(name), name="layer")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int8.tensor", "needs `tensor_amax`"),
        ("nvfp4", "needs `tensor_amax`"),
        ("int4.g32@nats", "weighs errors by `importance`"),
        ("int4.g32~gptq", "need calibration statistics"),
    ],
)
def test_what_a_scheme_needs_beyond_the_weight_is_asked_for(name: str, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        quantize_weight(torch.ones(2, 32), weight_scheme(name))


def test_integer_weights_are_not_quantized_again() -> None:
    with pytest.raises(SchemeError, match=r"torch\.int8"):
        quantize_weight(torch.ones(2, 32, dtype=torch.int8), weight_scheme("int4.g32"))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(WEIGHT_SCHEMES),
    data=hnp.arrays(
        "float32",
        (32, 64),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
        fill=st.just(0.0),
    ),
)
def test_any_finite_weight_stays_finite_and_never_changes_sign(name: str, data: object) -> None:
    weight_OI, scheme = torch.from_numpy(data), weight_scheme(name)  # type: ignore[arg-type]
    amax = float(weight_OI.abs().max())
    fake_OI = fake_quantize_weight(weight_OI, scheme, tensor_amax=amax)
    assert fake_OI.isfinite().all()
    assert (fake_OI.double() * weight_OI.double() >= 0).all()


@pytest.mark.parametrize(
    ("elements", "tile_rows", "expected"),
    [
        (12, 1, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (12, 2, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]),
        (1, 1, [(row, row + 1) for row in range(10)]),
        (1, 8, [(0, 8), (8, 10)]),
        (28, 0, [(0, 7), (7, 10)]),
        (1000, 4, [(0, 10)]),
    ],
)
def test_blocks_of_rows_are_bounded_and_cut_no_tile(
    elements: int, tile_rows: int, expected: list[tuple[int, int]]
) -> None:
    assert list(row_blocks(10, 4, elements=elements, tile_rows=tile_rows)) == expected
