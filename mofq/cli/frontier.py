"""``mofq frontier``: accuracy against size, from one end to the other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Any

from mofq.cli.curve import CurveOptions, curve_request
from mofq.cli.tables import open_for_reading
from mofq.cli.terminal import note, print_json, print_table, short_bytes
from mofq.decision.request import request_flags, request_problem
from mofq.decision.result import size_figures
from mofq.decision.solvers import Frontier, Problem, predict, solve_frontier

#: Points that a person is shown; ``--json`` has all.
_SHOWN = 24


def run_frontier(table: Path, options: CurveOptions, *, sizes: int | None, as_json: bool) -> None:
    """Print the non-dominated recipes of a table, smallest first."""
    request = curve_request(options)
    problem = request_problem(open_for_reading(table), request)
    start = monotonic()
    frontier = solve_frontier(problem, request.budgets, sizes=sizes)
    seconds = monotonic() - start
    if as_json:
        count = len(frontier.bytes_K)
        print_json(
            {
                "unit": problem.unit,
                "axis": "size_bytes" if problem.kv_tokens else "bits_per_weight",
                "gap": frontier.gap,
                "points": [_point(problem, frontier, k) for k in range(count)],
                "seconds": round(seconds, 3),
            }
        )
        return
    shown = _evenly_spaced(len(frontier.bytes_K), _SHOWN)
    points = [_point(problem, frontier, k) for k in shown]
    title = f"{len(shown)} of {len(frontier.bytes_K)} points; largest gap to the bound "
    title += f"{100 * frontier.gap:.3g} %"
    columns = [*_size_columns(problem), problem.unit, "stderr"]
    print_table(title, columns, [_row(problem, point) for point in points])
    budget = "--max-size SIZE" if problem.kv_tokens else "--max-bits BITS"
    note(f"Take one with `mofq search {table} {budget}{request_flags(request)} -o recipe.yaml`.")


def _size_columns(problem: Problem) -> list[str]:
    """What is said of a recipe's size."""
    columns = ["bits/weight"]
    if problem.cached:
        columns.append("KV bits")
    columns.append("checkpoint")
    if problem.kv_tokens:
        columns.append(f"and {problem.kv_tokens:,} tokens")
    return columns


def _row(problem: Problem, point: dict[str, Any]) -> list[str]:
    row = [f"{point['bits_per_weight']:.4f}"]
    if problem.cached:
        row.append(f"{point['kv_bits']:.4f}")
    row.append(short_bytes(point["checkpoint_bytes"]))
    if problem.kv_tokens:
        row.append(short_bytes(point["size_bytes"]))
    stderr = point["stderr"]
    return [*row, f"{point['error']:.4g}", "" if stderr is None else f"± {stderr:.1g}"]


def _point(problem: Problem, frontier: Frontier, k: int) -> dict[str, Any]:
    choice_F = frontier.choice_KF[k]
    figures = size_figures(problem, choice_F)
    stderr = None
    if problem.sample_errors is not None:
        stderr = predict(problem, choice_F).stderr
    point: dict[str, Any] = {
        "bits_per_weight": figures["bits_per_weight"],
        "bytes": figures["bytes"],
        "checkpoint_bytes": figures["checkpoint_bytes"],
        "error": float(frontier.error_K[k]),
        "stderr": stderr,
        "bound": float(frontier.bound_K[k]),
    }
    if problem.cached:
        schemes = problem.schemes_of(choice_F)
        formats = Counter(schemes[group.name] for group in problem.groups if group.cached)
        point["kv_bits"] = figures["kv_bits"]
        point["kv_bytes_per_token"] = figures["kv_bytes_per_token"]
        point["kv_cache"] = dict(formats)
    if problem.kv_tokens:
        point["size_bytes"] = problem.size_of(choice_F) + problem.other_bytes
    return point


def _evenly_spaced(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
