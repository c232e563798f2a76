"""What changed between two recipes of one model, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.inputs import open_recipe, open_table
from mofq.api.options import Option, Tell, documented, silent
from mofq.api.request import read_corpus_weights
from mofq.exceptions import MofqError, option

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.decision.recipe_difference import Difference
    from mofq.evidence.table import Table

FirstRecipe = Annotated["Recipe | str | Path", Option("A recipe.", positional=True)]
SecondRecipe = Annotated[
    "Recipe | str | Path", Option("Another recipe of the same model.", positional=True)
]
PricingTable = Annotated[
    "Table | str | Path | None", Option("From `mofq measure`: what each change costs.")
]
#: As `CorpusWeights`, which by default are not known here.
DiffWeights = Annotated[
    str | Mapping[str, float] | None,
    Option(
        "What each corpus counts in a cost, e.g. en=3,pt=1; by default as the recipes say, or the "
        "same where they do not agree.",
        read_as=str,
    ),
]


@dataclass(frozen=True, slots=True)
class DiffResult:
    """Two recipes, and the fusion groups in which they differ."""

    names: tuple[str, str]  #: of their files
    recipes: tuple[Recipe, Recipe]
    difference: Difference

    @property
    def with_cache(self) -> bool:
        """Whether either recipe says what the KV cache is kept in."""
        return any(one.kv_cache for one in self.recipes)

    @property
    def kv_bits(self) -> list[float | None]:
        """Bits per cached number: as the result says; 16 where the cache is left as it is."""

        def of(recipe: Recipe) -> float | None:
            bits = recipe.result.kv_bits
            return 16.0 if bits is None and not recipe.kv_cache else bits

        return [of(one) for one in self.recipes]

    def to_json(self) -> dict[str, Any]:
        """The difference, for machines."""
        found = self.difference
        content: dict[str, Any] = {
            "changed": {one.group: [one.before, one.after] for one in found.groups},
            "bits_per_weight": [one.bits_per_weight for one in self.recipes],
            "kl_nats_per_token": [one.kl_nats_per_token for one in self.recipes],
        }
        if self.with_cache:
            content["kv_bits"] = self.kv_bits
        if any(one.tuning is not None for one in self.recipes):
            content["tuned"] = [one.tuning and one.tuning.to_json() for one in self.recipes]
        if found.total is not None:
            content["unit"] = found.unit
            if found.objective is not None:
                content["objective"] = found.objective
                content["corpus_weights"] = found.corpus_weights
            content["difference"] = {"error": found.total.value, "stderr": found.total.stderr}
            content["groups"] = {
                one.group: {
                    "bytes": one.bytes,
                    "error": None if one.error is None else one.error.value,
                    "stderr": None if one.error is None else one.error.stderr,
                    **({"cache_bytes_per_token": one.cache_bytes} if one.is_cache else {}),
                }
                for one in found.groups
            }
        return content


@documented
def diff(
    first: FirstRecipe,
    second: SecondRecipe,
    *,
    table: PricingTable = None,
    corpus_weights: DiffWeights = None,
    tell: Tell | None = None,
) -> DiffResult:
    """What changed between two recipes, and what it costs.

    Returns:
        The fusion groups that differ.

    Raises:
        MofqError: The recipes are of two models, or an input is not valid.
    """
    from mofq.decision.recipe_difference import compare_recipes, pricing_request, with_figures

    if corpus_weights is not None and table is None:
        raise MofqError(f"{option('corpus_weights')} is of a cost; give {option('table')} too.")
    a, b = open_recipe(first), open_recipe(second)
    opened = None if table is None else open_table(table, tell or silent)
    weights = read_corpus_weights(corpus_weights)
    found = compare_recipes(a, b, opened, corpus_weights=weights)
    if opened is not None:
        request = pricing_request([a, b], corpus_weights=weights)
        a, b = with_figures(a, opened, request), with_figures(b, opened, request)
    return DiffResult((_name(first, "first"), _name(second, "second")), (a, b), found)


def _name(recipe: Recipe | str | Path, otherwise: str) -> str:
    return Path(recipe).name if isinstance(recipe, str | Path) else otherwise
