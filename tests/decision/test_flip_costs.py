"""What changes of experts add to a prediction, and what a search makes of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from solver_problems import problem_of, sampled

from mofq.decision import Budgets, Problem
from mofq.decision.choice import choose, expand_chosen
from mofq.decision.flip_costs import flip_cost, flip_costs, flip_shares, flip_stderr
from mofq.decision.frontier import solve_frontier
from mofq.decision.interactions import around
from mofq.decision.prediction import error_together, paired_loss, predict, stated

RNG = np.random.default_rng(0)
#: Of three groups; the last is behind the last router.
RATES = np.array([[0.04], [0.01], [0.0]])


def mixture(rates: np.ndarray | None = RATES, *, scale: float = 1e-3) -> Problem:
    groups = [
        [
            sampled(scheme, size, scale * error * RNG.uniform(0.9, 1.1, 6))
            for scheme, size, error in (
                ("int4.g32", 50, 16.0),
                ("int8.channel", 100, 1.0),
                ("fp8_e4m3.channel", 75, 4.0),
            )
        ]
        for _ in range(3)
    ]
    return problem_of(groups, flip_FC=rates)


def choices(problem: Problem) -> list[np.ndarray]:
    ranges = [problem.options_of(group) for group in range(len(problem.groups))]
    return [np.array(one) for one in itertools.product(*ranges)]


def test_a_recipe_costs_the_root_of_its_weighed_errors_beside_their_sum() -> None:
    problem = mixture()
    for choice_F in choices(problem):
        error_F = problem.error_PC[choice_F, 0]
        expected = error_F.sum() + np.sqrt(0.04 * error_F[0] + 0.01 * error_F[1])
        assert predict(problem, choice_F).value == pytest.approx(expected)
        assert error_together(problem, choice_F) == pytest.approx(expected)
        assert flip_cost(problem, choice_F) == pytest.approx(expected - error_F.sum())


def test_a_model_without_routers_costs_the_sum() -> None:
    problem = mixture(None)
    choice_F = choices(problem)[5]
    assert predict(problem, choice_F).value == pytest.approx(problem.error_of(choice_F))
    assert flip_cost(problem, choice_F) is None


def test_error_bars_grow_by_the_slope_of_the_root() -> None:
    problem = mixture()
    choice_F = choices(problem)[0]
    plain, whole = (predict(one, choice_F) for one in (mixture_like(problem), problem))
    slope = float(flip_costs(problem, choice_F)[0]) / (2 * plain.value)
    assert plain.stderr is not None
    assert whole.stderr == pytest.approx((1 + slope) * plain.stderr)


def test_error_bars_have_the_noise_of_what_changes_cost() -> None:
    problem = mixture()
    noisy = replace(problem, flip_stderr_C=(0.1,))
    first_F, other_F = choices(problem)[0], choices(problem)[5]
    flips, others = (float(flip_costs(problem, one)[0]) for one in (first_F, other_F))
    plain, wide = (predict(one, first_F) for one in (problem, noisy))
    assert plain.stderr is not None
    assert wide.stderr == pytest.approx(np.hypot(plain.stderr, 0.1 * flips))
    assert wide.value == plain.value
    plain, wide = (expand_chosen(one, Budgets(), first_F) for one in (problem, noisy))
    assert plain.stderr is not None
    assert wide.stderr == pytest.approx(np.hypot(plain.stderr, 0.1 * flips))
    # Of two recipes the noise is that of the difference.
    plain, wide = (paired_loss(one, first_F, other_F) for one in (problem, noisy))
    assert plain.stderr is not None
    assert wide.stderr == pytest.approx(np.hypot(plain.stderr, 0.1 * abs(others - flips)))


def test_the_noise_of_several_corpora_is_that_of_their_mean_or_of_the_worst() -> None:
    problem = replace(mixture(), corpora=("a", "b"), corpus_weights=(3.0, 1.0))
    noisy = replace(problem, flip_stderr_C=(0.1, 0.2))
    cost_C = np.array([0.02, 0.03])
    assert flip_stderr(noisy, cost_C) == pytest.approx(np.hypot(3 * 0.002, 0.006) / 4)
    assert flip_stderr(replace(noisy, objective="worst-corpus"), cost_C) == pytest.approx(0.006)
    assert flip_stderr(problem, cost_C) == 0.0


def mixture_like(problem: Problem) -> Problem:
    return replace(problem, flip_FC=None)


def test_shares_around_a_choice_are_exact_there_and_never_below_elsewhere() -> None:
    problem = mixture()
    for at_F in choices(problem)[::5]:
        share_P = flip_shares(problem, at_F)[:, 0]
        linear = around(problem, at_F)
        for choice_F in choices(problem):
            cost = flip_costs(problem, choice_F)[0]
            assert share_P[choice_F].sum() >= cost - 1e-12
            assert linear.error_of(choice_F) >= error_together(problem, choice_F) - 1e-12
        assert share_P[at_F].sum() == pytest.approx(flip_costs(problem, at_F)[0])


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e-1])
def test_a_search_finds_the_least_of_sum_and_root(scale: float) -> None:
    problem = mixture(scale=scale)
    for size in range(150, 301, 25):
        budgets = Budgets(max_bytes=size)
        found_F = choose(problem, budgets, ties=False).choice_F
        fitting = [one for one in choices(problem) if problem.bytes_of(one) <= size]
        least = min(error_together(problem, one) for one in fitting)
        assert error_together(problem, found_F) == pytest.approx(least)


def test_where_errors_are_small_what_is_behind_the_last_router_is_rounded_first() -> None:
    small = mixture(scale=1e-5)
    found_F = choose(small, Budgets(max_bytes=250), ties=False).choice_F
    schemes = small.schemes_of(found_F)
    assert schemes == {"g0": "int8.channel", "g1": "int8.channel", "g2": "int4.g32"}


def test_a_budget_in_nats_counts_changes_of_experts() -> None:
    problem = mixture()
    budgets = Budgets(max_kl=0.03)
    with_flips = choose(problem, budgets, ties=False)
    without = choose(mixture_like(problem), budgets, ties=False)
    assert with_flips.reported.upper <= 0.03
    assert problem.bytes_of(with_flips.choice_F) > problem.bytes_of(without.choice_F)


def test_the_frontier_has_changes_of_experts_in_errors_and_under_a_budget_in_nats() -> None:
    problem = mixture()
    assert problem.answers is None
    whole = solve_frontier(problem)
    for choice_F, error in zip(whole.choice_KF, whole.error_K, strict=True):
        assert error == pytest.approx(error_together(problem, choice_F))
    for max_kl in (0.02, 0.03):
        kept = solve_frontier(problem, Budgets(max_kl=max_kl))
        uppers = [stated(problem, predict(problem, one)).upper for one in kept.choice_KF]
        assert 0 < max(uppers) <= max_kl
