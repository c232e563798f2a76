"""What moving scales gains fitted codes, chosen by errors to nearest and by those of fitted codes.

    python -m scripts.bench.moved_scales MODEL --stats stats --scheme int4.g64 --method awq

Scales move at all sites of some decoder layers, the model's statistics follow, and their fusion
groups are measured under the scheme's fitted twin. Printed is what each of them is predicted to
cost [nats per token] as it is, and with scales that were chosen in either way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mofq.delivery.rewriting.choose_scales import choose_best
from mofq.delivery.rewriting.moved_stats import write_moved_stats
from mofq.delivery.rewriting.scales import METHODS
from mofq.delivery.rewriting.sites import find_sites
from mofq.delivery.rewriting.write import write_rewritten
from mofq.evidence.calibration.stats import Stats, read_stats
from mofq.evidence.fitted_space import fitted_twin
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.spaces import parse_search_space
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import find_layers
from mofq.numbers.schemes import Scheme, parse_scheme
from scripts.shared.command import print_markdown, script_parser


def errors(
    checkpoint: Checkpoint, stats: Stats, scheme: Scheme, groups: frozenset[str], path: Path
) -> dict[str, float]:
    """Fusion group -> what it costs under a scheme [nats per token]."""
    space = parse_search_space(
        f"version: 1\nschemes: [{scheme.name}]\noffer_unquantized: false\n", name="one", where="one"
    )
    measure(
        checkpoint,
        find_layers(checkpoint),
        space,
        table_path=path,
        stats=stats,
        wanted=lambda group, name: group in groups and name == scheme.name,
    )
    rows = read_table(path).rows
    return {row.group: row.error for row in rows if row.scheme == scheme.name}


def main(given: Sequence[str] | None = None) -> int:
    """Choose, move and measure, and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--stats", type=Path, required=True, help="of the model")
    parser.add_argument("--scheme", required=True, help="rounded to nearest, such as int4.g64")
    parser.add_argument("--method", action="append", choices=METHODS, help="all by default")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 9, 18, 27])
    options = parser.parse_args(given)
    scheme = parse_scheme(options.scheme)
    twin = fitted_twin(scheme)
    if twin is None:
        parser.error(f"{scheme.name} has no fitted twin.")
    checkpoint, stats = open_checkpoint(options.model), read_stats(options.stats)
    layers = find_layers(checkpoint)
    beginnings = tuple(f"layers.{number}." for number in options.layers)
    groups = frozenset(one.name for one in layers.groups if one.name.startswith(beginnings))
    sites = [one for one in find_sites(checkpoint, layers) if one.group in groups]
    methods = tuple(options.method or METHODS)
    with TemporaryDirectory(dir=options.stats.parent) as work:
        found = [errors(checkpoint, stats, twin, groups, Path(work) / "table.jsonl")]
        for name, fitted in (("to nearest", ()), ("fitted", (scheme.name,))):
            choices = [
                choose_best(checkpoint, one, [scheme], stats=stats, methods=methods, fitted=fitted)
                for one in sites
            ]
            moved = sum(one.strength is not None for one in choices)
            before = math.fsum(one.nats_before for one in choices)
            after = math.fsum(one.nats_after for one in choices)
            sums = f"{before:.6f} -> {after:.6f}"
            said = f"{name}: scales move at {moved} of {len(sites)} sites, predicted {sums}"
            print(said, file=sys.stderr, flush=True)
            folder = Path(work) / name
            write_rewritten(checkpoint, choices, folder / "m", method="by site", stats=stats)
            rewritten = open_checkpoint(str(folder / "m"))
            write_moved_stats(stats, rewritten, choices, folder / "stats")
            table = folder / "table.jsonl"
            found.append(errors(rewritten, read_stats(folder / "stats"), twin, groups, table))
    total = {name: [one[name] for one in found] for name in sorted(found[0])}
    total["sum"] = [math.fsum(one.values()) for one in found]
    rows = [
        [
            name,
            *(f"{value:.6f}" for value in every),
            *(f"{value / every[0]:.3f}" for value in every[1:]),
        ]
        for name, every in total.items()
    ]
    header = [twin.name, "as it is", "to nearest", "fitted", "to nearest", "fitted"]
    print_markdown(header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
