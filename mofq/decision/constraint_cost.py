"""What constraints on layers cost: the decision beside the one that would be made without them."""

from __future__ import annotations

from mofq.decision.budgets import Budgets
from mofq.decision.choice import SOLVERS, choose
from mofq.decision.decision import Decision
from mofq.decision.from_table import request_problem
from mofq.decision.measured.measurement import shown
from mofq.decision.offered_schemes import asked_constraints
from mofq.decision.prediction import Estimate, error_together, paired_loss
from mofq.decision.problem import KL_UNIT, IntArray, Problem
from mofq.decision.request import Request
from mofq.decision.timing import request_budgets
from mofq.evidence.table import Table
from mofq.exceptions import BudgetError
from mofq.model.sizes import bits_per_weight


def constraint_note(table: Table, request: Request, decision: Decision) -> str | None:
    """What the constraints of a request and its search spaces cost, in a sentence.

    Args:
        table: That was decided on.
        request: As it was decided.
        decision: From `decide`, or after measuring, which is then not compared: measuring moves
            a recipe for reasons that a prediction without constraints does not know.

    Returns:
        The sentence; None where there are no constraints, or where the solver finds no recipe
        without them: a recipe of less error on the samples may be predicted to cost more, and
        then break a budget of KL.

    Raises:
        MofqError: As `decide`, but for budgets that are not met.
    """
    if not asked_constraints(table, request):
        return None
    problem, budgets = decision.problem, decision.budgets
    free = request_problem(table, request, is_constrained=False)
    free_budgets = request_budgets(table, free, request)
    solver = request.solver if request.solver in SOLVERS else "exact"
    ours_F = decision.choice_F
    try:
        best_F = choose(free, free_budgets, solver=solver, ties=request.ties).choice_F
        if decision.recipe.result.kl_measured is not None:
            ours_F = choose(problem, budgets, solver=solver, ties=request.ties).choice_F
    except BudgetError:
        return None
    return _cost(free, budgets, free.choice_of(problem.schemes_of(ours_F)), best_F)


def _cost(free: Problem, budgets: Budgets, ours_F: IntArray, best_F: IntArray) -> str:
    """How much a choice under constraints loses against the one without them."""
    if budgets.minimises_bytes:
        more = free.size_of(ours_F) - free.size_of(best_F)
        if more > 0:
            share = _percent(more, free.size_of(best_F))
            bits = bits_per_weight(int(free.layer_bytes_P[best_F].sum()), free.weights)
            return (
                f"The constraints cost {more:,} bytes ({share}): without them {bits:.4f} bits per "
                f"weight keep the budget."
            )
        return "The constraints cost nothing: without them no smaller recipe is found."
    least = error_together(free, best_F)
    cost = Estimate(error_together(free, ours_F) - least, _noise(free, best_F, ours_F))
    if cost.value <= 0:
        return "The constraints cost nothing: without them no better recipe is found."
    unit = "nats per token" if free.unit == KL_UNIT else f"of {free.unit}"
    share = f" ({_percent(cost.value, least)})" if least else ""
    return (
        f"The constraints cost {shown(cost)} {unit}{share}: without them the same "
        f"budgets give {least:.3g}."
    )


def _percent(part: float, whole: float) -> str:
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _noise(problem: Problem, best_F: IntArray, ours_F: IntArray) -> float | None:
    """The standard error of a cost, where it is a mean over samples."""
    if problem.sample_errors is None or problem.objective != "mean":
        return None
    return paired_loss(problem, best_F, ours_F).stderr
