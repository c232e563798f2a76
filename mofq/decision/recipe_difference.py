"""Two recipes of one model: which fusion groups differ, and what each difference costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision.from_table import request_problem
from mofq.decision.prediction import Estimate, paired_loss
from mofq.decision.problem import IntArray, Objective, Problem
from mofq.decision.recipe import Recipe
from mofq.decision.recipe_costs import pricing_request
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
