"""The scale search: never worse than the plain rules, and the same under any order of work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from number_cases import adversarial_weight, quantized, trained_like_weight, weight_scheme
from torch import Tensor

from mofq.exceptions import SchemeError
from mofq.numbers.quantize import dequantize_weight, quantize_weight, quantize_with_scales

SEARCHED = (
    *(f"int{bits}.g32" for bits in range(2, 9)),
    *("int4.channel", "int4.block16x32", "int4.g16.s-e4m3", "int4.g32.s-f32", "int4.g32.s-e8m0"),
    *("int4.g32.asym", "int8.channel.asym", "fp8_e4m3.channel", "fp6_e2m3.g32", "fp4_e2m1.g32"),
    *("fp4_e2m1.channel", "fp4_e2m1_ieee.g32", "nvfp4", "mxfp4", "mxfp6_e3m2", "nf4.g64"),
    *("fp4_e2m1.g32.s-e8m0ceil",),
)
SIGNED_SCALES = ("int2.g32", "int3.g32", "int4.g32", "int8.channel", "int4.g16.s-e4m3")


def squared_error(name: str, weight_OI: Tensor, *, importance: Tensor | None = None) -> Tensor:
    """Of each tile, float64, weighed where ``importance`` says so."""
    scheme = weight_scheme(name)
    weighted = scheme.scale_rule == "nats"
    q = quantize_weight(
        weight_OI,
        scheme,
        tensor_amax=float(weight_OI.abs().max()),
        importance=importance if weighted else None,
    )
    assert q.scale is not None
    squared_OI = (dequantize_weight(q, scheme).double() - weight_OI.double()) ** 2
    if importance is not None:
        squared_OI = squared_OI * importance.double()
    down, across = q.scale.shape
    rows, columns = weight_OI.shape
    return squared_OI.reshape(down, rows // down, across, columns // across).sum((1, 3))


def assert_never_worse(name: str, plain: str, weight_OI: Tensor) -> None:
    searched, other = squared_error(name, weight_OI), squared_error(plain, weight_OI)
    # The search sums in units of 2**-32 amax**2, and before the product is rounded to float32.
    assert (searched <= other * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", SEARCHED)
def test_the_search_is_never_worse_than_absmax_and_better_on_the_whole(name: str) -> None:
    weight_OI = trained_like_weight(128, 256)
    assert_never_worse(f"{name}@mse", name, weight_OI)
    searched, plain = squared_error(f"{name}@mse", weight_OI), squared_error(name, weight_OI)
    # INT8's own error is almost all rounding, and E8M0 has three candidates.
    assert searched.sum() <= plain.sum() * (1.0 if "int8" in name or "mx" in name else 0.97)


@pytest.mark.parametrize("name", SIGNED_SCALES)
def test_the_search_is_never_worse_than_fullrange(name: str) -> None:
    weight_OI = trained_like_weight(128, 256)
    assert_never_worse(f"{name}@mse", f"{name}@fullrange", weight_OI)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(SIGNED_SCALES),
    data=hnp.arrays("float32", (4, 32), elements=st.floats(-4, 4, width=32)),
)
def test_the_search_is_never_worse_on_any_weight(name: str, data: object) -> None:
    weight_OI = torch.from_numpy(data)  # type: ignore[arg-type]
    assert_never_worse(f"{name}@mse", name, weight_OI)
    assert_never_worse(f"{name}@mse", f"{name}@fullrange", weight_OI)


def test_the_order_of_the_columns_does_not_change_the_scale() -> None:
    weight_OI = trained_like_weight(64, 128)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    for name in ("int4.channel@mse", "fp4_e2m1.channel@mse", "int3.channel.asym@mse"):
        plain, shuffled = quantized(name, weight_OI), quantized(name, weight_OI[:, order])
        assert plain.scale is not None
        assert shuffled.scale is not None
        assert torch.equal(plain.scale, shuffled.scale)
        assert torch.equal(plain.codes_OI[:, order], shuffled.codes_OI)


def test_both_signs_of_a_symmetric_group_tie_exactly_in_any_order() -> None:
    # Each number stands beside its opposite somewhere: -scale is as good as scale, to the last bit
    # of an exact sum, and comes later. A rounded sum would take either.
    half_OI = trained_like_weight(256, 128)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(7))
    q = quantized("int4.channel@mse", torch.cat([half_OI, -half_OI[:, order]], dim=1))
    assert q.scale is not None
    assert (q.scale > 0).all()


def test_among_equal_errors_the_first_candidate_wins() -> None:
    # Every candidate is as good as another on zeros, and absmax is exact here.
    q = quantized("int4.channel@mse", torch.tensor([[7.0, -3.0, 1.0], [0.0, 0.0, 0.0]]))
    assert q.scale is not None
    assert q.scale.tolist() == [[1.0], [1.0]]
    # -8 under scale -7/8 would be exact too, and comes later.
    q = quantized("int4.channel@mse", torch.tensor([[7.0, 0.0, 0.0]]))
    assert (q.scale, q.codes_OI.tolist()) == (1.0, [[7, 0, 0]])
    # -8 … 7 holds this group exactly under one sign alone; plain absmax cannot.
    q = quantized("int4.channel@mse", torch.tensor([[8.0, -7.0, 1.0], [-8.0, 7.0, 1.0]]))
    assert q.scale is not None
    assert q.scale.tolist() == [[-1.0], [1.0]]


def test_fp4_may_map_the_largest_magnitude_to_four() -> None:
    # 4, 3 and 1 are codes; under max -> 6 they are 6, 4.5 and 1.5.
    q = quantized("fp4_e2m1.channel@mse", torch.tensor([[4.0, 3.0, 3.0, 1.0]]))
    assert q.scale is not None
    fake_OI = dequantize_weight(q, weight_scheme("fp4_e2m1.channel@mse"))
    assert q.codes_OI.tolist() == [[4.0, 3.0, 3.0, 1.0]]
    assert fake_OI[0].tolist() == pytest.approx([4.0, 3.0, 3.0, 1.0], rel=0.005)


def test_an_outlier_is_clipped_where_that_pays() -> None:
    weight_OI = torch.cat([torch.full((1, 1), 1.5), torch.linspace(-1, 1, 255)[None]], dim=1)
    plain = quantized("int4.channel", weight_OI)
    searched = quantized("int4.channel@mse", weight_OI)
    assert plain.scale is not None
    assert searched.scale is not None
    assert searched.scale.abs().item() < 0.8 * plain.scale.item()


def test_an_asymmetric_search_clips_both_ends() -> None:
    body_OI = torch.linspace(-1, 1, 1023)[None] ** 3
    for outlier in (-1.6, 1.6):
        weight_OI = torch.cat([torch.full((1, 1), outlier), body_OI], dim=1)
        plain = quantized("int4.channel.asym", weight_OI)
        searched = quantized("int4.channel.asym@mse", weight_OI)
        assert plain.scale is not None
        assert searched.scale is not None
        assert searched.scale.item() < 0.9 * plain.scale.item()


def test_importance_moves_the_search_to_the_columns_that_matter() -> None:
    weight_OI = trained_like_weight(64, 128)
    importance_I = torch.ones(128)
    importance_I[::4] = 1000.0
    kwargs = {"importance": importance_I}
    weighed = squared_error("int4.g32@nats", weight_OI, **kwargs)
    unweighed = squared_error("int4.g32@mse", weight_OI, **kwargs)
    assert (weighed <= unweighed * (1 + 1e-5)).all()
    assert weighed.sum() < 0.9 * unweighed.sum()


def test_equal_importance_changes_nothing_whatever_its_size() -> None:
    weight_OI = trained_like_weight(32, 64)
    plain = quantized("int4.g32@mse", weight_OI)
    for level in (1e-30, 0.0, 5.0):
        for shape in ((64,), (32, 64)):
            importance = torch.full(shape, level)
            q = quantize_weight(weight_OI, weight_scheme("int4.g32@nats"), importance=importance)
            assert torch.equal(q.codes_OI, plain.codes_OI)


def test_importance_of_each_element_follows_its_row() -> None:
    # Many chunks of rows: the last ones must find their own importance.
    weight_OI = trained_like_weight(2100, 128)
    importance_OI = torch.rand(2100, 128, generator=torch.Generator().manual_seed(5)) ** 4
    scheme = weight_scheme("int3.g32.s-e8m0@nats")
    whole = quantize_weight(weight_OI, scheme, importance=importance_OI)
    last = quantize_weight(weight_OI[2000:], scheme, importance=importance_OI[2000:])
    assert torch.equal(whole.codes_OI[2000:], last.codes_OI)


def test_importance_without_the_rule_that_uses_it_is_refused() -> None:
    for name in ("int4.g32@mse", "int4.g32"):
        with pytest.raises(SchemeError, match="weighs errors by `importance`"):
            quantize_weight(
                torch.ones(1, 32), weight_scheme(name), importance=torch.ones(32), name="layer"
            )


def test_the_codes_are_those_of_the_scale_that_won() -> None:
    weight_OI = adversarial_weight()
    for name in ("int4.g32@mse", "nvfp4@mse", "int4.g32.asym@mse", "nf4.g64@mse"):
        q = quantized(name, weight_OI)
        codes_OI = quantize_with_scales(
            weight_OI,
            weight_scheme(name),
            scale=q.scale,
            zero_point=q.zero_point,
            global_scale=q.global_scale,
        )
        assert torch.equal(q.codes_OI, codes_OI)
