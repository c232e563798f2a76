"""Opens what is to be validated: a recipe, an exported folder, or another model's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from mofq.decision.recipe import RECIPE_FILE, Recipe, holds_recipe, load_recipe, recipe_text
from mofq.delivery.backends import APPLIERS, apply_recipe
from mofq.delivery.deviation import Deviation
from mofq.delivery.export.compressed_tensors import (
    find_folder_deviations,
    recipe_from_compressed_tensors,
)
from mofq.delivery.export.compressed_tensors.kv_cache import CACHES_BY_FLAG
from mofq.delivery.export.compressed_tensors.model_from_folder import load_compressed_tensors
from mofq.delivery.export.compressed_tensors.recipe_from_folder import QUANTIZATION_KEY
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.recipe_layers import checked_layers
from mofq.exceptions import BackendError, EnforcementError, MofqError, nearest_name
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint, open_stored
from mofq.model.layers import ModelLayers, find_layers
from mofq.model.loading import load_model
from mofq.model.sizes import bits_per_weight, counted_bytes, weights_of
from mofq.numbers.schemes import parse_scheme


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is validated, known to fit the original."""

    source: str
    base: Checkpoint  #: that the recipe is applied to: the original, or what it is rewritten to
    recipe: Recipe | None
    recipe_sha256: str | None
    folder: Checkpoint | None  #: exported, unquantized or of another tool
    bits_per_weight: float
    is_foreign: bool = False  #: quantized by another tool, whose codes are as they are
    served: Recipe | None = None  #: what engines read in a quantized folder
    deviations: tuple[Deviation, ...] = ()  #: of an exported folder
    backend: str = "emulate"  #: that applies the recipe
    emulated: tuple[str, ...] = ()  #: layers that the backend may emulate
    stats: str | Path | None = None  #: that fitted schemes rest on

    @property
    def applied(self) -> Recipe | None:
        """The recipe that is applied in memory; None where a folder is run."""
        return self.recipe if self.folder is None else None


def open_candidate(
    source: str | Path | Recipe,
    checkpoint: Checkpoint,
    *,
    backend: str,
    emulated: Collection[str],
    stats: str | Path | None,
) -> Candidate:
    """Read a candidate and check all that can be checked before a model runs.

    Args:
        source: A recipe, its file, a folder that mofq exported, a compressed-tensors
            folder of another tool, or the folder of an unquantized model.
        checkpoint: The original, or the rewritten model that a recipe is for.
        backend: That will apply the recipe, as in ``apply_recipe``.
        emulated: Layers that it may emulate, likewise.
        stats: The folder that the recipe rests on, where a scheme is fitted to it.

    Returns:
        The candidate.

    Raises:
        RecipeError: The recipe is not valid, or not for the original.
        EnforcementError: An exported folder differs from what its recipe makes of the
            original, so that it cannot be loaded.
        BackendError: A quantized folder is of a format that cannot be read.
        CheckpointError: The folder holds no model.
        StatsError: A scheme is fitted to statistics, and there are none, or others.
    """
    if backend not in APPLIERS:
        raise BackendError(f"unknown backend {backend!r}." + nearest_name(backend, APPLIERS))
    candidate = _open(source, checkpoint)
    recipe, folder = candidate.recipe, candidate.folder
    if recipe is not None:
        with open_fits(recipe, stats, index_sha256=checkpoint.index_sha256) as fits:
            if folder is not None and not candidate.is_foreign:
                if backend != "emulate":
                    raise BackendError(
                        f"{source}: is a folder, which is decoded and run as it is; backend "
                        f"{backend!r} applies recipes. Give {RECIPE_FILE} in it for that."
                    )
                found = find_folder_deviations(checkpoint, recipe, folder, fits=fits)
                candidate = replace(candidate, deviations=tuple(found))
                with naming_deviations(candidate):
                    candidate = replace(candidate, served=_read_served(folder, recipe))
    return replace(candidate, backend=backend, emulated=tuple(emulated), stats=stats)


@contextmanager
def naming_deviations(candidate: Candidate) -> Iterator[None]:
    """Whatever fails in a folder that is not as it was exported: say first how it differs.

    Raises:
        EnforcementError: Something failed, and the candidate has deviations.
    """
    try:
        yield
    # A changed config may fail anywhere in transformers, or in the model's own code.
    except Exception as error:
        if not candidate.deviations:
            raise
        first, *others = candidate.deviations
        more = f" (and {len(others)} more)" if others else ""
        why = error.template if isinstance(error, MofqError) else str(error)
        raise EnforcementError(
            f"{candidate.source}: {first.layer}: {first.reason}{more}. The folder is not what its "
            f"recipe says, and cannot be run: {why}"
        ) from error


def _read_served(folder: Checkpoint, recipe: Recipe) -> Recipe | None:
    """What engines read in an exported folder, started with the flags that its card gives.

    Weights, inputs and caches are the folder's own. Of the caches only flags can say that one
    stays unquantized, or has a format that a checkpoint has no words for.
    """
    if QUANTIZATION_KEY not in folder.config:
        return None
    served = recipe_from_compressed_tensors(folder.folder)
    caches = {cache.name: cache for cache in served.kv_cache}
    for cache in recipe.kv_cache:
        if cache.parsed.is_unquantized or cache.scheme in CACHES_BY_FLAG:
            caches[cache.name] = cache
    return replace(served, kv_cache=tuple(caches.values()))


def _open(source: str | Path | Recipe, checkpoint: Checkpoint) -> Candidate:
    if isinstance(source, Recipe):
        return _open_recipe(source, checkpoint, source="recipe", text=recipe_text(source))
    path = Path(source)
    if not path.is_dir():
        return _open_recipe_file(path, checkpoint, source=str(source))
    folder = open_stored(str(path))
    if holds_recipe(path / RECIPE_FILE):
        recipe_file = path / RECIPE_FILE
        candidate = _open_recipe_file(recipe_file, checkpoint, source=str(folder.folder))
        return replace(candidate, folder=folder)
    if QUANTIZATION_KEY in folder.config:
        recipe = recipe_from_compressed_tensors(path)
        text = recipe_text(recipe)
        candidate = _open_recipe(recipe, checkpoint, source=str(source), text=text)
        return replace(candidate, folder=folder, is_foreign=True, served=recipe)
    return Candidate(
        source=str(source),
        base=checkpoint,
        recipe=None,
        recipe_sha256=None,
        folder=folder,
        bits_per_weight=_bits(find_layers(folder), {}),
    )


def load_candidate(
    candidate: Candidate, *, dtype: str, device: str, progress: Progress | None
) -> PreTrainedModel:
    """The candidate's model in memory.

    Args:
        candidate: From ``open_candidate``.
        dtype: Of the arithmetic.
        device: Where it runs.
        progress: Of the backend.

    Returns:
        Of a folder, its own config and tensors, decoded, with inputs and caches quantized as
        its config says; else the original with the recipe applied.

    Raises:
        MofqError: It cannot be loaded, or the recipe cannot be applied.
    """
    if candidate.folder is not None:
        with naming_deviations(candidate):
            if candidate.served is None:
                return load_model(candidate.folder.folder, dtype=dtype, device=device)
            return load_compressed_tensors(
                candidate.folder, candidate.served, dtype=dtype, device=device, progress=progress
            )
    assert candidate.recipe is not None
    model = load_model(candidate.base.folder, dtype=dtype, device=device)
    apply_recipe(
        model,
        candidate.recipe,
        candidate.backend,
        checkpoint=candidate.base,
        stats=candidate.stats,
        emulate=candidate.emulated,
        progress=progress,
    )
    return model


def _open_recipe_file(path: Path, checkpoint: Checkpoint, *, source: str) -> Candidate:
    recipe = load_recipe(path)
    return _open_recipe(recipe, checkpoint, source=source, text=path.read_text("utf-8"))


def _open_recipe(recipe: Recipe, checkpoint: Checkpoint, *, source: str, text: str) -> Candidate:
    layers = checked_layers(checkpoint, recipe, experts_apart=True)
    return Candidate(
        source=source,
        base=checkpoint,
        recipe=recipe,
        recipe_sha256=hashlib.sha256(text.encode()).hexdigest(),
        folder=None,
        bits_per_weight=_bits(layers, recipe.schemes),
    )


def _bits(layers: ModelLayers, schemes: Mapping[str, str]) -> float:
    """True bits per weight of the fusion groups; a layer without a scheme is unquantized."""
    stored_bytes = sum(
        counted_bytes(group, parse_scheme(schemes.get(group.layers[0].name, "bf16")))
        for group in layers.groups
    )
    return bits_per_weight(stored_bytes, weights_of(layers.groups))
