"""The eight laws that every change must keep."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from calibrated import calibrate_folder, some_tokens, space_of
from conftest import TinyCheckpoint
from exported import (
    STORABLE,
    Stored,
    quantize_layer,
    read_codes,
    read_scale,
    read_zero_point,
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
from safetensors.torch import load_file, save_file
from solver_problems import exhaustive, small_problems, some_budgets

from mofq.decision import SOLVERS, choose, solve_exact, solve_greedy, usage
from mofq.decision.budgets import budget_constraints
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.measure.fill_table import Work, measure, measure_groups
from mofq.exceptions import BudgetError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.sizes import counted_bytes, group_bytes, layer_bytes
from mofq.numbers.quantize import QuantizedWeight, dequantize_weight, quantize_with_scales
from mofq.numbers.schemes import parse_scheme


@pytest.mark.parametrize("name", STORABLE)
def test_law_1_codes_and_scales_read_back_equal_those_of_quantize(
    name: str, stored: Callable[[str], Stored]
) -> None:
    one, scheme = stored(name), parse_scheme(name)
    checkpoint, exported = one.checkpoint, one.exported
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
                reciprocal = parts["weight_global_scale"].double()
                assert abs(reciprocal * measured.global_scale.double() - 1) <= 2**-24


@pytest.mark.parametrize("name", STORABLE)
def test_law_1_the_consumers_decoder_returns_fake_quantize_to_one_rounding(
    name: str, stored: Callable[[str], Stored]
) -> None:
    one, scheme = stored(name), parse_scheme(name)
    checkpoint, exported = one.checkpoint, one.exported
    assert scheme.weight is not None
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
    name: str, stored: Callable[[str], Stored]
) -> None:
    one, scheme = stored(name), parse_scheme(name)
    checkpoint, exported, written = one.checkpoint, one.exported, one.result
    tensors = exported.tensors
    groups = find_layers(checkpoint).groups
    for group in groups:
        for layer in group.layers:
            parts = exported.parts(layer.name, tensors)
            nbytes = sum(part.numel() * part.element_size() for part in parts.values())
            assert nbytes == layer_bytes(layer, scheme)
    assert written.group_bytes == sum(counted_bytes(group, scheme) for group in groups)
    shapes = sum(tensors[name].nbytes for name in tensors if name.endswith("weight_shape"))
    in_file = sum(group_bytes(group, scheme) for group in groups)
    assert written.group_bytes + shapes == in_file


@pytest.mark.long
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
            assert all(row.holds(choice_F) for row in budget_constraints(problem, budgets))
            used = usage(problem, choice_F)
            assert used.bits_per_weight <= (budgets.max_bits or math.inf)
            assert used.checkpoint_bytes <= (budgets.max_bytes or math.inf)
            if budgets.max_finer is not None:
                assert used.finer_fraction <= budgets.max_finer


@pytest.mark.long
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


@pytest.mark.long
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


def shuffle_shards(source: Path, target: Path, *, seed: int) -> Path:
    """A copy of a one-file checkpoint in three shards, each with tensors from anywhere."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    random.Random(seed).shuffle(names)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, some in shards.items():
        save_file({name: tensors[name] for name in some}, target / shard, {"format": "pt"})
    where = {name: shard for shard, some in shards.items() for name in some}
    index = {"metadata": {}, "weight_map": {name: where[name] for name in names}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


class _Killed(Exception):
    pass


def fill_table(folder: Path, stats: Path, path: Path, *, threads: int = 1, kill: int = 0) -> bytes:
    """The table of a checkpoint, measured on some threads, killed after so many groups."""

    def progress(_: str, done: int, __: int) -> None:
        if kill and done == kill:
            raise _Killed

    checkpoint = open_checkpoint(str(folder))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        measure(
            checkpoint,
            find_layers(checkpoint),
            space_of("int4.g32", "nvfp4", "int8.channel+int8.token"),
            table_path=path,
            stats=read_stats(stats),
            progress=progress,
        )
    finally:
        torch.set_num_threads(before)
    return path.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_law_7_shards_threads_and_kills_change_no_byte_of_the_table(
    family: str, tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny(family)
    calibrate_folder(folder, tmp_path / "stats", {"a": some_tokens(2, 16)})
    # Several blocks of rows in every layer.
    for name in ("_BLOCK_ELEMENTS", "_MOST_BLOCK_ELEMENTS"):
        monkeypatch.setattr(f"mofq.evidence.measure.layer_inputs.{name}", 64 * 128)
    expected = fill_table(folder, tmp_path / "stats", tmp_path / "whole.jsonl")
    for seed, (threads, kill) in enumerate([(1, 3), (2, 0), (2, 1), (3, 2)]):
        shuffled = shuffle_shards(folder, tmp_path / str(seed) / family, seed=seed)
        path = tmp_path / f"{seed}.jsonl"
        if kill:
            with pytest.raises(_Killed):
                fill_table(shuffled, tmp_path / "stats", path, threads=threads, kill=kill)
        assert fill_table(shuffled, tmp_path / "stats", path, threads=threads) == expected


def test_law_7_fusion_groups_measured_alone_and_in_any_order_have_the_same_rows(
    tiny_llama: Path, tmp_path: Path
) -> None:
    stats = calibrate_folder(tiny_llama, tmp_path, {"a": some_tokens(2, 16)})
    checkpoint = open_checkpoint(str(tiny_llama))
    schemes = space_of("int4.g32", "int8.channel+int8.token").schemes
    work = [Work(group, schemes, ("a",)) for group in find_layers(checkpoint).groups]
    together = list(measure_groups(checkpoint, work, stats=stats))
    for i in (5, 0, 7, 3):
        assert list(measure_groups(checkpoint, [work[i]], stats=stats)) == [together[i]]
