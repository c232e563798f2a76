"""``mofq explore`` and ``mofq plot``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from mofq.cli.tables import open_for_reading
from mofq.cli.terminal import note, print_json, progress_bars, short_bytes

if TYPE_CHECKING:
    from mofq.decide import Request


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """What is to be drawn, and where to."""

    table: Path
    output: Path
    recipes: tuple[Path, ...] = ()
    validations: tuple[Path, ...] = ()
    unit: str | None = None
    engine: str | None = None
    space: str | None = None


def run_explore(options: DrawOptions, *, as_json: bool) -> None:
    """Decide the whole frontier and write the page."""
    from mofq.explore.content import page_content
    from mofq.explore.document import write_page

    start = monotonic()
    with progress_bars() as bars:
        content = page_content(
            open_for_reading(options.table),
            options.table,
            recipes=options.recipes,
            validations=options.validations,
            request=_request(options),
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


def run_plot(options: DrawOptions, *, kind: str, as_json: bool) -> None:
    """Draw one figure."""
    from mofq.explore.figures import draw_figure, figure_inputs

    start = monotonic()
    inputs = figure_inputs(
        open_for_reading(options.table),
        recipes=options.recipes,
        validations=options.validations,
        request=_request(options),
    )
    draw_figure(kind, inputs, path=options.output)
    if as_json:
        print_json(
            {
                "figure": str(options.output),
                "kind": kind,
                "bytes": options.output.stat().st_size,
                "seconds": round(monotonic() - start, 2),
            }
        )
        return
    note(f"{options.output}: {kind} of {options.table}")


def _request(options: DrawOptions) -> Request:
    from mofq.decide import Request
    from mofq.solvers import Budgets

    return Request(
        Budgets(), unit=options.unit, engine=options.engine, space=options.space, ties=False
    )
