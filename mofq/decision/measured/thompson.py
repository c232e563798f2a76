"""Where to look next, given what was predicted and what was measured.

The true cost of every option is unknown, and normal around its prediction: errors of one
table share samples (so they are wrong together), each is wrong a little on its own, and
all are wrong by one factor on another text. A measured recipe is, against a first one,
the sum of the costs that differ. A proposal draws costs from what is left of the doubt
and takes the optimum under the budgets for them (Thompson sampling): options that are
surely worse are left alone, and those that nobody can tell apart get measured.

Array suffixes beside `problem`'s: T recipes that were measured, D directions of doubt.

Source: Matheron's rule for the draws, as in J. T. Wilson et al., "Pathwise conditioning of
Gaussian processes", JMLR 22 (2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mofq.decision.budgets import Budgets, budget_constraints, offered
from mofq.decision.exact import minimise
from mofq.decision.prediction import Estimate
from mofq.decision.problem import FloatArray, IntArray, Problem
from mofq.exceptions import BudgetError

#: Share of each error that may be wrong on its own: measured and predicted KL of single
#: fusion groups scatter by about this much around each other.
_OWN_DOUBT = 0.2
#: Share of all errors that may be wrong together, on another text.
_COMMON_DOUBT = 0.2
#: Share of a measured difference that is not a sum over fusion groups.
_INTERACTION = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """A measured recipe."""

    choice_F: IntArray
    loss: Estimate  #: against the first recipe, window by window [nats per token]


def propose(
    problem: Problem,
    budgets: Budgets,
    first_F: IntArray,
    *,
    best_F: IntArray,
    observations: Sequence[Observation],
    generator: np.random.Generator,
) -> IntArray:
    """The next recipe to measure: the best one with some groups as one draw would have them.

    Args:
        problem: Errors; samples where there are.
        budgets: That every proposal keeps. Not ``max_kl``.
        first_F: What losses are measured against.
        best_F: What was measured best until now; the proposal stays near it.
        observations: What was measured.
        generator: Of the draw.

    Returns:
        One option of each group. It may have been measured already.

    Raises:
        BudgetError: No recipe keeps the budgets.
    """
    cost_P = draw_costs(problem, first_F, observations, generator=generator)
    everything_F = _optimum(problem, budgets, cost_P, offered(problem, budgets))
    changed = np.flatnonzero(everything_F != best_F)
    if len(changed) < 2:
        return everything_F
    # A few groups at a time: what is measured can then be laid at their door.
    count = round(math.exp(generator.uniform(math.log(2), math.log(len(changed)))))
    free = generator.choice(changed, size=count, replace=False)
    partly_F = best_F.copy()
    partly_F[free] = everything_F[free]
    if not problem.goes_together(partly_F):  # the format of the cache changes in one piece
        cached = [n for n in changed if problem.groups[n].cached]
        free = np.union1d(free, np.array(cached, dtype=np.int64))
    allowed_P = offered(problem, budgets) & np.isin(problem.group_P, free)
    allowed_P[best_F] = True
    return _optimum(problem, budgets, cost_P, allowed_P)


def _optimum(
    problem: Problem, budgets: Budgets, cost_P: FloatArray, allowed_P: np.ndarray
) -> IntArray:
    best = minimise(problem, cost_P[:, None], budget_constraints(problem, budgets), allowed_P)
    if best is None:
        raise BudgetError("No recipe meets the budgets near one that did.")
    choice_F: IntArray = best.choice_F
    return choice_F


def draw_costs(
    problem: Problem,
    first_F: IntArray,
    observations: Sequence[Observation],
    *,
    generator: np.random.Generator,
) -> FloatArray:
    """One draw of what every option may truly cost, given what was measured.

    Args:
        problem: The predictions.
        first_F: What losses are measured against.
        observations: What was measured.
        generator: Of the draw.

    Returns:
        [P], in the problem's unit; a draw may be negative.
    """
    error_P = problem.mean_over_corpora(problem.error_PC)
    shared_PD, own_P = _doubt(problem, error_P)
    cost_P: FloatArray = error_P + shared_PD @ generator.standard_normal(shared_PD.shape[1])
    cost_P += own_P * generator.standard_normal(len(own_P))
    known = [one for one in observations if one.loss.stderr is not None]
    if not known:
        return cost_P
    difference_TP = np.zeros((len(known), len(error_P)))
    for row_P, one in zip(difference_TP, known, strict=True):
        row_P[one.choice_F] += 1.0
        row_P[first_F] -= 1.0
    loss_T = np.array([one.loss.value for one in known])
    stderr_T = np.array([one.loss.stderr or 0.0 for one in known])
    noise_T = np.hypot(stderr_T, _INTERACTION * loss_T) + 1e-3 * float(error_P[first_F].sum())
    covariance_PT = shared_PD @ (difference_TP @ shared_PD).T
    covariance_PT += np.square(own_P)[:, None] * difference_TP.T
    covariance_TT = difference_TP @ covariance_PT + np.diag(np.square(noise_T))
    drawn_T = difference_TP @ cost_P + noise_T * generator.standard_normal(len(known))
    return np.asarray(cost_P + covariance_PT @ np.linalg.solve(covariance_TT, loss_T - drawn_T))


def _doubt(problem: Problem, error_P: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Standard deviations in directions that options share, [P, D], and of each alone, [P]."""
    shared = [_COMMON_DOUBT * error_P[:, None]]
    total = sum(problem.corpus_weights)
    for weight, e_PN in zip(problem.corpus_weights, problem.sample_errors or (), strict=False):
        count = e_PN.shape[1]
        if count > 1:
            share = math.sqrt(count * (count - 1)) * total
            shared.append(weight * (e_PN - e_PN.mean(axis=1, keepdims=True)) / share)
    return np.concatenate(shared, axis=1), _OWN_DOUBT * np.abs(error_P)
