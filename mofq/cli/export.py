"""``mofq export``."""

from __future__ import annotations

from pathlib import Path

from mofq.cli.terminal import note, print_json, progress_bars


def run_export(model: str, recipe: Path, *, to: str, output: Path, as_json: bool) -> None:
    """Write a checkpoint or another tool's recipe."""
    from mofq.backends import find_exporter
    from mofq.checkpoint.headers import open_checkpoint
    from mofq.recipe import load_recipe

    exporter = find_exporter(to)
    loaded = load_recipe(recipe)
    checkpoint = open_checkpoint(model)
    with progress_bars() as bars:
        exporter(
            checkpoint,
            loaded,
            output,
            progress=bars.stage,
        )
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if as_json:
        print_json({"folder": str(output), "bytes": size, "to": to})
    else:
        note(f"{output}: {size:,} bytes, for {to}.")
