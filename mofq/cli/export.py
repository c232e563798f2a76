"""``mofq export``."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from mofq.cli.checks import check_folder, check_output
from mofq.cli.terminal import (
    next_step,
    note,
    print_json,
    progress_bars,
    say,
    short_bytes,
    stats_for,
)
from mofq.exceptions import EngineError

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.delivery.export.compressed_tensors import Export


#: What another tool's recipe is called in the folder of a run.
_FILES = {"torchao": "torchao.json", "modelopt": "hf_quant_config.json"}


def run_export(
    model: str,
    recipe: Path,
    *,
    to: str | None,
    output: Path,
    engine: str | None,
    stats: Path | None = None,
    as_json: bool = False,
) -> None:
    """Write a checkpoint and say how it is served, or another tool's recipe."""
    from mofq.decision.recipe import load_recipe
    from mofq.delivery.backends import RECIPE_EXPORTERS

    start = monotonic()
    check_folder(output.parent)
    loaded = load_recipe(recipe)
    to = to or _what_is_read(engine, loaded)
    if to in RECIPE_EXPORTERS:
        check_output(output, recipe)
        _export_file(model, loaded, to=to, output=output, as_json=as_json)
        return
    engine = engine or recipe_engine(loaded, to)
    done = export_recipe(model, loaded, to=to, output=output, engine=engine, stats=stats)
    seconds = monotonic() - start
    if as_json:
        print_json(
            {
                "folder": str(done.folder),
                "to": to,
                "engine": engine,
                "group_bytes": done.group_bytes,
                "checkpoint_bytes": done.checkpoint_bytes,
                "serve_command": done.serve_command,
                "seconds": round(seconds, 2),
            }
        )
        return
    note(f"{output}: {short_bytes(done.checkpoint_bytes)} of tensors for {to}, {seconds:.1f} s.")
    say(f"Serve it with: {done.serve_command}")
    next_step("validate", model, output, *stats_for(loaded), "--text", "FILE")


def _what_is_read(engine: str | None, recipe: Recipe) -> str:
    """What the engine loads, the recipe's where none is named; else what most engines load."""
    from mofq.engines import find_engine

    name = engine or recipe.made_by.get("engine")
    return "compressed-tensors" if name is None else find_engine(str(name)).reads


def _export_file(model: str, recipe: Recipe, *, to: str, output: Path, as_json: bool) -> None:
    from mofq.delivery.backends import find_exporter
    from mofq.model.checkpoint.headers import open_checkpoint

    written: Path = find_exporter(to)(open_checkpoint(model), recipe, output)
    if as_json:
        print_json({"file": str(written), "to": to})
    else:
        note(f"{written}: for {to}.")


def write_recipe_file(model: str, recipe: Recipe, *, to: str, folder: Path) -> Path:
    """A recipe for another tool, under the name that the tool gives such a file."""
    from mofq.delivery.backends import find_exporter
    from mofq.model.checkpoint.headers import open_checkpoint

    output = folder / _FILES.get(to, f"{to}.txt")
    written: Path = find_exporter(to)(open_checkpoint(model), recipe, output)
    return written


def export_recipe(
    model: str,
    recipe: Recipe,
    *,
    to: str,
    output: Path,
    engine: str | None,
    stats: Path | None = None,
    validation: str = "",
) -> Export:
    """Export a recipe to a new folder; ``validation`` goes into its model card."""
    from mofq.delivery.backends import find_exporter
    from mofq.model.checkpoint.headers import open_checkpoint

    exporter = find_exporter(to)
    checkpoint = open_checkpoint(model)
    with progress_bars() as bars:
        done: Export = exporter(
            checkpoint,
            recipe,
            output,
            engine=engine,
            stats=stats,
            validation=validation,
            progress=bars.stage,
        )
    return done


def read_export(
    model: str, recipe: Recipe, *, folder: Path, engine: str, stats: Path | None = None
) -> Export:
    """What a former run exported, proved byte for byte.

    Raises:
        EnforcementError: The folder is not what the recipe makes of the model.
    """
    from mofq.delivery.export.compressed_tensors import Export, check_compressed_tensors
    from mofq.delivery.export.compressed_tensors.export import serve_command
    from mofq.delivery.export.compressed_tensors.plan import plan_export
    from mofq.delivery.recipe_fits import open_fits
    from mofq.model.checkpoint.headers import open_checkpoint

    checkpoint = open_checkpoint(model)
    with open_fits(recipe, stats, index_sha256=checkpoint.index_sha256) as fits:
        check_compressed_tensors(checkpoint, recipe, folder, fits=fits)
    plan = plan_export(checkpoint, recipe)
    size = sum(tensor.nbytes for tensor in plan.tensors.values())
    return Export(folder, plan.group_bytes, size, serve_command(plan, folder, engine=engine))


def recipe_engine(recipe: Recipe, to: str) -> str | None:
    """The engine that a recipe was searched for, where it reads this kind of export."""
    from mofq.engines import find_engine

    name = recipe.made_by.get("engine")
    try:
        engine = find_engine(str(name))
    except EngineError:  # of another version of mofq
        return None
    return engine.name if engine.reads == to else None
