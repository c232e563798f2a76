"""A study of measured KL and true bits, on a known truth."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_worker import BUDGETS, WINDOWS, problem, true_costs, truth

from mofq.decision import solve_exact
from mofq.decision.measured.sampler import START
from mofq.decision.measured.study import study_starts
from mofq.decision.measured.study_storage import joined_study
from mofq.decision.measured.trials import (
    FrontierTrial,
    check_trial,
    enqueue,
    measured_frontier,
    measured_trials,
    run_trials,
    search_result,
)
from mofq.exceptions import MofqError


def run(storage: str, trials: int) -> tuple[FrontierTrial, ...]:
    one = problem()
    start_F = solve_exact(one, BUDGETS).choice_F
    starts = study_starts(one, BUDGETS, start_F, along_frontier=True)
    sizes = sorted({one.bytes_of(choice_F) for choice_F in starts.values()})
    with joined_study(storage, "frontier", objectives=2) as study:
        enqueue(study, one, starts)
        run_trials(study, one, BUDGETS, start_F, sizes=sizes, measure=truth, trials=trials)
        assert len(measured_trials(study, one)) == trials
        assert len(study.best_trials) >= len(measured_frontier(study, one))
        return measured_frontier(study, one)


@pytest.mark.long
@pytest.mark.parametrize("name", ["study.db", "study.journal"])
def test_the_frontier_falls_keeps_the_budget_and_beats_what_was_predicted(
    tmp_path: Path, name: str
) -> None:
    one = problem()
    frontier = run(str(tmp_path / name), 40)
    kl = [point.measured.kl.value for point in frontier]
    bits = [point.size for point in frontier]
    assert kl == sorted(kl, reverse=True)
    assert bits == sorted(bits)
    assert max(bits) <= 6.0
    assert all(len(point.measured.windows) == WINDOWS for point in frontier)
    true_P = true_costs(one)
    start_F = solve_exact(one, BUDGETS).choice_F
    # At the budget it finds what the prediction got wrong, as a study of KL alone does.
    best = frontier[-1].measured.choice_F
    assert true_P[best].sum() < true_P[start_F].sum()
    # The smallest recipe is on it: nothing is as small.
    assert bits[0] == 8 * 20 * 10 / one.weights


@pytest.mark.long
def test_a_second_run_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.db")
    first = run(storage, 12)
    assert [point.trial for point in run(storage, 12)] == [point.trial for point in first]
    assert run(storage, 14)[-1].measured.kl.value <= first[-1].measured.kl.value


def test_a_study_of_two_objectives_starts_along_the_frontier() -> None:
    one = problem()
    start_F = solve_exact(one, BUDGETS).choice_F
    starts = study_starts(one, BUDGETS, start_F, along_frontier=True)
    assert (starts[START] == start_F).all()
    assert len({choice_F.tobytes() for choice_F in starts.values()}) == len(starts)
    assert min(one.bytes_of(choice_F) for choice_F in starts.values()) == 20 * 10
    assert all(one.bytes_of(choice_F) <= 30 * 10 for choice_F in starts.values())


def test_the_recipe_of_a_trial_can_be_taken(tmp_path: Path) -> None:
    storage, one = str(tmp_path / "study.db"), problem()
    smallest, *_, largest = run(storage, 9)
    with joined_study(storage, "frontier", objectives=2) as study:
        taken = search_result(study, one, trial=smallest.trial).best
        assert (taken.choice_F == smallest.measured.choice_F).all()
        assert taken.windows == smallest.measured.windows
        assert (search_result(study, one).best.choice_F != taken.choice_F).any()
        assert largest.trial != smallest.trial
        with pytest.raises(MofqError, match=r"trial=99: the study has no such trial .* it has 0, "):
            search_result(study, one, trial=99)
    with (
        joined_study(str(tmp_path / "empty.db"), "frontier", objectives=2) as study,
        pytest.raises(MofqError, match=r"trial=0: the study has no such trial .* it has none\."),
    ):
        check_trial(study, one, 0)


def test_one_window_has_no_error_bar(tmp_path: Path) -> None:
    one = problem()
    start_F = solve_exact(one, BUDGETS).choice_F
    with joined_study(str(tmp_path / "s.db"), "frontier", objectives=2) as study:
        enqueue(study, one, {START: start_F})
        with pytest.raises(MofqError, match="at least 2 windows"):
            run_trials(
                study,
                one,
                BUDGETS,
                start_F,
                sizes=[one.bytes_of(start_F)],
                measure=lambda schemes: iter([1.0]),
                trials=1,
            )
