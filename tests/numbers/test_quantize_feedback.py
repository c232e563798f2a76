"""Rounding with feedback: GPTQ, on every grid, the same numbers however it is split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch
from number_cases import WEIGHT_SCHEMES, adversarial_weight, trained_like_weight, weight_scheme
from torch import Tensor

from mofq.exceptions import SchemeError
from mofq.numbers.quantize import (
    Feedback,
    dequantize_weight,
    factorise_hessian,
    gptq,
    quantize_weight,
    quantize_with_scales,
)
from mofq.numbers.quantize.gptq import DAMPING, factorise_flipped

#: Schemes with room for a rounding; microexponents, four over six and what is stored refuse one.
SCHEMES = [
    f"{name}~gptq"
    for name in WEIGHT_SCHEMES
    if (not name.startswith("mx") or "fp" in name) and not name.endswith("@stored")
]
SOME = ("int4.g32@mse~gptq", "int4.channel~gptq", "fp4_e2m1.g32~gptq", "int4.block16x32~gptq")


def inputs(tokens: int = 512, columns: int = 128, *, seed: int = 0) -> Tensor:
    """Correlated inputs, a few channels large, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator).double() / columns**0.5
    x = torch.randn(tokens, columns, generator=generator).double() @ mixing
    x[:, ::17] *= 8
    return x + torch.randn(columns, generator=generator).double()


def hessian(**options: int) -> Tensor:
    x_TI = inputs(**options)
    return x_TI.T @ x_TI


def rounded(name: str, weight_OI: Tensor, feedback: Feedback) -> Tensor:
    scheme = weight_scheme(name)
    amax = float(weight_OI.abs().max())
    quantized = quantize_weight(weight_OI, scheme, tensor_amax=amax, feedback=feedback)
    return dequantize_weight(quantized, scheme)


def cost(change_OI: Tensor, hessian_II: Tensor) -> float:
    change_OI = change_OI.double()
    return float(((change_OI @ hessian_II) * change_OI).sum())


def gptq_codes(weight_OI: Tensor, hessian_II: Tensor, scale_O: Tensor) -> np.ndarray:
    """The algorithm of arXiv:2210.17323 as written there, with the inverse, in numpy."""
    h = hessian_II.numpy().copy()
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    w, scale = weight_OI.double().numpy().copy(), scale_O.double().numpy()
    codes = np.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.round(w[:, j] / scale), -7, 7)
        error = (w[:, j] - codes[:, j] * scale) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return codes


def ldlq_codes(
    weight_OI: Tensor, hessian_II: Tensor, *, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """LDLQ of arXiv:2307.13304 in numpy, a group's scale found at its first column."""
    h = hessian_II.numpy().copy()
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    passed = upper / np.diag(upper)
    w = weight_OI.double().numpy()
    adjusted, codes, scales = w.copy(), np.zeros_like(w), []
    for j in range(w.shape[1]):
        if j % group_size == 0:
            amax = np.abs(adjusted[:, j : j + group_size]).max(1)
            scales.append((amax / 7).astype(ml_dtypes.bfloat16).astype(np.float64))
        codes[:, j] = np.clip(np.round(adjusted[:, j] / scales[-1]), -7, 7)
        error = w[:, j] - codes[:, j] * scales[-1]
        adjusted[:, j + 1 :] += np.outer(error, passed[j, j + 1 :])
    return codes, np.array(scales).T


def test_the_scale_of_a_group_is_that_of_the_weights_as_feedback_left_them() -> None:
    weight_OI, hessian_II = trained_like_weight(64, 128), hessian()
    scheme, feedback = weight_scheme("int4.g32~gptq"), factorise_hessian(hessian_II)
    quantized = quantize_weight(weight_OI, scheme, feedback=feedback)
    codes, scales = ldlq_codes(weight_OI, hessian_II, group_size=32)
    assert quantized.scale is not None
    # 22 bits of feedback against float64: a tie may fall to the other side, once in a while.
    assert (quantized.scale.double().numpy() != scales).mean() < 0.02
    assert (quantized.codes_OI.numpy() != codes).mean() < 0.01
    as_it_was = np.abs(weight_OI.double().numpy()).reshape(64, 4, 32).max(2) / 7
    assert np.abs(as_it_was[:, 1:] / scales[:, 1:] - 1).mean() > 0.02  # they are others


def test_the_codes_are_those_of_gptq_as_published() -> None:
    weight_OI, hessian_II = trained_like_weight(64, 128), hessian()
    scheme = weight_scheme("int4.channel~gptq")
    quantized = quantize_weight(weight_OI, scheme, feedback=factorise_hessian(hessian_II))
    assert quantized.scale is not None
    expected = gptq_codes(weight_OI, hessian_II, quantized.scale[:, 0])
    # 22 bits of feedback against float64: a tie may fall to the other side, once in a while.
    assert (quantized.codes_OI.numpy() != expected).mean() < 1e-3


@pytest.mark.parametrize("name", SOME)
def test_it_costs_less_than_rounding_to_nearest(name: str) -> None:
    weight_OI, hessian_II = trained_like_weight(64, 128), hessian()
    nearest = weight_scheme(name.removesuffix("~gptq"))
    plain_OI = dequantize_weight(quantize_weight(weight_OI, nearest), nearest)
    change_OI = rounded(name, weight_OI, factorise_hessian(hessian_II)) - weight_OI
    assert cost(change_OI, hessian_II) < 0.7 * cost(plain_OI - weight_OI, hessian_II)


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_have_the_same_codes_in_any_block(name: str) -> None:
    weight_OI, feedback = trained_like_weight(64, 128), factorise_hessian(hessian())
    scheme, amax = weight_scheme(name), float(trained_like_weight(64, 128).abs().max())
    whole = quantize_weight(weight_OI, scheme, tensor_amax=amax, feedback=feedback)
    part = quantize_weight(weight_OI[32:], scheme, tensor_amax=amax, feedback=feedback)
    assert torch.equal(whole.codes_OI[32:], part.codes_OI)
    if whole.scale is not None and part.scale is not None and len(whole.scale) > 1:
        assert torch.equal(whole.scale[-len(part.scale) :], part.scale)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_what_their_scales_make_of_the_result(name: str) -> None:
    scheme, weight_OI = weight_scheme(name), trained_like_weight(64, 128)
    quantized = quantize_weight(
        weight_OI,
        scheme,
        tensor_amax=float(weight_OI.abs().max()),
        feedback=factorise_hessian(hessian()),
    )
    again = quantize_with_scales(
        dequantize_weight(quantized, scheme),
        scheme,
        scale=quantized.scale,
        zero_point=quantized.zero_point,
        global_scale=quantized.global_scale,
    )
    assert torch.equal(again, quantized.codes_OI)


@pytest.mark.parametrize("name", SOME)
def test_the_largest_floats_stay_finite(name: str) -> None:
    result_OI = rounded(name, adversarial_weight(), factorise_hessian(hessian()))
    assert bool(torch.isfinite(result_OI).all())


@pytest.mark.parametrize("name", ["int4.channel", "fp4_e2m1.g32@mse", "int4.g64.asym"])
def test_independent_inputs_leave_rounding_to_nearest(name: str) -> None:
    weight_OI, scheme = trained_like_weight(64, 128), weight_scheme(name)
    plain = quantize_weight(weight_OI, scheme)
    for hessian_II in (torch.zeros(128, 128), torch.diag(torch.arange(128) + 1.0)):
        feedback = factorise_hessian(hessian_II.double())
        ours = quantize_weight(weight_OI, weight_scheme(f"{name}~gptq"), feedback=feedback)
        assert torch.equal(ours.codes_OI, plain.codes_OI)


def test_groups_wider_than_a_batch_and_of_odd_sizes_lose_no_feedback() -> None:
    weight_OI = trained_like_weight(16, 600)
    hessian_II = hessian(tokens=2000, columns=600)
    feedback = factorise_hessian(hessian_II)
    for name in ("int4.channel", "int4.g300", "int4.g200", "int4.g24", "int4.g1"):
        scheme = weight_scheme(name)
        plain_OI = dequantize_weight(quantize_weight(weight_OI, scheme), scheme)
        ours = cost(rounded(f"{name}~gptq", weight_OI, feedback) - weight_OI, hessian_II)
        assert ours < 0.7 * cost(plain_OI - weight_OI, hessian_II) or name == "int4.g1"


def test_the_scale_of_the_hessian_and_the_number_of_threads_do_not_matter() -> None:
    weight_OI, hessian_II = trained_like_weight(64, 128), hessian()
    expected_OI = rounded("int4.g32@nats~gptq", weight_OI, factorise_hessian(hessian_II))
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        other = factorise_hessian(hessian_II * 2.0**40)
        assert torch.equal(rounded("int4.g32@nats~gptq", weight_OI, other), expected_OI)
    finally:
        torch.set_num_threads(threads)


def test_a_wide_hessian_is_factorised_in_tiles_to_the_same_bits_on_any_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hessian_II = hessian(columns=320)
    whole = factorise_hessian(hessian_II)
    monkeypatch.setattr(gptq, "_WIDE", 1)
    monkeypatch.setattr(gptq, "_TILE", 96)  # the last tile is smaller
    flipped_II = hessian_II.flip(0, 1)
    # What lies above the diagonal is not read.
    upper_II = torch.full_like(flipped_II, float("nan")).triu(1)
    in_turn = factorise_flipped(flipped_II.tril() + upper_II)
    assert torch.allclose(in_turn.passed_II, whole.passed_II, rtol=0, atol=2**-20)
    assert torch.allclose(in_turn.cost_I, whole.cost_I, rtol=1e-6)
    with ThreadPoolExecutor(4) as threads:

        def side_by_side(work: Iterable[Callable[[], None]]) -> None:
            list(threads.map(lambda one: one(), work))

        at_once = factorise_flipped(flipped_II.clone(), run_all=side_by_side)
    assert torch.equal(at_once.passed_II, in_turn.passed_II)
    assert torch.equal(at_once.cost_I, in_turn.cost_I)
    indefinite_II = hessian_II - 50 * hessian_II.diagonal().mean() * torch.eye(320)
    with pytest.raises(SchemeError, match="not positive definite"):
        factorise_hessian(indefinite_II)


def test_the_rule_nats_weighs_columns_by_what_they_cost_after_feedback() -> None:
    weight_OI, hessian_II = trained_like_weight(64, 128), hessian()
    feedback = factorise_hessian(hessian_II)
    by_nats = cost(rounded("int4.g32@nats~gptq", weight_OI, feedback) - weight_OI, hessian_II)
    by_mse = cost(rounded("int4.g32@mse~gptq", weight_OI, feedback) - weight_OI, hessian_II)
    assert by_nats < by_mse


def test_a_hessian_that_is_none_is_refused_by_name() -> None:
    for hessian_II in (-torch.eye(4).double(), torch.full((4, 4), torch.nan).double()):
        with pytest.raises(SchemeError, match=r"^layer: the Hessian"):
            factorise_hessian(hessian_II, name="layer")


def test_feedback_is_for_gptq_and_importance_for_nats_alone() -> None:
    weight_OI, feedback = trained_like_weight(16, 128), factorise_hessian(hessian())
    ones_I = torch.ones(128)
    for name, options in (
        ("int4.g32", {"feedback": feedback}),
        ("int4.g32", {"importance": ones_I}),
        ("int4.g32~gptq", {"importance": ones_I}),
        ("int4.g32@nats", {"feedback": feedback}),
        ("int4.g32@nats~gptq", {"importance": ones_I, "feedback": feedback}),
    ):
        with pytest.raises(SchemeError, match="no other scheme takes either"):
            quantize_weight(weight_OI, weight_scheme(name), **options)  # type: ignore[arg-type]
