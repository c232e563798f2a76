from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from solver_problems import option, problem_of, sampled, sampled_problem

from mofq.decision import (
    Budgets,
    Option,
    Problem,
    choose,
    predict,
    predict_chosen,
    solve_exact,
    solve_frontier,
    usage,
)
from mofq.decision.choice import expand_chosen
from mofq.decision.prediction import crossfit, stated
from mofq.decision.problem import IntArray, with_samples
from mofq.exceptions import BudgetError, MofqError


def best_of(problem: Problem) -> IntArray:
    return solve_exact(problem, Budgets()).choice_F


def test_the_prediction_sums_the_samples_before_it_judges_their_spread() -> None:
    up = sampled("int8.channel", 100, [1.0, 2.0, 3.0, 4.0])
    down = sampled("int8.channel", 100, [4.0, 3.0, 2.0, 1.0])
    apart = predict(problem_of([[up], [down]]), np.array([0, 1]))
    together = predict(problem_of([[up], [up]]), np.array([0, 1]))
    assert (apart.value, apart.stderr) == (5.0, 0.0)
    # 2, 4, 6, 8: variance 20/3, over four samples.
    assert together.value == 5.0
    assert together.stderr == pytest.approx(math.sqrt(20 / 3 / 4))


def test_without_samples_there_is_a_sum_and_no_error_bar() -> None:
    problem = problem_of([[option("int8.channel", 100, 3.0)]], unit="relative_weight_error")
    found = predict(problem, np.array([0]))
    assert (found.value, found.stderr) == (3.0, None)
    assert crossfit(problem, best_of) is None


def test_the_unquantized_scheme_needs_no_samples() -> None:
    options = [option("bf16", 200, 0.0), sampled("int8.channel", 100, [1.0, 2.0])]
    found = predict(problem_of([options]), np.array([0]))
    assert (found.value, found.stderr) == (0.0, 0.0)


def test_several_corpora_give_their_mean_or_the_worst() -> None:
    two = Option(
        "int8.channel",
        100,
        (1.5, 5.0),
        stderrs=(0.5, 1.0),
        sample_errors=((1.0, 2.0), (4.0, 6.0)),
    )
    mean = predict(problem_of([[two]], corpora=("en", "pt")), np.array([0]))
    assert (mean.value, mean.stderr) == (3.25, pytest.approx(math.hypot(0.5, 1.0) / 2))
    problem = problem_of([[two]], corpora=("en", "pt"), objective="worst-corpus")
    worst = predict(problem, np.array([0]))
    assert (worst.value, worst.stderr) == (5.0, 1.0)


def test_a_corpus_counts_as_its_weight_says() -> None:
    two = Option(
        "int8.channel",
        100,
        (1.5, 5.0),
        stderrs=(0.5, 1.0),
        sample_errors=((1.0, 2.0), (4.0, 6.0)),
    )
    keys: dict[str, object] = {"corpora": ("en", "pt")}
    found = predict(problem_of([[two]], corpus_weights=(3.0, 1.0), **keys), np.array([0]))
    assert found.value == (3 * 1.5 + 5.0) / 4
    assert found.stderr == pytest.approx(math.hypot(3 * 0.5, 1.0) / 4)
    alone = predict(problem_of([[two]], corpus_weights=(0.0, 2.0), **keys), np.array([0]))
    assert (alone.value, alone.stderr) == (5.0, 1.0)


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_the_weights_of_corpora_decide(solver: str) -> None:
    for_en, for_pt = option("int4.g32", 50, 1.0, 4.0), option("fp4_e2m1.g32", 50, 3.0, 1.5)
    cases = [((3.0, 1.0), "int4.g32", 1.75), ((1.0, 3.0), "fp4_e2m1.g32", 1.875)]
    for weights, scheme, error in cases:
        problem = problem_of([[for_en, for_pt]], corpora=("en", "pt"), corpus_weights=weights)
        chosen_F = choose(problem, Budgets(max_bytes=50), solver=solver).choice_F
        assert problem.schemes_of(chosen_F) == {"g0": scheme}
        assert problem.error_of(chosen_F) == error


def test_a_budget_in_nats_without_samples_is_on_the_weighted_mean() -> None:
    one = Option("int8.channel", 100, (1.0, 3.0), stderrs=(0.25, 0.5))
    problem = problem_of([[one]], corpora=("en", "pt"), corpus_weights=(3.0, 1.0))
    upper = (3 * 1.5 + 4.0) / 4
    choose(problem, Budgets(max_kl=upper))
    with pytest.raises(BudgetError, match="max_kl"):
        choose(problem, Budgets(max_kl=upper - 0.001))


def test_half_of_the_samples_have_their_own_mean() -> None:
    one = sampled("int8.channel", 100, [1.0, 2.0, 3.0, 4.0])
    half = with_samples(problem_of([[one]]), [np.array([1, 2])])
    assert half.error_PC.tolist() == [[2.5]]


def noisy_problem(seed: int) -> tuple[Problem, np.ndarray]:
    """Eight equally good formats for each of 40 groups, told apart by noise alone; the truth."""
    rng = np.random.default_rng(seed)
    names = [
        *("int8.channel", "fp8_e4m3.channel", "int8.g128", "int8.g64"),
        *("int8.g32", "fp8_e4m3.g128", "fp8_e4m3.g64", "fp8_e4m3.g32"),
    ]
    groups = [
        [sampled(name, 100, rng.gamma(2.0, 0.5, size=16).tolist()) for name in names]
        for _ in range(40)
    ]
    problem = problem_of(groups)
    return problem, np.ones(len(problem.schemes))


def test_cross_fitting_is_nearly_unbiased_where_the_naive_figure_is_optimistic() -> None:
    naive, honest, stderrs = [], [], []
    for seed in range(30):
        problem, truth_P = noisy_problem(seed)
        choice_F = best_of(problem)
        truth = truth_P[choice_F].sum()
        fitted = crossfit(problem, best_of)
        assert fitted is not None
        assert fitted.stderr is not None
        naive.append(predict(problem, choice_F).value / truth)
        honest.append(fitted.value / truth)
        stderrs.append(fitted.stderr / truth)
    # The least of eight means of 16 draws with spread 0.7 is about 1.4 * 0.18 too low.
    assert np.mean(naive) < 0.8
    assert np.mean(honest) == pytest.approx(1.0, abs=0.015)
    # Its error bar is of the size of the scatter over repetitions.
    assert np.mean(stderrs) == pytest.approx(np.std(honest), rel=0.35)


@pytest.mark.parametrize("ties", [False, True])
def test_a_recipe_is_predicted_the_same_however_it_was_found(ties: bool) -> None:
    problem = sampled_problem(3)
    frontier = solve_frontier(problem)
    compared = 0
    for choice_F in frontier.choice_KF[:: len(frontier.bytes_K) // 8]:
        size = problem.size_of(choice_F) + problem.other_bytes
        point = predict_chosen(problem, Budgets(), choice_F, is_optimum=True)
        assert predict_chosen(problem, Budgets(), choice_F) == point
        # One byte more changes no choice, and neither does another unit of the size.
        bits = 8 * problem.bytes_of(choice_F) / problem.weights
        for budgets in (Budgets(max_bytes=size + 1), Budgets(max_bits=bits)):
            found = choose(problem, budgets, ties=ties)
            if (found.choice_F == choice_F).all():
                assert found.reported == point
                compared += 1
    assert compared >= 4


def test_no_recipe_is_predicted_better_than_the_best_of_its_size() -> None:
    problem = sampled_problem(4)
    rng = np.random.default_rng(0)
    best_F = choose(problem, Budgets(max_bits=5.0), ties=False).choice_F
    for _ in range(10):
        choice_F = best_F.copy()
        group = int(rng.integers(len(problem.groups)))
        choice_F[group] = rng.choice(list(problem.options_of(group)))
        size = problem.size_of(choice_F) + problem.other_bytes
        best = choose(problem, Budgets(max_bytes=size), ties=False)
        loss = problem.error_of(choice_F) - problem.error_of(best.choice_F)
        mine = expand_chosen(problem, Budgets(), choice_F)
        its_best = expand_chosen(problem, Budgets(), best.choice_F)
        assert mine.value - its_best.value == pytest.approx(loss)
        assert loss >= -1e-15


def test_too_few_samples_cannot_be_cross_fitted() -> None:
    problem = problem_of([[sampled("int8.channel", 100, [1.0, 2.0, 3.0])]])
    assert crossfit(problem, best_of) is None
    found = choose(problem, Budgets())
    in_sample = replace(predict(problem, found.choice_F), is_in_sample=True)
    assert found.reported == stated(problem, in_sample)


@pytest.mark.parametrize(
    ("solver", "limits"), [("exact", (3e-5, 3e-4, 1e-3)), ("greedy", (3e-4, 1e-2))]
)
def test_an_accuracy_budget_is_kept_by_the_cross_fitted_figure(
    solver: str, limits: tuple[float, ...]
) -> None:
    problem = sampled_problem(0)
    for limit in limits:
        found = choose(problem, Budgets(max_kl=limit), solver=solver)
        assert found.reported.upper <= limit
        assert usage(problem, found.choice_F).bits_per_weight < 16


def test_the_recipe_under_an_accuracy_budget_is_hardly_larger_than_it_must_be() -> None:
    problem = sampled_problem(1, decoder_layers=10)
    limit = 5e-4
    found = choose(problem, Budgets(max_kl=limit), ties=False)
    size = problem.bytes_of(found.choice_F)
    smaller = choose(problem, Budgets(max_bytes=int(size * 0.998)), ties=False)
    assert smaller.reported.upper > limit
    # And a tighter budget takes a larger recipe.
    tighter = choose(problem, Budgets(max_kl=limit / 2), ties=False)
    assert problem.bytes_of(tighter.choice_F) > size


def test_an_accuracy_budget_beside_one_of_size_is_checked() -> None:
    problem = sampled_problem(2)
    at_five = choose(problem, Budgets(max_bits=5.0))
    upper = at_five.reported.upper
    both = choose(problem, Budgets(max_bits=5.0, max_kl=upper * 1.01))
    assert both.choice_F.tolist() == at_five.choice_F.tolist()
    with pytest.raises(BudgetError, match="the least under the other budgets is"):
        choose(problem, Budgets(max_bits=5.0, max_kl=upper * 0.99))


def test_an_accuracy_budget_that_no_recipe_meets_names_the_least() -> None:
    problem = problem_of([[sampled("int8.channel", 100, [0.01, 0.02, 0.01, 0.02])]])
    upper = stated(problem, predict(problem, np.array([0]))).upper
    words = rf"max_kl: asked for 0\.01 nats.*smallest possible is {upper:.4g}, the upper end"
    with pytest.raises(BudgetError, match=words):
        choose(problem, Budgets(max_kl=0.01))
    with pytest.raises(BudgetError, match="says nothing about nats"):
        choose(replace(problem, unit="output_mse"), Budgets(max_kl=1.0))


def test_ties_can_be_switched_off() -> None:
    problem = sampled_problem(3, samples=8)
    without = choose(problem, Budgets(max_bits=5.0), ties=False)
    assert without.ties is None
    assert without.choice_F.tolist() == without.solution.choice_F.tolist()
    with_ties = choose(problem, Budgets(max_bits=5.0))
    assert with_ties.ties is not None
    assert with_ties.solution.choice_F.tolist() == without.choice_F.tolist()


def test_an_unknown_solver_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(MofqError, match="Did you mean 'greedy'"):
        choose(sampled_problem(0), Budgets(), solver="gredy")
