"""What a page holds, as one JSON value."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mofq.decision import Request
from mofq.decision.measured import recipe_choice
from mofq.decision.recipe import recipe_text
from mofq.decision.request import request_flags, request_problem
from mofq.decision.solvers import KL_UNIT, Budgets, Problem
from mofq.decision.solvers.frontier import axis_value
from mofq.decision.solvers.problem import IntArray
from mofq.evidence.table import Table, TableGroup
from mofq.explore.frontier import (
    FrontierRecipe,
    Progress,
    best_for_corpus,
    frontier_recipes,
    shown_request,
)
from mofq.explore.named_points import (
    MeasuredPoint,
    NamedPoint,
    greedy_points,
    placed,
    read_validation,
    recipe_point,
    uniform_points,
)
from mofq.explore.profiles import group_profiles_content, profiles_of
from mofq.explore.recipe_parts import join_recipe, recipe_parts
from mofq.model.kv_schemes import is_cache_scheme, parse_cache_scheme
from mofq.model.layers import CacheLayer
from mofq.numbers.formats import FloatFormat, IntFormat
from mofq.numbers.schemes import parse_scheme

_DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+\.")
#: Formats that are named as the two sides of a choice.
_NUMBERS = {IntFormat: "INT", FloatFormat: "FP"}
_CACHE_KEYS = ("kv_bits", "kv_bytes_per_token")
_POINT_KEYS = (
    "bits_per_weight",
    "bytes",
    "checkpoint_bytes",
    "kl_nats_per_token",
    "kl_stderr",
    "error",
)


def page_content(
    table: Table,
    path: Path,
    *,
    recipes: Sequence[Path] = (),
    validations: Sequence[Path] = (),
    request: Request | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All that the page shows.

    Args:
        table: From `mofq measure`.
        path: Its file, for the commands that the page shows.
        recipes: To compare.
        validations: From `mofq validate -o`, of the table's model.
        request: What may be chosen (unit, engine, space, the KV cache); by default all that
            was measured, and the cache as it is.
        progress: Told how far the frontier is.

    Returns:
        Plain dictionaries, lists and scalars; numbers of rows to six digits.

    Raises:
        MofqError: The table is not complete, or a recipe or validation does not belong to it.
    """
    request = shown_request(table, request or Request(Budgets()))
    problem = request_problem(table, request)
    compared = [recipe_point(one, table, problem) for one in recipes]
    measured = placed(
        [read_validation(one, table.header) for one in validations], compared, problem
    )
    points = frontier_recipes(table, problem, request=request, progress=progress)
    uniforms = uniform_points(table, problem, request)
    others = Budgets(max_kv_bits=request.budgets.max_kv_bits)
    named = [*uniforms, *greedy_points(problem, uniforms, others), *compared]
    schemes = scheme_order(problem, named)
    return {
        "model": table.header.model_name,
        "table": path.name,
        "table_sha256": table.sha256,
        "unit": problem.unit,
        "is_kl": problem.unit == KL_UNIT,
        "corpora": list(problem.corpora),
        "samples": None if table.header.stats is None else table.header.stats.samples,
        "weights": problem.weights,
        "cached": problem.cached,
        "kv_tokens": problem.kv_tokens,
        "other_bytes": problem.other_bytes,
        "schemes": [_scheme_content(name) for name in schemes],
        "groups": _groups(table, problem, schemes),
        "points": _points(points, problem, path, request),
        "recipe": _recipe_content(table, points, problem),
        "named": [_named(one, schemes) for one in named],
        "measured": [_measured(one) for one in measured],
        "corpus_best": _corpus_best(problem, points, others),
    }


def scheme_order(problem: Problem, named: Sequence[NamedPoint]) -> list[str]:
    """All schemes of the options and of some recipes, few bits first."""
    bits: dict[str, float] = {}
    for p, name in enumerate(problem.schemes):
        bits[name] = max(bits.get(name, 0.0), option_bits(problem, p))
    for one in named:
        for name in one.schemes:
            bits.setdefault(name, 99.0)
    return sorted(
        bits,
        key=lambda name: (is_cache_scheme(name), name == "bf16", round(bits[name], 2), name),
    )


def option_bits(problem: Problem, p: int) -> float:
    """True bits of an option, per weight or per cached number."""
    group = problem.groups[int(problem.group_P[p])]
    if group.cached:
        return int(problem.cache_bits_P[p]) / group.cached
    return 8 * int(problem.bytes_P[p]) / group.weights


def _scheme_content(name: str) -> dict[str, Any]:
    if is_cache_scheme(name):
        element = element_name(name)
        return {
            "name": name,
            "element": element,
            "number": None,
            "weight": None,
            "activation": None,
        }
    scheme = parse_scheme(name)
    weight, activation = scheme.weight, scheme.activation
    return {
        "name": name,
        "element": element_name(name),
        "number": None if weight is None else _NUMBERS.get(type(weight.element)),
        "weight": None if weight is None else weight.granularity.name,
        "activation": None if activation is None else activation.granularity.name,
    }


def element_name(name: str) -> str:
    """The element format of a scheme's weights, or keys; ``bf16`` where not quantized."""
    if is_cache_scheme(name):
        keys, values = parse_cache_scheme(name).parts.values()
        part = keys or values
        return "bf16" if part is None else f"kv:{part.scheme.element.name}"
    weight = parse_scheme(name).weight
    return "bf16" if weight is None else weight.element.name


def _groups(table: Table, problem: Problem, schemes: Sequence[str]) -> list[dict[str, Any]]:
    rejected: dict[str, list[list[str]]] = {}
    for one in table.rejections:
        rejected.setdefault(one.group, []).append([one.scheme, one.reason])
    content = []
    profiles = profiles_of(table)
    for number, group in enumerate(table.header.groups):
        options = [_option(problem, p, schemes) for p in problem.options_of(number)]
        content.append(
            {
                "name": group.name,
                "decoder_layer": group.layers[0].decoder_layer,
                "module": module_name(group),
                "weights": group.weights,
                "layers": [[one.name, one.out_features, one.in_features] for one in group.layers],
                "options": options,
                "rejected": rejected.get(group.name, []),
                "profile": group_profiles_content(profiles.get(group.name, [])),
                "cached": 0,
            }
        )
    caches = {cache.name: cache for cache in table.caches}
    for number, decided in enumerate(problem.groups):
        if decided.cached:
            options = [_option(problem, p, schemes) for p in problem.options_of(number)]
            content.append(_cache_content(caches[decided.name], options, rejected))
    return content


def _cache_content(
    cache: CacheLayer, options: list[list[Any]], rejected: Mapping[str, list[list[str]]]
) -> dict[str, Any]:
    """An attention layer's cache as a group of the map: no weights, some numbers a token."""
    return {
        "name": cache.name,
        "decoder_layer": cache.decoder_layer,
        "module": cache_name(cache),
        "weights": 0,
        "layers": [[cache.module, cache.kv_heads, cache.head_size]],
        "options": options,
        "rejected": rejected.get(cache.name, []),
        "profile": group_profiles_content([]),
        "cached": cache.numbers,
    }


def map_places(table: Table, problem: Problem) -> list[tuple[int | None, str]]:
    """Decoder layer and row of the map, of each group of a problem."""
    places = {
        one.name: (one.layers[0].decoder_layer, module_name(one)) for one in table.header.groups
    }
    cached = {one.name: (one.decoder_layer, cache_name(one)) for one in table.caches}
    return [cached[one.name] if one.cached else places[one.name] for one in problem.groups]


def cache_name(cache: CacheLayer) -> str:
    """The row of the map, as `module_name`."""
    return _DECODER_LAYER.sub(lambda found: "." if found[0][0] == "." else "", cache.name, count=1)


def module_name(group: TableGroup) -> str:
    """The row of the map: the group's name without its decoder layer."""
    if group.layers[0].decoder_layer is None:
        return group.name
    return _DECODER_LAYER.sub(lambda found: "." if found[0][0] == "." else "", group.name, count=1)


def _option(problem: Problem, p: int, schemes: Sequence[str]) -> list[Any]:
    stderr_PC = problem.stderr_PC
    stderrs = None if stderr_PC is None else [_short(value) for value in stderr_PC[p]]
    errors = [_short(value) for value in problem.error_PC[p]]
    size = int(problem.axis_P[p])
    bits = float(f"{option_bits(problem, p):.6g}")
    return [schemes.index(problem.schemes[p]), size, errors, stderrs, bits]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _points(
    points: Sequence[FrontierRecipe], problem: Problem, path: Path, request: Request
) -> list[dict[str, Any]]:
    content = []
    keys = (*_POINT_KEYS, *_CACHE_KEYS) if problem.cached else _POINT_KEYS
    for point in points:
        one: dict[str, Any] = {key: point.recipe.result.get(key) for key in keys}
        one["command"] = (
            f"mofq search {shlex.quote(str(path))} {' '.join(point.flags)} --ties off"
            f"{request_flags(request)} -o recipe.yaml"
        )
        choice_F = _choice_of(point, problem)
        one["at"], one["size"] = axis_value(problem, choice_F), problem.axis_of(choice_F)
        one["choice"] = _choice(point, problem)
        content.append(one)
    return content


def _choice_of(point: FrontierRecipe, problem: Problem) -> IntArray:
    return recipe_choice(problem, point.recipe)


def _choice(point: FrontierRecipe, problem: Problem) -> list[int]:
    return [int(p) for p in _choice_of(point, problem) - problem.start_F[:-1]]


def _recipe_content(
    table: Table, points: Sequence[FrontierRecipe], problem: Problem
) -> dict[str, Any]:
    options = [
        [problem.schemes[p] for p in problem.options_of(group)]
        for group in range(len(problem.groups))
    ]
    parts = recipe_parts(table, [point.recipe for point in points], options=options)
    for number, point in enumerate(points):
        joined = join_recipe(parts, number, choice=_choice(point, problem))
        assert joined == recipe_text(point.recipe)
    return parts


def _named(point: NamedPoint, schemes: Sequence[str]) -> dict[str, Any]:
    return asdict(point) | {"schemes": [schemes.index(name) for name in point.schemes]}


def _measured(point: MeasuredPoint) -> dict[str, Any]:
    return asdict(point)


def _corpus_best(
    problem: Problem, points: Sequence[FrontierRecipe], budgets: Budgets
) -> dict[str, list[list[int]]]:
    """For each of several corpora, what every point would choose if only that one counted."""
    names = [name for name in problem.corpora if name is not None]
    if len(names) < 2:
        return {}
    choices = [_choice_of(point, problem) for point in points]
    return {
        name: [
            [int(p) for p in choice_F - problem.start_F[:-1]]
            for choice_F in best_for_corpus(problem, budgets, corpus, choices=choices)
        ]
        for corpus, name in enumerate(names)
    }
