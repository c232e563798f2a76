"""What `mofq frontier` shows: its points, smallest first."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from mofq.api.formatting import short_bytes, with_interval
from mofq.cli.show.terminal import note, print_table

if TYPE_CHECKING:
    from mofq.api import FrontierPoint, FrontierResult

#: Points that a person is shown; ``--json`` has all.
_SHOWN = 24
#: Where the error is no sum over groups.
_NO_BOUND = (
    "What several groups do together (few bits make weights smaller, errors move tokens of a "
    "mixture to other experts) is no "
    "sum, so that no bound of it is known."
)
#: Where predictions were not compared with measurements.
_OUT_OF_RANGE = (
    "* is out of the range in which predictions were compared with measurements, {:g} nats per "
    "token: such a recipe may cost much more. Measure it with `mofq validate`."
)
#: Where a point does not meet its bound.
_GAP = (
    "The gap is no doubt about a point: each has the least error of its size. The bound is that of "
    "a relaxation, which may give a layer part of one scheme and part of another; a recipe whose "
    "size lies between two steps of the frontier cannot reach it."
)


def show_frontier(result: FrontierResult) -> None:
    """Some of the points, evenly spaced, and the search that takes one."""
    from mofq.decision import KL_UNIT
    from mofq.decision.model_error import model_error
    from mofq.decision.request import request_flags

    problem, count = result.problem, len(result)
    shown = list(range(count))
    if count > _SHOWN:
        shown = [round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]
    points = [result.point(k) for k in shown]
    columns = ["bits/weight"]
    columns += ["KV bits"] if problem.cached else []
    columns.append("checkpoint")
    columns += [f"and {problem.kv_tokens:,} tokens"] if problem.kv_tokens else []
    gap, unbounded = result.frontier.gap, result.frontier.unbounded
    proof = "no bound" if gap is None else f"largest gap to the bound {100 * gap:.3g} %"
    if gap is not None and unbounded:
        proof += f"; of {unbounded} points none is known"
    quantity = "KL, predicted, 95 % [nats/token]" if problem.unit == KL_UNIT else problem.unit
    print_table(
        f"{len(shown)} of {count} points; {proof}",
        [*columns, quantity],
        [_row(point) for point in points],
    )
    if any(point.is_out_of_range for point in points):
        note(_OUT_OF_RANGE.format(model_error().largest))
    if gap:
        note(_GAP)
    if unbounded:
        note(_NO_BOUND)
    if count > _SHOWN:
        note(f"`--json` has all {count} points.")
    budget = "--max-size SIZE" if problem.kv_tokens else "--max-bits BITS"
    flags = request_flags(result.request)
    note(f"Take one with `mofq search {result.source} {budget} --ties off{flags} -o recipe.yaml`.")


def _row(point: FrontierPoint) -> list[str]:
    # Rounded up, so that a search with what is shown finds the point.
    row = [f"{math.ceil(Fraction(point.bits_per_weight) * 10_000) / 10_000:.4f}"]
    if point.kv_bits is not None:
        row.append(f"{point.kv_bits:.4f}")
    row.append(short_bytes(point.checkpoint_bytes))
    if point.size_bytes is not None:
        row.append(short_bytes(point.size_bytes))
    if point.kl_nats_per_token is not None:
        ends = point.kl_low, point.kl_high
        shown = with_interval(point.kl_nats_per_token, *ends, stderr=point.kl_stderr)
        return [*row, f"{shown} *" if point.is_out_of_range else shown]
    return [*row, f"{point.error:.4g}"]
