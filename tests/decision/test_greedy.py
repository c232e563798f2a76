from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import option, problem_of, sampled_problem, small_problems, some_budgets

from mofq.decision import Budgets, solve_exact, solve_greedy, usage
from mofq.decision.budgets import budget_constraints
from mofq.exceptions import BudgetError

W8A8 = ("int8.channel+int8.token", "fp8_e4m3.channel+fp8_e4m3.token")


def test_at_equal_width_each_layer_takes_the_format_of_lower_error() -> None:
    problem = problem_of(
        [
            [option(W8A8[0], 100, 1.0), option(W8A8[1], 100, 2.0), option("bf16", 200, 0.0)],
            [option(W8A8[0], 100, 2.0), option(W8A8[1], 100, 1.0), option("bf16", 200, 0.0)],
        ]
    )
    found = solve_greedy(problem, Budgets())
    assert problem.schemes_of(found.choice_F) == {"g0": W8A8[0], "g1": W8A8[1]}


def test_of_the_widths_that_fit_the_budget_the_best_is_taken() -> None:
    options = [
        option("int4.g32", 56, 9.0),
        option("fp4_e2m1.g32", 56, 8.0),
        option("int8.channel", 100, 2.0),
        option("fp8_e4m3.channel", 100, 3.0),
    ]
    problem = problem_of([options] * 2)
    for limit, scheme in [(200, "int8.channel"), (199, "fp4_e2m1.g32")]:
        found = solve_greedy(problem, Budgets(max_bytes=limit))
        assert set(problem.schemes_of(found.choice_F).values()) == {scheme}
    with pytest.raises(BudgetError, match=r"max_size.*one width.*112 bytes"):
        solve_greedy(problem, Budgets(max_bytes=111))


def test_different_group_sizes_do_not_compete_as_formats() -> None:
    options = [
        option("int4.g128", 52, 9.0),
        option("fp4_e2m1.g128", 52, 8.0),
        option("int4.g32", 56, 1.0),
    ]
    problem = problem_of([options])
    found = solve_greedy(problem, Budgets(max_bytes=53))
    assert problem.schemes_of(found.choice_F) == {"g0": "fp4_e2m1.g128"}


def test_a_group_without_the_width_takes_one_of_the_same_bits() -> None:
    plain = [option("int4.g128", 52, 9.0), option("int8.channel", 100, 8.5)]
    odd = [option("int4.g64", 53, 9.0), option("int8.channel", 100, 8.5)]
    problem = problem_of([plain, plain, odd])
    found = solve_greedy(problem, Budgets(max_bytes=160))
    assert problem.schemes_of(found.choice_F)["g2"] == "int4.g64"


def test_finer_scales_go_to_the_layers_that_gain_most_while_the_share_lasts() -> None:
    def options(gain: float) -> list[object]:
        return [option("int8.channel", 100, 100.0), option("int8.g128", 102, 100.0 - gain)]

    gains = [1.0, 50.0, 3.0, 60.0]
    problem = problem_of(
        [options(gain) for gain in gains],  # type: ignore[misc]
        layers=[1, 1, 1, 3],  # 60 over three layers is 20 each
        base=("int8.channel",),
        min_gain=0.0,
    )
    expected = {0.0: [], 1 / 6: ["g1"], 2 / 6: ["g1", "g2"], 4 / 6: ["g1", "g3"]}
    for share, finer in expected.items():
        found = solve_greedy(problem, Budgets(max_finer=share))
        chosen = problem.schemes_of(found.choice_F)
        assert [name for name in chosen if chosen[name] == "int8.g128"] == finer
        assert usage(problem, found.choice_F).finer_fraction <= share


def test_finer_scales_stop_at_the_budget_of_size_too() -> None:
    options = [option("int8.channel", 100, 9.0), option("int8.g128", 102, 1.0)]
    problem = problem_of([options] * 3, base=("int8.channel",), min_gain=0.0)
    found = solve_greedy(problem, Budgets(max_finer=1.0, max_bytes=305))
    assert problem.bytes_of(found.choice_F) == 304


def test_without_a_budget_the_unquantized_scheme_is_no_width() -> None:
    problem = sampled_problem(0)
    found = solve_greedy(problem, Budgets())
    assert "bf16" not in problem.schemes_of(found.choice_F).values()
    only = problem_of([[option("bf16", 200, 0.0)]])
    assert only.schemes_of(solve_greedy(only, Budgets()).choice_F) == {"g0": "bf16"}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_greedy_keeps_every_budget_and_exact_is_never_worse(data: st.DataObject) -> None:
    problem = data.draw(small_problems())
    budgets = data.draw(some_budgets(problem))
    try:
        greedy_F = solve_greedy(problem, budgets).choice_F
    except BudgetError:
        return
    assert all(row.holds(greedy_F) for row in budget_constraints(problem, budgets))
    exact_F = solve_exact(problem, budgets).choice_F
    if budgets.minimises_bytes:
        assert problem.bytes_of(exact_F) <= problem.bytes_of(greedy_F)
    else:
        assert problem.error_of(exact_F) <= problem.error_of(greedy_F) + 1e-15
