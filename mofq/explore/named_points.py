"""Points beside the frontier: uniform schemes, recipes to compare, measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mofq.decision import Request, uniform_recipes
from mofq.decision.recipe import Recipe, load_recipe
from mofq.decision.solvers import KL_UNIT, Budgets, Problem, predict, solve_greedy, usage
from mofq.decision.solvers.frontier import axis_value
from mofq.decision.solvers.problem import IntArray
from mofq.evidence.table import Table, TableHeader
from mofq.exceptions import BudgetError, MofqError, RecipeError
from mofq.files.documents import parse_json, read_text
from mofq.model.kv_schemes import is_cache_scheme

#: Of validation.json; what else it holds is not drawn.
_VALIDATION_VERSION = 1


@dataclass(frozen=True, slots=True)
class NamedPoint:
    """A recipe with a name, drawn beside the frontier."""

    kind: str  #: "uniform", "greedy" or "recipe"
    label: str
    solver: str | None  #: that made it, as far as its file says
    bits_per_weight: float | None
    kv_bits: float | None  #: per cached number; None: not known, or not decided
    at: float | None  #: on the axis of the frontier, see `axis_value`
    value: float | None  #: predicted, in the unit of the page
    stderr: float | None
    schemes: tuple[str, ...]  #: of each fusion group of the table, and each cache


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """The KL of a quantized model as `mofq validate` measured it."""

    label: str
    text: str
    bits_per_weight: float
    at: float | None  #: on the axis of the frontier; None: the file does not say
    kl_nats_per_token: float
    kl_stderr: float | None
    predicted: float | None
    predicted_stderr: float | None


def uniform_points(table: Table, problem: Problem, request: Request) -> tuple[NamedPoint, ...]:
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
    best: list[NamedPoint] = []
    for one in sorted([*points, *pairs], key=lambda one: (one.at or 0.0, one.value or 0.0)):
        if not best or (one.value or 0.0) < (best[-1].value or 0.0):
            best.append(one)
    return (*points, *(one for one in best if one not in points))


def greedy_points(
    problem: Problem, uniforms: Sequence[NamedPoint], budgets: Budgets
) -> tuple[NamedPoint, ...]:
    """What MoFQ's rule chooses at the size of each uniform scheme, where it mixes schemes."""
    sizes = sorted({one.at for one in uniforms if one.at is not None})
    found: dict[tuple[str, ...], NamedPoint] = {}
    for size in sizes:
        limit = replace(budgets, max_bits=size)
        if problem.kv_tokens:
            limit = replace(budgets, max_bytes=int(size))
        try:
            choice_F = solve_greedy(problem, limit).choice_F
        except BudgetError:
            continue  # no width is as small for every fusion group
        schemes = tuple(problem.schemes[int(p)] for p in choice_F)
        if _is_mixed(problem, schemes) and schemes not in found:
            one = NamedPoint(
                "greedy", "", "greedy", None, None, None, value=None, stderr=None, schemes=schemes
            )
            one = _predicted(one, problem, choice_F)
            found[schemes] = replace(one, label=f"greedy, {_shown(problem, one)}")
    return tuple(found.values())


def _is_mixed(problem: Problem, schemes: Sequence[str]) -> bool:
    """Whether layers have several schemes, or caches several formats."""
    kinds: dict[bool, set[str]] = {}
    for group, scheme in zip(problem.groups, schemes, strict=True):
        kinds.setdefault(group.cached > 0, set()).add(scheme)
    return any(len(names) > 1 for names in kinds.values())


def _shown(problem: Problem, one: NamedPoint) -> str:
    at = one.at or 0.0
    return f"{at / 1e6:.4g} MB" if problem.kv_tokens else f"{at:.2f} bits"


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
        at=_needed(content, "bits_per_weight", path),
        kl_nats_per_token=_needed(content, "kl_nats_per_token", path),
        kl_stderr=_number(content, "kl_stderr", path),
        predicted=_number(content, "predicted_kl_nats_per_token", path),
        predicted_stderr=_number(content, "predicted_kl_stderr", path),
    )


def placed(
    measured: Sequence[MeasuredPoint], compared: Sequence[NamedPoint], problem: Problem
) -> tuple[MeasuredPoint, ...]:
    """Measurements on the axis of the frontier.

    A validation knows no size of a context's cache; the recipe of its name, which is compared
    too, does.
    """
    if not problem.kv_tokens:
        return tuple(measured)
    sizes = {Path(one.label).stem: one.at for one in compared}
    return tuple(replace(one, at=sizes.get(one.label)) for one in measured)


def _point(recipe: Recipe, problem: Problem, *, kind: str, label: str) -> NamedPoint:
    schemes = _schemes_of(recipe, problem, label=label)
    value = recipe.kl_nats_per_token if problem.unit == KL_UNIT else None
    solver = recipe.made_by.get("solver")
    point = NamedPoint(
        kind,
        label,
        solver if isinstance(solver, str) else None,
        recipe.bits_per_weight,
        _figure(recipe, "kv_bits"),
        at=_at(recipe, problem),
        value=value,
        stderr=None,
        schemes=schemes,
    )
    knows_cache = all(one.parsed.is_unquantized for one in recipe.kv_cache) or problem.cached > 0
    if knows_cache and all(name in _offered(problem, n) for n, name in enumerate(schemes)):
        named = zip(problem.groups, schemes, strict=True)
        return _predicted(
            point, problem, problem.choice_of({group.name: name for group, name in named})
        )
    return point


def _at(recipe: Recipe, problem: Problem) -> float | None:
    """On the axis, as far as the recipe's file says."""
    if not problem.kv_tokens:
        return recipe.bits_per_weight
    size, cached = _figure(recipe, "checkpoint_bytes"), _figure(recipe, "kv_bytes_per_token")
    if cached is None and not recipe.kv_cache:
        cached = 2.0 * problem.cached  # as it is
    return None if size is None or cached is None else size + problem.kv_tokens * cached


def _figure(recipe: Recipe, key: str) -> float | None:
    value = recipe.result.get(key)
    return float(value) if isinstance(value, int | float) else None


def _predicted(point: NamedPoint, problem: Problem, choice_F: IntArray) -> NamedPoint:
    used, predicted = usage(problem, choice_F), predict(problem, choice_F)
    value, stderr = predicted.value, predicted.stderr
    if problem.unit != KL_UNIT:
        value, stderr = problem.error_of(choice_F), None
    kv_bits = None
    if problem.cached:
        kv_bits = int(problem.cache_bits_P[choice_F].sum()) / problem.cached
    return replace(
        point,
        bits_per_weight=used.bits_per_weight,
        kv_bits=kv_bits,
        at=axis_value(problem, choice_F),
        value=value,
        stderr=stderr,
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
