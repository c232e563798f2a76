"""The flow from Python: one function for each stage, with the checks and figures of its command.

Every function reads finished files and writes new ones, and returns a typed result. None prints;
what a user should know goes to ``tell``, and how far a long stage is to ``progress``. Errors are
`mofq.exceptions.MofqError`. Importing this package imports neither numpy nor torch.
"""

from __future__ import annotations

from mofq.api.advise import AdviseResult, advise
from mofq.api.calibrate import CalibrateResult, calibrate
from mofq.api.catalog import (
    DevicesResult,
    EnginesResult,
    FormatsResult,
    SpacesResult,
    devices,
    engines,
    formats,
    spaces,
)
from mofq.api.diff import DiffResult, diff
from mofq.api.explore import ExploreResult, PlotResult, explore, plot
from mofq.api.export import ExportResult, export
from mofq.api.frontier import FrontierPoint, FrontierResult, frontier
from mofq.api.inspect import InspectResult, inspect
from mofq.api.measure import MeasureResult, measure
from mofq.api.options import (
    Aim,
    Budget,
    Choices,
    Constraints,
    Excerpts,
    LmEval,
    Method,
    OnModel,
    Running,
    Samples,
    Study,
    Timing,
    Vocabulary,
    Where,
    Windows,
)
from mofq.api.recipe import RecipeFromResult, UniformResult, recipe_from, uniform
from mofq.api.rewrite import RewriteResult, rewrite
from mofq.api.run import RunResult, demo, run
from mofq.api.search import SearchResult, search
from mofq.api.tune import TuneResult, tune
from mofq.api.validate import ValidateResult, validate

__all__ = [
    "AdviseResult",
    "Aim",
    "Budget",
    "CalibrateResult",
    "Choices",
    "Constraints",
    "DevicesResult",
    "DiffResult",
    "EnginesResult",
    "Excerpts",
    "ExploreResult",
    "ExportResult",
    "FormatsResult",
    "FrontierPoint",
    "FrontierResult",
    "InspectResult",
    "LmEval",
    "MeasureResult",
    "Method",
    "OnModel",
    "PlotResult",
    "RecipeFromResult",
    "RewriteResult",
    "RunResult",
    "Running",
    "Samples",
    "SearchResult",
    "SpacesResult",
    "Study",
    "Timing",
    "TuneResult",
    "UniformResult",
    "ValidateResult",
    "Vocabulary",
    "Where",
    "Windows",
    "advise",
    "calibrate",
    "demo",
    "devices",
    "diff",
    "engines",
    "explore",
    "export",
    "formats",
    "frontier",
    "inspect",
    "measure",
    "plot",
    "recipe_from",
    "rewrite",
    "run",
    "search",
    "spaces",
    "tune",
    "uniform",
    "validate",
]
