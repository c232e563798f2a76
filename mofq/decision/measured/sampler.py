"""Optuna's way to ask `thompson` for recipes.

All that a sampler knows is in the study, so that processes share it and a killed one is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mofq.decision.budgets import Budgets, offered
from mofq.decision.measured.thompson import Observation, propose
from mofq.decision.problem import IntArray, Problem

#: Name of the first recipe, which all others are compared with.
START = "start"
#: Draws before a recipe is measured a second time.
_DRAWS = 8


def start_trial(study: Study) -> FrozenTrial | None:
    """The complete trial of the first recipe."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.user_attrs.get("origin") == START:
            return trial
    return None


def study_space(problem: Problem, budgets: Budgets) -> dict[str, CategoricalDistribution]:
    """The parameters of a study: fusion group -> the schemes that it may have."""
    allowed_P = offered(problem, budgets)
    return {
        group.name: CategoricalDistribution(
            [problem.schemes[p] for p in problem.options_of(n) if allowed_P[p]]
        )
        for n, group in enumerate(problem.groups)
    }


class Sampler(optuna.samplers.BaseSampler):
    """Asks for the next recipe of a study."""

    def __init__(
        self,
        problem: Problem,
        budgets: Budgets,
        next_choice: Callable[[Study, int], IntArray],
    ) -> None:
        """Take what decides.

        Args:
            problem: Its groups are the parameters.
            budgets: That say which schemes may be had.
            next_choice: Study and number of a trial -> its recipe. Trials that died with their
                process do not count, as if they had never been.
        """
        self._problem = problem
        self._budgets = budgets
        self._next_choice = next_choice

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Every fusion group, in one draw."""
        return dict(study_space(self._problem, self._budgets))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next recipe; nothing where one was queued."""
        if "fixed_params" in trial.system_attrs:
            return {}
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        number = trial.number - sum(one.number < trial.number for one in failed)
        return self._problem.schemes_of(self._next_choice(study, number))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A group that was queued without a scheme, by hand: as in the start, or the simplest."""
        assert isinstance(param_distribution, CategoricalDistribution)
        first = start_trial(study)
        return param_distribution.choices[0] if first is None else first.params[param_name]


def propose_new(
    problem: Problem,
    budgets: Budgets,
    start_F: IntArray,
    *,
    best_F: IntArray,
    observations: Sequence[Observation],
    tried: set[bytes],
    seed: tuple[int, int],
) -> IntArray:
    """As `propose`, and one that was not measured yet, if there is one near.

    Args:
        problem: What may be chosen.
        budgets: That the recipe keeps.
        start_F: That the observations are differences from.
        best_F: The best so far.
        observations: What was measured.
        tried: The bytes of all choices that were.
        seed: Of the study, and the number of the trial.
    """
    generator = np.random.default_rng(seed)
    for _ in range(_DRAWS):
        choice_F = propose(
            problem,
            budgets,
            start_F,
            best_F=best_F,
            observations=observations,
            generator=generator,
        )
        if choice_F.tobytes() not in tried:
            break
    return choice_F
