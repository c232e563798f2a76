"""Consumers of recipes: what can be applied to a model in memory, and what can be exported."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mofq.decision.recipe import Recipe
from mofq.engines import ENGINES
from mofq.exceptions import BackendError, RecipeError, how_to_install, nearest_name, option
from mofq.files.documents import write_beside_and_rename
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from torch.nn import Module

    from mofq.model.checkpoint.headers import Checkpoint

#: Name -> module with ``apply(model, recipe, *, checkpoint=None, fits=None, progress=None)``.
APPLIERS: dict[str, str] = {
    "emulate": "mofq.delivery.apply.emulate",
    "torchao": "mofq.delivery.apply.torchao",
}

#: Name -> module and function ``(checkpoint, recipe, folder, *, engine, stats, validation, …)``.
EXPORTERS: dict[str, tuple[str, str]] = {
    "compressed-tensors": ("mofq.delivery.export.compressed_tensors", "export_compressed_tensors"),
}

#: Name of another tool -> module and function ``(checkpoint, recipe)`` to the text of its file.
RECIPE_EXPORTERS: dict[str, tuple[str, str]] = {
    "llm-compressor": ("mofq.delivery.export.llm_compressor", "llm_compressor_recipe"),
    "modelopt": ("mofq.delivery.export.modelopt", "modelopt_config"),
    "auto-round": ("mofq.delivery.export.auto_round", "auto_round_config"),
    "torchao": ("mofq.delivery.export.torchao_config", "torchao_config"),
    "llama.cpp": ("mofq.delivery.export.llama_cpp", "llama_cpp_arguments"),
}

#: Export -> the package that writes it, which mofq does not install by itself.
_PACKAGES = {"torchao": "torchao"}


def apply_recipe(
    model: Module,
    recipe: Recipe,
    backend: str = "emulate",
    *,
    checkpoint: Checkpoint | None = None,
    stats: str | Path | None = None,
    emulate: Collection[str] = (),
    progress: Progress | None = None,
) -> Module:
    """Quantize a loaded model in memory.

    Args:
        model: As transformers loads it; its linear layers are replaced in place.
        recipe: Of that model.
        backend: A key of ``APPLIERS``.
        checkpoint: The model's own, where the backend should read weights from it.
        stats: The folder from `mofq calibrate` that the recipe rests on; needed where a
            scheme is fitted to it (``@nats``, ``~gptq``, ``~descent``).
        emulate: Names of layers, or patterns such as ``*``, that the backend
            ``torchao`` emulates where it has no kernel; the backend ``emulate``
            emulates every layer.
        progress: Called with the backend's name, fusion groups done, and all of them.

    Returns:
        The same model.

    Raises:
        BackendError: No backend has that name, or it cannot apply a scheme, or has no
            kernel for a layer, which the message names.
        RecipeError: The recipe is not for this model, or rests on other statistics.
        StatsError: A scheme is fitted to statistics, and there are none.
    """
    if backend not in APPLIERS:
        raise BackendError(f"unknown backend {backend!r}." + nearest_name(backend, APPLIERS))
    apply = import_module(APPLIERS[backend]).apply
    options = {} if backend == "emulate" else {"emulate": emulate}
    from mofq.delivery.recipe_fits import open_fits

    if recipe.rewriting is not None and checkpoint is None:
        raise RecipeError(
            f"{recipe.title}: is for the model that it rewrites {recipe.rewriting.model} to. "
            f"Export it and load the folder; or load the rewritten model, and give its checkpoint "
            f"and its statistics too."
        )
    index_sha256 = None if checkpoint is None else checkpoint.index_sha256
    with open_fits(recipe, stats, index_sha256=index_sha256) as fits:
        applied: Module = apply(
            model, recipe, checkpoint=checkpoint, fits=fits, progress=progress, **options
        )
    return applied


#: What people call other tools that they export for -> the format that it reads.
_READS = {"llmcompressor": "llm-compressor", "trtllm": "modelopt", "gguf": "llama.cpp"}


def find_exporter(name: str) -> Any:
    """The function that exports to a format.

    Args:
        name: A key of ``EXPORTERS``, which write a checkpoint, or of
            ``RECIPE_EXPORTERS``, which write a file for another tool.

    Returns:
        The function; its first three arguments are checkpoint, recipe and output.

    Raises:
        BackendError: No exporter has that name, or it needs a package that is not installed.
    """
    known = EXPORTERS | RECIPE_EXPORTERS
    if name not in known:
        reads = {key.partition("-")[0]: one.reads for key, one in ENGINES.items()} | _READS
        read = reads.get(name.partition("-")[0].lower())
        near = (
            nearest_name(name, known)
            if read is None
            else f" For it, export with {option('to', read)}."
        )
        raise BackendError(f"unknown export format {name!r}.{near}")
    if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
        raise BackendError(
            f"exporting to {name} needs the package {_PACKAGES[name]}, which is not installed. "
            f"{how_to_install(_PACKAGES[name])}"
        )
    module, function = known[name]
    found = getattr(import_module(module), function)
    return partial(_write_file, name, found) if name in RECIPE_EXPORTERS else found


def _write_file(
    name: str,
    text_of: Callable[[Checkpoint, Recipe], str],
    checkpoint: Checkpoint,
    recipe: Recipe,
    file: str | Path,
) -> Path:
    """Write another tool's file, unless the recipe says what no such file would."""
    if any(not cache.parsed.is_unquantized for cache in recipe.kv_cache):
        raise BackendError(
            f"kv_cache: what mofq writes for {name} says nothing of the KV cache, which would stay "
            f"as it is. Export with {option('to', 'compressed-tensors')}, or remove kv_cache from "
            f"the recipe."
        )
    if recipe.tuning is not None:
        raise BackendError(
            f"{recipe.title}: is tuned, and {name} would quantize the model with codes and norms "
            f"as it finds them. Export with {option('to', 'compressed-tensors')}, or remove "
            f"`tuning` from the recipe."
        )
    path = Path(file)
    write_beside_and_rename(path, text_of(checkpoint, recipe))
    return path
