"""What a recipe says of itself: where it came from, what it may cost, what it does cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mofq import __version__
from mofq.decision.expert_visits import active_weights
from mofq.decision.flip_costs import flip_cost
from mofq.decision.offered_schemes import asked_constraints, spaces_of
from mofq.decision.prediction import Estimate, error_together, predict_given
from mofq.decision.problem import KL_UNIT, IntArray, Problem, usage
from mofq.decision.recipe import (
    Recipe,
    RecipeCache,
    RecipeGroup,
    RecipeResult,
    join_hashes,
)
from mofq.decision.request import Request, weights_text
from mofq.decision.timing import time_of
from mofq.evidence.table import Table
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import ModelLayers
from mofq.model.sizes import bits_per_weight, counted_bytes, group_bytes, weights_of
from mofq.numbers.schemes import parse_scheme

#: Keys of `mofq.decision.recipe.MadeByKeys`.
MadeBy = dict[str, str | int | None]


def recipe_from_table(
    table: Table,
    schemes: Mapping[str, str],
    *,
    made_by: MadeBy,
    budget: Mapping[str, float | int | str],
    result: RecipeResult | None = None,
) -> Recipe:
    """A recipe of a table's model: fusion group, or cache -> scheme, and what is to be said."""
    amax = {
        (row.group, row.scheme): row.static_amax
        for row in table.rows
        if row.static_amax is not None and schemes.get(row.group) == row.scheme
    }
    caches = [
        RecipeCache(one.name, schemes[one.name], amax.get((one.name, schemes[one.name])))
        for one in table.caches
        if one.name in schemes
    ]
    return Recipe(
        model_name=table.header.model_name,
        index_sha256=table.header.index_sha256,
        weights_sha256=table.header.weights_sha256,
        groups=tuple(
            RecipeGroup(
                group.name,
                schemes[group.name],
                layers=group.layer_names,
                static_amax=amax.get((group.name, schemes[group.name])),
            )
            for group in table.header.groups
        ),
        unquantized=table.header.unquantized,
        layers=table.header.model.layers,
        made_by=made_by,
        budget=budget,
        result=result or RecipeResult(),
        # A cache that stays as it is everywhere is not spoken of.
        kv_cache=() if all(one.parsed.is_unquantized for one in caches) else tuple(caches),
    )


def recipe_from_layers(
    layers: ModelLayers,
    schemes: Mapping[str, str],
    *,
    checkpoint: Checkpoint | None = None,
    static_amax: Mapping[str, float] | None = None,
) -> Recipe:
    """A recipe of a model's layers, without a table and without figures.

    Args:
        layers: Of the model.
        schemes: Fusion group -> scheme.
        checkpoint: That they are of; None: the recipe is for any model of this shape.
        static_amax: Layer -> largest magnitude of its input, for schemes with static activations,
            which nothing applies without it.

    Raises:
        SchemeError: A scheme's name does not parse.
    """
    groups = []
    for group in layers.groups:
        scheme = parse_scheme(schemes[group.name])
        names = tuple(layer.name for layer in group.layers)
        amax = None
        if scheme.has_static_inputs and static_amax is not None:
            amax = {name: static_amax[name] for name in names}
        groups.append(RecipeGroup(group.name, scheme.name, names, static_amax=amax))
    return Recipe(
        model_name=layers.architecture if checkpoint is None else checkpoint.name,
        index_sha256=None if checkpoint is None else checkpoint.index_sha256,
        groups=tuple(groups),
        unquantized=tuple(layer.name for layer in layers.unquantized),
        layers=layers.stated,
    )


def made_by_request(table: Table, problem: Problem, request: Request) -> MadeBy:
    """Where a recipe comes from."""
    stats = table.header.stats
    made: MadeBy = {
        "mofq": __version__,
        "solver": request.solver,
        "seed": None if stats is None else stats.seed,
        "unit": problem.unit,
        "objective": request.objective,
        "tie_rule": "two standard errors" if request.ties else "off",
        "table_sha256": table.sha256,
    }
    if request.corpus_weights is not None:
        made["corpus_weights"] = weights_text(request.corpus_weights)
    if table.header.numerics is not None:
        made["numerics"] = table.header.numerics
    if request.engine is not None:
        made["engine"] = request.engine
    spaces = spaces_of(table, request.space)
    if spaces:
        made["space"] = ", ".join(dict.fromkeys(one.name for one in spaces))
    if len(spaces) == 1:
        made["space_sha256"] = spaces[0].sha256
    if constraints := asked_constraints(table, request):
        made["constraints"] = "; ".join(map(str, constraints))
    if stats is not None:
        made["stats_sha256"] = stats.sha256
        made["corpora_sha256"] = join_hashes(stats.corpora.values())
        made["sequence_length"] = stats.sequence_length
        if stats.bos:
            made["bos"] = True
    return made


def budget_figures(request: Request) -> dict[str, float | int | str]:
    """The budgets that were asked for, and the workload whose time is told or kept."""
    budgets, time = request.budgets, request.time
    named = {
        "bits_per_weight": budgets.max_bits,
        "checkpoint_bytes": budgets.max_bytes,
        "kl_nats_per_token": budgets.max_kl,
        "finer_fraction": budgets.max_finer,
        "kv_bits": budgets.max_kv_bits,
        "active_bits": budgets.max_active_bits,
        "kv_tokens": request.kv_tokens or None,
        "device": None if time is None else time.device.name,
        "workload": None if time is None else time.workload.text,
        "seconds": None if time is None else time.max_seconds,
    }
    return {name: value for name, value in named.items() if value is not None}


def chosen_result(problem: Problem, choice_F: IntArray, prediction: Estimate) -> RecipeResult:
    """Sizes, error and, in nats, the prediction."""
    result = replace(
        sizes_of(problem, choice_F),
        error=error_together(problem, choice_F),
        kl_routing=flip_cost(problem, choice_F),
    )
    return with_prediction(result, prediction) if problem.unit == KL_UNIT else result


def decided_result(
    table: Table,
    request: Request,
    problem: Problem,
    choice_F: IntArray,
    prediction: Estimate,
    *,
    uniform: tuple[str, IntArray] | None,
) -> RecipeResult:
    """What a decision says of its choice.

    Args:
        table: That was decided on.
        request: As it was decided.
        problem: What might be chosen.
        choice_F: One option of each fusion group.
        prediction: Of the choice, from `predict_chosen`.
        uniform: The best uniform scheme of no more bytes, from `best_uniform`.

    Returns:
        Sizes and prediction, the time of a workload that was named, what a token reads of a
        mixture where the table knows it, and what the uniform scheme would be.
    """
    result = replace(
        chosen_result(problem, choice_F, prediction),
        seconds=time_of(table, problem.schemes_of(choice_F), request),
    )
    active = active_weights(table, problem) if table.visits else None
    if active is not None:
        result = replace(
            result,
            active_bits=active.bits(problem, choice_F),
            active_bytes_per_token=active.bytes(problem, choice_F),
        )
    return result if uniform is None else _with_uniform(result, problem, *uniform)


def _with_uniform(
    result: RecipeResult, problem: Problem, name: str, choice_F: IntArray
) -> RecipeResult:
    kl = predict_given(problem, choice_F).value if problem.unit == KL_UNIT else None
    return replace(
        result,
        uniform_scheme=name,
        uniform_bits_per_weight=usage(problem, choice_F).bits_per_weight,
        uniform_kl_nats_per_token=kl,
    )


def sizes_of(problem: Problem, choice_F: IntArray) -> RecipeResult:
    """Sizes and shares; no prediction yet."""
    used = usage(problem, choice_F)
    return RecipeResult(
        bits_per_weight=used.bits_per_weight,
        bytes=used.bytes,
        checkpoint_bytes=used.checkpoint_bytes,
        finer_fraction=used.finer_fraction,
        finer_weight_fraction=used.finer_weight_fraction,
        kv_bits=used.kv_bits,
        kv_bytes_per_token=used.kv_bytes_per_token,
    )


def sizes_by_shape(layers: ModelLayers, schemes: Mapping[str, str]) -> RecipeResult:
    """Sizes from shapes and schemes alone.

    Args:
        layers: Of the model.
        schemes: Linear layer -> scheme; all layers of a fusion group have one.
    """
    chosen = [(one, parse_scheme(schemes[one.layers[0].name])) for one in layers.groups]
    size = sum(counted_bytes(*one) for one in chosen)
    return RecipeResult(
        bits_per_weight=bits_per_weight(size, weights_of(layers.groups)),
        bytes=size,
        checkpoint_bytes=sum(group_bytes(*one) for one in chosen) + layers.other_bytes,
    )


def with_prediction(result: RecipeResult, prediction: Estimate) -> RecipeResult:
    """The predicted KL, and its interval where samples are kept."""
    result = replace(result, kl_nats_per_token=prediction.value, kl_stderr=prediction.stderr)
    if prediction.stderr is None:
        return result
    return replace(result, kl_low=prediction.lower, kl_high=prediction.upper)
