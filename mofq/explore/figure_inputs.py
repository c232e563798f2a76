"""What figures are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mofq.decision import KL_UNIT, Budgets, Problem, Request, request_problem
from mofq.evidence.table import Table
from mofq.explore.frontier import shown_request
from mofq.explore.named_points import (
    MeasuredPoint,
    NamedPoint,
    placed,
    read_validation,
    recipe_point,
)


@dataclass(frozen=True, slots=True)
class FigureInputs:
    """What figures are drawn from."""

    table: Table
    problem: Problem
    request: Request
    recipes: tuple[NamedPoint, ...]
    measured: tuple[MeasuredPoint, ...]

    @property
    def quantity(self) -> str:
        """Of the errors, with their unit."""
        if self.problem.unit == KL_UNIT:
            return "KL [nats per token]"
        return self.problem.unit.replace("_", " ")

    @property
    def axis(self) -> str:
        """Of the frontier, with its unit."""
        tokens = self.problem.kv_tokens
        return (
            f"checkpoint and KV cache of {tokens:,} tokens [MB]"
            if tokens
            else "true bits per weight"
        )

    def place(self, at: float) -> float:
        """A place on the axis in its unit."""
        return at / 1e6 if self.problem.kv_tokens else at


def figure_inputs(
    table: Table,
    *,
    recipes: Sequence[Path] = (),
    validations: Sequence[Path] = (),
    request: Request | None = None,
) -> FigureInputs:
    """Read what belongs to a table; see `page_content`.

    Raises:
        MofqError: The table is not complete, or a recipe or validation does not belong to it.
    """
    request = shown_request(table, request or Request(Budgets(), ties=False))
    problem = request_problem(table, request)
    compared = tuple(recipe_point(path, table, problem) for path in recipes)
    measured = [read_validation(path, table.header) for path in validations]
    return FigureInputs(
        table,
        problem,
        request=request,
        recipes=compared,
        measured=placed(measured, compared, problem),
    )
