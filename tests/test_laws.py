"""The eight laws that every change must keep."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from exported import (
    STORABLE,
    Exported,
    quantize_layer,
    read_codes,
    read_scale,
    read_zero_point,
    uniform_recipe,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from number_cases import (
    WEIGHT_SCHEMES,
    adversarial_weight,
    quantized,
    trained_like_weight,
    weight_scheme,
)
from solver_problems import exhaustive, small_problems, some_budgets

from mofq.backends.compressed_tensors import export_compressed_tensors
from mofq.checkpoint.headers import open_checkpoint
from mofq.cost import group_bytes, layer_bytes
from mofq.exceptions import BudgetError
from mofq.layers import find_layers
from mofq.quantize import QuantizedWeight, dequantize_weight, quantize_with_scales
from mofq.schemes import parse_scheme
from mofq.solvers import SOLVERS, choose, solve_exact, solve_greedy, usage
from mofq.solvers.budgets import budget_rows


@pytest.mark.parametrize("name", STORABLE)
def test_law_1_codes_and_scales_read_back_equal_those_of_quantize(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    scheme = parse_scheme(name)
    export_compressed_tensors(checkpoint, uniform_recipe(checkpoint, name), tmp_path / "out")
    exported = Exported(tmp_path / "out")
    tensors = exported.tensors
    for group in find_layers(checkpoint).groups[:4]:
        for layer in group.layers:
            measured = quantize_layer(checkpoint, group, layer, scheme)
            parts = exported.parts(layer.name, tensors)
            codes = read_codes(parts, scheme)
            assert codes.dtype == measured.codes_OI.dtype
            assert torch.equal(codes, measured.codes_OI)
            assert measured.scale is not None
            assert torch.equal(read_scale(parts, scheme, measured.scale), measured.scale)
            if measured.zero_point is not None:
                points = read_zero_point(parts, scheme, measured.zero_point)
                assert torch.equal(points, measured.zero_point)
            if measured.global_scale is not None:
                # Stored as its reciprocal: the one number that is rounded.
                stored = parts["weight_global_scale"].double()
                assert abs(stored * measured.global_scale.double() - 1) <= 2**-24


@pytest.mark.parametrize("name", STORABLE)
def test_law_1_the_consumers_decoder_returns_fake_quantize_to_one_rounding(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    scheme = parse_scheme(name)
    assert scheme.weight is not None
    export_compressed_tensors(checkpoint, uniform_recipe(checkpoint, name), tmp_path / "out")
    exported = Exported(tmp_path / "out")
    tensors = exported.tensors
    for group in find_layers(checkpoint).groups[:4]:
        for layer in group.layers:
            measured = quantize_layer(checkpoint, group, layer, scheme)
            expected = dequantize_weight(measured, scheme.weight)
            decoded = exported.decode(layer.name, tensors)
            # NVFP4 divides the scale by the global one first, which is a rounding of its own.
            roundings = 2 if scheme.weight.scale.global_scale_bits else 1
            unit = torch.finfo(decoded.dtype).eps / 2
            error = (decoded.double() - expected.double()).abs()
            assert bool((error <= 1.01 * roundings * unit * expected.double().abs()).all())


@pytest.mark.parametrize("weight_OI", [trained_like_weight(), adversarial_weight()])
@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_law_2_with_its_scales_held_a_quantized_weight_quantizes_to_itself(
    name: str, weight_OI: torch.Tensor
) -> None:
    scheme, q = weight_scheme(name), quantized(name, weight_OI)
    once_OI = dequantize_weight(q, scheme)
    codes_OI = quantize_with_scales(
        once_OI,
        scheme,
        scale=q.scale,
        zero_point=q.zero_point,
        global_scale=q.global_scale,
    )
    assert codes_OI.dtype == q.codes_OI.dtype
    assert torch.equal(codes_OI, q.codes_OI)
    twice = QuantizedWeight(codes_OI, q.scale, q.zero_point, q.global_scale)
    assert torch.equal(dequantize_weight(twice, scheme), once_OI)


@pytest.mark.parametrize("name", STORABLE)
def test_law_3_cost_equals_the_bytes_of_the_exported_tensors(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    scheme = parse_scheme(name)
    written = export_compressed_tensors(
        checkpoint, uniform_recipe(checkpoint, name), tmp_path / "out"
    )
    exported = Exported(tmp_path / "out")
    tensors = exported.tensors
    groups = find_layers(checkpoint).groups
    for group in groups:
        for layer in group.layers:
            parts = exported.parts(layer.name, tensors)
            stored = sum(part.numel() * part.element_size() for part in parts.values())
            assert stored == layer_bytes(layer, scheme)
    assert written.group_bytes == sum(group_bytes(group, scheme) for group in groups)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_law_4_no_solver_exceeds_a_budget(data: st.DataObject) -> None:
    problem = data.draw(small_problems())
    budgets = data.draw(some_budgets(problem))
    for solver in SOLVERS:
        for ties in (True, False):
            try:
                choice_F = choose(problem, budgets, solver=solver, ties=ties).choice_F
            except BudgetError:
                continue
            assert all(row.holds(choice_F) for row in budget_rows(problem, budgets))
            used = usage(problem, choice_F)
            assert used.bits_per_weight <= (budgets.max_bits or math.inf)
            assert used.checkpoint_bytes <= (budgets.max_bytes or math.inf)
            if budgets.max_finer is not None:
                assert used.finer_fraction <= budgets.max_finer


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_law_4_more_budget_never_means_more_predicted_error(data: st.DataObject) -> None:
    problem = data.draw(small_problems())
    other = replace(data.draw(some_budgets(problem)), max_bits=None, max_kl=None)
    sizes = data.draw(st.lists(st.integers(0, int(problem.bytes_P.sum())), min_size=2, max_size=5))
    errors = []
    for size in sorted(sizes):
        try:
            choice_F = solve_exact(problem, replace(other, max_bytes=size)).choice_F
        except BudgetError:
            assert not errors  # what was possible stays possible
            continue
        errors.append(problem.error_of(choice_F))
    assert all(more <= less + 1e-15 for less, more in pairwise(errors))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_law_5_exact_equals_exhaustive_search_and_greedy_is_never_better(
    data: st.DataObject,
) -> None:
    problem = data.draw(small_problems())
    budgets = replace(data.draw(some_budgets(problem)), max_kl=None)
    best = exhaustive(problem, budgets)
    try:
        exact_F = solve_exact(problem, budgets).choice_F
    except BudgetError:
        assert best is None
        return
    assert best == pytest.approx((problem.error_of(exact_F),), rel=1e-9, abs=1e-15)
    try:
        greedy_F = solve_greedy(problem, budgets).choice_F
    except BudgetError:
        return
    assert problem.error_of(exact_F) <= problem.error_of(greedy_F) + 1e-15
