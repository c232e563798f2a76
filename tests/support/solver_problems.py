"""Problems for the solvers' tests, and the slow way to their optimum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from mofq.decision.solvers import (
    Budgets,
    LinearBudget,
    Option,
    Problem,
    ProblemGroup,
    build_problem,
)
from mofq.decision.solvers.budgets import budget_rows, max_kl_rows, offered
from mofq.decision.solvers.problem import FloatArray, IntArray, Objective

SCHEMES = (
    "int8.channel",
    "int4.g128",
    "int4.g32",
    "fp4_e2m1.g32",
    "fp8_e4m3.channel",
    "bf16",
)
BASE = ("int8.channel", "int4.g128")


def problem_of(
    groups: Sequence[Sequence[Option]], *, layers: Sequence[int] = (), **keys: object
) -> Problem:
    """A problem whose groups are called g0, g1, … and have one layer of 100 weights each."""
    counts = layers or [1] * len(groups)
    pairs = [
        (ProblemGroup(f"g{n}", tuple(f"g{n}.{i}" for i in range(count)), 100 * count), options)
        for n, (options, count) in enumerate(zip(groups, counts, strict=True))
    ]
    return build_problem(pairs, **keys)  # type: ignore[arg-type]


def option(scheme: str, size: int, *errors: float, **keys: object) -> Option:
    return Option(scheme, size, errors, **keys)  # type: ignore[arg-type]


def sampled(scheme: str, size: int, samples: Sequence[float], **keys: object) -> Option:
    """An option whose error and error bar come from its samples."""
    values = np.asarray(samples, dtype=np.float64)
    stderr = float(values.std(ddof=1) / math.sqrt(len(values)))
    return Option(
        scheme,
        size,
        (float(values.mean()),),
        stderrs=(stderr,),
        sample_errors=(tuple(samples),),
        **keys,  # type: ignore[arg-type]
    )


@st.composite
def small_problems(draw: st.DrawFn) -> Problem:
    """Up to five groups of up to five options, with ties and zeros, small or huge sizes."""
    corpora = draw(st.integers(1, 2))
    sizes = draw(st.sampled_from([st.integers(0, 12), st.integers(0, 10**10)]))
    errors = draw(st.sampled_from([st.integers(0, 8).map(float), st.floats(1e-9, 1e-2)]))
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        names = draw(st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=5, unique=True))
        groups.append(
            [
                Option(
                    name,
                    draw(sizes),
                    errors=tuple(draw(errors) for _ in range(corpora)),
                    stderrs=(0.0,) * corpora,
                )
                for name in names
            ]
        )
    objective: Objective = draw(st.sampled_from(["mean", "worst-corpus"]))
    layers = draw(st.lists(st.integers(1, 3), min_size=len(groups), max_size=len(groups)))
    names = tuple(f"corpus {n}" for n in range(corpora))
    return problem_of(
        groups, layers=layers, corpora=names, objective=objective, base=BASE, min_gain=0.0
    )


@st.composite
def some_budgets(draw: st.DrawFn, problem: Problem) -> Budgets:
    """Any of the budgets, most of them possible."""
    least = sum(int(problem.bytes_P[list(problem.options_of(g))].min()) for g in groups_of(problem))
    most = sum(int(problem.bytes_P[list(problem.options_of(g))].max()) for g in groups_of(problem))
    largest = float(problem.cost_PK.max()) * len(problem.groups)
    share = st.floats(0, 1)
    size = st.none() | st.integers(least, most)
    cost_P = np.array([draw(share) for _ in problem.schemes])
    seconds = draw(st.none() | share.map(lambda s: s * len(problem.groups)))
    if seconds is not None and draw(st.booleans()):  # used up to the last bit
        seconds = math.fsum(
            cost_P[draw(st.sampled_from(problem.options_of(g)))] for g in groups_of(problem)
        )
    linear = LinearBudget("max_time", "seconds", cost_P, seconds or 0.0)
    return Budgets(
        max_bytes=draw(size),
        max_bits=draw(st.none() | st.integers(least, most).map(lambda n: 8 * n / problem.weights)),
        max_kl=draw(st.none() | share.map(lambda s: s * largest)),
        max_finer=draw(st.none() | share) if problem.is_base_P.any() else None,
        linear=() if seconds is None else (linear,),
    )


def groups_of(problem: Problem) -> range:
    return range(len(problem.groups))


def all_choices(problem: Problem, budgets: Budgets) -> IntArray:
    """Every combination of options, one a row."""
    allowed_P = offered(problem, budgets)
    options = [[p for p in problem.options_of(g) if allowed_P[p]] for g in groups_of(problem)]
    grid = np.meshgrid(*options, indexing="ij")
    return np.stack([axis.ravel() for axis in grid], axis=1)


def exhaustive(problem: Problem, budgets: Budgets) -> tuple[float, ...] | None:
    """What the best combination reaches: its error, or its size and error; None: there is none."""
    rows = budget_rows(problem, budgets)
    if budgets.max_kl is not None:
        rows += max_kl_rows(problem, budgets.max_kl)
    choices = all_choices(problem, budgets)
    for row in rows:
        sums = row.cost_P[choices].sum(axis=1)
        near = np.abs(sums - row.limit) <= 1e-9 * (1 + abs(row.limit))
        fits = sums <= row.limit
        if row.cost_P.dtype != np.int64:
            fits[near] = [row.holds(choice) for choice in choices[near]]
        choices = choices[fits]
    if not len(choices):
        return None
    error: FloatArray = problem.cost_PK[choices].sum(axis=1).max(axis=1)
    if not budgets.minimises_bytes:
        return (float(error.min()),)
    size = problem.bytes_P[choices].sum(axis=1)
    return (float(size.min()), float(error[size == size.min()].min()))


#: Fusion groups of a decoder layer of the LLaMA3-70B shape: name -> weights, layers.
LLAMA3_70B = {
    "attn.qkv": (10240 * 8192, 3),
    "attn.o": (8192 * 8192, 1),
    "mlp.gate_up": (57344 * 8192, 2),
    "mlp.down": (28672 * 8192, 1),
}


def sampled_problem(
    seed: int, *, decoder_layers: int = 4, samples: int = 32, noise: float = 1.0
) -> Problem:
    """Options whose samples scatter around a true error, as a table in nats has them."""
    rng = np.random.default_rng(seed)
    bits = {"int8.channel": 8.01, "fp8_e4m3.channel": 8.01, "int4.g128": 4.125, "int4.g32": 4.5}
    groups = []
    for decoder_layer in range(decoder_layers):
        for name, (weights, count) in LLAMA3_70B.items():
            scale = weights / 1e9 * math.exp(rng.normal(0, 1))
            options = [option("bf16", 2 * weights, 0.0)]
            for scheme, width in bits.items():
                true = scale * 4.0**-width * math.exp(rng.normal(0, 0.3))
                draws = true * rng.gamma(1 / noise**2, noise**2, size=samples)
                options.append(sampled(scheme, int(weights * width / 8), draws.tolist()))
            members = tuple(f"{decoder_layer}.{name}.{i}" for i in range(count))
            groups.append(
                (ProblemGroup(f"layers.{decoder_layer}.{name}", members, weights), options)
            )
    return build_problem(groups, base=BASE)
