"""Writes a quantized checkpoint for a serving engine, or a recipe for another tool."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.inputs import open_recipe
from mofq.api.options import AnyRecipe, Model, Option, Stats, documented
from mofq.api.preconditions import check_folder, check_output
from mofq.exceptions import EngineError
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.delivery.export.compressed_tensors import Export


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A checkpoint for an engine, or a file for another tool."""

    model: str  #: as it was given
    recipe: Recipe
    output: Path  #: the folder, or the file
    to: str  #: the format
    engine: str | None  #: that was checked, of a checkpoint
    checkpoint: Export | None  #: sizes and how it is served; None: a file for another tool
    seconds: float

    @property
    def serve_command(self) -> str | None:
        """What serves the checkpoint; None: no server does, or it is a file for another tool."""
        return None if self.checkpoint is None else self.checkpoint.serve_command

    @property
    def how_to_use(self) -> str | None:
        """What is done with the checkpoint next, in words; None: a file for another tool."""
        if self.checkpoint is None:
            return None
        if self.serve_command is not None:
            return f"Serve it with: {self.serve_command}"
        return f"Load it with: {self.checkpoint.load_code}"

    def to_json(self) -> dict[str, Any]:
        """What was written, for machines."""
        if self.checkpoint is None:
            return {"file": str(self.output), "to": self.to}
        return {
            "folder": str(self.checkpoint.folder),
            "to": self.to,
            "engine": self.engine,
            "group_bytes": self.checkpoint.group_bytes,
            "checkpoint_bytes": self.checkpoint.checkpoint_bytes,
            "serve_command": self.checkpoint.serve_command,
            "load_code": self.checkpoint.load_code,
            "seconds": round(self.seconds, 2),
        }


@documented
def export(
    model: Model,
    recipe: AnyRecipe,
    output: Annotated[str | Path, Option("The folder, or file, to write.", short="-o")],
    *,
    to: Annotated[
        str | None,
        Option(
            "compressed-tensors; torchao, llm-compressor, modelopt, auto-round or llama.cpp. "
            "What the engine reads by default."
        ),
    ] = None,
    engine: Annotated[
        str | None, Option("Refuse what it cannot serve; the recipe's by default.")
    ] = None,
    stats: Stats = None,
    model_card: str = "",
    progress: Progress | None = None,
) -> ExportResult:
    """Write a quantized checkpoint that a serving engine loads.

    A folder must be new or empty. For tools other than engines, ``output`` is a file. The model
    card of a checkpoint says ``model_card`` of its accuracy.

    Returns:
        Folder, sizes, and the command that serves it, or the code that loads it.

    Raises:
        MofqError: A scheme cannot be served, the folder is in the way, or an input is not valid.
    """
    from mofq.delivery.backends import RECIPE_EXPORTERS, find_exporter
    from mofq.model.checkpoint.headers import open_checkpoint

    start = monotonic()
    path = Path(output)
    loaded = open_recipe(recipe)
    to = to or _format_of(engine, loaded)
    checkpoint = open_checkpoint(str(model))
    exporter = find_exporter(to)
    done: Export | None = None
    if to in RECIPE_EXPORTERS:
        check_output(path, files=[recipe], folders=[model])
        path = exporter(checkpoint, loaded, path)
    else:
        check_folder(path, folders=[model, stats])
        engine = engine or _engine_of(loaded, to)
        done = exporter(
            checkpoint,
            loaded,
            path,
            engine=engine,
            stats=stats,
            validation=model_card,
            progress=progress,
        )
    return ExportResult(str(model), loaded, path, to, engine, done, monotonic() - start)


def _format_of(engine: str | None, recipe: Recipe) -> str:
    """What the engine loads, the recipe's where none is named; else what most engines load."""
    from mofq.engines import find_engine

    name = engine or recipe.made_by.get("engine")
    return "compressed-tensors" if name is None else find_engine(str(name)).reads


def _engine_of(recipe: Recipe, to: str) -> str | None:
    """The engine that a recipe was searched for, where it reads this kind of export."""
    from mofq.engines import find_engine

    name = recipe.made_by.get("engine")
    try:
        engine = find_engine(str(name))
    except EngineError:  # of another version of mofq
        return None
    return engine.name if engine.reads == to else None
