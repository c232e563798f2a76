"""Recipes beside the frontier: one scheme for every layer, MoFQ's rule, and recipes to compare."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mofq.decision import (
    KL_UNIT,
    Budgets,
    Problem,
    Request,
    predict_chosen,
    solve_greedy,
    uniform_recipes,
    usage,
)
from mofq.decision.from_table import request_problem
from mofq.decision.frontier import axis_value
from mofq.decision.prediction import predict_given
from mofq.decision.problem import IntArray
from mofq.decision.recipe import Recipe, load_recipe
from mofq.decision.request import weights_text
from mofq.evidence.table import Table
from mofq.exceptions import BudgetError, RecipeError
from mofq.explore.measured_points import MeasuredPoint
from mofq.model.kv_schemes import is_cache_scheme

#: Sizes that differ by less are one: a file has them as a quotient.
_SAME_BITS = 1e-9


@dataclass(frozen=True, slots=True)
class ReferencePoint:
    """A recipe that the frontier is compared with."""

    kind: str  #: "uniform", "greedy" or "recipe"
    label: str
    solver: str | None  #: that made it, as far as its file says
    bits_per_weight: float | None
    kv_bits: float | None  #: per cached number; None: not known, or not decided
    at: float | None  #: on the axis of the frontier, see `axis_value`
    value: float | None  #: predicted, in the unit of the drawing
    stderr: float | None
    schemes: tuple[str, ...]  #: of each fusion group of the table, and each cache
    recipe_sha256: str | None = None  #: of the text of its file, where it has one


def uniform_points(table: Table, problem: Problem, request: Request) -> tuple[ReferencePoint, ...]:
    """Every scheme that all fusion groups may get.

    Where a context's KV cache counts as size, each beside the cache as it is, and with one
    format for all of that too, as far as none of these is both smaller and better.
    """
    points = [
        _point(recipe, problem, kind="uniform", label=name)
        for name, recipe in uniform_recipes(table, request).items()
    ]
    if not problem.kv_tokens:
        return tuple(points)
    formats = [name for name in dict.fromkeys(problem.schemes) if is_cache_scheme(name)]
    pairs = [
        _point(recipe, problem, kind="uniform", label=f"{name}, {cache}")
        for cache in formats
        for name, recipe in uniform_recipes(table, request, cache=cache).items()
    ]
    best: list[ReferencePoint] = []
    for one in sorted([*points, *pairs], key=lambda one: (one.at or 0.0, one.value or 0.0)):
        if not best or (one.value or 0.0) < (best[-1].value or 0.0):
            best.append(one)
    return (*points, *(one for one in best if one not in points))


def measured_uniform(measured: MeasuredPoint, references: Sequence[ReferencePoint]) -> int | None:
    """The place of the uniform scheme that was measured; None: it is of none of them.

    Of the same name and size: constraints, and what a search space excludes, leave a uniform
    scheme other layers.
    """
    for number, one in enumerate(references):
        bits = one.bits_per_weight
        if one.kind == "uniform" and one.label == measured.label and bits is not None:
            return number if abs(bits - measured.bits_per_weight) < _SAME_BITS else None
    return None


def greedy_points(
    problem: Problem, uniforms: Sequence[ReferencePoint], budgets: Budgets
) -> tuple[ReferencePoint, ...]:
    """What MoFQ's rule chooses at the size of each uniform scheme, where it mixes schemes.

    Where constraints hold, a uniform scheme is a mixture too: what is one of these is none of its
    own.
    """
    drawn = {one.schemes for one in uniforms}
    found: dict[tuple[str, ...], ReferencePoint] = {}
    for size in sorted({one.at for one in uniforms if one.at is not None}):
        limit = replace(budgets, max_bits=size)
        if problem.kv_tokens:
            limit = replace(budgets, max_bytes=int(size))
        try:
            choice_F = solve_greedy(problem, limit).choice_F
        except BudgetError:
            continue  # no width is as small for every fusion group
        schemes = tuple(problem.schemes[int(p)] for p in choice_F)
        if _is_mixed(problem, schemes) and schemes not in drawn and schemes not in found:
            at = axis_value(problem, choice_F)
            shown = f"{at / 1e6:.4g} MB" if problem.kv_tokens else f"{at:.2f} bits"
            found[schemes] = _predicted(
                problem, choice_F, kind="greedy", label=f"greedy, {shown}", solver="greedy"
            )
    return tuple(found.values())


def _is_mixed(problem: Problem, schemes: Sequence[str]) -> bool:
    """Whether layers have several schemes, or caches several formats."""
    kinds: dict[bool, set[str]] = {}
    for group, scheme in zip(problem.groups, schemes, strict=True):
        kinds.setdefault(group.cached > 0, set()).add(scheme)
    return any(len(names) > 1 for names in kinds.values())


def recipe_point(path: Path, table: Table, problem: Problem, request: Request) -> ReferencePoint:
    """A recipe from a file.

    Args:
        path: Of the recipe.
        table: Of the drawing.
        problem: Of the drawing, on which the recipe is predicted where that offers its schemes;
            else on all rows of the table.
        request: Of the drawing.

    Raises:
        RecipeError: The recipe is not valid, or is for another model than the table.
    """
    recipe = load_recipe(path)
    ours = table.header.index_sha256
    if recipe.index_sha256 is not None and not ours.startswith(recipe.index_sha256):
        raise RecipeError(
            f"{path}: was made for {recipe.model_name} with index_sha256 {recipe.index_sha256}, "
            f"and the table for {table.header.model_name} with {ours}. "
            f"Compare recipes of one model."
        )
    weights = table.header.weights_sha256
    if recipe.weights_sha256 and weights and not weights.startswith(recipe.weights_sha256):
        raise RecipeError(
            f"{path}: was made for other weights (weights_sha256 {recipe.weights_sha256}) than the "
            f"table ({weights}). Compare recipes of one model."
        )
    if not _has_options(problem, _schemes_of(recipe, problem, label=path.name)):
        problem = request_problem(table, request, has_all_rows=True)
    point = replace(
        _point(recipe, problem, kind="recipe", label=path.name),
        recipe_sha256=hashlib.sha256(path.read_text("utf-8").encode()).hexdigest(),
    )
    own = recipe.kl_nats_per_token
    drawn = {
        "table_sha256": table.sha256,
        "objective": request.objective,
        "corpus_weights": weights_text(request.corpus_weights),
    }
    is_alike = all(recipe.made_by.get(key) == value for key, value in drawn.items())
    if problem.unit == KL_UNIT and is_alike and own is not None:
        return replace(point, value=own, stderr=recipe.result.kl_stderr)
    return point


def _point(recipe: Recipe, problem: Problem, *, kind: str, label: str) -> ReferencePoint:
    """Predicted where the table knows all that the recipe chooses; else what the recipe says."""
    schemes = _schemes_of(recipe, problem, label=label)
    solver = recipe.made_by.get("solver")
    solver = solver if isinstance(solver, str) else None
    knows_cache = problem.cached > 0 or all(one.parsed.is_unquantized for one in recipe.kv_cache)
    if knows_cache and _has_options(problem, schemes):
        names = [group.name for group in problem.groups]
        choice_F = problem.choice_of(dict(zip(names, schemes, strict=True)))
        return _predicted(problem, choice_F, kind=kind, label=label, solver=solver)
    return ReferencePoint(
        kind,
        label,
        solver,
        recipe.bits_per_weight,
        kv_bits=recipe.result.kv_bits,
        at=_at(recipe, problem),
        value=recipe.kl_nats_per_token if problem.unit == KL_UNIT else None,
        stderr=None,
        schemes=schemes,
    )


def _has_options(problem: Problem, schemes: Sequence[str]) -> bool:
    """Whether each group may have its scheme."""
    return all(
        scheme in [problem.schemes[p] for p in problem.options_of(number)]
        for number, scheme in enumerate(schemes)
    )


def _at(recipe: Recipe, problem: Problem) -> float | None:
    """On the axis, as far as the recipe's file says."""
    if not problem.kv_tokens:
        return recipe.bits_per_weight
    size, cached = recipe.result.checkpoint_bytes, recipe.result.kv_bytes_per_token
    if cached is None and not recipe.kv_cache:
        cached = 2.0 * problem.cached  # as it is
    return None if size is None or cached is None else size + problem.kv_tokens * cached


def _predicted(
    problem: Problem, choice_F: IntArray, *, kind: str, label: str, solver: str | None
) -> ReferencePoint:
    value, stderr = problem.error_of(choice_F), None
    if problem.unit == KL_UNIT:
        # A uniform scheme is not chosen on the samples, and has nothing of their luck.
        is_uniform = solver == "uniform"
        predicted = (
            predict_given(problem, choice_F)
            if is_uniform
            else predict_chosen(problem, Budgets(), choice_F)
        )
        value, stderr = predicted.value, predicted.stderr
    used = usage(problem, choice_F)
    return ReferencePoint(
        kind,
        label,
        solver,
        used.bits_per_weight,
        kv_bits=used.kv_bits,
        at=axis_value(problem, choice_F),
        value=value,
        stderr=stderr,
        schemes=tuple(problem.schemes[int(p)] for p in choice_F),
    )


def _schemes_of(recipe: Recipe, problem: Problem, *, label: str) -> tuple[str, ...]:
    by_layers = {frozenset(group.layers): group.scheme for group in recipe.groups}
    layers = [group for group in problem.groups if not group.cached]
    missing = next((g for g in layers if frozenset(g.layers) not in by_layers), None)
    if missing is not None:
        raise RecipeError(
            f"{label}: has no fusion group of the layers of {missing.name}, and the table has. "
            f"Compare recipes of one model."
        )
    caches = {one.name: one.scheme for one in recipe.kv_cache}
    return tuple(
        caches.get(group.name, "bf16") if group.cached else by_layers[frozenset(group.layers)]
        for group in problem.groups
    )
