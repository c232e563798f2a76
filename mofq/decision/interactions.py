"""A solver's choice made better by what its groups do together.

Solvers minimise a sum over groups. Where rounding changes the size of weights, groups do something
together too (`mofq.decision.size_answers`), which is no such sum. Around a choice it nearly is: a
group's share of it is linear in the group's own change of size while the others stay. So the
solver is asked again with these shares added, until nothing is gained. Each of these problems is
solved as exactly as the first, and the result is never worse than the first choice. So it is with
what groups cost by sending tokens of a mixture to other experts (`mofq.decision.flip_costs`), which
is the root of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mofq.decision.budgets import Budgets, offered
from mofq.decision.exact import Solution
from mofq.decision.flip_costs import flip_costs, flip_shares
from mofq.decision.prediction import error_together
from mofq.decision.problem import IntArray, Problem

#: Solved again at most.
_MOST = 4
#: What the groups do together is looked at where their changes of size, or the products of these,
#: make this share of the error: below it less than a hundredth was gained
#: (scripts/bench/low_bits.py).
_LEAST = 0.03

Solver = Callable[[Problem, Budgets], Solution]


def solve_together(problem: Problem, budgets: Budgets, solve: Solver) -> Solution:
    """Solve, and solve again with what the groups of the choice do together.

    Args:
        problem: What may be chosen.
        budgets: Any number at once; of KL none where the groups do something together, since
            the solver would hold it against their sum.
        solve: Minimises a sum over groups.

    Returns:
        The best choice that was found, without a bound where the groups act together: their
        error is no sum. Prices are those of the first problem.

    Raises:
        BudgetError: No recipe keeps the budgets.
    """
    first = solve(problem, budgets)
    if budgets.max_kl is not None or not act_together(problem, first.choice_F):
        return first
    # What a budget of finer layers offers follows from errors, and those are changed below.
    offered_P = offered(problem, budgets)
    best_F, error = first.choice_F, error_together(problem, first.choice_F)
    for _ in range(_MOST):
        next_F = solve(around(problem, best_F), budgets).choice_F
        next_error = error_together(problem, next_F)
        if next_error >= error or not offered_P[next_F].all():
            break
        best_F, error = next_F, next_error
    return replace(first, choice_F=best_F, bound=None)


def act_together(problem: Problem, choice_F: IntArray) -> bool:
    """Whether what the groups of a choice do together is worth looking at.

    Args:
        problem: What may be chosen.
        choice_F: One option of each fusion group.
    """
    if not problem.acts_together or problem.sample_errors is None:
        return False
    error_C = problem.error_PC[choice_F].sum(axis=0)
    if (flip_costs(problem, choice_F) > _LEAST * error_C).any():
        return True
    return problem.answers is not None and any(
        max(one.squares(choice_F), abs(float(one.products(choice_F).mean()))) > _LEAST * error
        for one, error in zip(problem.answers, error_C.tolist(), strict=True)
    )


def around(problem: Problem, choice_F: IntArray) -> Problem:
    """The problem with each option's share of what it does together with a choice.

    Args:
        problem: With answers, or rates of changes of experts.
        choice_F: One option of each fusion group.

    Returns:
        Errors of which the sums of choices that differ in one group differ as what they cost
        together does. A constant is added to all corpora alike, so that none is negative.
    """
    error_PC = problem.error_PC.copy()
    for number, answers in enumerate(problem.answers or ()):
        beside_P = answers.beside(choice_F, problem.group_P)
        # Each product is in the shares of both of its groups.
        twice = float(answers.products(choice_F).mean()) / len(problem.groups)
        error_PC[:, number] += beside_P - twice
    if problem.flip_FC is not None:
        error_PC += flip_shares(problem, choice_F)
    least_F = np.minimum.reduceat(error_PC.min(axis=1), problem.start_F[:-1])
    shift_F = np.minimum(least_F, 0.0)
    return replace(problem, error_PC=error_PC - shift_F[problem.group_P][:, None])
