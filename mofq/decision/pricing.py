"""How corpora count where recipes are priced: as they did where the recipes were found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mofq.decision.budgets import Budgets
from mofq.decision.problem import Objective
from mofq.decision.recipe import Recipe
from mofq.decision.request import Request, lowest_terms, read_weights


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
    objective, weights = found[0] if found else ("mean", None)
    if any(one[0] != objective or _differ(one[1], weights) for one in found):
        objective, weights = "mean", None
    return Request(Budgets(), objective=objective, corpus_weights=weights, kv_cache=kv_cache)


def _asked(recipe: Recipe) -> tuple[Objective, Mapping[str, float] | None]:
    weights = recipe.made_by.get("corpus_weights")
    is_worst = recipe.made_by.get("objective") == "worst-corpus"
    where = f"{recipe.title}: made_by: corpus_weights"
    return (
        "worst-corpus" if is_worst else "mean",
        None if weights is None else read_weights(str(weights), where=where),
    )


def _differ(one: Mapping[str, float] | None, other: Mapping[str, float] | None) -> bool:
    return lowest_terms(one) != lowest_terms(other)
