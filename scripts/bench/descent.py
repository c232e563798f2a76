"""What `~descent` gains over `~gptq`, by how often it passes all columns: predicted nats and time.

    python scripts/bench/descent.py MODEL --stats STATS --work FOLDER --scheme int4.g32@nats

Nought passes are the codes of `~gptq`. Nats are the sum of the table's cross-fitted rows, over all
corpora; the time is that of measuring them, on the threads of the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import process_time

from mofq.api import measure
from mofq.evidence.table import read_table
from mofq.numbers.quantize import descent
from scripts.shared.command import model_parser, parse_into_work, print_markdown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the scheme under each number of passes."""
    parser = model_parser(__doc__, ("--stats", "folder of `mofq calibrate`"))
    parser.add_argument("--scheme", default="int4.g32@nats", help="without a rounding")
    parser.add_argument("--sweeps", type=int, nargs="+", default=[0, 1, 3, 6])
    options = parse_into_work(parser, arguments)
    rows = []
    for sweeps in options.sweeps:
        descent.SWEEPS = sweeps
        name = f"{options.scheme}~{'descent' if sweeps else 'gptq'}"
        before = process_time()
        nats = measured(options.model, name, stats=options.stats, folder=options.work / str(sweeps))
        rows.append([f"`{name}`", str(sweeps), f"{nats:.5f}", f"{process_time() - before:.0f} s"])
    print_markdown(["", "passes", "predicted KL [nats/token]", "processor time"], rows)


def measured(model: str, scheme: str, *, stats: str, folder: Path) -> float:
    """The sum of the rows of a scheme in a table of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    space = folder / "space.yaml"
    space.write_text(f"version: 1\ndescription: one\nschemes:\n  - {scheme}\n", "utf-8")
    table = read_table(measure(model, space, folder / "table.jsonl", stats=stats).output)
    assert table.header.stats is not None
    return sum(
        row.error
        for corpus in table.header.stats.corpora
        for rows in table.rows_of("kl_nats_per_token", corpus).values()
        for row in rows
        if row.scheme == scheme
    )


if __name__ == "__main__":
    main()
