"""What is said of a recipe beside the sum of its errors: the model's own error and its interval."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from solver_problems import option, problem_of, sampled, sampled_problem

from mofq.decision import Budgets, choose, predict, predict_chosen
from mofq.decision.choice import expand_chosen
from mofq.decision.model_error import ModelError, model_error, row_error
from mofq.decision.prediction import Estimate, predict_row, stated, with_model_error

MODEL = ModelError("", ("one",), recipes=10, curvature=1.0, spread=0.1, growth=0.5, largest=0.25)


@pytest.mark.parametrize("has_flips", [False, True])
def test_what_is_shipped_rests_on_measured_recipes(has_flips: bool) -> None:
    shipped = model_error(has_flips=has_flips)
    assert shipped.recipes >= 80
    assert len(shipped.models) >= 2
    assert "scripts/bench/interval" in shipped.source
    assert 0.01 < shipped.spread < 0.3
    assert shipped.largest == model_error().largest  # one end of the range is said for all


def test_what_is_shipped_of_rows_rests_on_rows_that_were_measured() -> None:
    shipped = row_error()
    assert shipped.recipes >= 60
    assert shipped.models
    assert "scripts/bench/interval" in shipped.source
    assert model_error().spread < shipped.spread < 0.3
    assert shipped.corrected(0.1) == 0.1  # a row is a term of the sum, and stays one


def test_the_interval_of_a_row_is_wider_than_that_of_its_samples() -> None:
    samples = [0.008, 0.012, 0.009, 0.011]
    problem = problem_of([[option("bf16", 200, 0.0), sampled("int2.g32@mse", 20, samples)]])
    assert problem.stderr_PC is not None
    row = predict_row(problem, 1)
    assert row.value == pytest.approx(0.01)
    own = math.hypot(row_error().spread, row_error().growth * 0.01) * 0.01
    assert row.stderr == pytest.approx(math.hypot(problem.stderr_PC[1, 0], own))
    assert row.upper - row.value > 0.2 * row.value
    assert predict_row(problem, 0) == Estimate(0.0, 0.0)  # what is left as it is costs nothing
    other_unit = replace(problem, unit="output_mse")
    assert predict_row(other_unit, 1).stderr == problem.stderr_PC[1, 0]


def test_a_row_under_the_worst_of_corpora_is_that_of_one_corpus() -> None:
    rows = [option("int4.g32", 50, 0.01, 0.03, stderrs=(0.004, 0.001))]
    corpora = ("a", "b")
    worst = problem_of([rows], corpora=corpora, objective="worst-corpus", unit="output_mse")
    assert predict_row(worst, 0) == Estimate(0.03, 0.001)
    mean = replace(worst, objective="mean")
    both = predict_row(mean, 0)
    assert both.value == pytest.approx(0.02)
    assert both.stderr == pytest.approx(math.hypot(0.004, 0.001) / 2)


def test_a_row_without_samples_has_no_interval() -> None:
    problem = problem_of([[option("int4.g32", 50, 0.01)]])
    assert predict_row(problem, 0) == Estimate(0.01, None)


def test_a_prediction_with_changes_of_experts_is_less_certain() -> None:
    dense = problem_of([[option("int8.channel", 100, 0.02)]])
    mixture = replace(dense, flip_FC=np.array([[0.0]]))
    expansion = Estimate(0.02, 0.0)
    narrow, wide = (stated(problem, expansion) for problem in (dense, mixture))
    assert narrow == with_model_error(expansion, model_error())
    assert wide == with_model_error(expansion, model_error(has_flips=True))
    assert narrow.stderr is not None
    assert wide.stderr is not None
    assert wide.stderr / wide.value > 1.2 * narrow.stderr / narrow.value


def test_a_larger_sum_of_errors_is_never_said_to_cost_less() -> None:
    values = [MODEL.corrected(x) for x in np.linspace(0, 2, 500).tolist()]
    assert all(after > before for before, after in itertools.pairwise(values))
    steps = np.diff(values)
    assert steps.max() < 1.6 * steps.min()  # without a jump at the end of the range


def test_the_slope_is_that_of_the_correction() -> None:
    for x in (0.01, 0.1, 0.19, 0.4):
        difference = (MODEL.corrected(x + 1e-6) - MODEL.corrected(x - 1e-6)) / 2e-6
        assert MODEL.slope(x) == pytest.approx(difference, rel=1e-4)


def test_the_range_ends_where_the_corrected_prediction_does() -> None:
    end = max(x for x in np.linspace(0, 1, 10001).tolist() if MODEL.corrected(x) <= MODEL.largest)
    assert end == pytest.approx(0.207, abs=1e-3)  # x + x^2 = 0.25
    assert MODEL.corrected(2 * end) == pytest.approx(2 * MODEL.corrected(end), rel=1e-3)


def test_sampling_noise_and_the_models_own_error_add_in_quadrature() -> None:
    alone, both = (with_model_error(Estimate(0.05, noise), MODEL) for noise in (0.0, 0.004))
    assert alone.stderr is not None
    assert both.stderr is not None
    sampling = MODEL.slope(0.05) * 0.004
    assert both.stderr == pytest.approx(math.hypot(alone.stderr, sampling))
    assert both.value == alone.value > 0.05
    assert both.upper - both.value == pytest.approx(2 * both.stderr)


def test_the_interval_of_a_large_kl_is_wider_in_proportion() -> None:
    small, large = (with_model_error(Estimate(kl, 0.0), MODEL) for kl in (0.001, 0.15))
    assert small.stderr is not None
    assert large.stderr is not None
    assert large.stderr / large.value > 1.2 * small.stderr / small.value


def test_without_error_bars_no_interval_is_said() -> None:
    one = with_model_error(Estimate(0.05, None), MODEL)
    assert one.stderr is None
    assert one.upper == math.inf


def test_errors_in_other_units_are_left_as_they_are() -> None:
    problem = problem_of([[option("int8.channel", 100, 0.5)]], unit="output_mse")
    choice_F = np.array([0])
    assert predict_chosen(problem, Budgets(), choice_F).value == 0.5


def test_a_budget_of_kl_is_held_against_the_upper_end() -> None:
    problem = sampled_problem(4)
    limit = choose(problem, Budgets(max_bits=5.0)).reported.upper
    found = choose(problem, Budgets(max_kl=limit))
    expansion = expand_chosen(problem, Budgets(), found.choice_F)
    assert found.reported.upper <= limit
    assert found.reported == stated(problem, expansion)
    # The sampling of sequences alone leaves more room than the interval does.
    assert expansion.upper < found.reported.upper


def test_the_error_of_sampled_sequences_is_smaller_than_what_is_said() -> None:
    problem = sampled_problem(4)
    choice_F = choose(problem, Budgets(max_bits=5.0)).choice_F
    sampling, said = predict(problem, choice_F), predict_chosen(problem, Budgets(), choice_F)
    assert sampling.stderr is not None
    assert said.stderr is not None
    assert said.stderr > model_error().spread * said.value
