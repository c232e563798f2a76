"""Writes a quantized checkpoint for a serving engine, or a recipe for another tool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.formatting import with_error, with_interval
from mofq.api.inputs import open_recipe
from mofq.api.options import AnyRecipe, Model, Option, Stats, documented
from mofq.api.preconditions import check_folder, check_output
from mofq.exceptions import EngineError, MofqError, option
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.delivery.export.compressed_tensors import Export
    from mofq.delivery.validation import Validation
    from mofq.model.checkpoint.headers import Checkpoint


Measured = Annotated[
    Sequence["Validation | str | Path"],
    Option("From `mofq validate -o`, for the model card; repeatable.", flag="--validation"),
]


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
    stats: str | Path | None = None  #: as they were given

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
            "A folder of compressed-tensors, or a file for torchao, llm-compressor, modelopt, "
            "auto-round or llama.cpp; by default what the engine reads."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        Option("Refuse what this engine cannot serve; the recipe's engine by default."),
    ] = None,
    stats: Stats = None,
    validations: Measured = (),
    progress: Progress | None = None,
) -> ExportResult:
    """Write a quantized checkpoint that a serving engine loads.

    A folder must be new or empty. For tools other than engines, ``output`` is a file. The model
    card of a checkpoint says what ``validations`` measured of the recipe.

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
    if validations and to in RECIPE_EXPORTERS:
        raise MofqError(f"{option('validations')}: a file for {to} has no model card to say it in.")
    measured = [_measured(one, recipe, loaded, checkpoint) for one in validations]
    if to in RECIPE_EXPORTERS:
        if loaded.rewriting is not None:
            raise MofqError(
                f"{loaded.title}: is for the model that it rewrites {loaded.rewriting.model} to. "
                f"A file for {to} is of a model that is there: search with "
                f"{option('effort', 'quick')}, or rewrite with `mofq rewrite` and run on that."
            )
        check_output(path, files=[recipe], folders=[model])
        path = exporter(checkpoint, loaded, path)
    else:
        check_folder(path, folders=[model, stats])
        engine = engine or _engine_of(loaded, to)
        from mofq.delivery.rewriting.remake import base_of

        with base_of(loaded, checkpoint, stats) as base:
            done = exporter(
                base.checkpoint,
                loaded,
                path,
                engine=engine,
                stats=base.stats,
                validation="\n\n".join(map(_accuracy, measured)),
                progress=progress,
            )
    return ExportResult(str(model), loaded, path, to, engine, done, monotonic() - start, stats)


def _measured(
    source: Validation | str | Path, recipe: Recipe | str | Path, loaded: Recipe, model: Checkpoint
) -> Validation:
    """A validation of this very recipe and model, in which the recipe was enforced.

    Raises:
        MofqError: It is another one, or no validation.
    """
    from mofq.decision.recipe import Recipe, recipe_text
    from mofq.delivery.validation import Validation, read_validation

    found = source if isinstance(source, Validation) else read_validation(source)
    models = [model.index_sha256]
    if loaded.rewriting is not None:  # and is validated against the model before
        models.append(loaded.rewriting.index_sha256)
    texts = [recipe_text(loaded)]
    if not isinstance(recipe, Recipe):
        texts.append(Path(recipe).read_text("utf-8"))
    if found.lineage.recipe_sha256 not in [sha256(one.encode()).hexdigest() for one in texts]:
        wrong = "of another recipe"
    elif found.lineage.index_sha256 not in models:
        wrong = "of another model"
    elif not found.enforced:
        wrong = "of a model that was not as the recipe says"
    else:
        return found
    where = "" if isinstance(source, Validation) else f"{source}: "
    raise MofqError(
        f"{where}is a validation {wrong} ({found.lineage.candidate}). Validate what is exported, "
        f"with `mofq validate MODEL RECIPE -o`."
    )


def _accuracy(validation: Validation) -> str:
    """What the model card says of accuracy."""
    kl = with_error(validation.kl_nats_per_token, validation.kl_stderr)
    low, high = validation.predicted_kl_low, validation.predicted_kl_high
    predicted = validation.predicted_kl_nats_per_token
    if low is not None and high is not None:
        before = " before it was tuned" if validation.is_tuned else ""
        kl += f" (predicted{before}, with a 95 % interval: {with_interval(predicted, low, high)})"
    begin = ", in windows that begin with BOS" if validation.lineage.bos else ""
    lines = [
        f"On {validation.tokens} tokens of `{Path(validation.lineage.text).name}`{begin}: KL "
        f"divergence from the original {kl} nats per token, perplexity "
        f"{validation.perplexity:.4g} (original {validation.perplexity_original:.4g}), the same "
        f"most probable token at {100 * validation.top1_agreement:.2f} % of positions."
    ]
    lines += [
        f"- {one.task}, {one.metric}: {with_error(one.value, one.stderr)} (original "
        f"{with_error(one.original, one.original_stderr)})"
        for one in validation.tasks
    ]
    return "\n".join(lines[:1] + [""] * (len(lines) > 1) + lines[1:])


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
