"""``mofq explore`` and ``mofq plot``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from mofq.cli.checks import check_output
from mofq.cli.curve import CurveOptions, curve_request
from mofq.cli.tables import open_for_reading
from mofq.cli.terminal import note, print_json, progress_bars, short_bytes


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """What is to be drawn, and where to."""

    table: Path
    output: Path
    recipes: tuple[Path, ...] = ()
    validations: tuple[Path, ...] = ()
    curve: CurveOptions = field(default_factory=CurveOptions)


def run_explore(options: DrawOptions, *, as_json: bool) -> None:
    """Decide the whole frontier and write the page."""
    from mofq.explore.content import page_content
    from mofq.explore.document import write_page

    start = monotonic()
    check_output(options.output, options.table, *options.recipes, *options.validations)
    with progress_bars() as bars:
        content = page_content(
            open_for_reading(options.table),
            options.table,
            recipes=options.recipes,
            validations=options.validations,
            request=curve_request(options.curve),
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
    from mofq.explore.figure_inputs import figure_inputs
    from mofq.explore.figures import draw_figure

    start = monotonic()
    check_output(options.output, options.table, *options.recipes, *options.validations)
    inputs = figure_inputs(
        open_for_reading(options.table),
        recipes=options.recipes,
        validations=options.validations,
        request=curve_request(options.curve),
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
