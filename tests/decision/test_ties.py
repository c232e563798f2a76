from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import option, problem_of, sampled, sampled_problem

from mofq.decision import Budgets, Problem, solve_exact, usage
from mofq.decision.prediction import paired_loss
from mofq.decision.simplicity import _KINDS, simplicity
from mofq.decision.ties import move_ties
from mofq.numbers.formats import SCALE_FORMATS
from mofq.numbers.schemes import GranularityKind, ScaleRule, parse_scheme


def two_formats(int_samples: list[float], fp_samples: list[float], groups: int = 1) -> Problem:
    options = [
        sampled("int8.channel", 100, int_samples),
        sampled("fp8_e4m3.channel", 100, fp_samples),
    ]
    return problem_of([options] * groups)


def moved(problem: Problem, budgets: Budgets | None = None) -> dict[str, str]:
    budgets = budgets or Budgets()
    choice_F = solve_exact(problem, budgets).choice_F
    return problem.schemes_of(move_ties(problem, budgets, choice_F).choice_F)


def test_a_difference_within_its_paired_noise_is_a_tie() -> None:
    # FP8 is better by 0.01 in the mean and the samples disagree about it.
    problem = two_formats([1.0, 2.0, 3.0, 4.0], [1.2, 1.76, 3.2, 3.8])
    assert problem.schemes_of(solve_exact(problem, Budgets()).choice_F) == {
        "g0": "fp8_e4m3.channel"
    }
    assert moved(problem) == {"g0": "int8.channel"}


def test_a_small_difference_that_all_samples_agree_on_is_no_tie() -> None:
    # Each error alone is uncertain by 0.6, the paired difference by nothing at all.
    problem = two_formats([1.0, 2.0, 3.0, 4.0], [0.99, 1.99, 2.99, 3.99])
    assert moved(problem) == {"g0": "fp8_e4m3.channel"}


def test_a_tie_keeps_a_budget_in_nats() -> None:
    # Two standard errors above their means are 3.79 of INT8 and 3.70 of FP8.
    problem = two_formats([1.0, 2.0, 3.0, 4.0], [1.2, 1.76, 3.2, 3.8])
    assert moved(problem, Budgets(max_kl=3.76)) == {"g0": "fp8_e4m3.channel"}
    assert moved(problem, Budgets(max_kl=3.80)) == {"g0": "int8.channel"}


def test_ties_are_counted_in_layers() -> None:
    options = [
        sampled("int8.channel", 100, [1.0, 2.0, 3.0, 4.0]),
        sampled("fp8_e4m3.channel", 100, [1.2, 1.76, 3.2, 3.8]),
    ]
    problem = problem_of([options, [options[0]]], layers=[3, 2])
    choice_F = solve_exact(problem, Budgets()).choice_F
    found = move_ties(problem, Budgets(), choice_F)
    assert (found.tied_layers, found.moved_layers) == (3, 3)
    assert (found.choice_F != choice_F).tolist() == [True, False]
    assert paired_loss(problem, choice_F, found.choice_F).value == pytest.approx(0.01)


def test_moves_stop_before_the_recipe_loses_more_than_its_noise() -> None:
    # Each group alone loses 1.2 standard errors, a tie; the losses of all add up, and so
    # does their noise, which they share. None can be afforded.
    difference = np.array([-1.0, 1.0, -1.0, 1.0]) + 1.2 * np.sqrt(4 / 3) / 2
    worse = (5 + difference).tolist()
    problem = two_formats(worse, [5.0] * 4, groups=3)
    choice_F = solve_exact(problem, Budgets()).choice_F
    found = move_ties(problem, Budgets(), choice_F)
    assert (found.tied_layers, found.moved_layers) == (3, 0)
    assert found.choice_F.tolist() == choice_F.tolist()


def test_the_smallest_losses_move_first() -> None:
    wave = np.array([-1.0, 1.0, -1.0, 1.0])
    scale = np.sqrt(4 / 3) / 2  # the standard error of the wave

    def options(stderrs: float) -> list[object]:
        worse = 5 + wave + stderrs * scale
        return [
            sampled("int8.channel", 100, worse.tolist()),
            sampled("fp8_e4m3.channel", 100, [5.0] * 4),
        ]

    problem = problem_of([options(1.9), options(0.4), options(0.9)])  # type: ignore[list-item]
    choice_F = solve_exact(problem, Budgets()).choice_F
    found = move_ties(problem, Budgets(), choice_F)
    # Losses of 0.4 and 0.9 together are below the shared noise of two, 1.9 more are not.
    assert (found.choice_F != choice_F).tolist() == [False, True, True]


def test_a_tie_never_takes_more_bytes_or_more_of_a_budget() -> None:
    noisy, calm = [1.0, 2.0, 3.0, 4.0], [1.2, 1.76, 3.2, 3.8]
    larger = [sampled("int8.channel", 101, noisy), sampled("fp8_e4m3.channel", 100, calm)]
    assert moved(problem_of([larger])) == {"g0": "fp8_e4m3.channel"}
    finer = [sampled("int4.g32", 100, noisy), sampled("fp8_e4m3.channel", 100, calm)]
    problem = problem_of([finer], base=("fp8_e4m3.channel",), min_gain=0.0)
    assert moved(problem) == {"g0": "fp8_e4m3.channel"}


def test_without_samples_nothing_moves() -> None:
    problem = problem_of([[option("int8.channel", 100, 1.0), option("nf4.g32", 100, 1.0)]])
    found = move_ties(problem, Budgets(), np.array([1]))
    assert (found.choice_F.tolist(), found.tied_layers) == ([1], 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(4.2, 9.0), st.floats(0.1, 0.9))
def test_ties_keep_every_budget_and_lose_at_most_one_standard_error(
    seed: int, bits: float, share: float
) -> None:
    problem = replace(sampled_problem(seed, decoder_layers=2, samples=8), min_gain=0.0)
    share = max(share, 0.5)
    budgets = Budgets(max_bits=bits, max_finer=share)
    choice_F = solve_exact(problem, budgets).choice_F
    found = move_ties(problem, budgets, choice_F)
    assert problem.bytes_of(found.choice_F) <= problem.bytes_of(choice_F)
    assert usage(problem, found.choice_F).finer_fraction <= share
    loss = paired_loss(problem, choice_F, found.choice_F)
    assert loss.stderr is not None
    assert loss.value <= loss.stderr
    assert found.moved_layers <= found.tied_layers
    for group, (before, after) in enumerate(zip(choice_F, found.choice_F, strict=True)):
        assert after <= before, problem.groups[group].name  # options stand in order of simplicity


def test_the_order_of_simplicity_is_the_documented_one() -> None:
    names = [
        "bf16",
        "int8.channel",  # the base
        "fp8_e4m3.tensor",
        "int4.channel",
        "int8.channel+int8.token",
        "int4.channel@fullrange",
        "int4.channel@mse",
        "fp8_e4m3.channel",
        "nf4.channel",
        "int8.block128",
        "int4.g128",
        "int4.g32",
        "int4.g32@mse",
        "fp4_e2m1.g32",
        "mxfp4",
        "int4.g32.asym",
        "int4.g128~gptq",
    ]
    canonical = [parse_scheme(name).name for name in names]
    ranked = sorted(canonical, key=lambda name: simplicity(name, base=name == "int8.channel"))
    assert [name for name in ranked if name != "int8.channel+int8.token"] == [
        name for name in canonical if name != "int8.channel+int8.token"
    ]
    assert simplicity("int8.channel") < simplicity("int8.channel+int8.token")


def test_the_parts_of_a_scheme_are_in_the_order_of_simplicity() -> None:
    assert set(_KINDS) == set(get_args(GranularityKind))
    # Another order of these would move ties to other schemes.
    scales = ["bf16", "f32", "e8m0", "e8m0ceil", "micro16", "e4m3"]
    rules = ["absmax", "fullrange", "fouroversix", "stored", "mse", "nats"]
    assert [one for one in SCALE_FORMATS if one in scales] == scales
    assert [one for one in get_args(ScaleRule) if one in rules] == rules
