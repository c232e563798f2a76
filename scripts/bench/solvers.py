"""Times of the solvers on a table of LLaMA3-70B's shape: 320 fusion groups, 12 schemes.

The errors are drawn at random, as spread out as measured ones are; the sizes are
those of the schemes. Run it with ``python scripts/bench/solvers.py``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from mofq.decision import (
    Budgets,
    LinearBudget,
    Objective,
    Option,
    Problem,
    ProblemGroup,
    build_problem,
    choose,
    solve_exact,
    solve_frontier,
    solve_greedy,
)
from mofq.evidence.standard_error import standard_errors

#: Fusion groups of a decoder layer: name, weights, linear layers.
GROUPS = (
    ("attn.qkv", 10240 * 8192, 3),
    ("attn.o", 8192 * 8192, 1),
    ("mlp.gate_up", 57344 * 8192, 2),
    ("mlp.down", 28672 * 8192, 1),
)
DECODER_LAYERS = 80
#: Scheme -> true bits per weight.
SCHEMES = {
    "int4.g128": 4.125,
    "int4.g64": 4.25,
    "int4.g32": 4.5,
    "fp4_e2m1.g32": 4.5,
    "nvfp4": 4.5,
    "int5.channel": 5.002,
    "int6.channel": 6.002,
    "fp6_e2m3.g32": 6.25,
    "int8.channel": 8.002,
    "fp8_e4m3.channel": 8.002,
    "int8.g128": 8.125,
    "bf16": 16.0,
}

_Result = TypeVar("_Result")


def make_problem(seed: int, *, samples: int, corpora: int = 1) -> Problem:
    """A problem of the shape, its samples gamma-distributed around log-normal errors."""
    rng = np.random.default_rng(seed)
    groups = []
    for decoder_layer in range(DECODER_LAYERS):
        for name, weights, count in GROUPS:
            scale = weights / 1e10 * math.exp(rng.normal(0, 1))
            options = []
            for scheme, bits in SCHEMES.items():
                true = 0.0 if bits == 16 else scale * 4.0**-bits * math.exp(rng.normal(0, 0.4))
                drawn = true * rng.gamma(2.0, 0.5, size=(corpora, samples))
                options.append(
                    Option(
                        scheme,
                        int(weights * bits / 8),
                        errors=tuple(drawn.mean(axis=1).tolist()),
                        stderrs=tuple(standard_errors(drawn).tolist()),
                        sample_errors=tuple(row.tolist() for row in drawn),
                    )
                )
            members = tuple(f"{decoder_layer}.{name}.{n}" for n in range(count))
            group = ProblemGroup(f"layers.{decoder_layer}.{name}", members, weights)
            groups.append((group, options))
    objective: Objective = "worst-corpus" if corpora > 1 else "mean"
    names = tuple(f"corpus {n}" for n in range(corpora))
    return build_problem(groups, corpora=names, objective=objective, base=("int8.channel",))


def timed(call: Callable[[], _Result]) -> tuple[float, _Result]:
    """Seconds and result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def bench(seed: int, samples: int) -> Table:
    """One row for each task: seconds and the distance from the relaxation's bound."""
    problem = make_problem(seed, samples=samples)
    shown = Table("task", "seconds", "gap", "note", title=f"seed {seed}")
    six_bits_F = solve_exact(problem, Budgets(max_bits=6.0)).choice_F
    noise_P = np.random.default_rng(seed).uniform(0.5, 1.5, len(problem.schemes))
    seconds_P = problem.bytes_P / 3e12 * noise_P
    limit = 0.95 * float(seconds_P[six_bits_F].sum())
    slow = (LinearBudget("max_time", "seconds", seconds_P, limit),)
    for what, budgets in {
        "exact, 4.3 bits": Budgets(max_bits=4.3),
        "exact, 5 bits": Budgets(max_bits=5.0),
        "exact, 6 bits": Budgets(max_bits=6.0),
        "exact, 9 bits": Budgets(max_bits=9.0),
        "exact, 3% finer": Budgets(max_finer=0.03),
        "exact, 9 bits and 10% finer": Budgets(max_bits=9.0, max_finer=0.1),
        "exact, 6 bits and a time": Budgets(max_bits=6.0, linear=slow),
    }.items():
        seconds, found = timed(lambda budgets=budgets: solve_exact(problem, budgets))  # type: ignore[misc]
        error = problem.error_of(found.choice_F)
        shown.add_row(what, f"{seconds:.2f}", f"{1 - found.bound / error:.1e}", f"{error:.4g} nats")
    seconds, _ = timed(lambda: solve_greedy(problem, Budgets(max_bits=5.0)))
    shown.add_row("greedy, 5 bits", f"{seconds:.2f}", "", "")
    seconds, curve = timed(lambda: solve_frontier(problem))
    shown.add_row("frontier", f"{seconds:.2f}", f"{curve.gap:.1e}", f"{len(curve.bytes_K)} points")
    seconds, curve = timed(lambda: solve_frontier(problem, sizes=200))
    points = f"{len(curve.bytes_K)} points"
    shown.add_row("frontier, 200 sizes exact", f"{seconds:.2f}", f"{curve.gap:.1e}", points)
    seconds, chosen = timed(lambda: choose(problem, Budgets(max_bits=5.0)))
    moved = chosen.ties.moved_layers if chosen.ties else 0
    note = f"{moved} layers moved"
    shown.add_row("exact, ties and cross-fitting, 5 bits", f"{seconds:.2f}", "", note)
    kl = 1.2 * chosen.reported.upper
    seconds, _ = timed(lambda: choose(problem, Budgets(max_kl=kl)))
    shown.add_row(f"smallest within {kl:.3g} nats", f"{seconds:.2f}", "", "")
    two = make_problem(seed, samples=samples, corpora=2)
    seconds, _ = timed(lambda: solve_exact(two, Budgets(max_bits=5.0)))
    shown.add_row("exact, worst of two corpora, 5 bits", f"{seconds:.2f}", "", "")
    return shown


def main() -> None:
    """Print a table for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    seconds, _ = timed(lambda: __import__("scipy.optimize"))
    print(f"importing scipy.optimize: {seconds:.2f} s")
    for seed in range(arguments.seeds):
        Console().print(bench(seed, arguments.samples))


if __name__ == "__main__":
    main()
