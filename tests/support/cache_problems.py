"""Problems with layers and KV caches, for the solvers' tests."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from mofq.decision.solvers import Option, Problem, ProblemGroup, build_problem
from mofq.decision.solvers.problem import IntArray

#: Numbers that the cache of each layer keeps of a token.
NUMBERS = 64
WEIGHTS = 400
#: Format of the cache -> its bits of a token, bytes of static scales, share of the layer's error.
FORMATS = {
    "kv:fp8_e4m3.tensor": (8 * NUMBERS, 8, 0.10),
    "kv:int8.token_head": (9 * NUMBERS, 0, 0.02),
    "kv:fp8_e4m3.token_head": (9 * NUMBERS, 0, 0.09),
    "kv:int4.token_head": (5 * NUMBERS, 0, 1.0),
}
#: Scheme of a layer -> bytes, share of its error.
SCHEMES = {"int8.channel": (400, 0.05), "fp8_e4m3.channel": (400, 0.04), "int4.g32": (225, 1.0)}


def cached_problem(
    seed: int = 0,
    *,
    layers: int = 3,
    kv_tokens: int = 0,
    one_format: bool = False,
    corpora: int = 1,
    samples: int = 8,
) -> Problem:
    """Layers and as many caches, whose errors scatter around a share of one of their own."""
    rng = np.random.default_rng(seed)
    groups: list[tuple[ProblemGroup, list[Option]]] = []
    for n in range(layers):
        name = f"layers.{n}.mlp.down"
        group = ProblemGroup(name, (f"{name}_proj",), WEIGHTS)
        options = [Option("bf16", 2 * WEIGHTS, (0.0,) * corpora)]
        error = 0.01 * math.exp(rng.normal())
        for scheme, (size, share) in SCHEMES.items():
            options.append(_drawn(rng, scheme, error * share, corpora, samples, size=size))
        groups.append((group, options))
    for n in range(layers):
        name = f"layers.{n}.attn.kv_cache"
        group = ProblemGroup(name, (name,), weights=0, counted=False, cached=NUMBERS)
        options = [Option("bf16", 0, (0.0,) * corpora, cache_bits=16 * NUMBERS)]
        error = 0.01 * math.exp(rng.normal())
        for scheme, (bits, size, share) in FORMATS.items():
            options.append(
                _drawn(rng, scheme, error * share, corpora, samples, size=size, cache_bits=bits)
            )
        groups.append((group, options))
    return build_problem(
        groups,
        corpora=tuple(f"corpus {c}" for c in range(corpora)),
        objective="worst-corpus" if corpora > 1 else "mean",
        other_bytes=1000,
        kv_tokens=kv_tokens,
        one_format=one_format,
    )


def _drawn(
    rng: np.random.Generator,
    scheme: str,
    error: float,
    corpora: int,
    samples: int,
    **sizes: int,
) -> Option:
    drawn = [error * rng.gamma(4.0, 0.25, size=samples) for _ in range(corpora)]
    return Option(
        scheme,
        sizes.pop("size"),
        tuple(float(one.mean()) for one in drawn),
        tuple(float(one.std(ddof=1) / math.sqrt(samples)) for one in drawn),
        tuple(one.tolist() for one in drawn),
        cache_bits=sizes.get("cache_bits", 0),
    )


def formats_of(problem: Problem, choice_F: IntArray) -> set[str]:
    """The quantized formats of a choice's caches."""
    schemes = problem.schemes_of(choice_F)
    return {schemes[group.name] for group in problem.groups if group.cached} - {"bf16"}


def legal_choices(problem: Problem, *, one_format: bool) -> IntArray:
    """Every combination that may be had, one a row, by looking at all of them."""
    options = [problem.options_of(group) for group in range(len(problem.groups))]
    choices = np.array(list(product(*options)), dtype=np.int64)
    if not one_format:
        return choices
    return np.array([one for one in choices if len(formats_of(problem, one)) <= 1])
