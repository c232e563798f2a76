"""Scales: each rule against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from number_cases import adversarial_weight, quantized, trained_like_weight, weight_scheme

from mofq.numbers.quantize import QuantizedWeight, dequantize_weight, quantize_weight


def one_row(name: str, *numbers: float, amax: float | None = None) -> QuantizedWeight:
    return quantized(name, torch.tensor([numbers], dtype=torch.float32), amax=amax)


def scale_of(q: QuantizedWeight) -> float:
    assert q.scale is not None
    return q.scale.reshape(-1)[0].item()


@pytest.mark.parametrize(
    ("name", "numbers", "scale", "codes"),
    [
        # 7 = 7 * 1; 2.5 and 3.5 are ties.
        ("int4.channel", (7.0, 2.5, 3.5, -7.0, 0.4), 1.0, [7, 2, 4, -7, 0]),
        ("int2.channel", (2.0, 1.0, -1.1, 0.9), 2.0, [1, 0, -1, 0]),
        ("int8.channel", (-254.0, 1.0, 3.0), 2.0, [-127, 0, 2]),
        # The largest magnitude is -8's, whatever its sign.
        ("int4.channel@fullrange", (-8.0, 7.0, 1.0), 1.0, [-8, 7, 1]),
        ("int4.channel@fullrange", (8.0, -7.0, 1.0), -1.0, [-8, 7, -1]),
        ("int4.channel@fullrange", (8.0, -8.0, 1.0), -1.0, [-8, 7, -1]),
        ("int4.channel@fullrange", (-8.0, 8.0, 1.0), 1.0, [-8, 7, 1]),
        ("int2.channel@fullrange", (1.0, -4.0, 2.2), 2.0, [0, -2, 1]),
        # 15 steps from 0 to 7.5; all positive: the range still holds 0.
        ("int4.channel.asym", (7.5, 5.0, 0.25), 0.5, [15, 10, 0]),
        ("int4.channel.asym", (-7.5, -5.0), 0.5, [0, 5]),
        ("int4.channel.asym", (-2.0, 5.5, 0.0), 0.5, [0, 15, 4]),
        # 448 is E4M3's largest; 17 and 19 are ties between 16, 18, 20.
        ("fp8_e4m3.channel", (896.0, 34.0, 38.0, -2.0), 2.0, [448, 16, 20, -1]),
        ("fp8_e5m2.channel", (57344.0, 9.0, 11.0), 1.0, [57344, 8, 12]),
        ("fp4_e2m1.channel", (12.0, 1.5, 2.5, -7.0), 2.0, [6, 1, 1, -4]),
        ("fp4_e2m1_ieee.channel", (12.0, 5.0, 7.0), 4.0, [3, 1, 2]),
        ("fp6_e3m2.channel", (28.0, 4.5, 5.5), 1.0, [28, 4, 6]),
        ("fp6_e2m3.channel", (7.5, 2.125, 2.375), 1.0, [7.5, 2, 2.5]),
        ("nf4.channel", (2.0, -2.0, 0.0, 0.2), 2.0, [15, 0, 7, 8]),
        # OCP: floor(log2(7)) - 2 = 0, so 7 saturates; the ceiling rule takes 2 instead.
        ("fp4_e2m1.channel.s-e8m0", (7.0, 2.5), 1.0, [6, 2]),
        ("fp4_e2m1.channel.s-e8m0ceil", (7.0, 2.5), 2.0, [4, 1]),
        ("fp4_e2m1.channel.s-e8m0ceil", (6.0, 2.5), 1.0, [6, 2]),
        ("fp4_e2m1.channel.s-e8m0ceil", (0.75, 0.5), 0.125, [6, 4]),
        ("fp8_e4m3.channel.s-e8m0", (511.0, 1.0), 1.0, [448, 1]),
        ("fp8_e4m3.channel.s-e8m0ceil", (511.0, 2.0), 2.0, [256, 1]),
        # MXINT8: floor(log2(127)) is 6, so 127.9 at scale 1 saturates.
        ("int8.channel.s-e8m0", (127.9, 1.5), 1.0, [127, 2]),
        ("int8.channel.s-e8m0", (-1.0, 0.5), 2.0**-6, [-64, 32]),
    ],
)
def test_a_scale_by_hand(
    name: str, numbers: tuple[float, ...], scale: float, codes: list[float]
) -> None:
    q = one_row(name, *numbers)
    assert scale_of(q) == scale
    assert q.codes_OI.tolist() == [codes]


def test_zero_points_by_hand() -> None:
    q = one_row("int4.channel.asym", -2.0, 5.5, 0.0)
    assert q.zero_point is not None
    assert q.zero_point.tolist() == [[4]]
    # 0.9 / 0.1 falls on 9 of 15 and covers the range; 0 is exactly the zero point.
    q = one_row("int8.channel.asym.s-f32", -0.9, 1.65)
    assert q.zero_point is not None
    assert q.zero_point.tolist() == [[90]]
    assert dequantize_weight(q, weight_scheme("int8.channel.asym.s-f32"))[0, 0] == pytest.approx(
        -0.9, rel=1e-6
    )


def test_bf16_scales_round_to_the_nearest_and_f32_scales_do_not() -> None:
    exact = torch.tensor(1.0) / 7
    assert scale_of(one_row("int4.channel.s-f32", 1.0)) == exact.item()
    assert scale_of(one_row("int4.channel", 1.0)) == exact.to(torch.bfloat16).item()


def test_two_level_scales_by_hand() -> None:
    # The global scale maps the tensor's 2688 = 448 * 6 to 1; groups have 6 * scale.
    q = quantized(
        "nvfp4", torch.tensor([[2688.0] + [0.0] * 15 + [6.0, 3.0] + [0.0] * 14 + [102.0] * 16])
    )
    assert q.global_scale == 1
    # 102 / 6 = 17 is a tie of E4M3 between 16 and 18.
    assert q.scale is not None
    assert q.scale.tolist() == [[448.0, 1.0, 16.0]]
    assert q.codes_OI[0, [0, 16, 17, 32]].tolist() == [6.0, 6.0, 3.0, 6.0]


def test_two_level_integer_scales_use_the_largest_integer() -> None:
    q = one_row("int4.g16.s-e4m3", *([7.0] + [1.0] * 15), amax=448.0 * 7)
    assert (q.global_scale, scale_of(q)) == (1.0, 1.0)
    q = one_row("int4.g16.s-e4m3@fullrange", *([8.0] + [1.0] * 15), amax=448.0 * 7)
    assert (q.global_scale, scale_of(q)) == (1.0, -1.0)


def test_a_two_level_scale_multiplies_before_it_divides_as_modelopt_does() -> None:
    # 62 * 448 / 896 = 31, a tie of E4M3 between 30 and 32; 62 / 6 / global falls below it.
    assert scale_of(one_row("nvfp4", *([62.0] + [0.0] * 15), amax=896.0)) == 32.0


def test_the_first_of_two_largest_in_a_block_is_found_row_by_row() -> None:
    plus_first = torch.tensor([[1.0, 8.0], [-8.0, 1.0]])
    for weight_OI, scale in ((plus_first, -1.0), (-plus_first, 1.0), (plus_first.T, 1.0)):
        assert scale_of(quantized("int4.block2@fullrange", weight_OI.contiguous())) == scale


def test_the_global_scale_comes_from_the_given_amax_alone() -> None:
    row = [6.0] + [1.0] * 15
    q = one_row("nvfp4", *row, amax=5376.0)
    assert (q.global_scale, scale_of(q)) == (2.0, 0.5)
    # Larger than the amax says: the group's scale saturates at 448, the element at 6.
    q = one_row("nvfp4", *row, amax=1.0)
    assert scale_of(q) == 448.0
    assert q.codes_OI[0, 0] == 6.0


def test_a_two_level_scale_that_would_underflow_is_the_smallest_e4m3() -> None:
    row = torch.tensor([[1e6] * 16 + [1e-6] * 16 + [0.0] * 16])
    q = quantized("nvfp4", row)
    assert q.scale is not None
    assert q.scale.tolist() == [[448.0, 2.0**-9, 1.0]]
    assert dequantize_weight(q, weight_scheme("nvfp4"))[0, 16:].tolist() == [0.0] * 32


def test_a_tensor_scale_comes_from_the_given_amax_alone() -> None:
    q = one_row("int8.tensor", 1.0, 0.5, amax=127.0)
    assert scale_of(q) == 1.0
    assert q.codes_OI.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(2.0**-126, 2.0**-126), (2.0**-149, 2.0**-126), (1e-40, 2.0**-126), (0.0, 1.0)],
)
def test_no_scale_is_subnormal_and_only_zeros_have_scale_one(largest: float, scale: float) -> None:
    for name in ("int4.channel", "int4.channel.s-f32", "fp8_e4m3.channel", "mxfp4", "nf4.channel"):
        assert scale_of(one_row(name, largest, *([0.0] * 31))) == scale
    negative = one_row("int4.channel@fullrange", largest, 0.0)
    assert abs(scale_of(negative)) == scale


def test_unscaled_rounds_the_numbers_themselves_and_saturates() -> None:
    q = one_row("fp8_e4m3.unscaled", 1e6, 17.0, 19.0, 2.0**-10, 1.5 * 2.0**-9, -0.01)
    assert q.scale is None
    assert q.codes_OI.tolist() == [[448.0, 16.0, 20.0, 0.0, 2.0**-8, -0.009765625]]


def test_every_granularity_is_the_channel_rule_on_its_own_tiles() -> None:
    weight_OI = adversarial_weight(64, 128)
    groups = quantized("int4.g32@fullrange", weight_OI)
    rows = quantized("int4.channel@fullrange", weight_OI.reshape(-1, 32))
    assert groups.scale is not None
    assert rows.scale is not None
    assert torch.equal(groups.codes_OI.reshape(-1, 32), rows.codes_OI)
    assert torch.equal(groups.scale.reshape(-1, 1), rows.scale)

    blocks = quantized("int4.block16x32@fullrange", weight_OI)
    tiles = weight_OI.reshape(4, 16, 4, 32).transpose(1, 2).reshape(16, 16 * 32)
    rows = quantized("int4.channel@fullrange", tiles)
    assert blocks.scale is not None
    assert rows.scale is not None
    assert torch.equal(blocks.scale.reshape(-1, 1), rows.scale)
    codes = blocks.codes_OI.reshape(4, 16, 4, 32).transpose(1, 2).reshape(16, 16 * 32)
    assert torch.equal(codes, rows.codes_OI)


@pytest.mark.parametrize("name", ["int8.channel", "fp8_e4m3.channel", "fp4_e2m1.g32", "nf4.g32"])
def test_a_power_of_two_moves_into_the_scale(name: str) -> None:
    weight_OI = trained_like_weight()
    plain, scaled = quantized(name, weight_OI), quantized(name, weight_OI * 2.0**20)
    assert torch.equal(plain.codes_OI, scaled.codes_OI)
    assert plain.scale is not None
    assert scaled.scale is not None
    assert torch.equal(plain.scale * 2.0**20, scaled.scale)


def test_an_infinite_extent_of_an_asymmetric_group_saturates() -> None:
    largest = torch.finfo(torch.float32).max
    weight_OI = torch.tensor([[largest, -largest, 0.0, 1.0]])
    q = quantize_weight(weight_OI, weight_scheme("int4.channel.asym"))
    fake_OI = dequantize_weight(q, weight_scheme("int4.channel.asym"))
    assert fake_OI.isfinite().all()
    assert fake_OI[0, 2:].tolist() == [0.0, 0.0]
