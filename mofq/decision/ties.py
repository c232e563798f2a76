"""Choices within noise are ties, and ties go to the simpler scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mofq.decision.budgets import (
    Budgets,
    Constraint,
    budget_constraints,
    keeps_all,
    max_kl_constraints,
    offered,
)
from mofq.decision.prediction import Estimate, paired_loss
from mofq.decision.problem import IntArray, Problem

#: A difference below so many standard errors is noise.
TIE_STDERRS = 2.0
#: The moves of a whole recipe may lose so many.
RECIPE_STDERRS = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Ties:
    """What became of the ties of a recipe."""

    choice_F: IntArray  #: after the moves
    tied_layers: int  #: whose group had a simpler scheme within noise
    moved_layers: int  #: whose group took it


@dataclass(frozen=True, slots=True)
class _Move:
    group: int
    option: int
    loss: Estimate


def move_ties(problem: Problem, budgets: Budgets, choice_F: IntArray) -> Ties:
    """Move choices to simpler schemes where the samples cannot tell them apart.

    A tie is an option of the same fusion group that is simpler (see `simplicity`),
    uses no more of any budget and no more bytes, and whose paired loss is at most
    two standard errors. Each group offers its simplest tie. They are taken, the
    smallest loss first, while the paired loss of all of them together is at most one
    standard error, and a budget in nats is kept; the first that would exceed either ends the moves.

    Args:
        problem: Without samples nothing is known of noise, and nothing moves.
        budgets: That the choice keeps.
        choice_F: One option of each group.

    Returns:
        The choice after the moves, and how many layers had ties.
    """
    if problem.sample_errors is None or min(e.shape[1] for e in problem.sample_errors) < 2:
        return Ties(choice_F, 0, 0)
    moves = _simplest_ties(problem, budgets, choice_F)
    moves.sort(key=lambda move: (move.loss.value, move.group))
    accuracy = () if budgets.max_kl is None else max_kl_constraints(problem, budgets.max_kl)
    moved_F = choice_F
    taken: list[_Move] = []
    for move in moves:
        next_F = moved_F.copy()
        next_F[move.group] = move.option
        loss = paired_loss(problem, choice_F, next_F)
        if not (keeps_all(accuracy, next_F) and _within(loss, RECIPE_STDERRS)):
            break
        moved_F = next_F
        taken.append(move)
    return Ties(moved_F, _layers(problem, moves), _layers(problem, taken))


def _within(loss: Estimate, stderrs: float) -> bool:
    return loss.stderr is not None and loss.value <= stderrs * loss.stderr


def _layers(problem: Problem, moves: Sequence[_Move]) -> int:
    return sum(len(problem.groups[move.group].layers) for move in moves)


def _simplest_ties(problem: Problem, budgets: Budgets, choice_F: IntArray) -> list[_Move]:
    """The simplest tie of each group that has one; options are in order of simplicity."""
    constraints = budget_constraints(problem, budgets)
    allowed_P = offered(problem, budgets) & problem.beside(choice_F)
    moves = []
    for group, chosen in enumerate(choice_F.tolist()):
        for option in range(int(problem.start_F[group]), chosen):
            if not (allowed_P[option] and _uses_no_more(problem, constraints, option, chosen)):
                continue
            loss = paired_loss(problem, np.array([chosen]), np.array([option]))
            if _within(loss, TIE_STDERRS) and math.isfinite(loss.value):
                moves.append(_Move(group, option, loss))
                break
    return moves


def _uses_no_more(
    problem: Problem, constraints: Sequence[Constraint], option: int, chosen: int
) -> bool:
    costs = (problem.size_P, problem.bytes_P, *(constraint.cost_P for constraint in constraints))
    return all(cost_P[option] <= cost_P[chosen] for cost_P in costs)
