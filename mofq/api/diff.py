"""What changed between two recipes of one model, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.inputs import open_recipe, open_table
from mofq.api.options import Option, Tell, documented

if TYPE_CHECKING:
    from mofq.decision.difference import Difference
    from mofq.decision.recipe import Recipe
    from mofq.evidence.table import Table

FirstRecipe = Annotated["Recipe | str | Path", Option("A recipe.", positional=True)]
SecondRecipe = Annotated[
    "Recipe | str | Path", Option("Another recipe of the same model.", positional=True)
]
PricingTable = Annotated[
    "Table | str | Path | None", Option("From `mofq measure`: what each change costs.")
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
        if found.total is not None:
            content["unit"] = found.unit
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
    tell: Tell | None = None,
) -> DiffResult:
    """What changed between two recipes, and what it costs.

    Returns:
        The fusion groups that differ.

    Raises:
        MofqError: The recipes are of two models, or an input is not valid.
    """
    from mofq.decision.difference import compare_recipes
    from mofq.decision.edited import with_figures

    a, b = open_recipe(first), open_recipe(second)
    opened = None if table is None else open_table(table, tell)
    found = compare_recipes(a, b, opened)
    if opened is not None:
        a, b = with_figures(a, opened), with_figures(b, opened)
    return DiffResult((_name(first, "first"), _name(second, "second")), (a, b), found)


def _name(recipe: Recipe | str | Path, otherwise: str) -> str:
    return Path(recipe).name if isinstance(recipe, str | Path) else otherwise
