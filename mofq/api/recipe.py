"""Recipes without a search: one scheme for all layers, and those of a quantized checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.inputs import open_layers, save_recipe
from mofq.api.options import (
    LayersFile,
    Model,
    Option,
    RecipeOutput,
    Stats,
    Tell,
    Vocabulary,
    documented,
    silent,
)
from mofq.api.preconditions import check_output

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe


@dataclass(frozen=True, slots=True)
class UniformResult:
    """A recipe of one scheme."""

    recipe: Recipe
    output: Path | None

    def to_json(self) -> dict[str, Any]:
        """The recipe's figures, for machines."""
        return {
            "recipe": None if self.output is None else str(self.output),
            **self.recipe.result.known(),
        }


@dataclass(frozen=True, slots=True)
class RecipeFromResult:
    """The recipe that a quantized checkpoint follows."""

    recipe: Recipe
    output: Path | None
    folder: Path  #: of the checkpoint

    @property
    def fusion_groups(self) -> Counter[str]:
        """Scheme -> fusion groups that have it."""
        return Counter(group.scheme for group in self.recipe.groups)

    def to_json(self) -> dict[str, Any]:
        """The recipe's schemes and figures, for machines."""
        return {
            "recipe": None if self.output is None else str(self.output),
            "fusion_groups": dict(self.fusion_groups),
            **self.recipe.result.known(),
        }


@documented
def uniform(
    model: Model,
    scheme: Annotated[str, Option("For every linear layer, e.g. int4.g32@mse.", positional=True)],
    output: RecipeOutput = None,
    *,
    stats: Stats = None,
    layers: LayersFile = None,
    vocabulary: Vocabulary = Vocabulary(),
    tell: Tell | None = None,
) -> UniformResult:
    """One scheme for every linear layer of a model.

    Returns:
        The recipe, without predictions.

    Raises:
        MofqError: The scheme does not fit a layer, the statistics are of another model, or an
            input is not valid.
    """
    from mofq.decision import uniform_recipe
    from mofq.model.checkpoint.headers import open_checkpoint

    path = _checked(output, model, stats)
    checkpoint = open_checkpoint(str(model))
    found = open_layers(checkpoint, vocabulary, layers)
    rests_on: dict[str, Any] = {}
    if stats is not None:
        from mofq.decision.recipe import join_hashes
        from mofq.evidence.calibration.stats import check_same_model, read_stats
        from mofq.model.checkpoint.weights_hash import hash_weights

        read = read_stats(stats)
        check_same_model(read, checkpoint, weights_sha256=hash_weights(checkpoint))
        plan = read.plan
        rests_on = {
            "stats_sha256": read.sha256,
            "corpora_sha256": join_hashes(one.text_sha256 for one in plan.corpora),
            "bos": plan.bos,
            "sequence_length": plan.sequence_length,
        }
    recipe = uniform_recipe(checkpoint, found, scheme, **rests_on)
    if path is not None:
        save_recipe(recipe, path, tell or silent)
    return UniformResult(recipe, path)


@documented
def recipe_from(
    folder: Annotated[
        str | Path, Option("A compressed-tensors checkpoint, whoever wrote it.", positional=True)
    ],
    output: RecipeOutput = None,
    *,
    model: Annotated[
        str | Path | None, Option("The original; the recipe is checked to fit it.", read_as=str)
    ] = None,
    tell: Tell | None = None,
) -> RecipeFromResult:
    """The schemes of a quantized checkpoint as a recipe.

    Returns:
        The recipe.

    Raises:
        MofqError: The checkpoint says what no recipe can, or an input is not valid.
    """
    from mofq.decision.recipe import check_recipe
    from mofq.delivery.export.compressed_tensors import recipe_from_compressed_tensors
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.layers import find_layers, included, layers_of

    path = _checked(output, folder, model)
    recipe = recipe_from_compressed_tensors(Path(folder))
    if model is not None:
        checkpoint = open_checkpoint(str(model))
        asked = included(layers_of(recipe.groups), str(checkpoint.config.get("model_type")))
        check_recipe(recipe, find_layers(checkpoint, **asked, stated=recipe.layers))
        recipe = replace(recipe, model_name=checkpoint.name, index_sha256=checkpoint.index_sha256)
    if path is not None:
        save_recipe(recipe, path, tell or silent)
    return RecipeFromResult(recipe, path, Path(folder))


def _checked(output: str | Path | None, *folders: object) -> Path | None:
    if output is None:
        return None
    check_output(Path(output), folders=folders)
    return Path(output)
