"""``mofq frontier``: accuracy against size, from one end to the other."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Any

from mofq.cli.tables import open_for_reading
from mofq.cli.terminal import note, print_json, print_table, short_bytes
from mofq.solvers import Frontier, Problem, predict, problem_from_table, solve_frontier

#: Points that a person is shown; ``--json`` has all.
_SHOWN = 24


def run_frontier(table: Path, *, unit: str | None, sizes: int | None, as_json: bool) -> None:
    """Print the non-dominated recipes of a table, smallest first."""
    problem = problem_from_table(open_for_reading(table), unit=unit)
    start = monotonic()
    frontier = solve_frontier(problem, sizes=sizes)
    seconds = monotonic() - start
    if as_json:
        count = len(frontier.bytes_K)
        print_json(
            {
                "unit": problem.unit,
                "gap": frontier.gap,
                "points": [_point(problem, frontier, k) for k in range(count)],
                "seconds": round(seconds, 3),
            }
        )
        return
    shown = _evenly_spaced(len(frontier.bytes_K), _SHOWN)
    points = [_point(problem, frontier, k) for k in shown]
    rows = [
        [
            f"{point['bits_per_weight']:.4f}",
            short_bytes(point["checkpoint_bytes"]),
            f"{point['error']:.4g}",
            "" if point["stderr"] is None else f"± {point['stderr']:.1g}",
        ]
        for point in points
    ]
    title = f"{len(shown)} of {len(frontier.bytes_K)} points; largest gap to the bound "
    title += f"{100 * frontier.gap:.3g} %"
    print_table(title, ["bits/weight", "checkpoint", problem.unit, "stderr"], rows)
    note(f"Take one with `mofq search {table} --max-bits BITS -o recipe.yaml`.")


def _point(problem: Problem, frontier: Frontier, k: int) -> dict[str, Any]:
    choice_F = frontier.choice_KF[k]
    size = int(frontier.bytes_K[k])
    stderr = None
    if problem.sample_errors is not None:
        stderr = predict(problem, choice_F).additive.stderr
    return {
        "bits_per_weight": 8 * size / problem.weights,
        "bytes": size,
        "checkpoint_bytes": size + problem.other_bytes,
        "error": float(frontier.error_K[k]),
        "stderr": stderr,
        "bound": float(frontier.bound_K[k]),
    }


def _evenly_spaced(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
