"""From what every choice costs to the best choice under budgets. Nothing here runs a model."""

from __future__ import annotations

from mofq.decision.solvers.budgets import Budgets, LinearBudget, finer_is_offered
from mofq.decision.solvers.exact import Solution, least_bytes, solve_exact
from mofq.decision.solvers.from_table import problem_from_table
from mofq.decision.solvers.frontier import Frontier, solve_frontier
from mofq.decision.solvers.greedy import solve_greedy
from mofq.decision.solvers.kv_cache import CacheRequest
from mofq.decision.solvers.pipeline import SOLVERS, Chosen, Solver, choose, solve_smallest
from mofq.decision.solvers.prediction import Estimate, crossfit, paired_loss, predict
from mofq.decision.solvers.problem import (
    KL_UNIT,
    Objective,
    Option,
    Problem,
    ProblemGroup,
    build_problem,
    with_samples,
)
from mofq.decision.solvers.simplicity import simplicity
from mofq.decision.solvers.swaps import promising_swaps
from mofq.decision.solvers.ties import Ties, move_ties
from mofq.decision.solvers.usage import Usage, usage

__all__ = [
    "KL_UNIT",
    "SOLVERS",
    "Budgets",
    "CacheRequest",
    "Chosen",
    "Estimate",
    "Frontier",
    "LinearBudget",
    "Objective",
    "Option",
    "Problem",
    "ProblemGroup",
    "Solution",
    "Solver",
    "Ties",
    "Usage",
    "build_problem",
    "choose",
    "crossfit",
    "finer_is_offered",
    "least_bytes",
    "move_ties",
    "paired_loss",
    "predict",
    "problem_from_table",
    "promising_swaps",
    "simplicity",
    "solve_exact",
    "solve_frontier",
    "solve_greedy",
    "solve_smallest",
    "usage",
    "with_samples",
]
