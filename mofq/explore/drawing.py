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
    recipes: tuple[ReferencePoint, ...]  #: to compare, each with a label of its own
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
    compared = tuple(recipe_point(path, table, problem, request) for path in recipes)
    # The validations of several runs have uniform schemes in common.
    found = (point for path in validations for point in measured_points(path, table.header))
    measured = [_with_recipe(one, compared, problem) for one in dict.fromkeys(found)]
    labels = [one.label for one in compared]
    compared = tuple(
        one
        if labels.count(one.label) == 1
        else replace(one, label=f"{path.parent.name}/{path.name}")
        for path, one in zip(map(Path.absolute, recipes), compared, strict=True)
    )
    return Drawing(table, request, problem, recipes=compared, measured=tuple(measured))


def _with_recipe(
    measured: MeasuredPoint, recipes: Sequence[ReferencePoint], problem: Problem
) -> MeasuredPoint:
    """With the recipe that was measured, where it is drawn too.

    That is the recipe of the same text; of the same file name where the validation does not say
    the text.
    """
    place = next(
        (
            number
            for number, one in enumerate(recipes)
            if (
                one.recipe_sha256 == measured.recipe_sha256
                if measured.recipe_sha256
                else Path(one.label).stem == measured.label
            )
        ),
        None,
    )
    if not problem.kv_tokens:
        return replace(measured, recipe=place)
    # A validation says no size of a context's cache; its recipe does.
    return replace(measured, recipe=place, at=None if place is None else recipes[place].at)
