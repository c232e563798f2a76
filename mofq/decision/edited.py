"""What is known of a recipe that was edited after it was found."""

from __future__ import annotations

from dataclasses import replace

from mofq.decision.budgets import Budgets
from mofq.decision.choice import predict_chosen
from mofq.decision.from_table import request_problem
from mofq.decision.pricing import counts_alike, pricing_request
from mofq.decision.recipe import Recipe, RecipeResult
from mofq.decision.request import Request
from mofq.decision.result import chosen_result
from mofq.evidence.table import Table
from mofq.model.layers import ModelLayers
from mofq.model.sizes import bits_per_weight, counted_bytes, group_bytes, weights_of
from mofq.numbers.schemes import parse_scheme


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
    if not recipe.is_edited and counts_alike(asked, own):
        return recipe
    problem = request_problem(table, asked, has_all_rows=True)
    choice_F = problem.choice_of(recipe.scheme_of_group)
    prediction = predict_chosen(problem, Budgets(), choice_F)
    return replace(recipe, result=chosen_result(problem, choice_F, prediction))


def with_sizes(recipe: Recipe, layers: ModelLayers) -> Recipe:
    """A recipe with its sizes anew, from shapes; as it is where it was not edited.

    Args:
        recipe: That was checked against the layers.
        layers: Of the model.
    """
    if not recipe.is_edited:
        return recipe
    schemes = recipe.schemes
    chosen = [(one, parse_scheme(schemes[one.layers[0].name])) for one in layers.groups]
    size = sum(counted_bytes(*one) for one in chosen)
    result = RecipeResult(
        bits_per_weight=bits_per_weight(size, weights_of(layers.groups)),
        bytes=size,
        checkpoint_bytes=sum(group_bytes(*one) for one in chosen) + layers.other_bytes,
    )
    return replace(recipe, result=result)
