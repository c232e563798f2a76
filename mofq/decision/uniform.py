"""One scheme for every linear layer: what a mixture has to beat."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mofq import __version__
from mofq.decision.budgets import Budgets
from mofq.decision.exact import solve_exact
from mofq.decision.from_table import request_problem
from mofq.decision.make_recipe import (
    MadeBy,
    recipe_from_layers,
    recipe_from_table,
    sizes_by_shape,
    sizes_of,
    with_prediction,
)
from mofq.decision.prediction import error_together, predict_given
from mofq.decision.problem import KL_UNIT, IntArray, Problem
from mofq.decision.recipe import Recipe, join_hashes
from mofq.decision.request import Request, weights_text
from mofq.evidence.spaces import shape_rejection, statistics_rejection
from mofq.evidence.table import Table
from mofq.exceptions import SchemeError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import ModelLayers, vocabulary_rejection
from mofq.numbers.numerics import NUMERICS
from mofq.numbers.schemes import parse_scheme


def uniform_recipe(
    checkpoint: Checkpoint,
    layers: ModelLayers,
    scheme_name: str,
    *,
    stats_sha256: str | None = None,
    corpora_sha256: str | None = None,
    bos: bool | None = None,
    sequence_length: int | None = None,
) -> Recipe:
    """One scheme for every linear layer, from headers alone.

    Args:
        checkpoint: The model.
        layers: Its layers.
        scheme_name: A scheme without static activations.
        stats_sha256: Of the statistics that the scheme is fitted to, where it is.
        corpora_sha256: Of the texts that they are of, joined by ``join_hashes``.
        bos: Whether their sequences begin with BOS; None: they do not.
        sequence_length: Tokens of each of their sequences.

    Returns:
        The recipe, without predictions.

    Raises:
        SchemeError: The name does not parse, or the scheme does not fit some layer.
    """
    scheme = parse_scheme(scheme_name)
    needs = statistics_rejection(scheme)
    if needs is not None and (stats_sha256 is None or scheme.has_static_inputs):
        raise SchemeError(f"scheme {scheme.name!r}: {needs}; then `mofq search`.")
    reasons = [
        reason
        for layer in layers.grouped_layers
        if (reason := vocabulary_rejection(scheme, layer) or shape_rejection(scheme, layer))
    ]
    if reasons:
        raise SchemeError(
            f"{reasons[0]} ({len(reasons)} such layers in all). Take another scheme, or a search "
            f"space with `mofq measure` and `mofq search`, which may mix."
        )
    schemes = dict.fromkeys((group.name for group in layers.groups), scheme.name)
    recipe = recipe_from_layers(layers, schemes, checkpoint=checkpoint)
    return replace(
        recipe,
        weights_sha256=hash_weights(checkpoint),
        made_by=_made_by(
            NUMERICS,
            {
                "stats_sha256": stats_sha256,
                "corpora_sha256": corpora_sha256,
                "bos": bos,
                "sequence_length": sequence_length,
            },
        ),
        result=sizes_by_shape(layers, recipe.schemes),
    )


def _made_by(numerics: int | None, rests_on: MadeBy) -> MadeBy:
    """Where a uniform recipe comes from; what is not known is left out."""
    made: MadeBy = {"mofq": __version__, "numerics": numerics, "solver": "uniform", **rests_on}
    return {key: value for key, value in made.items() if value is not None}


def uniform_recipes(
    table: Table, request: Request, *, cache: str | None = None
) -> dict[str, Recipe]:
    """Each scheme that every fusion group of a table may get, for all of them.

    Args:
        table: From `mofq measure`.
        request: Its unit, space and engine say which schemes may be had and what is
            predicted of them.
        cache: The format of the KV cache, where that is decided too; by default what is best
            within the request's ``max_kv_bits``, or what leaves it as it is.

    Returns:
        Scheme name -> recipe.
    """
    problem = request_problem(table, request)
    budgets = Budgets(max_kv_bits=request.budgets.max_kv_bits)
    cached_F = None
    if cache is None and budgets != Budgets():
        cached_F = solve_exact(problem, budgets).choice_F
    recipes = {}
    stats = table.header.stats
    rests_on: MadeBy = {
        "corpus_weights": weights_text(request.corpus_weights),
        "table_sha256": table.sha256,
    }
    if stats is not None:
        rests_on |= {
            "stats_sha256": stats.sha256,
            "corpora_sha256": join_hashes(stats.corpora.values()),
            "bos": stats.bos,
            "sequence_length": stats.sequence_length,
        }
    made_by = _made_by(table.header.numerics, rests_on)
    for name in dict.fromkeys(problem.schemes):
        choice_F = uniform_choice(problem, name, cached_F, cache=cache or "bf16")
        if choice_F is not None:
            result = sizes_of(problem, choice_F)
            if problem.unit == KL_UNIT:
                result = with_prediction(result, predict_given(problem, choice_F))
            recipes[name] = recipe_from_table(
                table,
                problem.schemes_of(choice_F),
                made_by=made_by,
                budget={},
                result=result,
            )
    return recipes


def best_uniform(problem: Problem, choice_F: IntArray) -> tuple[str, IntArray] | None:
    """The uniform scheme of least error among those of no more bytes than a choice.

    The KV cache, where it is decided too, is as in the choice.
    """
    found = []
    layer_bytes_P = problem.layer_bytes_P
    most_bytes = int(layer_bytes_P[choice_F].sum())
    for name in dict.fromkeys(problem.schemes):
        uniform_F = uniform_choice(problem, name, choice_F)
        if uniform_F is not None and int(layer_bytes_P[uniform_F].sum()) <= most_bytes:
            found.append((error_together(problem, uniform_F), name, uniform_F))
    if not found:
        return None
    _, name, uniform_F = min(found, key=lambda one: one[:2])
    return name, uniform_F


def has_uniform(problem: Problem, scheme: str) -> bool:
    """Whether every layer may have a scheme, those without a choice too."""
    with_it = {
        int(group)
        for group, name in zip(problem.group_P, problem.schemes, strict=True)
        if name == scheme
    }
    return all(one.cached or number in with_it for number, one in enumerate(problem.groups))


def uniform_choice(
    problem: Problem,
    scheme: str,
    choice_F: IntArray | None = None,
    *,
    cache: str = "bf16",
) -> IntArray | None:
    """One scheme for every layer; a fusion group that may have one scheme alone keeps that.

    Args:
        problem: What may be chosen.
        scheme: Of the layers.
        choice_F: Whose formats of the KV cache are taken.
        cache: The format of all caches, where there is no such choice.

    Returns:
        One option of each group; None: a group does not have the scheme.
    """
    cached_F = np.array([group.cached > 0 for group in problem.groups])
    same_P = _as_array(problem.schemes) == np.where(cached_F[problem.group_P], cache, scheme)
    chosen_F = problem.start_F[:-1].copy()
    has_same_F = np.zeros(len(problem.groups), dtype=np.bool_)
    first = np.flatnonzero(same_P)[::-1]  # of several options of a group the first is written last
    chosen_F[problem.group_P[first]] = first
    has_same_F[problem.group_P[first]] = True
    if choice_F is not None:
        chosen_F[cached_F] = choice_F[cached_F]
        has_same_F |= cached_F
    has_choice_F = np.diff(problem.start_F) > 1
    return None if (has_choice_F & ~has_same_F).any() else chosen_F


@lru_cache(maxsize=1)
def _as_array(names: tuple[str, ...]) -> NDArray[np.str_]:
    """Names to compare all at once."""
    return np.array(names)
