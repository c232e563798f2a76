"""What `mofq frontier` shows: points of the curve, smallest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofq.api.figures import short_bytes
from mofq.cli.show.terminal import note, print_table

if TYPE_CHECKING:
    from mofq.api import FrontierPoint, FrontierResult

#: Points that a person is shown; ``--json`` has all.
_SHOWN = 24


def show_frontier(result: FrontierResult) -> None:
    """Some of the points, evenly spaced, and the search that takes one."""
    from mofq.decision.request import request_flags

    problem, count = result.problem, len(result)
    shown = list(range(count))
    if count > _SHOWN:
        shown = [round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]
    columns = ["bits/weight"]
    columns += ["KV bits"] if problem.cached else []
    columns.append("checkpoint")
    columns += [f"and {problem.kv_tokens:,} tokens"] if problem.kv_tokens else []
    gap = 100 * result.frontier.gap
    print_table(
        f"{len(shown)} of {count} points; largest gap to the bound {gap:.3g} %",
        [*columns, problem.unit, "stderr"],
        [_row(result.point(k)) for k in shown],
    )
    if count > _SHOWN:
        note(f"`--json` has all {count} points.")
    budget = "--max-size SIZE" if problem.kv_tokens else "--max-bits BITS"
    flags = request_flags(result.request)
    note(f"Take one with `mofq search {result.source} {budget}{flags} -o recipe.yaml`.")


def _row(point: FrontierPoint) -> list[str]:
    row = [f"{point.bits_per_weight:.4f}"]
    if point.kv_bits is not None:
        row.append(f"{point.kv_bits:.4f}")
    row.append(short_bytes(point.checkpoint_bytes))
    if point.size_bytes is not None:
        row.append(short_bytes(point.size_bytes))
    stderr = point.stderr
    return [*row, f"{point.error:.4g}", "" if stderr is None else f"± {stderr:.1g}"]
