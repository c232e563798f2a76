"""From a table and budgets to a recipe.

`decide` is the way through: `request_problem` makes a problem of the table's rows, `choose` takes
one option of each fusion group (`solve_exact` or `solve_greedy`, then ties), `predict_chosen` says
what it will cost, and `recipe_from_table` writes it down. `mofq.decision.measured` adds what
running the model tells; nothing else here does.
"""

from __future__ import annotations

from mofq.decision.budgets import Budgets, LinearBudget, finer_is_offered
from mofq.decision.choice import SOLVERS, choose, predict_chosen
from mofq.decision.decision import Decision, decide
from mofq.decision.exact import Solution, least_bytes, solve_exact
from mofq.decision.from_table import request_problem
from mofq.decision.frontier import Frontier, solve_frontier
from mofq.decision.greedy import solve_greedy
from mofq.decision.make_recipe import recipe_from_layers, recipe_from_table
from mofq.decision.prediction import Estimate, predict
from mofq.decision.problem import (
    KL_UNIT,
    Objective,
    Option,
    Problem,
    ProblemGroup,
    build_problem,
    usage,
)
from mofq.decision.request import Request, check_budget
from mofq.decision.uniform import uniform_recipe, uniform_recipes

__all__ = [
    "KL_UNIT",
    "SOLVERS",
    "Budgets",
    "Decision",
    "Estimate",
    "Frontier",
    "LinearBudget",
    "Objective",
    "Option",
    "Problem",
    "ProblemGroup",
    "Request",
    "Solution",
    "build_problem",
    "check_budget",
    "choose",
    "decide",
    "finer_is_offered",
    "least_bytes",
    "predict",
    "predict_chosen",
    "recipe_from_layers",
    "recipe_from_table",
    "request_problem",
    "solve_exact",
    "solve_frontier",
    "solve_greedy",
    "uniform_recipe",
    "uniform_recipes",
    "usage",
]
