"""Recipes near a recipe that may well be better: what is worth measuring on the model itself."""

from __future__ import annotations

import numpy as np

from mofq.decision.budgets import Budgets, Constraint, budget_constraints, keeps_all, offered
from mofq.decision.exact import Solution
from mofq.decision.problem import BoolArray, FloatArray, IntArray, Problem

#: Single moves that are combined in pairs.
_MOVES = 200


def promising_swaps(
    problem: Problem, budgets: Budgets, solution: Solution, count: int
) -> list[IntArray]:
    """Choices one or two moves away whose loss could be the least, by what the samples allow.

    A move gives one fusion group another option; two moves together keep a budget
    that one alone would break. They are ranked by their predicted loss less two of its
    paired standard errors: a swap that the samples are sure about is not
    promising, one that they cannot judge is.

    Args:
        problem: What may be chosen; without samples the predicted loss alone ranks.
        budgets: That every swap keeps; ``max_kl`` is not looked at.
        solution: Where to start, with its prices.
        count: How many to return.

    Returns:
        At most so many choices, the most promising first.
    """
    constraints = budget_constraints(problem, budgets)
    allowed_P = offered(problem, budgets) & problem.beside(solution.choice_F)
    moves = _best_moves(problem, constraints, solution, allowed_P=allowed_P)
    if not len(moves):
        return []
    chosen = solution.choice_F[problem.group_P[moves]]
    score_SS = _optimistic_loss(problem, moves, chosen)
    fits_SS = _fits(constraints, solution.choice_F, moves, chosen)
    # A single move stands on the diagonal, a pair above it.
    other_group_SS = problem.group_P[moves][:, None] != problem.group_P[moves][None, :]
    wanted_SS = fits_SS & (np.triu(other_group_SS) | np.eye(len(moves), dtype=np.bool_))
    first_S, second_S = np.nonzero(wanted_SS)
    swaps: list[IntArray] = []
    for n in np.argsort(score_SS[first_S, second_S], kind="stable"):
        if len(swaps) == count:
            break
        swapped_F = solution.choice_F.copy()
        for move in (moves[first_S[n]], moves[second_S[n]]):
            swapped_F[problem.group_P[move]] = move
        if keeps_all(constraints, swapped_F) and problem.goes_together(swapped_F):
            swaps.append(swapped_F)
    return swaps


def _best_moves(
    problem: Problem,
    constraints: tuple[Constraint, ...],
    solution: Solution,
    *,
    allowed_P: BoolArray,
) -> IntArray:
    """Options of other schemes that cost least once what they use is paid for, [S]."""
    priced_P = problem.mean_over_corpora(problem.error_PC)
    for name, one in (solution.prices or {}).items():
        constraint = next(
            (constraint for constraint in constraints if constraint.name == name), None
        )
        priced_P = priced_P if constraint is None else priced_P + one * constraint.cost_P
    extra_P = priced_P - priced_P[solution.choice_F][problem.group_P]
    is_chosen_P = np.zeros(len(allowed_P), dtype=np.bool_)
    is_chosen_P[solution.choice_F] = True
    moves = np.flatnonzero(allowed_P & ~is_chosen_P)
    return np.sort(moves[np.argsort(extra_P[moves], kind="stable")[:_MOVES]])


def _optimistic_loss(problem: Problem, moves: IntArray, chosen: IntArray) -> FloatArray:
    """Predicted loss less two standard errors; a single move stands on the diagonal."""
    loss_S = problem.mean_over_corpora(problem.error_PC[moves] - problem.error_PC[chosen])
    loss_SS = loss_S[:, None] + loss_S[None, :]
    variance_SS = np.zeros_like(loss_SS)
    np.fill_diagonal(loss_SS, loss_S)
    total = sum(problem.corpus_weights)
    for weight, error_PN in zip(problem.corpus_weights, problem.sample_errors or (), strict=False):
        if error_PN.shape[1] < 2:
            continue
        difference_SN = error_PN[moves] - error_PN[chosen]
        covariance_SS = np.atleast_2d(np.cov(difference_SN)) / error_PN.shape[1]
        own_S = np.diag(covariance_SS).copy()
        pair_SS = own_S[:, None] + own_S[None, :] + 2 * covariance_SS
        np.fill_diagonal(pair_SS, own_S)
        variance_SS += pair_SS * weight**2 / total**2
    return np.asarray(loss_SS - 2 * np.sqrt(np.maximum(variance_SS, 0.0)))


def _fits(
    constraints: tuple[Constraint, ...], choice_F: IntArray, moves: IntArray, chosen: IntArray
) -> BoolArray:
    """Whether each move (on the diagonal) and each pair keeps every budget."""
    fits_SS = np.ones((len(moves), len(moves)), dtype=np.bool_)
    for constraint in constraints:
        added_S = constraint.cost_P[moves] - constraint.cost_P[chosen]
        added_SS = added_S[:, None] + added_S[None, :]
        np.fill_diagonal(added_SS, added_S)
        fits_SS &= constraint.used(choice_F) + added_SS <= constraint.limit
    return fits_SS
