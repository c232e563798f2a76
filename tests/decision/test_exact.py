from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import (
    SCHEMES,
    exhaustive,
    option,
    problem_of,
    sampled_problem,
    small_problems,
    some_budgets,
)

from mofq.decision import (
    Budgets,
    LinearBudget,
    Option,
    Problem,
    ProblemGroup,
    build_problem,
    finer_is_offered,
    least_bytes,
    solve_exact,
    usage,
)
from mofq.decision import exact as exact_module
from mofq.decision.budgets import budget_constraints
from mofq.exceptions import BudgetError, TableError


def check_against_exhaustive(problem: Problem, budgets: Budgets) -> None:
    expected = exhaustive(problem, budgets)
    try:
        choice_F = solve_exact(problem, budgets).choice_F
    except BudgetError:
        assert expected is None
        return
    assert all(row.holds(choice_F) for row in budget_constraints(problem, budgets))
    found: tuple[float, ...] = (problem.error_of(choice_F),)
    if budgets.minimises_bytes:
        found = (problem.bytes_of(choice_F), *found)
    assert expected is not None
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.long
@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data())
def test_exact_equals_exhaustive_search_under_any_budgets(data: st.DataObject) -> None:
    problem = data.draw(small_problems())
    check_against_exhaustive(problem, data.draw(some_budgets(problem)))


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_exact_equals_exhaustive_search_in_ten_thousand_problems(data: st.DataObject) -> None:
    problem = data.draw(small_problems())
    check_against_exhaustive(problem, data.draw(some_budgets(problem)))


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_the_integer_program_equals_exhaustive_search_too(data: st.DataObject) -> None:
    problem = data.draw(small_problems())
    budgets = data.draw(some_budgets(problem))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_module, "_LABELS_OF_TWO_SUMS", 0)
        patch.setattr(exact_module, "_LABELS_OF_MORE", 0)
        check_against_exhaustive(problem, budgets)


@pytest.mark.parametrize("limit", [0.0, 5e-324, 1.0])
def test_a_cost_next_to_nothing_is_kept_by_the_integer_program(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_module, "_LABELS_OF_TWO_SUMS", 0)
    monkeypatch.setattr(exact_module, "_LABELS_OF_MORE", 0)
    names = ("int8.channel", "int4.g128", "int4.g32")
    errors = ((0.0, 0.0), (0.0, 1.0), (0.0, 0.0))
    options = [option(name, 0, *two) for name, two in zip(names, errors, strict=True)]
    problem = problem_of([options], corpora=("a", "b"))
    cost_P = np.array([1.0, 0.0, 5e-324])
    found = solve_exact(
        problem, Budgets(linear=(LinearBudget("max_time", "seconds", cost_P, limit),))
    )
    assert problem.error_of(found.choice_F) == (0.5 if limit == 0.0 else 0.0)
    assert cost_P[found.choice_F].sum() <= limit


def test_exact_finds_the_optimum_that_rounding_the_relaxation_misses() -> None:
    # By error per byte the first group goes first, and then nothing else fits.
    problem = problem_of(
        [
            [option("int4.g32", 0, 10.0), option("int8.channel", 6, 0.0)],
            [option("int4.g32", 0, 7.0), option("int8.channel", 5, 0.0)],
            [option("int4.g32", 0, 7.0), option("int8.channel", 5, 0.0)],
        ]
    )
    found = solve_exact(problem, Budgets(max_bytes=10))
    assert problem.schemes_of(found.choice_F) == {
        "g0": "int4.g32",
        "g1": "int8.channel",
        "g2": "int8.channel",
    }
    assert found.bound is not None
    assert found.bound <= 10.0


def test_a_budget_is_kept_to_the_byte() -> None:
    size = 10**12 + 7
    problem = problem_of(
        [[option("int4.g32", size - 1, 2.0), option("int8.channel", size, 1.0)]] * 2
    )
    for limit, error in [(2 * size, 2.0), (2 * size - 1, 3.0), (2 * size - 2, 4.0)]:
        choice_F = solve_exact(problem, Budgets(max_bytes=limit)).choice_F
        assert problem.error_of(choice_F) == error
        assert problem.bytes_of(choice_F) <= limit


@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_budget_of_floats_may_be_used_up_to_the_last_bit(count: int) -> None:
    # 0.1 + 0.1 + 0.1 is one bit more than 0.3 when it is added up from the left.
    groups = [[option("int4.g32", 1, 2.0), option("int8.channel", 1, 1.0)]] * count
    problem = problem_of(groups)
    cost_P = np.array([{"int4.g32": 0.05, "int8.channel": 0.1}[name] for name in problem.schemes])
    limit = math.fsum([0.1] * count)
    for most, error in [(limit, count), (math.nextafter(limit, 0), count + 1)]:
        time = LinearBudget("max_time", "seconds", cost_P, most)
        choice_F = solve_exact(problem, Budgets(linear=(time,))).choice_F
        assert problem.error_of(choice_F) == error


def test_the_other_tensors_of_the_checkpoint_count_towards_its_size_only() -> None:
    groups = [[option("int4.g32", 50, 2.0), option("int8.channel", 100, 1.0)]]
    problem = problem_of(groups, other_bytes=1000)
    assert problem.bytes_of(solve_exact(problem, Budgets(max_bytes=1099)).choice_F) == 50
    assert problem.bytes_of(solve_exact(problem, Budgets(max_bits=8.0)).choice_F) == 100
    assert problem.bytes_of(solve_exact(problem, Budgets(max_bits=7.99)).choice_F) == 50


def test_a_budget_in_bits_is_the_decimal_number_that_was_written() -> None:
    # 4.1 as a binary number is a little less than 4.1 * 1000 weights / 8 = 512.5 needs.
    group = ProblemGroup("g0", ("l",), 8000)
    problem = build_problem([(group, [option("int4.g32", 4100, 1.0)])])
    assert problem.bytes_of(solve_exact(problem, Budgets(max_bits=4.1)).choice_F) == 4100
    assert usage(problem, np.array([0])).bits_per_weight <= 4.1


def test_an_impossible_budget_names_the_tightest_possible() -> None:
    groups = [[option("int4.g32", 50, 2.0), option("int8.channel", 100, 1.0)]] * 2
    problem = problem_of(groups, other_bytes=7)
    with pytest.raises(BudgetError, match=r"max_size.*smallest possible is 107 bytes"):
        solve_exact(problem, Budgets(max_bytes=106))
    with pytest.raises(BudgetError, match=r"max_bits.*smallest possible is 4 bits per weight"):
        solve_exact(problem, Budgets(max_bits=3.9))
    solve_exact(problem, Budgets(max_bits=4, max_bytes=107))


def test_the_tightest_possible_bits_are_rounded_so_that_they_can_be_met() -> None:
    group = ProblemGroup("g0", ("l",), 3)
    problem = build_problem([(group, [option("int4.g32", 2, 1.0)])])
    with pytest.raises(BudgetError, match=r"smallest possible is 5\.3334 bits"):
        solve_exact(problem, Budgets(max_bits=5.3333))
    solve_exact(problem, Budgets(max_bits=5.3334))


def test_budgets_that_contradict_each_other_are_told_apart() -> None:
    problem = problem_of(
        [[option("int4.g32", 50, 0.5), option("int8.channel", 100, 1.0)]],
        base=("int8.channel",),
        min_gain=0.0,
    )
    with pytest.raises(BudgetError, match="Each can be met alone") as caught:
        solve_exact(problem, Budgets(max_bytes=60, max_finer=0.0))
    assert "max_size: asked for 60 bytes; the smallest possible beside max_finer is 100 bytes" in (
        str(caught.value)
    )
    assert "max_finer: asked for 0 (0 of 1 layers); the smallest possible beside max_size is 1" in (
        str(caught.value)
    )


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (Budgets(max_bits=-1.0), "max_bits: must be a number of at least 0"),
        (Budgets(max_bits=math.nan), "max_bits: must be a number"),
        (Budgets(max_finer=3.0), "at most 1"),
        (Budgets(max_finer=0.1), "names no `base`"),
        (Budgets(max_kl=0.1), "says nothing about nats"),
        (Budgets(linear=(LinearBudget("max_time", "seconds", np.ones(5), 1.0),)), "2 options"),
    ],
)
def test_a_budget_that_has_no_meaning_is_refused(budgets: Budgets, message: str) -> None:
    groups = [[option("int4.g32", 50, 2.0), option("int8.channel", 100, 1.0)]]
    problem = problem_of(groups, unit="relative_weight_error")
    with pytest.raises(BudgetError, match=message):
        solve_exact(problem, budgets)


def test_a_budget_in_nats_needs_error_bars() -> None:
    problem = problem_of([[option("int4.g32", 50, 2.0)]])
    with pytest.raises(BudgetError, match="no standard errors"):
        solve_exact(problem, Budgets(max_kl=3.0))


def test_a_budget_in_nats_alone_gives_the_smallest_recipe_and_of_these_the_best() -> None:
    exact = (0.0,)
    groups = [
        [
            option("int4.g32", 50, 2.0, stderrs=exact),
            option("fp4_e2m1.g32", 50, 1.5, stderrs=exact),
            option("int8.channel", 100, 1.0, stderrs=exact),
        ]
    ] * 2
    problem = problem_of(groups)
    found = solve_exact(problem, Budgets(max_kl=2.6)).choice_F
    assert problem.bytes_of(found) == 150
    assert problem.error_of(found) == 2.5


def test_every_budget_has_a_price_and_a_loose_one_costs_nothing() -> None:
    groups = [[option("int4.g32", 50, 2.0), option("int8.channel", 100, 1.0)]] * 4
    problem = problem_of(groups)
    prices = solve_exact(problem, Budgets(max_bytes=250, max_bits=16)).prices
    assert prices == {"max_bytes": pytest.approx(1 / 50), "max_bits": 0.0}


def test_the_worst_corpus_is_what_is_minimised_when_asked_for() -> None:
    options = [option("int4.g32", 50, 0.0, 3.0), option("int8.channel", 50, 2.0, 2.0)]
    for objective, scheme in [("mean", "int4.g32"), ("worst-corpus", "int8.channel")]:
        problem = problem_of([options], corpora=("en", "pt"), objective=objective)
        found = solve_exact(problem, Budgets())
        assert problem.schemes_of(found.choice_F) == {"g0": scheme}


def test_the_order_of_options_changes_no_choice() -> None:
    problem = sampled_problem(0)
    rng = random.Random(0)
    chosen = []
    for _ in range(3):
        groups: list[tuple[ProblemGroup, list[Option]]] = []
        for number, group in enumerate(problem.groups):
            options = [
                option(problem.schemes[p], int(problem.bytes_P[p]), float(problem.error_PC[p, 0]))
                for p in problem.options_of(number)
            ]
            groups.append((group, rng.sample(options, len(options))))
        shuffled = build_problem(groups)
        found = solve_exact(shuffled, Budgets(max_bits=5.0))
        chosen.append(shuffled.schemes_of(found.choice_F))
    assert chosen[0] == chosen[1] == chosen[2]


def test_of_equal_options_the_simplest_is_chosen() -> None:
    names = ["nf4.g32", "int4.g32@mse", "fp4_e2m1.g32", "int4.g32", "int4.g32.asym"]
    problem = problem_of([[option(name, 50, 1.0) for name in names]])
    found = solve_exact(problem, Budgets(max_bytes=50))
    assert problem.schemes_of(found.choice_F) == {"g0": "int4.g32"}


def test_nothing_is_printed_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    # HiGHS writes a debugging line on problems such as these, and `--json` owns that stream.
    rng = np.random.default_rng(0)
    groups = [
        [option(name, int(rng.integers(1, 10**9)), float(rng.random())) for name in SCHEMES]
        for _ in range(40)
    ]
    problem = problem_of(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_module, "_LABELS_OF_TWO_SUMS", 0)
        for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
            solve_exact(problem, Budgets(max_bytes=int(40e9 * share)))
    assert capfd.readouterr().out == ""


def test_the_smallest_size_is_that_of_the_smallest_options() -> None:
    problem = sampled_problem(1)
    sizes = [min(problem.bytes_P[list(problem.options_of(g))]) for g in range(len(problem.groups))]
    assert least_bytes(problem, Budgets()) == sum(sizes)


def test_a_finer_scheme_is_offered_only_where_it_gains_enough_per_layer() -> None:
    # The median layer gains 1; three layers that gain 30 together gain 10 each.
    plain = [option("int8.channel", 100, 2.0), option("int4.g32", 60, 1.0)]
    great = [option("int8.channel", 100, 32.0), option("int4.g32", 60, 2.0)]
    small = [option("int8.channel", 100, 31.0), option("int4.g32", 60, 2.0)]
    problem = problem_of(
        [plain, plain, plain, plain, great, small],
        layers=[1, 1, 1, 5, 3, 3],
        base=("int8.channel",),
        min_gain=10.0,
    )
    kept = finer_is_offered(problem)
    finer = [bool(kept[p]) for p in range(len(kept)) if problem.schemes[p] == "int4.g32"]
    assert finer == [False, False, False, False, True, False]
    chosen = solve_exact(problem, Budgets(max_finer=1.0)).choice_F
    assert usage(problem, chosen).finer_layers == ("g4.0", "g4.1", "g4.2")
    assert usage(problem, chosen).finer_fraction == 3 / 14
    assert usage(problem, chosen).finer_weight_fraction == 300 / 1400


def test_layers_where_a_finer_scheme_is_the_same_as_the_base_do_not_make_the_median() -> None:
    # A group of 128 is the whole channel in four layers; of the others one stands out.
    same = [option("int8.channel", 100, 2.0), option("int4.g32", 60, 2.0)]
    plain = [option("int8.channel", 100, 2.0), option("int4.g32", 60, 1.0)]
    great = [option("int8.channel", 100, 32.0), option("int4.g32", 60, 2.0)]
    problem = problem_of([same] * 4 + [plain, plain, great], base=("int8.channel",), min_gain=10.0)
    kept = finer_is_offered(problem)
    finer = [bool(kept[p]) for p in range(len(kept)) if problem.schemes[p] == "int4.g32"]
    assert finer == [False] * 6 + [True]


def test_a_group_without_an_offer_is_outside_of_the_share_of_finer_layers() -> None:
    offered = [option("int8.channel", 100, 9.0), option("int4.g32", 60, 1.0)]
    group = ProblemGroup("excluded", ("x.0", "x.1"), 200, counted=False)
    problem = build_problem(
        [(group, [option("bf16", 400, 0.0)]), (ProblemGroup("g", ("g.0",), 100), offered)],
        base=("int8.channel",),
        min_gain=0.0,
    )
    assert solve_exact(problem, Budgets(max_finer=0.0)).choice_F.tolist() == [0, 1]
    assert usage(problem, np.array([0, 1])).finer_layers == ()
    assert usage(problem, np.array([0, 2])).finer_fraction == 1.0


def test_formats_of_the_cache_are_neither_base_nor_finer() -> None:
    cache = ProblemGroup("cache", ("cache",), weights=0, counted=False, cached=64)
    options = [
        option("bf16", 0, 0.0, cache_bits=1024),
        option("kv:fp8_e4m3.tensor", 8, 0.1, cache_bits=512),
    ]
    layers = [option("int8.channel", 100, 1.0), option("bf16", 200, 0.0)]
    problem = build_problem(
        [(ProblemGroup("g0", ("l",), 100), layers), (cache, options)],
        base=("int8.channel", "bf16"),
    )
    solution = solve_exact(problem, Budgets(max_finer=0.0, max_kv_bits=8.0))
    chosen = problem.schemes_of(solution.choice_F)
    assert chosen == {"g0": "bf16", "cache": "kv:fp8_e4m3.tensor"}


def test_an_option_that_lacks_a_corpus_is_refused() -> None:
    with pytest.raises(TableError, match=r"g0: needs a row for each of 2 corpora, has 1 errors"):
        problem_of([[option("int8.channel", 100, 9.0)]], corpora=("en", "pt"))
    with pytest.raises(TableError, match=r"g0: .*no row"):
        problem_of([[]])


def test_a_choice_and_its_schemes_say_the_same() -> None:
    problem = sampled_problem(2)
    found = solve_exact(problem, Budgets(max_bits=5.0)).choice_F
    assert problem.choice_of(problem.schemes_of(found)).tolist() == found.tolist()
    with pytest.raises(
        TableError, match=r"layers.0.attn.qkv: the table has no error for 'nf4.g32' here; it has"
    ):
        problem.choice_of({"layers.0.attn.qkv": "nf4.g32"})
