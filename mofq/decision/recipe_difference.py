"""Recipes of one model that are there: what they cost, and where two of them differ.

Their errors are those of a table, and corpora count as they did where the recipes were found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision.budgets import Budgets
from mofq.decision.choice import predict_chosen
from mofq.decision.from_table import request_problem
from mofq.decision.make_recipe import chosen_result
from mofq.decision.prediction import Estimate, paired_loss
from mofq.decision.problem import IntArray, Objective, Problem
from mofq.decision.recipe import Recipe
from mofq.decision.request import Request, lowest_terms, read_weights
from mofq.evidence.table import Table, TableHeader
from mofq.exceptions import RecipeError


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """One fusion group under two recipes."""

    group: str
    before: str | None  #: scheme; None: the recipe has no such group
    after: str | None
    bytes: int | None = None  #: more than before; None: no table was given
    error: Estimate | None = None  #: more than before, paired, in the table's unit
    is_cache: bool = False  #: of an attention layer's KV cache
    cache_bytes: float | None = None  #: of one token, more than before


@dataclass(frozen=True, slots=True)
class Difference:
    """What another recipe changes."""

    groups: tuple[GroupDifference, ...]  #: those that differ; the largest error first
    unit: str | None  #: of the errors
    total: Estimate | None  #: all together, paired
    #: How the errors of several corpora became one; None: there is one, or no table was given.
    objective: Objective | None = None
    corpus_weights: Mapping[str, float] | None = None  #: in the mean


def pricing_request(
    recipes: Sequence[Recipe], *, corpus_weights: Mapping[str, float] | None = None
) -> Request:
    """What the errors of recipes are a sum of: their corpora, and the cache where one has it.

    Args:
        recipes: To be priced together.
        corpus_weights: What each corpus counts in the mean; None: what it counted where the
            recipes were found. Where they do not agree, all count the same.

    Raises:
        MofqError: What a recipe says that corpora count cannot be read.
    """
    kv_cache = any(one.kv_cache for one in recipes)
    if corpus_weights is not None:
        return Request(Budgets(), corpus_weights=corpus_weights, kv_cache=kv_cache)
    # A recipe that no search found says no objective, and agrees with all.
    found = [_asked(one) for one in recipes if "objective" in one.made_by]
    if not found or not all(_counts_alike(one, found[0]) for one in found):
        return Request(Budgets(), kv_cache=kv_cache)
    return replace(found[0], kv_cache=kv_cache)


def _counts_alike(one: Request, other: Request) -> bool:
    """Whether several corpora count the same in two requests."""
    weights = (lowest_terms(each.corpus_weights) for each in (one, other))
    return one.objective == other.objective and len(set(weights)) == 1


def _asked(recipe: Recipe) -> Request:
    weights = recipe.made_by.get("corpus_weights")
    is_worst = recipe.made_by.get("objective") == "worst-corpus"
    where = f"{recipe.title}: made_by: corpus_weights"
    return Request(
        Budgets(),
        objective="worst-corpus" if is_worst else "mean",
        corpus_weights=None if weights is None else read_weights(str(weights), where=where),
    )


def with_figures(recipe: Recipe, table: Table, request: Request | None = None) -> Recipe:
    """A recipe with sizes and prediction anew, from a table; as it is where its own hold.

    They do where it was not edited, and its corpora count as is asked.

    Args:
        recipe: Of the table's model.
        table: Whose errors the prediction adds up.
        request: How corpora count, from `pricing_request`; None: as they did where the recipe was
            found.

    Raises:
        TableError: A scheme of the recipe was not measured, or a corpus that counts.
        MofqError: What the recipe says that corpora count cannot be read.
    """
    own = pricing_request([recipe])
    asked = own if request is None else replace(request, kv_cache=own.kv_cache)
    if not recipe.is_edited and _counts_alike(asked, own):
        return recipe
    problem = request_problem(table, asked, has_all_rows=True)
    choice_F = problem.choice_of(recipe.scheme_of_group)
    prediction = predict_chosen(problem, Budgets(), choice_F)
    return replace(recipe, result=chosen_result(problem, choice_F, prediction))


def compare_recipes(
    first: Recipe,
    second: Recipe,
    table: Table | None = None,
    *,
    corpus_weights: Mapping[str, float] | None = None,
) -> Difference:
    """What changes from one recipe to another.

    Args:
        first: A recipe.
        second: Another of the same model.
        table: Of the model; with it the differences have a cost.
        corpus_weights: What each corpus counts in it; None: as `pricing_request` says.

    Raises:
        RecipeError: They, or the table, are of different models.
        TableError: A scheme of a recipe was not measured, or the weights are not of its corpora.
        MofqError: What a recipe says that corpora count cannot be read.
    """
    _check_same_model(first, second, table)
    ours, theirs = first.scheme_of_group, second.scheme_of_group
    caches = {cache.name for cache in (*first.kv_cache, *second.kv_cache)}
    for name in [*ours, *theirs]:
        if name in caches:
            ours.setdefault(name, "bf16")
            theirs.setdefault(name, "bf16")
    changed = [
        GroupDifference(name, ours.get(name), theirs.get(name), is_cache=name in caches)
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    if table is None:
        return Difference(tuple(changed), unit=None, total=None)
    request = pricing_request([first, second], corpus_weights=corpus_weights)
    problem = request_problem(table, request, has_all_rows=True)
    first_F, second_F = problem.choice_of(ours), problem.choice_of(theirs)
    numbers = {group.name: n for n, group in enumerate(problem.groups)}
    priced = []
    for one in changed:
        if one.group not in numbers:
            raise RecipeError(
                f"{one.group}: the table has no fusion group of this name, and one of the recipes "
                f"has, so the difference cannot be priced. Compare the recipes without the table."
            )
        number = numbers[one.group]
        before, after = first_F[[number]], second_F[[number]]
        size = problem.bytes_of(after) - problem.bytes_of(before)
        error = _loss(problem, before, after)
        bits = int(problem.cache_bits_P[after].sum() - problem.cache_bits_P[before].sum())
        cached = bits / 8 if one.is_cache else None
        priced.append(replace(one, bytes=size, error=error, cache_bytes=cached))
    priced.sort(key=lambda one: -abs(one.error.value) if one.error is not None else 0.0)
    total = _loss(problem, first_F, second_F)
    done = Difference(tuple(priced), unit=problem.unit, total=total)
    if len(problem.corpora) < 2:
        return done
    counted = zip(map(str, problem.corpora), problem.corpus_weights, strict=True)
    weights = dict(counted) if problem.objective == "mean" else None
    return replace(done, objective=problem.objective, corpus_weights=weights)


def _loss(problem: Problem, before_F: IntArray, after_F: IntArray) -> Estimate:
    if problem.sample_errors is not None:
        return paired_loss(problem, before_F, after_F)
    difference = problem.cost_PK[after_F] - problem.cost_PK[before_F]
    return Estimate(float(np.max(difference.sum(axis=0))), stderr=None)


def _check_same_model(first: Recipe, second: Recipe, table: Table | None) -> None:
    named: list[Recipe | TableHeader] = [first, second, *([] if table is None else [table.header])]
    for key in ("index_sha256", "weights_sha256"):
        hashes: list[tuple[str, str | None]] = [
            (one.model_name, getattr(one, key)) for one in named
        ]
        known = [(name, sha256) for name, sha256 in hashes if sha256]
        for name, sha256 in known[1:]:
            # A hash may be shortened in a recipe.
            if sha256[:8] != known[0][1][:8]:
                raise RecipeError(
                    f"one is of {known[0][0]} ({key} {known[0][1][:8]}) and another of {name} "
                    f"({sha256[:8]}). Compare two recipes of one model."
                )
