"""From a table and budgets to a recipe: what `mofq search` decides, and nothing it prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mofq import __version__
from mofq.checkpoint.headers import Checkpoint
from mofq.cost import bits_per_weight, group_bytes, weights_of
from mofq.engines import legality
from mofq.exceptions import SchemeError
from mofq.layers import FusionGroup, LinearLayer, ModelLayers
from mofq.recipe import Recipe, RecipeGroup
from mofq.schemes import parse_scheme
from mofq.search_space import shape_rejection, statistics_rejection
from mofq.solvers import (
    KL_UNIT,
    Budgets,
    Chosen,
    Objective,
    Prediction,
    Problem,
    choose,
    predict,
    problem_from_table,
    usage,
)
from mofq.table import Table, TableGroup

#: Below so many samples of a corpus, error bars say little.
_FEW_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Request:
    """What a recipe is asked to be."""

    budgets: Budgets
    solver: str = "exact"
    unit: str | None = None  #: None: nats where the table has them, else what it has
    objective: Objective = "mean"
    engine: str | None = None
    ties: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """A recipe and what is worth knowing of how it came about."""

    recipe: Recipe
    finer_layers: tuple[str, ...]  #: linear layers whose scheme is not among the space's base
    tied_layers: int  #: linear layers that had a simpler scheme within noise
    moved_layers: int  #: those of them that took it
    notes: tuple[str, ...]  #: what the user should know


def decide(table: Table, request: Request) -> Decision:
    """Choose one scheme for each fusion group of a table.

    Args:
        table: From `mofq measure`.
        request: Budgets and how to meet them.

    Returns:
        The recipe, with predictions where the table is in nats.

    Raises:
        BudgetError: No recipe meets the budgets; the message names the tightest possible.
        TableError: The table is not complete, or has no rows in the unit.
        EngineError: There is no such engine.
    """
    problem = _problem(table, request)
    chosen = choose(problem, request.budgets, solver=request.solver, ties=request.ties)
    used = usage(problem, chosen.choice_F)
    notes = []
    result = _result(problem, chosen)
    uniform = best_uniform(problem, used.bytes)
    if uniform is not None:
        name, choice_F = uniform
        other = predict(problem, choice_F).additive.value
        result["uniform_scheme"] = name
        result["uniform_bits_per_weight"] = usage(problem, choice_F).bits_per_weight
        if problem.unit == KL_UNIT:
            result["uniform_kl_nats_per_token"] = other
        if other <= chosen.prediction.additive.value and (choice_F != chosen.choice_F).any():
            notes.append(f"{name} for every layer is as small and predicted to be as good.")
    stats = table.header.stats
    if problem.unit == KL_UNIT and stats is not None and stats.samples < _FEW_SAMPLES:
        notes.append(
            f"{stats.samples} calibration sequences are too few for error bars that mean "
            f"anything; calibrate with at least {_FEW_SAMPLES}."
        )
    recipe = _recipe(
        table,
        problem.schemes_of(chosen.choice_F),
        made_by=_made_by(table, problem, request),
        budget=_budget(request.budgets),
        result=result,
    )
    ties = chosen.ties
    return Decision(
        recipe,
        finer_layers=used.finer_layers,
        tied_layers=0 if ties is None else ties.tied_layers,
        moved_layers=0 if ties is None else ties.moved_layers,
        notes=tuple(notes),
    )


def uniform_recipes(table: Table, *, unit: str | None = None) -> dict[str, Recipe]:
    """Each scheme that every fusion group of a table may get, for all of them.

    Args:
        table: From `mofq measure`.
        unit: Of the predictions, as in `Request`.

    Returns:
        Scheme name -> recipe.
    """
    problem = problem_from_table(table, unit=unit)
    recipes = {}
    for name in dict.fromkeys(problem.schemes):
        choice_F = _uniform_choice(problem, name)
        if choice_F is not None:
            result = _sizes(problem, choice_F)
            if problem.unit == KL_UNIT:
                result |= _predicted(predict(problem, choice_F))
            recipes[name] = _recipe(
                table,
                problem.schemes_of(choice_F),
                made_by={"mofq": __version__, "solver": "uniform", "table_sha256": table.sha256},
                budget={},
                result=result,
            )
    return recipes


def uniform_recipe(checkpoint: Checkpoint, layers: ModelLayers, scheme_name: str) -> Recipe:
    """One scheme for every linear layer, from headers alone.

    Args:
        checkpoint: The model.
        layers: Its layers.
        scheme_name: A scheme that needs no calibration.

    Returns:
        The recipe, without predictions.

    Raises:
        SchemeError: The name does not parse, or the scheme does not fit some layer.
    """
    scheme = parse_scheme(scheme_name)
    reasons = [
        reason
        for group in layers.groups
        for layer in group.layers
        if (reason := shape_rejection(scheme, layer)) is not None
    ]
    reasons += [reason] if (reason := statistics_rejection(scheme)) is not None else []
    if reasons:
        raise SchemeError(
            f"{reasons[0]} ({len(reasons)} layers in all). "
            f"Measure a search space and use `mofq search` instead."
        )
    size = sum(group_bytes(group, scheme) for group in layers.groups)
    return Recipe(
        model_name=checkpoint.name,
        index_sha256=checkpoint.index_sha256,
        groups=tuple(
            RecipeGroup(group.name, scheme.name, tuple(layer.name for layer in group.layers))
            for group in layers.groups
        ),
        unquantized=tuple(layer.name for layer in layers.unquantized),
        made_by={"mofq": __version__, "solver": "uniform"},
        result={
            "bits_per_weight": bits_per_weight(size, weights_of(layers.groups)),
            "bytes": size,
            "checkpoint_bytes": size + layers.other_bytes,
        },
    )


def best_uniform(problem: Problem, most_bytes: int) -> tuple[str, np.ndarray] | None:
    """The uniform scheme of least error among those of at most so many bytes."""
    found = []
    for name in dict.fromkeys(problem.schemes):
        choice_F = _uniform_choice(problem, name)
        if choice_F is not None and problem.bytes_of(choice_F) <= most_bytes:
            found.append((problem.error_of(choice_F), name, choice_F))
    if not found:
        return None
    _, name, choice_F = min(found, key=lambda one: one[:2])
    return name, choice_F


def _uniform_choice(problem: Problem, scheme: str) -> np.ndarray | None:
    at = [p for p, name in enumerate(problem.schemes) if name == scheme]
    return np.array(at, dtype=np.int64) if len(at) == len(problem.groups) else None


def _problem(table: Table, request: Request) -> Problem:
    if request.engine is None:
        return problem_from_table(table, unit=request.unit, objective=request.objective)
    refuses = legality(request.engine)

    def is_legal(group: TableGroup, scheme: str) -> bool:
        return refuses(parse_scheme(scheme), _fusion_group(group)) is None

    return problem_from_table(
        table, unit=request.unit, objective=request.objective, is_legal=is_legal
    )


def _fusion_group(group: TableGroup) -> FusionGroup:
    """A fusion group as far as an engine's rules look at it: names and shapes."""
    return FusionGroup(
        group.name,
        tuple(
            LinearLayer(
                name=layer.name,
                tensor=f"{layer.name}.weight",
                out_features=layer.out_features,
                in_features=layer.in_features,
                dtype=layer.dtype,
                transposed=False,
                expert=None,
                row_start=0,
                decoder_layer=layer.decoder_layer,
                module=layer.module,
                shares_scale="",
            )
            for layer in group.layers
        ),
    )


def _made_by(table: Table, problem: Problem, request: Request) -> dict[str, str | int | None]:
    stats = table.header.stats
    made: dict[str, str | int | None] = {
        "mofq": __version__,
        "solver": request.solver,
        "seed": None if stats is None else stats.seed,
        "unit": problem.unit,
        "objective": request.objective,
        "tie_rule": "two standard errors" if request.ties else "off",
        "table_sha256": table.sha256,
    }
    if request.engine is not None:
        made["engine"] = request.engine
    if table.spaces:
        made["space"] = table.spaces[-1].name
        made["space_sha256"] = table.spaces[-1].sha256
    if stats is not None:
        made["stats_sha256"] = stats.sha256
    return made


def _budget(budgets: Budgets) -> dict[str, float | int]:
    named = {
        "bits_per_weight": budgets.max_bits,
        "checkpoint_bytes": budgets.max_bytes,
        "kl_nats_per_token": budgets.max_kl,
        "finer_fraction": budgets.max_finer,
    }
    return {name: value for name, value in named.items() if value is not None}


def _result(problem: Problem, chosen: Chosen) -> dict[str, float | int | str | None]:
    result = _sizes(problem, chosen.choice_F)
    result["error"] = problem.error_of(chosen.choice_F)
    if problem.unit == KL_UNIT:
        result |= _predicted(chosen.reported)
    if chosen.solution.bound is not None:
        result["gap"] = max(0.0, problem.error_of(chosen.solution.choice_F) - chosen.solution.bound)
    return result


def _sizes(problem: Problem, choice_F: np.ndarray) -> dict[str, float | int | str | None]:
    used = usage(problem, choice_F)
    return {
        "bits_per_weight": used.bits_per_weight,
        "bytes": used.bytes,
        "checkpoint_bytes": used.checkpoint_bytes,
        "finer_fraction": used.finer_fraction,
        "finer_weight_fraction": used.finer_weight_fraction,
        "kl_nats_per_token": None,
    }


def _predicted(prediction: Prediction) -> dict[str, float | int | str | None]:
    predicted: dict[str, float | int | str | None] = {
        "kl_nats_per_token": prediction.additive.value
    }
    if prediction.additive.stderr is not None:
        predicted["kl_stderr"] = prediction.additive.stderr
    if prediction.joint is not None:
        predicted["kl_joint"] = max(0.0, prediction.joint.value)
        if prediction.joint.stderr is not None:
            predicted["kl_joint_stderr"] = prediction.joint.stderr
    return predicted


def _recipe(
    table: Table,
    schemes: Mapping[str, str],
    *,
    made_by: Mapping[str, str | int | None],
    budget: Mapping[str, float | int],
    result: Mapping[str, float | int | str | None],
) -> Recipe:
    amax = {
        (row.group, row.scheme): row.static_amax
        for row in table.rows
        if row.static_amax is not None
    }
    return Recipe(
        model_name=table.header.model_name,
        index_sha256=table.header.index_sha256,
        groups=tuple(
            RecipeGroup(
                group.name,
                schemes[group.name],
                layers=tuple(layer.name for layer in group.layers),
                static_amax=amax.get((group.name, schemes[group.name])),
            )
            for group in table.header.groups
        ),
        unquantized=table.header.unquantized,
        made_by=made_by,
        budget=budget,
        result=result,
    )
