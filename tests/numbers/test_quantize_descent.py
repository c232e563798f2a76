"""Descent from the codes of GPTQ: what it costs, on every grid, the same however it is split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from number_cases import WEIGHT_SCHEMES, adversarial_weight, trained_like_weight, weight_scheme
from torch import Tensor

from mofq.exceptions import SchemeError
from mofq.numbers.quantize import (
    Feedback,
    QuantizedWeight,
    dequantize_weight,
    descent,
    factorise_hessian,
    gptq,
    quantize_weight,
    quantize_with_scales,
)
from mofq.numbers.quantize.gptq import DAMPING, factorise_flipped

#: Schemes with room for a rounding; microexponents, four over six and what is stored refuse one.
SCHEMES = [
    name
    for name in WEIGHT_SCHEMES
    if (not name.startswith("mx") or "fp" in name) and not name.endswith("@stored")
]


def hessian(columns: int = 128) -> Tensor:
    """Of correlated inputs, a few channels large, float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator).double() / columns**0.5
    x_TI = torch.randn(4 * columns, columns, generator=generator).double() @ mixing
    x_TI[:, ::17] *= 8
    return x_TI.T @ x_TI


def damped(hessian_II: Tensor) -> Tensor:
    return hessian_II + DAMPING * hessian_II.diagonal().mean() * torch.eye(len(hessian_II))


def quantized(name: str, weight_OI: Tensor, feedback: Feedback) -> QuantizedWeight:
    amax = float(trained_like_weight(64, 128).abs().max())
    return quantize_weight(weight_OI, weight_scheme(name), tensor_amax=amax, feedback=feedback)


@cache
def usual_feedback() -> Feedback:
    return factorise_hessian(hessian(), keep=True)


@cache
def usual(name: str) -> QuantizedWeight:
    """The whole of the usual weight, under the usual Hessian. Not to be changed in place."""
    return quantized(name, trained_like_weight(64, 128), usual_feedback())


def cost_of(
    name: str, weight_OI: Tensor, hessian_II: Tensor, found: QuantizedWeight | None = None
) -> Tensor:
    """Of each row, under the damped Hessian; of codes that are there already."""
    if found is None:
        found = quantized(name, weight_OI, factorise_hessian(hessian_II, keep=True))
    change_OI = (dequantize_weight(found, weight_scheme(name)) - weight_OI).double()
    return ((change_OI @ damped(hessian_II)) * change_OI).sum(1)


def descended(
    weight_OI: Tensor, codes_OI: Tensor, scale_OG: Tensor, hessian_II: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The same descent in numpy: for each group its scale, then its codes, all in float64."""
    h, w = damped(hessian_II).numpy(), weight_OI.double().numpy()
    codes, scales = codes_OI.double().numpy().copy(), scale_OG.double().numpy().copy()
    size = w.shape[1] // scales.shape[1]

    def pull(columns: object) -> np.ndarray:
        return ((w - codes * scales.repeat(size, 1)) @ h)[:, columns]  # type: ignore[index]

    for _ in range(descent.SWEEPS):
        for group in range(scales.shape[1]):
            own = slice(group * size, (group + 1) * size)
            values, gain = codes[:, own], (pull(own) * codes[:, own]).sum(1)
            curve = ((values @ h[own, own]) * values).sum(1)
            wanted = scales[:, group] + gain / curve
            stored = wanted.astype(ml_dtypes.bfloat16).astype(np.float64)
            step = stored - scales[:, group]
            better = step * step * curve - 2 * step * gain < 0
            scales[better, group] = stored[better]
            for j in range(own.start, own.stop):
                wish = codes[:, j] * scales[:, group] + pull(j) / h[j, j]
                codes[:, j] = np.clip(np.round(wish / scales[:, group]), -8, 7)
    return codes, scales


def test_codes_and_scales_are_those_of_a_descent_that_is_written_out() -> None:
    weight_OI, hessian_II = trained_like_weight(64, 128), hessian()
    feedback = factorise_hessian(hessian_II, keep=True)
    begun = quantized("int4.g32@mse~gptq", weight_OI, feedback)
    found = quantized("int4.g32@mse~descent", weight_OI, feedback)
    assert begun.scale is not None
    assert found.scale is not None
    codes, scales = descended(weight_OI, begun.codes_OI, begun.scale, hessian_II)
    # 22 bits against float64: a tie may fall to the other side, once in a while.
    assert (found.codes_OI.numpy() != codes).mean() < 0.01
    assert (found.scale.double().numpy() != scales).mean() < 0.02
    assert (found.codes_OI != begun.codes_OI).double().mean() > 0.05  # it went somewhere
    assert (found.scale != begun.scale).double().mean() > 0.5


@pytest.mark.parametrize("name", SCHEMES)
def test_no_row_costs_more_than_it_did_and_all_cost_less(name: str) -> None:
    weight_OI, hessian_II = trained_like_weight(64, 128), hessian()
    before_O, after_O = (
        cost_of(fitted, weight_OI, hessian_II, usual(fitted))
        for fitted in (f"{name}~gptq", f"{name}~descent")
    )
    # A block's rows share a scale that stays, and every row goes down by itself all the same.
    assert bool((after_O <= before_O * (1 + 1e-6)).all())
    assert float(after_O.sum()) < 0.95 * float(before_O.sum())


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_have_the_same_codes_in_any_block(name: str) -> None:
    whole = usual(f"{name}~descent")
    part = quantized(f"{name}~descent", trained_like_weight(64, 128)[32:], usual_feedback())
    assert torch.equal(whole.codes_OI[32:], part.codes_OI)
    if whole.scale is not None and part.scale is not None and len(whole.scale) > 1:
        assert torch.equal(whole.scale[-len(part.scale) :], part.scale)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_what_their_scales_make_of_the_result(name: str) -> None:
    scheme = weight_scheme(f"{name}~descent")
    found = usual(f"{name}~descent")
    again = quantize_with_scales(
        dequantize_weight(found, scheme),
        scheme,
        scale=found.scale,
        zero_point=found.zero_point,
        global_scale=found.global_scale,
    )
    assert torch.equal(again, found.codes_OI)


@pytest.mark.parametrize("name", ["int4.g32@mse", "int4.channel", "fp4_e2m1.g32"])
def test_the_largest_floats_stay_finite(name: str) -> None:
    weight_OI, scheme = adversarial_weight(), weight_scheme(f"{name}~descent")
    found = quantize_weight(weight_OI, scheme, feedback=factorise_hessian(hessian(), keep=True))
    assert bool(torch.isfinite(dequantize_weight(found, scheme)).all())


@pytest.mark.long
def test_wide_groups_and_groups_of_odd_sizes_go_down_too() -> None:
    weight_OI, hessian_II = trained_like_weight(16, 600), hessian(600)
    for name in ("int4.channel", "int4.g300", "int4.g200", "int4.g24"):
        before, after = (
            float(cost_of(f"{name}~{rounding}", weight_OI, hessian_II).sum())
            for rounding in ("gptq", "descent")
        )
        assert after < 0.95 * before


def test_the_size_of_the_hessian_and_the_number_of_threads_do_not_matter() -> None:
    weight_OI, hessian_II = trained_like_weight(64, 128), hessian()
    expected = quantized(
        "int4.g32@nats~descent", weight_OI, factorise_hessian(hessian_II, keep=True)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        other = factorise_hessian(hessian_II * 2.0**140, keep=True)
        found = quantized("int4.g32@nats~descent", weight_OI, other)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.codes_OI, expected.codes_OI)


def test_the_hessian_that_is_kept_is_the_damped_one_also_of_a_wide_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hessian_II = hessian(320)
    kept_II = factorise_hessian(hessian_II, keep=True).hessian_II
    assert kept_II is not None
    expected_II = damped(hessian_II)
    largest_I = expected_II.abs().amax(0)
    ratio = 2.0 ** round(np.log2(float(kept_II[5, 5]) / float(expected_II[5, 5])))
    assert float(((kept_II.double() / ratio - expected_II).abs() / largest_I).max()) < 2**-21
    monkeypatch.setattr(gptq, "_WIDE", 1)
    monkeypatch.setattr(gptq, "_TILE", 96)
    # What lies above the diagonal is not read.
    flipped_II = hessian_II.flip(0, 1).tril() + torch.full((320, 320), torch.nan).triu(1)
    with ThreadPoolExecutor(4) as threads:

        def side_by_side(work: Iterable[Callable[[], None]]) -> None:
            list(threads.map(lambda one: one(), work))

        wide = factorise_flipped(flipped_II, run_all=side_by_side, keep=True)
    assert wide.hessian_II is not None
    assert torch.equal(wide.hessian_II, kept_II)


def test_an_expert_that_no_token_reached_is_rounded_to_nearest() -> None:
    weight_OI = trained_like_weight(64, 128)
    feedback = factorise_hessian(torch.zeros(128, 128).double(), keep=True)
    found = quantized("int4.channel~descent", weight_OI, feedback)
    assert torch.equal(
        found.codes_OI, quantize_weight(weight_OI, weight_scheme("int4.channel")).codes_OI
    )


def test_it_is_refused_without_the_hessian_itself() -> None:
    with pytest.raises(SchemeError, match="needs the Hessian itself"):
        quantized("int4.g32~descent", trained_like_weight(64, 128), factorise_hessian(hessian()))
