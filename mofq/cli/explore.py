"""``mofq explore``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from mofq.cli.terminal import note, print_json, progress_bars, short_bytes


@dataclass(frozen=True, slots=True)
class ExploreOptions:
    """What `mofq explore` was asked for."""

    table: Path
    output: Path
    recipes: tuple[Path, ...] = ()
    validations: tuple[Path, ...] = ()
    unit: str | None = None
    engine: str | None = None
    space: str | None = None


def run_explore(options: ExploreOptions, *, as_json: bool) -> None:
    """Decide the whole frontier and write the page."""
    from mofq.decide import Request
    from mofq.explore.content import page_content
    from mofq.explore.document import write_page
    from mofq.solvers import Budgets
    from mofq.table import read_table

    start = monotonic()
    request = Request(
        Budgets(), unit=options.unit, engine=options.engine, space=options.space, ties=False
    )
    with progress_bars() as bars:
        content = page_content(
            read_table(options.table),
            options.table,
            recipes=options.recipes,
            validations=options.validations,
            request=request,
            progress=bars.stage,
        )
    size = write_page(content, options.output)
    seconds = round(monotonic() - start, 2)
    count = len(content["points"])
    if as_json:
        print_json(
            {"page": str(options.output), "bytes": size, "recipes": count, "seconds": seconds}
        )
        return
    note(f"{options.output}: {count} recipes of the frontier, {short_bytes(size)}, {seconds:.1f} s")
