"""What a page holds, as one JSON value."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mofq.decide import Request
from mofq.decide.request import request_problem
from mofq.explore.frontier import FrontierRecipe, Progress, best_for_corpus, frontier_recipes
from mofq.explore.named_points import (
    MeasuredPoint,
    NamedPoint,
    greedy_points,
    read_validation,
    recipe_point,
    uniform_points,
)
from mofq.explore.profiles import group_profiles_content, profiles_of
from mofq.explore.recipe_parts import join_recipe, recipe_parts
from mofq.formats import FloatFormat, IntFormat
from mofq.recipe import recipe_text
from mofq.schemes import parse_scheme
from mofq.solvers import KL_UNIT, Budgets, Problem
from mofq.table import Table, TableGroup

_DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+\.")
#: Formats that are named as the two sides of a choice.
_NUMBERS = {IntFormat: "INT", FloatFormat: "FP"}
_POINT_KEYS = (
    "bits_per_weight",
    "bytes",
    "checkpoint_bytes",
    "kl_nats_per_token",
    "kl_stderr",
    "kl_joint",
    "kl_joint_stderr",
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
        request: What may be chosen (unit, engine, space); all that was measured by default.
        progress: Told how far the frontier is.

    Returns:
        Plain dictionaries, lists and scalars; numbers of rows to six digits.

    Raises:
        MofqError: The table is not complete, or a recipe or validation does not belong to it.
    """
    request = request or Request(Budgets())
    problem = request_problem(table, request)
    compared = [recipe_point(one, table, problem) for one in recipes]
    measured = [read_validation(one, table.header) for one in validations]
    points = frontier_recipes(table, problem, request=request, progress=progress)
    uniforms = uniform_points(table, problem, request)
    named = [*uniforms, *greedy_points(problem, uniforms), *compared]
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
        "schemes": [_scheme_content(name) for name in schemes],
        "groups": _groups(table, problem, schemes),
        "points": _points(points, problem, path, request),
        "recipe": _recipe_content(table, points, problem),
        "named": [_named(one, schemes) for one in named],
        "measured": [_measured(one) for one in measured],
        "corpus_best": _corpus_best(problem, points),
    }


def scheme_order(problem: Problem, named: Sequence[NamedPoint]) -> list[str]:
    """All schemes of the options and of some recipes, few bits first."""
    weights_P = np.array([group.weights for group in problem.groups])[problem.group_P]
    bits: dict[str, float] = {}
    for name, value in zip(problem.schemes, 8 * problem.bytes_P / weights_P, strict=True):
        bits[name] = max(bits.get(name, 0.0), float(value))
    for one in named:
        for name in one.schemes:
            bits.setdefault(name, 99.0)
    return sorted(bits, key=lambda name: (name == "bf16", round(bits[name], 2), name))


def _scheme_content(name: str) -> dict[str, Any]:
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
    """The element format of a scheme's weights; ``bf16`` where they are not quantized."""
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
            }
        )
    return content


def module_name(group: TableGroup) -> str:
    """The row of the map: the group's name without its decoder layer."""
    if group.layers[0].decoder_layer is None:
        return group.name
    return _DECODER_LAYER.sub(lambda found: "." if found[0][0] == "." else "", group.name, count=1)


def _option(problem: Problem, p: int, schemes: Sequence[str]) -> list[Any]:
    stderr_PC = problem.stderr_PC
    stderrs = None if stderr_PC is None else [_short(value) for value in stderr_PC[p]]
    errors = [_short(value) for value in problem.error_PC[p]]
    return [schemes.index(problem.schemes[p]), int(problem.bytes_P[p]), errors, stderrs]


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _points(
    points: Sequence[FrontierRecipe], problem: Problem, path: Path, request: Request
) -> list[dict[str, Any]]:
    content = []
    flags = [("--unit", request.unit), ("--engine", request.engine), ("--space", request.space)]
    given = "".join(f" {flag} {shlex.quote(value)}" for flag, value in flags if value is not None)
    for point in points:
        one: dict[str, Any] = {key: point.recipe.result.get(key) for key in _POINT_KEYS}
        # The digits of repr are enough to give the very same number back.
        one["command"] = (
            f"mofq search {shlex.quote(str(path))} --max-bits {point.max_bits!r} --ties off"
            f"{given} -o recipe.yaml"
        )
        one["choice"] = _choice(point, problem)
        content.append(one)
    return content


def _choice(point: FrontierRecipe, problem: Problem) -> list[int]:
    choice_F = problem.choice_of({group.name: group.scheme for group in point.recipe.groups})
    return [int(p) for p in choice_F - problem.start_F[:-1]]


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


def _corpus_best(problem: Problem, points: Sequence[FrontierRecipe]) -> dict[str, list[list[int]]]:
    """For each of several corpora, what every point would choose if only that one counted."""
    names = [name for name in problem.corpora if name is not None]
    if len(names) < 2:
        return {}
    choices = [
        problem.choice_of({group.name: group.scheme for group in point.recipe.groups})
        for point in points
    ]
    return {
        name: [
            [int(p) for p in choice_F - problem.start_F[:-1]]
            for choice_F in best_for_corpus(problem, corpus, choices=choices)
        ]
        for corpus, name in enumerate(names)
    }
