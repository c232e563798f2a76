from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import all_choices, option, problem_of, sampled_problem, small_problems

from mofq.decision import Budgets, Problem, solve_exact, solve_frontier, usage
from mofq.exceptions import BudgetError


def non_dominated(problem: Problem) -> list[tuple[int, float]]:
    """Size and error of every recipe that none beats, by looking at all of them."""
    choices = all_choices(problem, Budgets())
    sizes = problem.bytes_P[choices].sum(axis=1)
    errors = problem.cost_PK[choices].sum(axis=1).max(axis=1)
    points = []
    for n in np.lexsort((errors, sizes)):
        if not points or errors[n] < points[-1][1]:
            points.append((int(sizes[n]), float(errors[n])))
    return points


@pytest.mark.long
@settings(max_examples=200, deadline=None, derandomize=True)
@given(small_problems())
def test_every_point_of_the_frontier_is_non_dominated_and_exact_at_its_size(
    problem: Problem,
) -> None:
    frontier = solve_frontier(problem, sizes=4)
    best = dict(non_dominated(problem))
    for choice_F, size, error, bound in zip(
        frontier.choice_KF, frontier.bytes_K, frontier.error_K, frontier.bound_K, strict=True
    ):
        assert problem.bytes_of(choice_F) == size
        assert problem.error_of(choice_F) == error
        assert best[int(size)] == pytest.approx(error, rel=1e-9, abs=1e-15)
        assert bound <= error
    assert (np.diff(frontier.bytes_K) > 0).all()
    assert (np.diff(frontier.error_K) < 0).all()
    first, last = min(best), max(best)
    assert (frontier.bytes_K[0], frontier.bytes_K[-1]) == (first, last)


def test_without_integer_programs_the_points_are_the_hull_and_meet_their_bound() -> None:
    # By hand: sizes 2..8; the hull leaves out (5, 6), above the line from (4, 7) to (6, 4).
    first = [option("int4.g32", 1, 6.0), option("int8.channel", 3, 1.0)]
    second = [
        option("int4.g32", 1, 6.0),
        option("fp4_e2m1.g32", 2, 5.9),
        option("int8.channel", 4, 3.0),
    ]
    frontier = solve_frontier(problem_of([first, second]))
    assert frontier.bytes_K.tolist() == [2, 4, 7]
    assert frontier.error_K.tolist() == [12.0, 7.0, 4.0]
    assert frontier.gap == 0.0
    assert [frontier.at(size) for size in (1, 2, 6, 7, 99)] == [None, 0, 1, 2, 2]


def test_sizes_add_the_optima_between_the_points_of_the_hull() -> None:
    problem = sampled_problem(3, decoder_layers=2)
    hull = solve_frontier(problem)
    more = solve_frontier(problem, sizes=40)
    assert len(more.bytes_K) > len(hull.bytes_K)
    assert set(hull.bytes_K.tolist()) <= set(more.bytes_K.tolist())
    assert hull.gap == 0.0 < more.gap < 1.0
    for k, size in enumerate(more.bytes_K.tolist()):
        exact = solve_exact(problem, Budgets(max_bytes=size))
        assert problem.error_of(exact.choice_F) == pytest.approx(more.error_K[k], rel=1e-12)


def test_a_budget_of_size_ends_the_frontier() -> None:
    problem = sampled_problem(4)
    frontier = solve_frontier(problem, Budgets(max_bits=5.0))
    sizes = 8 * frontier.bytes_K / problem.weights
    assert 4.8 < sizes[-1] <= 5.0
    with pytest.raises(BudgetError, match="smallest possible is 4"):
        solve_frontier(problem, Budgets(max_bits=1.0))


def test_the_frontier_under_a_share_of_finer_layers_keeps_it_everywhere() -> None:
    problem = sampled_problem(5)
    budgets = Budgets(max_finer=0.3, max_bits=12.0)
    frontier = solve_frontier(problem, budgets, sizes=12)
    assert len(frontier.bytes_K) > 3
    for choice_F in frontier.choice_KF:
        used = usage(problem, choice_F)
        assert used.finer_fraction <= 0.3
        assert used.bits_per_weight <= 12.0
    with pytest.raises(BudgetError, match="more than the frontier may reach"):
        solve_frontier(problem, Budgets(max_finer=0.3, max_bits=4.0))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.long
def test_the_frontier_of_the_worst_corpus_is_exact_too(data: st.DataObject) -> None:
    options = [
        [
            option(name, data.draw(st.integers(1, 9)), *data.draw(ERRORS))
            for name in ("int4.g32", "int8.channel", "bf16")
        ]
        for _ in range(3)
    ]
    problem = problem_of(options, corpora=("en", "pt"), objective="worst-corpus")
    best = dict(non_dominated(problem))
    frontier = solve_frontier(problem, sizes=5)
    for size, error in zip(frontier.bytes_K.tolist(), frontier.error_K.tolist(), strict=True):
        assert best[size] == pytest.approx(error)


ERRORS = st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float))


def test_a_budget_of_bytes_that_only_schemes_without_shapes_keep_has_a_frontier() -> None:
    groups = [
        [option("int8.g128", 1032, 1.0, shape_bytes=16), option("fp8_e4m3.g128", 1016, 2.0)]
    ] * 3
    problem = problem_of(groups, other_bytes=100)
    for shapes in range(4):
        limit = 100 + 3 * 1016 + 16 * shapes
        frontier = solve_frontier(problem, Budgets(max_bytes=limit))
        assert frontier.error_K.tolist() == [6.0 - shapes]
        assert problem.size_of(frontier.choice_KF[0]) + 100 <= limit
    with pytest.raises(BudgetError, match="max_size"):
        solve_frontier(problem, Budgets(max_bytes=100 + 3 * 1016 - 1))
