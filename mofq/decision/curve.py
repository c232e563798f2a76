"""The whole curve of accuracy against size of a table, point by point."""

from __future__ import annotations

from dataclasses import dataclass

from mofq.decision.request import Request, request_problem
from mofq.decision.solvers import Frontier, Problem, predict, solve_frontier, usage
from mofq.evidence.table import Table


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A recipe that no other one beats in size and in error at once."""

    bits_per_weight: float  #: true bits, over all fusion groups
    bytes: int  #: of the fusion groups
    checkpoint_bytes: int  #: of all tensors
    error: float  #: predicted, in the unit of the curve
    stderr: float | None  #: where the table has samples
    bound: float  #: no recipe of this size has a smaller error


@dataclass(frozen=True, slots=True)
class Curve:
    """The points from the smallest recipe to the best one."""

    unit: str
    gap: float  #: largest relative distance of an error to its bound
    points: tuple[CurvePoint, ...]


def accuracy_curve(table: Table, request: Request, *, sizes: int | None = None) -> Curve:
    """Every non-dominated recipe.

    Args:
        table: From `mofq measure`.
        request: What may be chosen: unit, engine and space are looked at, and no budget.
        sizes: Solve exactly at this many sizes between the points of the hull too.

    Returns:
        Smallest first.

    Raises:
        EngineError: No engine has that name.
        TableError: The table has no such unit or space, or a group has no scheme left.
    """
    problem = request_problem(table, request)
    frontier = solve_frontier(problem, sizes=sizes)
    points = tuple(_point(problem, frontier, k) for k in range(len(frontier.bytes_K)))
    return Curve(problem.unit, frontier.gap, points)


def _point(problem: Problem, frontier: Frontier, k: int) -> CurvePoint:
    choice_F = frontier.choice_KF[k]
    used = usage(problem, choice_F)
    stderr = None
    if problem.sample_errors is not None:
        stderr = predict(problem, choice_F).stderr
    return CurvePoint(
        bits_per_weight=used.bits_per_weight,
        bytes=used.bytes,
        checkpoint_bytes=used.checkpoint_bytes,
        error=float(frontier.error_K[k]),
        stderr=stderr,
        bound=float(frontier.bound_K[k]),
    )
