"""A budget in nats that is measured: few recipes, and hardly larger than need be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from explore_tables import write_explore_table

from mofq.decision import Budgets, Frontier
from mofq.decision.measured.measurement import Measured
from mofq.decision.measured.proved_budget import (
    MOST_MEASURED,
    decide_proved,
    prove,
    secant,
)
from mofq.decision.model_error import model_error
from mofq.decision.problem import IntArray
from mofq.decision.request import Request
from mofq.evidence.table import read_table
from mofq.exceptions import BudgetError

#: Sizes in steps of half a percent, and errors that fall by 1.5 % a step.
SIZES = np.round(10_000 * 1.005 ** np.arange(400)).astype(np.int64)
ERRORS = 0.5 * 0.985 ** np.arange(400)
FRONTIER = Frontier(
    choice_KF=np.arange(400)[:, None], bytes_K=SIZES, error_K=ERRORS, bound_K=ERRORS
)


def solve_at(size: int) -> IntArray:
    """The best that is no larger."""
    return FRONTIER.choice_KF[int(np.searchsorted(SIZES, size, side="right")) - 1]


def size_of(choice_F: IntArray) -> int:
    return int(SIZES[choice_F[0]])


def measuring(truth: Callable[[float], float]) -> Callable[[IntArray], Measured]:
    """Measures what the errors truly amount to, on windows that differ."""

    def measure(choice_F: IntArray) -> Measured:
        kl = truth(float(ERRORS[choice_F[0]]))
        return Measured(choice_F, (0.97 * kl, kl, kl, 1.03 * kl))

    return measure


def proved(
    limit: float, truth: Callable[[float], float] = lambda x: x, frontier: Frontier = FRONTIER
) -> list[Measured]:
    functions = {"solve_at": solve_at, "size_of": size_of, "measure": measuring(truth)}
    return prove(frontier, limit, model=model_error(), **functions)


TRUTHS: dict[str, Callable[[float], float]] = {
    "as predicted": lambda x: x,
    "a half more": lambda x: 1.5 * x,
    "a third less": lambda x: 0.67 * x,
    "curved": lambda x: x * (1 + 3 * x),
    "of another slope": lambda x: x**1.3,
}


@pytest.mark.parametrize("limit", [0.004, 0.02, 0.1])
@pytest.mark.parametrize("name", TRUTHS)
def test_a_budget_is_kept_and_nearly_used_whatever_the_truth_is(name: str, limit: float) -> None:
    measure = measuring(TRUTHS[name])
    tried = proved(limit, TRUTHS[name])
    kept = [one for one in tried if one.kl.upper <= limit]
    within = [size_of(c) for c in FRONTIER.choice_KF if measure(c).kl.upper <= limit]
    found = min(int(SIZES[one.choice_F[0]]) for one in kept)
    assert len(tried) <= MOST_MEASURED
    assert found <= 1.02 * min(within)


@pytest.mark.parametrize("limit", [0.004, 0.02, 0.1])
@pytest.mark.parametrize("name", TRUTHS)
def test_a_recipe_between_two_points_of_the_frontier_is_found(name: str, limit: float) -> None:
    """Points of a frontier may be far apart; the best of any size between them is solved for."""
    few = np.arange(0, 400, 21)
    sparse = Frontier(
        choice_KF=FRONTIER.choice_KF[few],
        bytes_K=SIZES[few],
        error_K=ERRORS[few],
        bound_K=ERRORS[few],
    )
    measure = measuring(TRUTHS[name])
    tried = proved(limit, TRUTHS[name], sparse)
    within = [size_of(c) for c in FRONTIER.choice_KF if measure(c).kl.upper <= limit]
    found = min(size_of(one.choice_F) for one in tried if one.kl.upper <= limit)
    assert len(tried) <= MOST_MEASURED
    assert found <= 1.02 * min(within)


def test_no_recipe_is_measured_twice() -> None:
    for limit in np.geomspace(1e-3, 0.6, 20).tolist():
        tried = proved(limit, TRUTHS["curved"])
        chosen = [int(one.choice_F[0]) for one in tried]
        assert len(set(chosen)) == len(chosen)


def test_a_budget_that_nothing_keeps_is_tried_at_the_finest_recipe() -> None:
    tried = proved(1e-6)
    assert [int(one.choice_F[0]) for one in tried] == [399]


def test_a_budget_that_everything_keeps_takes_the_smallest_recipe() -> None:
    tried = proved(10.0)
    assert min(int(one.choice_F[0]) for one in tried) == 0
    assert len(tried) == 1


def test_a_secant_meets_a_power_law_at_once() -> None:
    points = [(x, 2 * x**1.2) for x in (0.01, 0.02)]
    wanted = secant(points, 0.05)
    assert 2 * wanted**1.2 == pytest.approx(0.05)
    assert secant(points[:1], 0.05) == pytest.approx(0.01 * 0.05 / points[0][1])


def test_noise_does_not_turn_the_secant_round() -> None:
    falling = [(0.010, 0.020), (0.011, 0.019)]
    for one, other in itertools.permutations(falling):
        assert 0.011 < secant([one, other], 0.03) < 0.03


def test_a_budget_of_nothing_and_measurements_of_nothing_are_numbers_too() -> None:
    tried = proved(0.0)
    assert [int(one.choice_F[0]) for one in tried] == [399]
    assert secant([(1e-300, 1e-300), (1e300, 0.0)], 1e300) > 0


def test_a_budget_that_is_no_number_or_not_in_the_unit_is_refused_before_measuring(
    tmp_path: Path,
) -> None:
    table = read_table(write_explore_table(tmp_path / "table.jsonl", decoder_layers=1))

    def decided(max_kl: float, unit: str | None = None) -> None:
        request = Request(budgets=Budgets(max_kl=max_kl), unit=unit)
        decide_proved(table, request, evaluate=Mock(), text_sha256="0" * 64, tokens=2)

    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(BudgetError, match=r"must be a number of at least 0"):
            decided(wrong)
    with pytest.raises(BudgetError, match=r"says nothing about nats"):
        decided(0.1, "tensor_mse")
