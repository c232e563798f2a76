"""What is drawn, on a page or in a figure: a table, and recipes and measurements beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mofq.decision import KL_UNIT, Budgets, Problem, Request, request_problem
from mofq.evidence.table import Table
from mofq.explore.measured_points import MeasuredPoint, measured_points
from mofq.explore.reference_points import ReferencePoint, recipe_point

#: Bits of a cached number that nobody quantizes.
_UNQUANTIZED_BITS = 16.0


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is drawn."""

    table: Table
    request: Request
    problem: Problem  #: that the request makes of the table
    recipes: tuple[ReferencePoint, ...]  #: to compare
    measured: tuple[MeasuredPoint, ...]

    @property
    def other_budgets(self) -> Budgets:
        """Those under which the whole frontier is solved: that on the cache, and none of size."""
        return Budgets(max_kv_bits=self.request.budgets.max_kv_bits)


def read_drawing(
    table: Table,
    *,
    recipes: Sequence[Path] = (),
    validations: Sequence[Path] = (),
    request: Request | None = None,
) -> Drawing:
    """Read what belongs to a table.

    Args:
        table: From `mofq measure`.
        recipes: To compare.
        validations: From `mofq validate -o`, of the table's model.
        request: What may be chosen (unit, engine, space, the KV cache); by default all that was
            measured. Where nobody asked for the KV cache and the table has it, its formats are
            drawn too, and it stays as it is on the frontier.

    Raises:
        MofqError: The table is not complete, or a recipe or validation does not belong to it.
    """
    request = request or Request(Budgets())
    problem = request_problem(table, request)
    if table.caches and not request.kv_cache and problem.unit == KL_UNIT:
        request = replace(request, kv_cache=True, budgets=Budgets(max_kv_bits=_UNQUANTIZED_BITS))
        problem = request_problem(table, request)
    compared = tuple(recipe_point(path, table, problem) for path in recipes)
    # The validations of several runs have uniform schemes in common.
    found = (point for path in validations for point in measured_points(path, table.header))
    measured = list(dict.fromkeys(found))
    if problem.kv_tokens:
        # A validation says no size of a context's cache; the recipe of its name does.
        sizes = {Path(one.label).stem: one.at for one in compared}
        measured = [replace(one, at=sizes.get(one.label)) for one in measured]
    return Drawing(table, request, problem, recipes=compared, measured=tuple(measured))
