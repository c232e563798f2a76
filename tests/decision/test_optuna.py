from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pytest
import study_worker
from explore_tables import write_explore_table
from optuna.study import Study
from optuna.trial import TrialState
from solver_problems import problem_of
from study_worker import BUDGETS, WINDOWS, problem, true_costs, truth

from mofq.decision import Budgets, Estimate, Option, Request, solve_exact
from mofq.decision.measured import thompson
from mofq.decision.measured.measurement import uniform_candidates
from mofq.decision.measured.sampler import START, Sampler, propose_new, study_space
from mofq.decision.measured.study import StudyPlan, study_name, study_starts
from mofq.decision.measured.study_storage import open_study
from mofq.decision.measured.thompson import Observation, draw_costs
from mofq.decision.measured.trials import UNIFORM, enqueue, run_trials, search_result
from mofq.evidence.table import read_table
from mofq.exceptions import MofqError


@pytest.fixture(params=["study.db", "study.journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / request.param)


def run(storage: str, trials: int, *, groups: int = 10, seed: int = 0) -> Study:
    one = problem(groups)
    start_F = solve_exact(one, BUDGETS).choice_F
    study = open_study(storage, "test")
    candidates = uniform_candidates(one, BUDGETS, start_F)
    starts = {START: start_F} | {f"{UNIFORM}{name}": one_F for name, one_F in candidates.items()}
    enqueue(study, one, starts)
    run_trials(study, one, BUDGETS, start_F, measure=truth, trials=trials, seed=seed)
    return study


@pytest.mark.long
def test_a_study_finds_what_the_predictions_got_wrong_and_keeps_the_budget(storage: str) -> None:
    one = problem()
    study = run(storage, 24)
    found = search_result(study, one)
    true_P = true_costs(one)
    start, best = true_P[found.start.choice_F].sum(), true_P[found.best.choice_F].sum()
    exact_F = solve_exact(_with_errors(true_P), BUDGETS).choice_F
    assert start - best > 0.5 * (start - true_P[exact_F].sum()) > 0
    for trial in study.trials:
        choice_F = one.choice_of(trial.user_attrs["recipe"])
        assert trial.user_attrs["bits_per_weight"] == 8 * one.bytes_of(choice_F) / one.weights
        assert trial.user_attrs["bits_per_weight"] <= 6.0
        assert trial.params == trial.user_attrs["recipe"]
    assert set(study.trials[0].params) == {f"layers.{n}.mlp.down" for n in range(10)}
    assert study.trials[0].user_attrs["origin"] == START


def test_trials_that_died_do_not_move_those_after_them() -> None:
    one, numbers = problem(3), []
    choice_F = solve_exact(one, BUDGETS).choice_F

    def next_choice(study: Study, number: int) -> np.ndarray:
        numbers.append(number)
        return choice_F

    study = optuna.create_study(sampler=Sampler(one, BUDGETS, next_choice))
    for state in (TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE):
        trial = study.ask(dict(study_space(one, BUDGETS)))
        study.tell(trial, 1.0 if state == TrialState.COMPLETE else None, state=state)
    assert numbers == [0, 1, 1, 1]


def test_a_recipe_that_was_measured_is_not_proposed_while_there_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = problem(3)
    start_F = solve_exact(one, BUDGETS).choice_F
    other_F = start_F + 1
    drawn, tried = iter([start_F, start_F, other_F]), {start_F.tobytes()}
    propose_one = partial(
        propose_new,
        one,
        BUDGETS,
        start_F,
        best_F=start_F,
        observations=(),
        tried=tried,
        seed=(0, 1),
    )
    monkeypatch.setattr("mofq.decision.measured.sampler.propose", lambda *_, **__: next(drawn))
    assert (propose_one() == other_F).all()
    monkeypatch.setattr("mofq.decision.measured.sampler.propose", lambda *_, **__: start_F)
    assert (propose_one() == start_F).all()


def _with_errors(true_P: np.ndarray):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(problem(), error_PC=true_P[:, None])


def test_hopeless_recipes_are_given_up_and_the_start_is_never_beaten_on_paper_only(
    tmp_path: Path,
) -> None:
    study = run(str(tmp_path / "one.journal"), 15)
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    assert pruned
    assert min(len(t.intermediate_values) for t in pruned) < WINDOWS
    found = search_result(study, problem())
    assert found.finished == 15
    assert found.given_up == len(pruned)
    assert found.best.kl.value <= found.start.kl.value


def test_with_one_trial_the_start_is_returned(tmp_path: Path) -> None:
    study = run(str(tmp_path / "one.journal"), 1)
    found = search_result(study, problem())
    assert found.best.choice_F.tolist() == solve_exact(problem(), BUDGETS).choice_F.tolist()
    assert found.best.windows == tuple(truth(problem().schemes_of(found.best.choice_F)))


def test_a_second_run_goes_on_where_the_first_stopped(storage: str) -> None:
    first = [trial.params for trial in run(storage, 6).trials]
    study = run(storage, 9)
    assert [trial.params for trial in study.trials][:6] == first
    assert len(study.trials) == 9
    assert len(run(storage, 9).trials) == 9


def test_one_process_with_one_seed_measures_the_same_recipes(tmp_path: Path) -> None:
    runs = [
        [t.params for t in run(str(tmp_path / f"{n}.journal"), 8, seed=seed).trials]
        for n, seed in enumerate((3, 3, 4))
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.long
def test_a_killed_process_loses_at_most_its_running_trial(storage: str) -> None:
    command = [sys.executable, study_worker.__file__, storage, "8", "0.02"]
    killed, other = (subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2))
    study = open_study(storage, "test")
    deadline = time.monotonic() + 300
    while _finished(study) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    before = _finished(study)
    killed.send_signal(signal.SIGKILL)
    _, errors = other.communicate(timeout=120)
    killed.communicate()
    assert other.returncode == 0, errors.decode()
    assert before >= 3
    assert 8 <= _finished(study) <= 9
    assert sum(not t.state.is_finished() for t in study.trials) <= 1
    assert _finished(run(storage, 10)) == 10


def _finished(study: Study) -> int:
    return len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))


def test_a_start_that_died_with_its_process_is_measured_again(tmp_path: Path) -> None:
    storage, one = str(tmp_path / "study.journal"), problem()
    start_F = solve_exact(one, BUDGETS).choice_F
    study = open_study(storage, "test")
    enqueue(study, one, {START: start_F})
    study.ask()  # as a process does that dies before it tells
    found = search_result(run(storage, 3), one)
    assert found.start.choice_F.tolist() == start_F.tolist()


def test_a_better_uniform_scheme_is_returned_by_name(tmp_path: Path) -> None:
    one, start_F = problem(4), solve_exact(problem(4), BUDGETS).choice_F

    def measure(schemes: Mapping[str, str]) -> Iterator[float]:
        uniform = set(schemes.values()) == {"int6.g32"}
        yield from ((0.1 if uniform else 0.5) + 0.01 * n for n in range(WINDOWS))

    study = open_study(str(tmp_path / "study.journal"), "test")
    uniform_F = uniform_candidates(one, BUDGETS, start_F)["int6.g32"]
    enqueue(study, one, {START: start_F, f"{UNIFORM}int6.g32": uniform_F})
    run_trials(study, one, BUDGETS, start_F, measure=measure, trials=3)
    found = search_result(study, one)
    assert found.uniform == "int6.g32"
    assert set(one.schemes_of(found.best.choice_F).values()) == {"int6.g32"}


def test_a_recipe_that_somebody_queued_over_the_budget_is_not_measured(tmp_path: Path) -> None:
    study = run(str(tmp_path / "study.journal"), 2, groups=4)
    study.enqueue_trial({f"layers.{n}.mlp.down": "int8.channel" for n in range(4)})
    study = run(str(tmp_path / "study.journal"), 4, groups=4)
    over = [t for t in study.trials if set(t.params.values()) == {"int8.channel"}]
    assert [(t.state, t.intermediate_values) for t in over] == [(TrialState.PRUNED, {})]
    assert search_result(study, problem(4)).finished == 4


def test_a_storage_that_cannot_be_opened_is_an_error_that_says_so(tmp_path: Path) -> None:
    for storage in (f"sqlite:///{tmp_path}/nowhere/study.db", "nothing://here"):
        with pytest.raises(MofqError, match="cannot be opened"):
            open_study(storage, "test")


def test_what_was_measured_corrects_the_costs_that_are_drawn() -> None:
    one = problem()
    first_F = solve_exact(one, Budgets(max_bits=4.0)).choice_F
    other_F = first_F.copy()
    other_F[0] += 1 if one.schemes[first_F[0] + 1] != "int8.channel" else -1
    predicted = one.error_PC[other_F, 0].sum() - one.error_PC[first_F, 0].sum()
    measured = Estimate(1.4 * predicted, 1e-6)
    drawn = {}
    for seen in ([], [Observation(other_F, measured)] * 50):
        generator = np.random.default_rng(0)
        costs = [draw_costs(one, first_F, seen, generator=generator) for _ in range(400)]
        drawn[len(seen)] = [c[other_F].sum() - c[first_F].sum() for c in costs]
    assert np.mean(drawn[0]) == pytest.approx(predicted, rel=0.1)
    assert np.mean(drawn[50]) == pytest.approx(1.4 * predicted, rel=0.05)
    assert np.std(drawn[50]) < 0.3 * np.std(drawn[0])


def test_costs_are_drawn_by_the_weights_of_corpora() -> None:
    samples = ((1.0, 2.0), (4.0, 8.0))
    two = Option("int8.channel", 100, (1.5, 6.0), stderrs=(0.5, 2.0), sample_errors=samples)
    for weights, mean, spread in [((3.0, 1.0), 2.625, 0.625), ((0.0, 1.0), 6.0, 2.0)]:
        one = problem_of([[two]], corpora=("en", "pt"), corpus_weights=weights)
        generator = np.random.default_rng(0)
        first_F = np.array([0])
        drawn = [draw_costs(one, first_F, [], generator=generator)[0] for _ in range(4000)]
        assert np.mean(drawn) == pytest.approx(mean, rel=0.05)
        doubt = mean * np.hypot(thompson._COMMON_DOUBT, thompson._OWN_DOUBT)
        assert np.std(drawn) == pytest.approx(np.hypot(spread, doubt), rel=0.05)


def test_studies_of_tables_without_caches_are_called_as_they_were(tmp_path: Path) -> None:
    # Read off the version before caches became parameters: a study goes on under its name.
    table = read_table(write_explore_table(tmp_path / "table.jsonl"))
    table = replace(table, sha256="f" * 64)
    plan = StudyPlan("s.db", "e" * 64, 4096, 512, device="cpu", trials=60, seed=0)
    request = Request(Budgets(max_bits=5.0), engine="vllm-hopper")
    assert study_name(table, request, plan) == "Tiny/model bb4a45f3590c"
    assert study_name(table, request, replace(plan, bos=True)) != "Tiny/model bb4a45f3590c"
    one = problem()
    start_F = solve_exact(one, BUDGETS).choice_F
    assert list(study_starts(one, BUDGETS, start_F)) == [
        *("start", "frontier 5.8000 bits", "frontier 5.6000 bits", "uniform int6.g32")
    ]
    assert list(study_starts(one, BUDGETS, start_F, along_frontier=True)) == [
        *("start", "frontier 4.0000 bits", "frontier 4.4000 bits", "frontier 4.8000 bits"),
        *("frontier 5.2000 bits", "frontier 5.6000 bits", "uniform int6.g32"),
    ]
