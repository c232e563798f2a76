"""What is said of a recipe beside the sum of its errors: the model's own error and its interval."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from solver_problems import option, problem_of, sampled_problem

from mofq.decision import Budgets, choose, predict, predict_chosen
from mofq.decision.choice import expand_chosen
from mofq.decision.model_error import ModelError, model_error
from mofq.decision.prediction import Estimate, stated, with_model_error

MODEL = ModelError("", ("one",), recipes=10, curvature=1.0, spread=0.1, growth=0.5, largest=0.25)


@pytest.mark.parametrize("has_flips", [False, True])
def test_what_is_shipped_rests_on_measured_recipes(has_flips: bool) -> None:
    shipped = model_error(has_flips=has_flips)
    assert shipped.recipes >= 80
    assert len(shipped.models) >= 2
    assert "scripts/bench/interval" in shipped.source
    assert 0.01 < shipped.spread < 0.3
    assert shipped.largest == model_error().largest  # one end of the range is said for all


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
