from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from mofq.decision import Budgets, Option, Problem, ProblemGroup, build_problem, solve_exact
from mofq.decision.measured.refine import Refined, refine
from mofq.decision.problem import IntArray
from mofq.exceptions import MofqError

SCHEMES = {"int4.g32": 20, "int8.channel": 40}
WINDOWS = 8


def problem_of(errors: Mapping[str, tuple[float, float]], *, noise: float = 0.0) -> Problem:
    """Groups with an INT4 and an INT8 error; the samples scatter by so much, INT4 alone."""
    groups = []
    for number, (name, (four, eight)) in enumerate(errors.items()):
        scatter = noise * np.sin(np.arange(1, 9) * (number + 1.0))
        scatter -= scatter.mean()
        options = [
            Option("int4.g32", 20, (four,), (noise / math.sqrt(8),), (four + scatter,)),
            Option("int8.channel", 40, (eight,), (0.0,), (np.full(8, eight),)),
        ]
        groups.append((ProblemGroup(name, (name,), weights=40), options))
    return build_problem(groups)


@dataclass
class Truth:
    """An objective whose KL is a sum over groups, and what was asked of it."""

    errors: Mapping[str, tuple[float, float]]
    scatter: float = 0.0
    asked: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, schemes: Mapping[str, str]) -> Iterator[float]:
        self.asked.append(dict(schemes))
        kl = sum(self.errors[g][list(SCHEMES).index(s)] for g, s in schemes.items())
        for window in range(WINDOWS):
            # Every recipe has the noise of the window, and some of its own.
            own = self.scatter * (-1) ** window * len(self.asked)
            yield kl * (1 + 0.3 * math.cos(window)) + own


def run(
    problem: Problem, truth: Truth, budgets: Budgets, swaps: int, *, ties: bool = True
) -> Refined:
    choice_F = solve_exact(problem, budgets).choice_F
    return refine(problem, budgets, choice_F, measure=truth, swaps=swaps, ties=ties)


PREDICTED = {"a": (0.10, 0.0), "b": (0.09, 0.0), "c": (0.01, 0.0), "d": (0.02, 0.0)}
#: As predicted, but b matters more than a.
TRUE = {**PREDICTED, "a": (0.05, 0.0), "b": (0.12, 0.0)}
SIX_BITS = Budgets(max_bits=5.0)  # INT8 for one of four


def test_a_swap_that_is_truly_better_is_found_and_taken() -> None:
    truth = Truth(TRUE)
    found = run(problem_of(PREDICTED, noise=0.02), truth, SIX_BITS, swaps=2)
    assert found.start.choice_F.tolist() != found.best.choice_F.tolist()
    accepted = [swap.changes for swap in found.swaps if swap.accepted]
    assert accepted == [{"a": ("int8.channel", "int4.g32"), "b": ("int4.g32", "int8.channel")}]
    assert found.best.kl.value == pytest.approx(np.mean(list(Truth(TRUE)(truth.asked[-1]))), rel=1)
    assert found.best.kl.value < found.start.kl.value
    assert found.uniform is None


def test_a_difference_within_noise_changes_nothing() -> None:
    same = {**PREDICTED, "a": (0.0901, 0.0)}
    truth = Truth({**same, "b": (0.0902, 0.0)}, scatter=0.01)
    found = run(problem_of(same, noise=0.02), truth, SIX_BITS, swaps=3)
    assert not any(swap.accepted for swap in found.swaps)
    assert found.best is found.start


def test_accepted_swaps_accumulate_from_each_other() -> None:
    predicted = {name: (0.05 - 0.001 * n, 0.0) for n, name in enumerate("abcdef")}
    true = {**predicted, "e": (0.12, 0.0), "f": (0.2, 0.0)}
    truth = Truth(true)
    found = run(problem_of(predicted, noise=0.03), truth, Budgets(max_bits=5.4), swaps=12)
    assert sum(swap.accepted for swap in found.swaps) >= 2
    chosen = problem_of(predicted).schemes_of(found.best.choice_F)
    assert {name for name, scheme in chosen.items() if scheme == "int8.channel"} == {"e", "f"}


def test_what_is_measured_was_expected_and_until_a_swap_is_accepted_in_this_order() -> None:
    predicted = {name: (0.05 - 0.001 * n, 0.0) for n, name in enumerate("abcdef")}
    problem = problem_of(predicted, noise=0.03)
    truth = Truth({**predicted, "e": (0.12, 0.0), "f": (0.2, 0.0)})
    expected: dict[int, list[dict[str, str]]] = {}  # by what was measured before

    def expect(choices: Iterable[IntArray]) -> None:
        expected[len(truth.asked)] = [problem.schemes_of(choice_F) for choice_F in choices]

    budgets = Budgets(max_bits=5.4)
    choice_F = solve_exact(problem, budgets).choice_F
    found = refine(problem, budgets, choice_F, measure=truth, expect=expect, swaps=12)
    first = 1 + len(found.uniforms)
    assert expected[0] == truth.asked[:first]
    accepted = [n for n, swap in enumerate(found.swaps, start=first) if swap.accepted]
    assert len(accepted) >= 2
    for before in range(first, len(truth.asked)):
        until = next((n for n in accepted if n >= before), len(truth.asked) - 1)
        assert expected[before][: until - before + 1] == truth.asked[before : until + 1]


def test_no_recipe_that_is_measured_exceeds_the_budget() -> None:
    predicted = {name: (0.05 - 0.001 * n, 0.0) for n, name in enumerate("abcdef")}
    truth = Truth(predicted, scatter=0.02)
    run(problem_of(predicted, noise=0.03), truth, Budgets(max_bits=5.4), swaps=20)
    sizes = [sum(SCHEMES[s] for s in schemes.values()) for schemes in truth.asked]
    assert 8 * max(sizes) / 240 <= 5.4
    assert len({tuple(schemes.items()) for schemes in truth.asked}) == len(truth.asked)


def test_the_swaps_measured_first_are_of_different_layers() -> None:
    predicted = {name: (0.05 - 0.001 * n, 0.0) for n, name in enumerate("abcdefghijklmnop")}
    truth = Truth(predicted)
    found = run(problem_of(predicted, noise=0.03), truth, Budgets(max_bits=6.0), swaps=4)
    changed = [frozenset(swap.changes) for swap in found.swaps]
    assert len(changed) == 4
    assert all(not one & other for one, other in itertools.combinations(changed, 2))


def test_a_uniform_scheme_that_is_better_is_returned_and_named() -> None:
    predicted = {"a": (0.02, 0.0), "b": (0.01, 0.03)}
    problem = problem_of(predicted)
    truth = Truth({"a": (0.02, 0.2), "b": (0.01, 0.2)})
    found = run(problem, truth, Budgets(max_bits=6.0), swaps=0)
    assert found.uniform == "int4.g32"
    assert set(problem.schemes_of(found.best.choice_F).values()) == {"int4.g32"}
    assert found.best.kl.value < found.start.kl.value


def test_a_uniform_scheme_within_noise_is_preferred_only_with_ties() -> None:
    problem = problem_of({"a": (0.02, 0.019), "b": (0.01, 0.03)})
    for ties, expected in ((True, "int4.g32"), (False, None)):
        truth = Truth({"a": (0.021, 0.02), "b": (0.01, 0.03)}, scatter=0.01)
        found = run(problem, truth, Budgets(max_bits=6.0), swaps=0, ties=ties)
        loss = found.uniforms["int4.g32"].kl.value - found.start.kl.value
        assert loss == pytest.approx(0.001, rel=0.1)
        assert found.uniform == expected


def test_a_hopeless_recipe_is_given_up_before_its_last_window() -> None:
    problem = problem_of({"a": (0.02, 0.0), "b": (0.015, 0.014)})
    truth = Truth({"a": (0.5, 0.0), "b": (0.015, 0.014)})
    found = run(problem, truth, Budgets(max_bits=6.0), swaps=0)
    assert len(found.uniforms["int4.g32"].windows) == 4
    assert found.uniform is None


def test_one_window_is_refused() -> None:
    problem = problem_of(PREDICTED)

    def measure(schemes: Mapping[str, str]) -> Iterator[float]:
        yield 1.0

    with pytest.raises(MofqError, match="at least 2 windows"):
        refine(problem, Budgets(), np.array([0, 2, 4, 6]), measure=measure, swaps=1)


def test_under_an_accuracy_budget_nothing_larger_than_the_recipe_is_tried() -> None:
    problem = problem_of(PREDICTED, noise=0.001)
    budgets = Budgets(max_kl=0.06)
    choice_F = solve_exact(problem, budgets).choice_F
    truth = Truth(TRUE)
    refine(problem, budgets, choice_F, measure=truth, swaps=5)
    sizes = [sum(SCHEMES[s] for s in schemes.values()) for schemes in truth.asked]
    assert max(sizes) == problem.bytes_of(choice_F)
