"""``mofq measure``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from mofq.cli.calibrate import note_unseen
from mofq.cli.checks import check_device, check_engine, check_output
from mofq.cli.terminal import note, print_json, progress_bars

if TYPE_CHECKING:
    from mofq.evidence.calibration.stats import Stats
    from mofq.evidence.measure.fill_table import Remotely
    from mofq.evidence.table import Table


@dataclass(frozen=True, slots=True)
class Where:
    """Where the work is done."""

    device: str = "cpu"
    address: str | None = None  #: as `mofq.evidence.cluster.cluster` takes it; None: this process
    cpus: int = 1  #: of one unit of work


_HERE = Where()


def run_measure(
    model: str,
    *,
    space: str,
    output: Path,
    stats: Path | None = None,
    engine: str | None = None,
    where: Where = _HERE,
    as_json: bool = False,
) -> None:
    """Fill the table and say what it holds."""
    from mofq.evidence.table import read_table

    start = monotonic()
    check_output(output, space)
    rows_before = _count_lines(output)
    opened = _measure(
        model,
        space=space,
        output=output,
        stats=stats,
        engine=engine,
        where=where,
    )
    table = read_table(output)
    is_new = _count_lines(output) > rows_before
    content = _summary(table) | {"table": str(output), "seconds": round(monotonic() - start, 2)}
    if as_json:
        unseen = {} if opened is None else opened.unseen
        print_json(content | {"unseen": {corpus: list(names) for corpus, names in unseen.items()}})
        return
    _print(output, content, table, is_new=is_new)
    if opened is not None:
        note_unseen(opened)
    elif any("+" in name for name in content["schemes"]):
        note("  Without --stats, what rounding activations costs is not in the errors.")


def _print(output: Path, content: dict[str, Any], table: Table, *, is_new: bool) -> None:
    note(
        f"{output}: {content['rows']} rows, {content['groups']} fusion groups, "
        f"{len(content['schemes'])} schemes, {content['seconds']:.1f} s"
        + ("." if is_new else "; everything was there already.")
    )
    alike: dict[tuple[int, str], list[str]] = {}
    for name in sorted({r.scheme for r in table.rejections}):
        refused = [r.reason for r in table.rejections if r.scheme == name]
        reason = refused[0] if len(set(refused)) == 1 else f"e.g. {refused[0]}"
        alike.setdefault((len(refused), reason), []).append(name)
    for (count, reason), names in alike.items():
        note(f"  not offered to {count} fusion groups: {', '.join(names)}: {reason}")


def _measure(
    model: str,
    *,
    space: str,
    output: Path,
    stats: Path | None,
    engine: str | None,
    where: Where,
) -> Stats | None:
    from mofq.engines import cache_legality, legality
    from mofq.evidence.spaces import load_search_space
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.layers import find_layers

    loaded_space = load_search_space(space)
    checkpoint = open_checkpoint(model)
    layers = find_layers(checkpoint)
    check_engine(engine, layers)
    from mofq.evidence.calibration.stats import read_stats
    from mofq.evidence.measure.fill_table import measure

    if where.address is None:
        check_device(where.device)
    opened = None if stats is None else read_stats(stats)
    with _connected(where) as remotely, progress_bars() as bars:
        measure(
            checkpoint,
            layers,
            loaded_space,
            table_path=output,
            stats=opened,
            engine=engine,
            legality=None if engine is None else legality(engine),
            cache_legality=None if engine is None else cache_legality(engine),
            device=where.device,
            progress=bars.stage,
            tell=note,
            remotely=remotely,
        )
    return opened


@contextmanager
def _connected(where: Where) -> Iterator[Remotely | None]:
    """What measures on the cluster, while it is connected; None where there is none."""
    if where.address is None:
        yield None
        return
    from mofq.evidence.cluster import cluster
    from mofq.evidence.measure.on_workers import measure_remotely

    with cluster(where.address, tell=note):
        yield partial(measure_remotely, cpus=where.cpus)


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _summary(table: Table) -> dict[str, Any]:
    return {
        "sha256": table.sha256,
        "rows": len(table.rows),
        "groups": len(table.header.groups),
        "schemes": sorted({row.scheme for row in table.rows}),
        "units": sorted({row.unit for row in table.rows}),
        "rejections": len(table.rejections),
    }
