"""One process of a study: measures recipes on a known truth, slowly. For tests."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping

import numpy as np

from mofq.decision import Budgets, Option, Problem, ProblemGroup, build_problem, solve_exact
from mofq.decision.measured.sampler import START
from mofq.decision.measured.study_storage import open_study
from mofq.decision.measured.trials import enqueue, run_trials

BUDGETS = Budgets(max_bits=6.0)
WINDOWS = 8


def problem(groups: int = 10) -> Problem:
    """Groups with INT4, INT6 and INT8 options whose errors differ from group to group."""
    rows = []
    for n in range(groups):
        error = 0.01 * (1.5 + math.sin(n))
        options = []
        for scheme, size, share in (("int4.g32", 20, 1.0), ("int6.g32", 30, 0.45)):
            scatter = 0.1 * share * error * np.sin((n + 1.0) * np.arange(1, 9))
            samples = share * error + scatter - scatter.mean()
            stderr = float(samples.std(ddof=1)) / math.sqrt(8)
            options.append(Option(scheme, size, (share * error,), (stderr,), (samples,)))
        options.append(Option("int8.channel", 40, (0.0,), (0.0,), (np.zeros(8),)))
        rows.append((ProblemGroup(f"layers.{n}.mlp.down", (f"down {n}",), weights=40), options))
    return build_problem(rows)


def true_costs(one: Problem) -> np.ndarray:
    """What each option truly costs: its prediction, wrong by a third up or down."""
    wrong = np.random.default_rng(1).normal(0.0, 0.3, len(one.schemes))
    return one.error_PC[:, 0] * np.exp(wrong)


def truth(schemes: Mapping[str, str], *, seconds: float = 0.0) -> Iterator[float]:
    """The objective."""
    one = problem(len(schemes))
    kl = float(true_costs(one)[one.choice_of(schemes)].sum())
    for window in range(WINDOWS):
        time.sleep(seconds)
        yield kl * (1 + 0.3 * math.cos(window))


def main(storage: str, trials: int, seconds: float) -> None:
    one = problem()
    start_F = solve_exact(one, BUDGETS).choice_F
    study = open_study(storage, "test")
    enqueue(study, one, {START: start_F})

    def slow_truth(schemes: Mapping[str, str]) -> Iterator[float]:
        return truth(schemes, seconds=seconds)

    run_trials(study, one, BUDGETS, start_F, measure=slow_truth, trials=trials)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
