"""From a table and budgets to a recipe: what `mofq search` decides, and nothing it prints."""

from __future__ import annotations

from mofq.decision.choice import Decision, decide
from mofq.decision.curve import Curve, CurvePoint, accuracy_curve
from mofq.decision.request import Request, check_budget
from mofq.decision.result import recipe_from_table
from mofq.decision.uniform import best_uniform, uniform_recipe, uniform_recipes

__all__ = [
    "Curve",
    "CurvePoint",
    "Decision",
    "Request",
    "accuracy_curve",
    "best_uniform",
    "check_budget",
    "decide",
    "recipe_from_table",
    "uniform_recipe",
    "uniform_recipes",
]
