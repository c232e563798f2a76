"""``mofq explore`` and ``mofq plot``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from mofq.cli.checks import check_output
from mofq.cli.curve import CurveOptions, curve_request
from mofq.cli.tables import open_for_reading
from mofq.cli.terminal import note, print_json, progress_bars, short_bytes

if TYPE_CHECKING:
    from mofq.explore.drawing import Drawing


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """What is to be drawn, and where to."""

    table: Path
    output: Path
    recipes: tuple[Path, ...] = ()
    validations: tuple[Path, ...] = ()
    curve: CurveOptions = field(default_factory=CurveOptions)


def _read_drawing(options: DrawOptions) -> Drawing:
    from mofq.explore.drawing import read_drawing

    return read_drawing(
        open_for_reading(options.table),
        recipes=options.recipes,
        validations=options.validations,
        request=curve_request(options.curve),
    )


def run_explore(options: DrawOptions, *, as_json: bool) -> None:
    """Decide the whole frontier and write the page."""
    from mofq.explore.html_page import write_page
    from mofq.explore.page_data import page_data

    start = monotonic()
    check_output(options.output, options.table, *options.recipes, *options.validations)
    with progress_bars() as bars:
        data = page_data(_read_drawing(options), options.table, progress=bars.stage)
    size = write_page(data, options.output)
    seconds = round(monotonic() - start, 2)
    count = len(data["points"])
    if as_json:
        print_json(
            {"page": str(options.output), "bytes": size, "recipes": count, "seconds": seconds}
        )
        return
    note(f"{options.output}: {count} recipes of the frontier, {short_bytes(size)}, {seconds:.1f} s")


def run_plot(options: DrawOptions, *, kind: str, as_json: bool) -> None:
    """Draw one figure."""
    from mofq.explore.figures import draw_figure

    start = monotonic()
    check_output(options.output, options.table, *options.recipes, *options.validations)
    draw_figure(kind, _read_drawing(options), path=options.output)
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
