"""The KV cache as decisions of every solver: what may be had together, and on which axis."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from cache_problems import FORMATS, NUMBERS, cached_problem, formats_of, legal_choices

from mofq.decision import (
    Budgets,
    Option,
    Problem,
    ProblemGroup,
    build_problem,
    choose,
    solve_exact,
    solve_frontier,
    solve_greedy,
)
from mofq.decision.budgets import budget_constraints
from mofq.decision.frontier import sized
from mofq.decision.measured.sampler import START
from mofq.decision.measured.study import study_starts
from mofq.decision.measured.study_storage import joined_study, open_study
from mofq.decision.measured.swaps import promising_swaps
from mofq.decision.measured.trials import (
    enqueue,
    measured_frontier,
    measured_trials,
    run_trials,
    search_result,
)
from mofq.decision.problem import IntArray
from mofq.decision.ties import move_ties
from mofq.exceptions import BudgetError, TableError

SIZE = 4_000  #: a budget beside 20 tokens of context: between the smallest and the largest
TOKENS = 20


def least_error(problem: Problem, budgets: Budgets, *, one_format: bool) -> float | None:
    """By looking at every recipe that may be had."""
    rows = budget_constraints(problem, budgets)
    choices = legal_choices(problem, one_format=one_format)
    for row in rows:
        choices = choices[row.cost_P[choices].sum(axis=1) <= row.limit]
    if not len(choices):
        return None
    errors = problem.cost_PK[choices].sum(axis=1).max(axis=1)
    return float(errors.min())


@pytest.mark.parametrize("corpora", [1, 2])
@pytest.mark.parametrize("one_format", [False, True])
@pytest.mark.parametrize(
    "budgets",
    [
        Budgets(max_kv_bits=7.5),
        Budgets(max_kv_bits=10.0, max_bits=7.0),
        Budgets(max_bytes=SIZE),
        Budgets(max_bytes=SIZE + 1000, max_kv_bits=9.0),
    ],
)
def test_exact_finds_the_best_recipe_of_those_that_may_be_had(
    budgets: Budgets, one_format: bool, corpora: int
) -> None:
    for seed in range(3):
        problem = cached_problem(
            seed, layers=2, kv_tokens=TOKENS, one_format=one_format, corpora=corpora
        )
        expected = least_error(problem, budgets, one_format=one_format)
        assert expected is not None
        found = solve_exact(problem, budgets)
        assert problem.error_of(found.choice_F) == pytest.approx(expected, rel=1e-12)
        assert found.bound is not None
        assert found.bound <= expected * (1 + 1e-12)
        assert len(formats_of(problem, found.choice_F)) <= (1 if one_format else 2)


def test_one_format_costs_something_where_a_mixture_is_better() -> None:
    mixed, single = (cached_problem(one_format=one) for one in (False, True))
    budgets = Budgets(max_kv_bits=7.5)
    errors = [
        problem.error_of(solve_exact(problem, budgets).choice_F) for problem in (mixed, single)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("one_format", [False, True])
def test_each_point_of_a_frontier_with_a_context_is_exact_at_its_size(one_format: bool) -> None:
    problem = cached_problem(1, kv_tokens=TOKENS, one_format=one_format)
    frontier = solve_frontier(problem)
    assert len(frontier.bytes_K) > 8
    assert (np.diff(frontier.bytes_K) > 0).all()
    assert (np.diff(frontier.error_K) < 0).all()
    for k, choice_F in enumerate(frontier.choice_KF):
        size = int(problem.layer_bytes_P[choice_F].sum())
        bits = int(problem.cache_bits_P[choice_F].sum())
        scales = problem.bytes_of(choice_F) - size
        assert frontier.bytes_K[k] == size + scales + TOKENS * bits / 8
        budgets = Budgets(max_bytes=int(frontier.bytes_K[k]) + problem.other_bytes)
        exact = problem.error_of(solve_exact(problem, budgets).choice_F)
        assert frontier.bound_K[k] <= exact * (1 + 1e-12)
        assert exact <= frontier.error_K[k] * (1 + 1e-12)
        if not one_format:
            assert exact == pytest.approx(frontier.error_K[k], rel=1e-12)
        assert len(formats_of(problem, choice_F)) <= (1 if one_format else 9)
    # Both ends: everything as small as it gets, and everything as it is.
    assert frontier.error_K[-1] == 0.0
    assert frontier.bytes_K[0] == 3 * (225 + TOKENS * 5 * NUMBERS // 8)


def test_the_formats_of_an_engines_frontier_change_along_it() -> None:
    problem = cached_problem(1, kv_tokens=TOKENS, one_format=True)
    frontier = solve_frontier(problem, sizes=20)
    formats = [frozenset(formats_of(problem, one)) for one in frontier.choice_KF]
    assert all(len(one) <= 1 for one in formats)
    assert len(set(formats)) > 2
    for k, size in enumerate(frontier.bytes_K.tolist()):
        exact = solve_exact(problem, Budgets(max_bytes=size + problem.other_bytes))
        assert frontier.bound_K[k] <= problem.error_of(exact.choice_F) * (1 + 1e-12)


def test_a_format_that_one_layer_lacks_is_no_one_format() -> None:
    problem = without_bf16({"fp8_e4m3", "int8"}, {"int8"})
    solutions = [solve(problem, Budgets()).choice_F for solve in (solve_exact, solve_greedy)]
    for choice_F in (*solutions, *solve_frontier(problem).choice_KF):
        assert formats_of(problem, choice_F) == {"kv:int8.token_head"}
    with pytest.raises(TableError, match="No format of the KV cache is offered for all layers"):
        without_bf16({"fp8_e4m3"}, {"int8"})


def without_bf16(*elements: Collection[str]) -> Problem:
    """One layer, and caches that must be quantized."""
    groups = [(ProblemGroup("mlp", ("mlp",), 400), [Option("int8.channel", 400, (0.1,))])]
    for n, names in enumerate(elements):
        group = ProblemGroup(f"{n}.kv_cache", (), weights=0, counted=False, cached=64)
        options = [
            Option(f"kv:{name}.token_head", 0, (len(name) / 10,), cache_bits=576) for name in names
        ]
        groups.append((group, options))
    return build_problem(groups, one_format=True)


@pytest.mark.parametrize("one_format", [False, True])
def test_bits_of_the_cache_are_met_along_a_frontier_of_layers(one_format: bool) -> None:
    problem = cached_problem(2, one_format=one_format)
    budgets = Budgets(max_kv_bits=9.0)
    frontier = solve_frontier(problem, budgets)
    assert len({tuple(one[3:]) for one in frontier.choice_KF.tolist()}) == 1  # one best cache
    for k, choice_F in enumerate(frontier.choice_KF):
        assert problem.cache_bits_P[choice_F].sum() <= 9 * 3 * NUMBERS
        assert frontier.bytes_K[k] == problem.layer_bytes_P[choice_F].sum()
        exact = solve_exact(problem, sized(problem, budgets, int(frontier.bytes_K[k])))
        assert problem.error_of(exact.choice_F) == pytest.approx(frontier.error_K[k], rel=1e-12)
    with pytest.raises(BudgetError, match="smallest possible is 5 bits per cached number"):
        solve_frontier(problem, Budgets(max_kv_bits=4.0))


def test_bits_of_the_cache_beside_a_context_are_solved_size_by_size() -> None:
    problem = cached_problem(2, kv_tokens=TOKENS)
    budgets = Budgets(max_kv_bits=7.0)
    frontier = solve_frontier(problem, budgets)
    assert len(frontier.bytes_K) > 3
    for k, choice_F in enumerate(frontier.choice_KF):
        assert problem.cache_bits_P[choice_F].sum() <= 7 * 3 * NUMBERS
        assert frontier.bytes_K[k] == problem.size_of(choice_F)
        exact = solve_exact(problem, sized(problem, budgets, int(frontier.bytes_K[k])))
        assert problem.error_of(exact.choice_F) == pytest.approx(frontier.error_K[k], rel=1e-12)


def test_a_cache_without_a_budget_stays_as_it_is_along_the_frontier() -> None:
    problem = cached_problem(3)
    frontier = solve_frontier(problem)
    assert len(frontier.bytes_K) > 3
    assert all(not formats_of(problem, one) for one in frontier.choice_KF)


@pytest.mark.parametrize("one_format", [False, True])
@pytest.mark.parametrize(
    "budgets",
    [Budgets(max_kv_bits=9.0), Budgets(max_bytes=SIZE + 1500), Budgets(max_kv_bits=8.0)],
)
def test_greedy_keeps_the_budgets_and_beats_exact_never(budgets: Budgets, one_format: bool) -> None:
    for seed in range(4):
        problem = cached_problem(seed, kv_tokens=TOKENS, one_format=one_format)
        choice_F = solve_greedy(problem, budgets).choice_F
        assert all(row.holds(choice_F) for row in budget_constraints(problem, budgets))
        assert problem.goes_together(choice_F)
        exact_F = solve_exact(problem, budgets).choice_F
        assert problem.error_of(exact_F) <= problem.error_of(choice_F)


def test_greedy_takes_the_format_of_lower_error_among_those_of_one_width() -> None:
    problem = cached_problem()
    # 9 bits: INT8 and FP8 with a scale for each head of a token compete; INT8 is better here.
    chosen = solve_greedy(problem, Budgets(max_kv_bits=9.0)).choice_F
    assert formats_of(problem, chosen) == {"kv:int8.token_head"}
    as_it_is = solve_greedy(problem, Budgets(max_kv_bits=16.0)).choice_F
    assert formats_of(problem, as_it_is) == set()
    with pytest.raises(BudgetError, match="which is what greedy chooses, has 5 bits per cached"):
        solve_greedy(problem, Budgets(max_kv_bits=4.5))


@pytest.mark.parametrize("seed", range(3))
def test_ties_and_swaps_leave_one_format(seed: int) -> None:
    problem = cached_problem(seed, layers=4, one_format=True, samples=4)
    budgets = Budgets(max_kv_bits=10.0, max_bits=9.0)
    solution = solve_exact(problem, budgets)
    assert problem.goes_together(move_ties(problem, budgets, solution.choice_F).choice_F)
    swaps = promising_swaps(problem, budgets, solution, 50)
    assert swaps
    assert all(problem.goes_together(one) for one in swaps)
    assert problem.goes_together(choose(problem, budgets).choice_F)


def test_a_cache_that_no_scheme_is_named_for_stays_as_it_is() -> None:
    problem = cached_problem()
    layers = {group.name: "int8.channel" for group in problem.groups if not group.cached}
    assert formats_of(problem, problem.choice_of(layers)) == set()
    with pytest.raises(TableError, match="no error for None here"):
        problem.choice_of({})


def truth_of(problem: Problem) -> tuple[np.ndarray, int]:
    wrong = np.random.default_rng(1).normal(0.0, 0.3, len(problem.schemes))
    return problem.error_PC[:, 0] * np.exp(wrong), 6


def measure_of(problem: Problem):  # type: ignore[no-untyped-def]
    true_P, windows = truth_of(problem)

    def measure(schemes: Mapping[str, str]) -> Iterator[float]:
        kl = float(true_P[problem.choice_of(schemes)].sum())
        yield from (kl * (1 + 0.1 * np.cos(n)) for n in range(windows))

    return measure


@pytest.mark.parametrize("one_format", [False, True])
def test_a_study_varies_caches_as_layers_and_never_returns_worse(
    tmp_path: Path, one_format: bool
) -> None:
    problem = cached_problem(2, kv_tokens=TOKENS, one_format=one_format)
    budgets = Budgets(max_bytes=SIZE + (4100 if one_format else 1500))
    start_F = solve_exact(problem, budgets).choice_F

    def run(trials: int) -> list[dict[str, str]]:
        study = open_study(str(tmp_path / "study.journal"), "caches")
        enqueue(study, problem, study_starts(problem, budgets, start_F))
        run_trials(study, problem, budgets, start_F, measure=measure_of(problem), trials=trials)
        found = search_result(study, problem)
        assert found.best.kl.value <= found.start.kl.value
        return [trial.params for trial in study.trials]

    first = run(9)
    params = run(12)
    assert params[:9] == first
    choices = [problem.choice_of(one) for one in params]
    rows = budget_constraints(problem, budgets)
    assert all(row.holds(one) for row in rows for one in choices)
    assert all(problem.goes_together(one) for one in choices)
    assert len({tuple(one[3:]) for one in map(np.ndarray.tolist, choices)}) > 1


@pytest.mark.long
def test_the_size_of_a_study_of_two_objectives_counts_the_cache(tmp_path: Path) -> None:
    problem = cached_problem(2, kv_tokens=TOKENS)
    budgets = Budgets(max_bytes=SIZE + 1500)
    start_F = solve_exact(problem, budgets).choice_F
    starts = study_starts(problem, budgets, start_F, along_frontier=True)
    assert any(name.endswith("bytes") for name in starts)
    sizes = sorted({problem.axis_of(one) for one in starts.values()})
    with joined_study(str(tmp_path / "s.db"), "frontier", objectives=2) as study:
        enqueue(study, problem, starts)
        run_trials(
            study, problem, budgets, start_F, sizes=sizes, measure=measure_of(problem), trials=16
        )
        frontier = measured_frontier(study, problem)
        measured = measured_trials(study, problem)
    for point in frontier:
        choice_F: IntArray = point.measured.choice_F
        assert point.size == problem.size_of(choice_F) + problem.other_bytes <= SIZE + 1500
    assert [one.size for one in frontier] == sorted(one.size for one in frontier)
    best = min(one.kl.value for one in measured.values())
    assert frontier[-1].measured.kl.value == best


def test_a_recipe_of_two_formats_that_somebody_queued_is_not_measured(tmp_path: Path) -> None:
    problem = cached_problem(one_format=True)
    budgets = Budgets(max_kv_bits=12.0)
    start_F = solve_exact(problem, budgets).choice_F
    study = open_study(str(tmp_path / "study.journal"), "caches")
    enqueue(study, problem, {START: start_F})
    mixed = problem.schemes_of(start_F)
    mixed |= {f"layers.{n}.attn.kv_cache": name for n, name in enumerate(list(FORMATS)[:3])}
    study.enqueue_trial(mixed)
    run_trials(study, problem, budgets, start_F, measure=measure_of(problem), trials=2)
    assert "recipe" not in study.trials[1].user_attrs
