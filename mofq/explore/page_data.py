"""What a page holds, as one JSON value."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mofq.decision import KL_UNIT, Problem
from mofq.decision.frontier import axis_value
from mofq.decision.model_error import row_error
from mofq.decision.offered_schemes import asked_constraints, refused_schemes
from mofq.decision.prediction import errors_by_corpus
from mofq.decision.problem import IntArray, option_bits
from mofq.decision.recipe import (
    CACHES_LINE,
    layers_line,
    name_line,
    recipe_header,
    scheme_line,
    static_amax_line,
    unquantized_line,
)
from mofq.evidence.table import Table
from mofq.explore.channel_profiles import profile_data
from mofq.explore.drawing import Drawing
from mofq.explore.frontier_recipes import (
    FrontierRecipe,
    best_for_corpus,
    frontier_recipes,
)
from mofq.explore.reference_points import (
    ReferencePoint,
    greedy_points,
    measured_uniform,
    uniform_points,
)
from mofq.files.progress import Progress
from mofq.model.kv_schemes import is_cache_scheme, parse_cache_scheme
from mofq.numbers.formats import FloatFormat, IntFormat
from mofq.numbers.schemes import parse_scheme

#: End of what stands before a module's name in its decoder layer.
_DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+\.")
#: Formats that are named as the two sides of a choice.
_NUMBERS = {IntFormat: "INT", FloatFormat: "FP"}
_CACHE_KEYS = ("kv_bits", "kv_bytes_per_token")
#: Of a fusion group that are shown with their shapes; of more the first alone.
_LAYERS = 8
_POINT_KEYS = (
    "bits_per_weight",
    "bytes",
    "checkpoint_bytes",
    "kl_nats_per_token",
    "kl_stderr",
    "error",
)


def page_data(
    drawing: Drawing, table_path: Path, *, progress: Progress | None = None
) -> dict[str, Any]:
    """All that the page shows.

    Args:
        drawing: From `read_drawing`.
        table_path: The table's file, for the commands that the page shows.
        progress: Told how far the frontier is.

    Returns:
        Plain dictionaries, lists and scalars; numbers of rows to six digits.

    Raises:
        BudgetError: No recipe keeps the budget on the cache.
    """
    table, problem = drawing.table, drawing.problem
    points = frontier_recipes(drawing, progress=progress)
    uniforms = uniform_points(table, problem, drawing.request)
    greedy = greedy_points(problem, uniforms, drawing.other_budgets)
    references = [*uniforms, *greedy, *drawing.recipes]
    first_recipe = len(references) - len(drawing.recipes)
    schemes = scheme_order(problem, references)
    return {
        "model": table.header.model_name,
        "table": table_path.name,
        "table_sha256": table.sha256,
        "unit": problem.unit,
        "is_kl": problem.unit == KL_UNIT,
        "row_error": _row_error() if problem.unit == KL_UNIT else None,
        "corpora": list(problem.corpora),
        "corpus_weights": list(problem.corpus_weights),
        "samples": None if table.header.stats is None else table.header.stats.samples,
        "weights": problem.weights,
        "cached": problem.cached,
        "kv_tokens": problem.kv_tokens,
        "other_bytes": problem.other_bytes,
        "schemes": [_scheme_data(name) for name in schemes],
        "constraints": list(map(str, asked_constraints(table, drawing.request))),
        "groups": _groups(drawing, schemes),
        **_points(problem, points, table_path),
        "references": [
            asdict(one) | {"schemes": [schemes.index(name) for name in one.schemes]}
            for one in references
        ],
        "measured": _measured(drawing, references, first_recipe),
        **_corpora(drawing, points),
    }


def _row_error() -> dict[str, float]:
    """What widens single rows; they are corrected by nothing."""
    model = row_error()
    return {"spread": model.spread, "growth": model.growth, "largest": model.largest}


def _measured(
    drawing: Drawing, references: Sequence[ReferencePoint], first_recipe: int
) -> list[dict[str, Any]]:
    """Each measurement with the place of the reference that was measured, where one is drawn.

    Besides recipes these are uniform schemes, which runs measure beside theirs. Several runs
    measure one of them alike, although each predicted it as its own corpora count.
    """
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    for number, one in enumerate(drawing.measured):
        recipe = None if one.recipe is None else first_recipe + one.recipe
        place = measured_uniform(one, references) if recipe is None else recipe
        content = asdict(one) | {"reference": place}
        key: tuple[object, ...] = (number,)
        if one.recipe is None and place is not None:
            reference = references[place]
            content |= {"predicted": reference.value, "predicted_stderr": reference.stderr}
            key = (place, one.text, one.kl_nats_per_token, one.kl_stderr)
        found.setdefault(key, content)
    return list(found.values())


def scheme_order(problem: Problem, references: Sequence[ReferencePoint]) -> list[str]:
    """All schemes of the options and of some recipes, few bits first."""
    bits: dict[str, float] = {}
    for p, name in enumerate(problem.schemes):
        bits[name] = max(bits.get(name, 0.0), option_bits(problem, p))
    for one in references:
        for name in one.schemes:
            bits.setdefault(name, 99.0)
    return sorted(
        bits,
        key=lambda name: (is_cache_scheme(name), name == "bf16", round(bits[name], 2), name),
    )


def _scheme_data(name: str) -> dict[str, Any]:
    data = {"name": name, "element": element_name(name), "line": scheme_line(name)}
    if is_cache_scheme(name):
        return data | dict.fromkeys(("number", "weight", "activation"))
    scheme = parse_scheme(name)
    weight, activation = scheme.weight, scheme.activation
    return data | {
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


def _groups(drawing: Drawing, schemes: Sequence[str]) -> list[dict[str, Any]]:
    """Fusion groups, then the caches of attention layers: no weights, some numbers a token."""
    table, problem = drawing.table, drawing.problem
    shown: dict[str, list[list[Any]]] = {
        group.name: [
            [one.name, one.out_features, one.in_features]
            for one in group.layers[: _LAYERS if len(group.layers) <= _LAYERS else 1]
        ]
        for group in table.header.groups
    }
    shown |= {one.name: [[one.module, one.kv_heads, one.head_size]] for one in table.caches}
    refused = refused_schemes(table, drawing.request)
    amax = {(row.group, row.scheme): row.static_amax for row in table.rows if row.static_amax}
    groups = []
    places = map_places(table, problem)
    for number, (group, (decoder_layer, module)) in enumerate(
        zip(problem.groups, places, strict=True)
    ):
        options = [
            _option(problem, p, schemes, amax.get((group.name, problem.schemes[p])))
            for p in problem.options_of(number)
        ]
        groups.append(
            {
                "name": group.name,
                "decoder_layer": decoder_layer,
                "module": module,
                "weights": group.weights,
                "layers": shown[group.name],
                "layer_count": len(group.layers),
                # Of its entry in a recipe, those before and behind that of the scheme.
                "lines": [name_line(group.name), "" if group.cached else layers_line(group.layers)],
                "options": options,
                "rejected": [[*pair] for pair in refused.get(group.name, {}).items()],
                "profile": profile_data([p for p in table.profiles if p.group == group.name]),
                "cached": group.cached,
            }
        )
    return groups


def map_places(table: Table, problem: Problem) -> list[tuple[int | None, str]]:
    """Decoder layer and row of the map, of each group of a problem."""
    layers = {one.name: one.layers[0].decoder_layer for one in table.header.groups}
    layers |= {one.name: one.decoder_layer for one in table.caches}
    return [(layers[one.name], _map_row(one.name, layers[one.name])) for one in problem.groups]


def _map_row(name: str, decoder_layer: int | None) -> str:
    """A group's name without its decoder layer."""
    if decoder_layer is None:
        return name
    return _DECODER_LAYER.sub(lambda found: "." if found[0][0] == "." else "", name, count=1)


def _option(
    problem: Problem, p: int, schemes: Sequence[str], static_amax: Mapping[str, float] | None
) -> list[Any]:
    """Scheme, size on the axis, errors, standard errors, bits; static maxima as a recipe has."""
    stderr_PC = problem.stderr_PC
    stderrs = None if stderr_PC is None else [_short(value) for value in stderr_PC[p]]
    errors = [_short(value) for value in problem.error_PC[p]]
    size = int(problem.axis_P[p])
    bits = float(f"{option_bits(problem, p):.6g}")
    option = [schemes.index(problem.schemes[p]), size, errors, stderrs, bits]
    if static_amax is not None:
        option.append(static_amax_line(static_amax))
    return option


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _points(problem: Problem, points: Sequence[FrontierRecipe], table_path: Path) -> dict[str, Any]:
    """The points of the frontier, and the lines of their recipes that belong to no group.

    The page's script joins lines and writes none: those of groups, schemes and static ranges stand
    with them.
    """
    keys = (*_POINT_KEYS, *_CACHE_KEYS) if problem.cached else _POINT_KEYS
    command = f"mofq search {shlex.quote(str(table_path))}"
    return {
        "points": [
            {key: getattr(one.recipe.result, key) for key in keys}
            | {
                "command": f"{command} {one.flags} -o recipe.yaml",
                "at": axis_value(problem, one.choice_F),
                "size": problem.axis_of(one.choice_F),
                "choice": _indices(problem, one.choice_F),
                "header": recipe_header(one.recipe),
                "has_caches": bool(one.recipe.kv_cache),
            }
            for one in points
        ],
        "recipe": {
            "unquantized": unquantized_line(points[0].recipe),
            "caches": CACHES_LINE,
        },
    }


def _indices(problem: Problem, choice_F: IntArray) -> list[int]:
    """A choice as the place of each group's option among its own."""
    return [int(p) for p in choice_F - problem.start_F[:-1]]


def _corpora(drawing: Drawing, points: Sequence[FrontierRecipe]) -> dict[str, Any]:
    """For each of several corpora, what every point would choose if only that one counted.

    And what the point and that choice cost on it.
    """
    problem = drawing.problem
    names = [name for name in problem.corpora if name is not None]
    best: dict[str, list[list[int]]] = {}
    errors: dict[str, list[list[float]]] = {}
    choices = [one.choice_F for one in points]
    for corpus, name in enumerate(names if len(names) > 1 else ()):
        alone = best_for_corpus(problem, drawing.other_budgets, corpus, choices=choices)
        best[name] = [_indices(problem, choice_F) for choice_F in alone]
        errors[name] = [
            [errors_by_corpus(problem, each_F)[corpus] for each_F in pair]
            for pair in zip(choices, alone, strict=True)
        ]
    return {"corpus_best": best, "corpus_errors": errors}
