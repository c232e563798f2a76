"""Opens what is to be validated: a recipe, or the folder of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from mofq.backends import emulate
from mofq.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.checkpoint.model import load_model
from mofq.cost import bits_per_weight, group_bytes, weights_of
from mofq.layers import find_layers
from mofq.recipe import Recipe, check_recipe, load_recipe, recipe_text
from mofq.schemes import parse_scheme

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is validated, known to fit the original."""

    source: str
    recipe: Recipe | None
    recipe_sha256: str | None
    folder: Checkpoint | None
    bits_per_weight: float


def open_candidate(source: str | Path | Recipe, checkpoint: Checkpoint) -> Candidate:
    """Read a candidate and check all that can be checked before a model runs.

    Args:
        source: A recipe, its file, or a model folder that transformers loads.
        checkpoint: The original.

    Returns:
        The candidate.

    Raises:
        RecipeError: The recipe is not valid, or not for the original.
        CheckpointError: The folder holds no model.
    """
    if not isinstance(source, Recipe) and Path(source).is_dir():
        return _open_folder(str(source))
    recipe = source if isinstance(source, Recipe) else load_recipe(source)
    layers = emulate.find_recipe_layers(checkpoint, recipe)
    check_recipe(recipe, layers, index_sha256=checkpoint.index_sha256)
    schemes = recipe.schemes
    stored_bytes = sum(
        group_bytes(group, parse_scheme(schemes[group.layers[0].name])) for group in layers.groups
    )
    text = recipe_text(recipe) if isinstance(source, Recipe) else Path(source).read_text("utf-8")
    return Candidate(
        source="recipe" if isinstance(source, Recipe) else str(source),
        recipe=recipe,
        recipe_sha256=hashlib.sha256(text.encode()).hexdigest(),
        folder=None,
        bits_per_weight=bits_per_weight(stored_bytes, weights_of(layers.groups)),
    )


def load_candidate(
    candidate: Candidate,
    checkpoint: Checkpoint,
    *,
    dtype: str,
    device: str,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The candidate's model in memory.

    Args:
        candidate: From ``open_candidate``.
        checkpoint: The original.
        dtype: Of the arithmetic.
        device: Where it runs.
        progress: Of the backend.

    Returns:
        A recipe's: the original with the recipe emulated. A folder's own otherwise.

    Raises:
        MofqError: It cannot be loaded, or the recipe cannot be applied.
    """
    if candidate.folder is not None:
        return load_model(candidate.folder.folder, dtype=dtype, device=device)
    assert candidate.recipe is not None
    model = load_model(checkpoint.folder, dtype=dtype, device=device)
    return emulate.apply(model, candidate.recipe, checkpoint=checkpoint, progress=progress)


def _open_folder(source: str) -> Candidate:
    folder = open_checkpoint(source)
    layers = find_layers(folder)
    unquantized = parse_scheme("bf16")
    stored_bytes = sum(group_bytes(group, unquantized) for group in layers.groups)
    return Candidate(
        source=source,
        recipe=None,
        recipe_sha256=None,
        folder=folder,
        bits_per_weight=bits_per_weight(stored_bytes, weights_of(layers.groups)),
    )
