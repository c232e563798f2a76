"""Points beside the frontier: uniform schemes, recipes to compare, measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mofq.decide import Request, uniform_recipes
from mofq.documents import parse_json, read_text
from mofq.exceptions import BudgetError, MofqError, RecipeError
from mofq.recipe import Recipe, load_recipe
from mofq.solvers import KL_UNIT, Budgets, Problem, predict, solve_greedy, usage
from mofq.solvers.problem import IntArray
from mofq.table import Table, TableHeader

#: Of validation.json; what else it holds is not drawn.
_VALIDATION_VERSION = 1


@dataclass(frozen=True, slots=True)
class NamedPoint:
    """A recipe with a name, drawn beside the frontier."""

    kind: str  #: "uniform", "greedy" or "recipe"
    label: str
    solver: str | None  #: that made it, as far as its file says
    bits_per_weight: float | None
    checkpoint_bytes: int | None
    value: float | None  #: predicted, in the unit of the page
    stderr: float | None
    schemes: tuple[str, ...]  #: of each fusion group of the table


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """The KL of a quantized model as `mofq validate` measured it."""

    label: str
    text: str
    bits_per_weight: float
    kl_nats_per_token: float
    kl_stderr: float | None
    predicted: float | None
    predicted_stderr: float | None


def uniform_points(table: Table, problem: Problem, request: Request) -> tuple[NamedPoint, ...]:
    """Every scheme that all fusion groups may get."""
    recipes = uniform_recipes(table, request)
    return tuple(
        _point(recipe, problem, kind="uniform", label=name) for name, recipe in recipes.items()
    )


def greedy_points(problem: Problem, uniforms: Sequence[NamedPoint]) -> tuple[NamedPoint, ...]:
    """What MoFQ's rule chooses at the size of each uniform scheme, where it mixes schemes."""
    sizes = sorted({one.bits_per_weight for one in uniforms if one.bits_per_weight is not None})
    found: dict[tuple[str, ...], NamedPoint] = {}
    for bits in sizes:
        try:
            choice_F = solve_greedy(problem, Budgets(max_bits=bits)).choice_F
        except BudgetError:
            continue  # no width is as small for every fusion group
        schemes = tuple(problem.schemes[int(p)] for p in choice_F)
        if len(set(schemes)) > 1 and schemes not in found:
            one = NamedPoint(
                "greedy", "", "greedy", None, None, value=None, stderr=None, schemes=schemes
            )
            one = _predicted(one, problem, choice_F)
            found[schemes] = replace(one, label=f"greedy, {one.bits_per_weight:.2f} bits")
    return tuple(found.values())


def recipe_point(path: Path, table: Table, problem: Problem) -> NamedPoint:
    """A recipe from a file.

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
    point = _point(recipe, problem, kind="recipe", label=path.name)
    if problem.unit == KL_UNIT and recipe.made_by.get("table_sha256") == table.sha256:
        # As the frontier, without the optimism of choosing on these very samples.
        value, stderr = recipe.kl_nats_per_token, recipe.result.get("kl_stderr")
        known = float(stderr) if isinstance(stderr, int | float) else None
        return point if value is None else replace(point, value=value, stderr=known)
    return point


def read_validation(path: Path, header: TableHeader) -> MeasuredPoint:
    """What is drawn of a ``validation.json``.

    Args:
        path: From `mofq validate -o`.
        header: Of the table that it is drawn with.

    Raises:
        MofqError: The file is not such a file, or of another model, or another training of it.
    """
    content = parse_json(read_text(path, MofqError), str(path), MofqError)
    if not isinstance(content, dict) or content.get("version") != _VALIDATION_VERSION:
        raise MofqError(
            f"{path}: is no validation of version {_VALIDATION_VERSION}. Take the file that "
            f"`mofq validate -o` wrote."
        )
    for key, ours in (
        ("index_sha256", header.index_sha256),
        ("weights_sha256", header.weights_sha256),
    ):
        found = content.get(key)
        is_older = key == "weights_sha256" and None in (found, ours)  # before it was noted
        if found != ours and not is_older:
            raise MofqError(
                f"{path}: is of a model with {key} {found}, and the table of one with {ours}. "
                f"Take validations of the table's model."
            )
    return MeasuredPoint(
        label=Path(str(content.get("candidate", path.stem))).stem,
        text=Path(str(content.get("text", ""))).name,
        bits_per_weight=_needed(content, "bits_per_weight", path),
        kl_nats_per_token=_needed(content, "kl_nats_per_token", path),
        kl_stderr=_number(content, "kl_stderr", path),
        predicted=_number(content, "predicted_kl_nats_per_token", path),
        predicted_stderr=_number(content, "predicted_kl_stderr", path),
    )


def _point(recipe: Recipe, problem: Problem, *, kind: str, label: str) -> NamedPoint:
    by_group = {group.name: group.scheme for group in recipe.groups}
    schemes = _schemes_of(recipe, problem, label=label)
    value = recipe.kl_nats_per_token if problem.unit == KL_UNIT else None
    solver = recipe.made_by.get("solver")
    point = NamedPoint(
        kind,
        label,
        solver if isinstance(solver, str) else None,
        recipe.bits_per_weight,
        None,
        value=value,
        stderr=None,
        schemes=schemes,
    )
    if all(name in _offered(problem, n) for n, name in enumerate(schemes)):
        return _predicted(point, problem, problem.choice_of(by_group))
    return point


def _predicted(point: NamedPoint, problem: Problem, choice_F: IntArray) -> NamedPoint:
    used, predicted = usage(problem, choice_F), predict(problem, choice_F).additive
    value, stderr = predicted.value, predicted.stderr
    if problem.unit != KL_UNIT:
        value, stderr = problem.error_of(choice_F), None
    return replace(
        point,
        bits_per_weight=used.bits_per_weight,
        checkpoint_bytes=used.checkpoint_bytes,
        value=value,
        stderr=stderr,
    )


def _schemes_of(recipe: Recipe, problem: Problem, *, label: str) -> tuple[str, ...]:
    by_layers = {frozenset(group.layers): group.scheme for group in recipe.groups}
    missing = next((g for g in problem.groups if frozenset(g.layers) not in by_layers), None)
    if missing is not None:
        raise RecipeError(
            f"{label}: has no fusion group of the layers of {missing.name}, and the table has. "
            f"Compare recipes of one model."
        )
    return tuple(by_layers[frozenset(group.layers)] for group in problem.groups)


def _offered(problem: Problem, group: int) -> Sequence[str]:
    return [problem.schemes[p] for p in problem.options_of(group)]


def _needed(content: Mapping[str, Any], key: str, path: Path) -> float:
    value = _number(content, key, path)
    if value is None:
        raise MofqError(f"{path}: has no {key}. Take the file that `mofq validate -o` wrote.")
    return value


def _number(content: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = content.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MofqError(f"{path}: {key} must be a number, found {value!r}.")
    return float(value)
