"""From a table and budgets to a recipe: what `mofq search` decides, and nothing it prints."""

from __future__ import annotations

from mofq.decide.choice import Decision, decide
from mofq.decide.curve import Curve, CurvePoint, accuracy_curve
from mofq.decide.request import Request, check_budget
from mofq.decide.result import recipe_from_table
from mofq.decide.uniform import best_uniform, uniform_recipe, uniform_recipes

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
