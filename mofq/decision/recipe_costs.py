"""What recipes cost that are there: corpora count as they did where the recipes were found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mofq.decision.budgets import Budgets
from mofq.decision.choice import predict_chosen
from mofq.decision.from_table import request_problem
from mofq.decision.make_recipe import chosen_result
from mofq.decision.recipe import Recipe
from mofq.decision.request import Request, lowest_terms, read_weights
from mofq.evidence.table import Table


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
