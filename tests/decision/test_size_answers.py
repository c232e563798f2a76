"""What groups do together where rounding changes the size of their weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mofq.decision import Budgets, Option, ProblemGroup, build_problem, solve_exact
from mofq.decision.budgets import offered
from mofq.decision.interactions import around, solve_together
from mofq.decision.prediction import error_together, paired_loss, predict, sample_sums
from mofq.decision.problem import IntArray, Objective, Problem, with_samples

SAMPLES, EACH = 4, 3


def some_answers(groups: int, seed: int) -> list[list[list[float]]]:
    """Of samples that stand for three sequences each, but the last for two."""
    value = np.random.default_rng(seed).normal(size=(groups, SAMPLES, EACH))
    return [
        [one.tolist() for one in group[:-1]] + [group[-1, : EACH - 1].tolist()] for group in value
    ]


def some_problem(
    groups: int, seed: int, *, corpora: int = 1, objective: Objective = "mean"
) -> Problem:
    """Each group may have three schemes; small ones make weights smaller."""
    random = np.random.default_rng(seed)
    answers = [some_answers(groups, seed + 10 * corpus) for corpus in range(corpora)]
    options = []
    for f in range(groups):
        of_group = []
        for scheme, size, shrink, rest in (
            ("int2.g32@mse", 100, 0.3, 0.1),
            ("int3.g32@mse", 150, 0.1, 0.05),
            ("int8.channel", 400, 0.0, 0.0001),
        ):
            share = -shrink * random.uniform(0.5, 1.5)
            samples, own = [], []
            for of_corpus in answers:
                own.append([[share * one for one in sample] for sample in of_corpus[f]])
                squares = [float(np.square(sample).mean()) for sample in own[-1]]
                samples.append(squares + rest * random.uniform(0.5, 1.5, SAMPLES))
            of_group.append(
                Option(
                    scheme,
                    bytes=size,
                    errors=tuple(float(one.mean()) for one in samples),
                    stderrs=tuple(0.01 for _ in samples),
                    sample_errors=tuple(one.tolist() for one in samples),
                    answers=tuple(own) if shrink else None,
                )
            )
        options.append((ProblemGroup(f"g{f}", (f"l{f}",), weights=400), of_group))
    return build_problem(
        options,
        corpora=tuple(f"c{c}" for c in range(corpora)),
        objective=objective,
    )


def by_definition(problem: Problem, choice_F: IntArray, corpus: int) -> list[float]:
    """Of each sample: the options' errors without their own answers, and all answers together."""
    assert problem.answers is not None
    assert problem.sample_errors is not None
    chosen_FR = problem.answers[corpus].value_PR[choice_F]
    found = []
    for n, count in enumerate((3, 3, 3, 2)):
        columns = range(3 * n, 3 * n + count)
        total = 0.0
        for f, p in enumerate(choice_F.tolist()):
            own = sum(chosen_FR[f, r] ** 2 for r in columns) / count
            total += problem.sample_errors[corpus][p, n] - own
        total += sum(sum(chosen_FR[:, r]) ** 2 for r in columns) / count
        found.append(total)
    return found


def all_choices(problem: Problem) -> list[IntArray]:
    ranges = [problem.options_of(f) for f in range(len(problem.groups))]
    return [np.array(one, dtype=np.int64) for one in itertools.product(*ranges)]


@pytest.mark.parametrize("seed", range(3))
def test_a_recipe_costs_its_options_and_what_they_do_together(seed: int) -> None:
    problem = some_problem(4, seed, corpora=2)
    for choice_F in all_choices(problem)[::7]:
        expected = [by_definition(problem, choice_F, corpus) for corpus in (0, 1)]
        for found_N, expected_N in zip(sample_sums(problem, choice_F), expected, strict=True):
            assert found_N.tolist() == pytest.approx(expected_N)
        assert predict(problem, choice_F).value == pytest.approx(np.mean(expected))
        assert error_together(problem, choice_F) == pytest.approx(np.mean(expected))
        worst = replace(problem, objective="worst-corpus")
        assert error_together(worst, choice_F) == pytest.approx(np.mean(expected, axis=1).max())


def test_one_group_alone_costs_what_its_row_says() -> None:
    problem = some_problem(3, 0)
    assert problem.sample_errors is not None
    for p in range(len(problem.schemes)):
        [alone_N] = sample_sums(problem, np.array([p]))
        assert alone_N.tolist() == pytest.approx(problem.sample_errors[0][p].tolist())


def test_half_of_the_samples_have_their_own_answers() -> None:
    problem = some_problem(4, 1)
    choice_F = all_choices(problem)[0]
    [whole_N] = sample_sums(problem, choice_F)
    for kept in ([0, 1], [2, 3], [3], [1, 3]):
        [part_N] = sample_sums(with_samples(problem, [np.array(kept)]), choice_F)
        assert part_N.tolist() == pytest.approx(whole_N[kept].tolist())


def test_a_paired_loss_has_what_changes_between_groups() -> None:
    problem = some_problem(4, 2)
    first_F, second_F = all_choices(problem)[0], all_choices(problem)[-2]
    expected = predict(problem, second_F).value - predict(problem, first_F).value
    assert paired_loss(problem, first_F, second_F).value == pytest.approx(expected)


def test_around_a_choice_one_change_costs_what_it_does_together() -> None:
    problem = some_problem(4, 3)
    choice_F = all_choices(problem)[40]
    near = around(problem, choice_F)
    assert (near.error_PC >= 0).all()
    for f in range(4):
        for p in problem.options_of(f):
            other_F = choice_F.copy()
            other_F[f] = p
            change = near.error_PC[p, 0] - near.error_PC[choice_F[f], 0]
            expected = error_together(problem, other_F) - error_together(problem, choice_F)
            assert change == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("objective", ["mean", "worst-corpus"])
def test_solving_together_is_never_worse_and_often_the_best_there_is(objective: Objective) -> None:
    best = better = 0
    for seed in range(6):
        problem = some_problem(6, seed, corpora=2, objective=objective)
        budgets = Budgets(max_bytes=800)
        within = [c for c in all_choices(problem) if problem.bytes_of(c) <= 800]
        least = min(error_together(problem, c) for c in within)
        alone = error_together(problem, solve_exact(problem, budgets).choice_F)
        found = solve_together(problem, budgets, solve_exact)
        assert problem.bytes_of(found.choice_F) <= 800
        error = error_together(problem, found.choice_F)
        assert least <= error + 1e-12
        assert error <= alone + 1e-12
        best += error <= least + 1e-12
        better += error < alone - 1e-12
    assert best >= 3
    assert better >= 1


def test_without_answers_errors_are_a_sum() -> None:
    problem = replace(some_problem(3, 0), answers=None)
    choice_F = all_choices(problem)[5]
    assert predict(problem, choice_F).value == pytest.approx(problem.error_of(choice_F))
    found = solve_together(problem, Budgets(max_bytes=500), solve_exact)
    assert found.choice_F.tolist() == solve_exact(problem, Budgets(max_bytes=500)).choice_F.tolist()


def test_a_budget_of_finer_layers_offers_what_it_offers_without_products() -> None:
    for seed in range(8):
        problem = replace(some_problem(6, seed), is_base_P=np.tile([True, True, False], 6))
        budgets = Budgets(max_bytes=1300, max_finer=0.5)
        found = solve_together(problem, budgets, solve_exact)
        assert offered(problem, budgets)[found.choice_F].all()
