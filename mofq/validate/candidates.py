"""Opens what is to be validated: a recipe, an exported folder, or another model's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from mofq.backends import emulate
from mofq.backends.compressed_tensors import check_compressed_tensors
from mofq.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.checkpoint.model import load_model
from mofq.cost import bits_per_weight, group_bytes, weights_of
from mofq.exceptions import BackendError
from mofq.layers import ModelLayers, find_layers
from mofq.recipe import Recipe, check_recipe, load_recipe, recipe_text
from mofq.schemes import parse_scheme

#: What ``mofq export`` calls the recipe in the folder that it writes.
RECIPE_FILE = "recipe.yaml"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is validated, known to fit the original."""

    source: str
    recipe: Recipe | None
    recipe_sha256: str | None
    folder: Checkpoint | None  #: exported or unquantized
    bits_per_weight: float


def open_candidate(source: str | Path | Recipe, checkpoint: Checkpoint) -> Candidate:
    """Read a candidate and check all that can be checked before a model runs.

    Args:
        source: A recipe, its file, a folder that mofq exported, or the folder of
            an unquantized model.
        checkpoint: The original.

    Returns:
        The candidate.

    Raises:
        RecipeError: The recipe is not valid, or not for the original.
        EnforcementError: An exported folder is not, byte for byte, what its
            recipe makes of the original.
        BackendError: A quantized folder is not of our making.
        CheckpointError: The folder holds no model.
    """
    if isinstance(source, Recipe):
        return _open_recipe(source, checkpoint, source="recipe", text=recipe_text(source))
    path = Path(source)
    if not path.is_dir():
        recipe = load_recipe(path)
        return _open_recipe(recipe, checkpoint, source=str(source), text=path.read_text("utf-8"))
    folder = open_checkpoint(str(path))
    if (path / RECIPE_FILE).exists():
        return _open_exported(folder, checkpoint)
    if "quantization_config" in folder.config:
        raise BackendError(
            f"{path}: holds quantized weights and no {RECIPE_FILE} that says what they should be. "
            f"Give a folder that `mofq export` wrote."
        )
    return Candidate(
        source=str(source),
        recipe=None,
        recipe_sha256=None,
        folder=folder,
        bits_per_weight=_bits(find_layers(folder), {}),
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
        The original with the recipe emulated, also for an exported folder, which
        is known to hold the same codes and scales; without a recipe, the
        folder's own model.

    Raises:
        MofqError: It cannot be loaded, or the recipe cannot be applied.
    """
    if candidate.recipe is not None:
        model = load_model(checkpoint.folder, dtype=dtype, device=device)
        return emulate.apply(model, candidate.recipe, checkpoint=checkpoint, progress=progress)
    assert candidate.folder is not None
    return load_model(candidate.folder.folder, dtype=dtype, device=device)


def _open_recipe(recipe: Recipe, checkpoint: Checkpoint, *, source: str, text: str) -> Candidate:
    layers = emulate.find_recipe_layers(checkpoint, recipe)
    check_recipe(recipe, layers, index_sha256=checkpoint.index_sha256)
    return Candidate(
        source=source,
        recipe=recipe,
        recipe_sha256=hashlib.sha256(text.encode()).hexdigest(),
        folder=None,
        bits_per_weight=_bits(layers, recipe.schemes),
    )


def _open_exported(folder: Checkpoint, checkpoint: Checkpoint) -> Candidate:
    path = folder.folder / RECIPE_FILE
    recipe = load_recipe(path)
    candidate = _open_recipe(
        recipe, checkpoint, source=str(folder.folder), text=path.read_text("utf-8")
    )
    check_compressed_tensors(checkpoint, recipe, folder.folder)
    return replace(candidate, folder=folder)


def _bits(layers: ModelLayers, schemes: Mapping[str, str]) -> float:
    """True bits per weight of the fusion groups; a layer without a scheme is unquantized."""
    stored_bytes = sum(
        group_bytes(group, parse_scheme(schemes.get(group.layers[0].name, "bf16")))
        for group in layers.groups
    )
    return bits_per_weight(stored_bytes, weights_of(layers.groups))
