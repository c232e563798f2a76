"""``mofq measure``."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from mofq.cli.terminal import note, print_json, progress_bars


def run_measure(
    model: str,
    *,
    space: str,
    output: Path,
    stats: Path | None = None,
    engine: str | None = None,
    device: str = "cpu",
    as_json: bool = False,
) -> None:
    """Fill the table and say what it holds."""
    from mofq.checkpoint.headers import open_checkpoint
    from mofq.engines import legality
    from mofq.layers import find_layers
    from mofq.search_space import load_search_space

    start = monotonic()
    loaded_space = load_search_space(space)
    check = None if engine is None else legality(engine)
    checkpoint = open_checkpoint(model)
    layers = find_layers(checkpoint)

    from mofq.calibration.stats import read_stats
    from mofq.measure.run import measure
    from mofq.table import read_table

    opened = None if stats is None else read_stats(stats)
    with progress_bars() as bars:
        measure(
            checkpoint,
            layers,
            loaded_space,
            table_path=output,
            stats=opened,
            engine=engine,
            legality=check,
            device=device,
            progress=lambda done, total: bars.stage("measure", done, total),
        )
    table = read_table(output)
    schemes = sorted({row.scheme for row in table.rows})
    if as_json:
        print_json(
            {
                "table": str(output),
                "sha256": table.sha256,
                "rows": len(table.rows),
                "groups": len(table.header.groups),
                "schemes": schemes,
                "units": sorted({row.unit for row in table.rows}),
                "rejections": len(table.rejections),
                "seconds": round(monotonic() - start, 2),
            }
        )
        return
    note(
        f"{output}: {len(table.rows)} rows, {len(table.header.groups)} fusion groups, "
        f"{len(schemes)} schemes, {monotonic() - start:.0f} s."
    )
    for name in sorted({r.scheme for r in table.rejections}):
        refused = [r for r in table.rejections if r.scheme == name]
        note(f"  {name}: refused in {len(refused)} groups, e.g. {refused[0].reason}")
