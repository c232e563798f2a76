"""Recipes from 2 to 8 bits, and what they measure. A part of the bench scripts.

Recipes are written down before any is measured; each measurement is added to a file as it is
known, and is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mofq.decision import Budgets, Problem, Request, choose, request_problem
from mofq.decision.make_recipe import recipe_from_table
from mofq.decision.prediction import estimate
from mofq.decision.problem import IntArray
from mofq.decision.uniform import uniform_choice
from mofq.delivery.validation.measured_kl import MeasuredKl
from mofq.evidence.corpora import load_text
from mofq.evidence.table import Table, read_table
from mofq.exceptions import BudgetError, TableError
from mofq.numbers.schemes import parse_scheme
from scripts.shared.command import measured_table

_MEASURED = "measured.jsonl"
SPACE = Path(__file__).with_name("interval.yaml")

#: Fusion group, or cache -> scheme.
Schemes = Mapping[str, str]

_WEIGHT_BITS = (2.55, 2.8, 3.2, 3.6, 4.0, 4.3, 4.6, 5.0, 6.0, 7.0)
_BOTH_BITS = (4.3, 4.6, 5.0, 6.0, 7.0)
_KV_BITS = (5.0, 7.0, 10.0)
_FINE_BITS = (4.3, 4.7, 5.5)
_RANDOM = 4


@dataclass(frozen=True, slots=True)
class Measurement:
    """A recipe's KL on a text [nats per token]."""

    windows: tuple[float, ...]

    @property
    def kl(self) -> float:
        """Mean over windows."""
        return estimate(self.windows).value

    @property
    def stderr(self) -> float:
        """Over windows."""
        return estimate(self.windows).stderr or 0.0


def prepared_table(options: argparse.Namespace) -> Table:
    """Calibrate and measure the space, unless that was done."""
    more = ("--sequence-length", options.sequence_length, "--sequences", options.sequences)
    more = (*more, "--seed", options.seed, "--kv-cache")
    return read_table(measured_table(options, options.space, "text", *more))


def whole_problem(table: Table) -> Problem:
    """All that was measured, the cache included where the space has formats of it."""
    return request_problem(table, Request(kv_cache=bool(table.caches)))


def restricted(table: Table, is_wanted: Callable[[str], bool]) -> Problem:
    """Layers alone, under some of the schemes."""
    return request_problem(table, is_legal=lambda _group, scheme: is_wanted(scheme))


def searched_recipes(table: Table, *, path: Path, seed: int) -> dict[str, Schemes]:
    """Uniform, searched and random recipes; those that the file has, where there is one."""
    if path.exists():
        return dict(json.loads(path.read_text("utf-8")))
    found: dict[str, Schemes] = {}
    for label, schemes in _recipes(table, seed):
        if schemes not in found.values():
            found[label] = schemes
    # Spread, so that a part of them is of all kinds too.
    order = sorted(found, key=lambda label: hashlib.sha256(label.encode()).hexdigest())
    path.write_text(json.dumps({label: found[label] for label in order}, indent=1))
    return {label: found[label] for label in order}


def single_rows(problem: Problem, count: int) -> Iterator[tuple[str, IntArray]]:
    """So many rows of all groups and schemes, drawn at random: one group's, and no other's."""
    unquantized_F = problem.choice_of({group.name: "bf16" for group in problem.groups})
    rows = [p for p in range(len(problem.schemes)) if problem.schemes[p] != "bf16"]
    for p in random.Random(0).sample(rows, min(count, len(rows))):
        choice_F = unquantized_F.copy()
        choice_F[problem.group_P[p]] = p
        yield f"{problem.groups[problem.group_P[p]].name} {problem.schemes[p]}", choice_F


def _recipes(table: Table, seed: int) -> Iterator[tuple[str, Schemes]]:
    problem = whole_problem(table)
    caches = dict.fromkeys(problem.schemes[p] for p in _cache_options(problem))
    names = [name for name in dict.fromkeys(problem.schemes) if name not in caches]
    for name in names:
        yield from _uniform(problem, name, "bf16")
    for cache in caches:
        yield from _uniform(problem, "bf16", cache)
        yield from _uniform(problem, "int8.channel+int8.token", cache)
    yield from _uniform(problem, "int4.g32@mse", "kv:int4.token_head.s-bf16")
    kinds: tuple[tuple[str, Callable[[str], bool], Sequence[float]], ...] = (
        ("weights", lambda scheme: not _rounds_inputs(scheme), _WEIGHT_BITS),
        ("inputs too", _rounds_inputs, _BOTH_BITS),
        ("4 bits and more", lambda scheme: weight_bits(scheme) >= 4, _FINE_BITS),
    )
    for kind, is_wanted, sizes in kinds:
        try:
            part = restricted(table, is_wanted)
        except TableError:  # the space has none of the kind
            continue
        for bits in sizes:
            yield from _searched(f"{kind}, {bits} bits", part, Budgets(max_bits=bits))
    for bits in _KV_BITS:
        budgets = Budgets(max_bits=5.0, max_kv_bits=bits)
        yield from _searched(f"everything, 5 bits, cache {bits} bits", problem, budgets)
    for number in range(_RANDOM):
        rng = random.Random(f"{seed}/{number}")
        most = 2 + number  # the coarsest weights that it has
        choice = [
            rng.choice(
                [p for p in problem.options_of(f) if weight_bits(problem.schemes[p]) >= most]
            )
            for f in range(len(problem.groups))
        ]
        yield f"random of {most} bits and more", problem.schemes_of(np.array(choice))


def _cache_options(problem: Problem) -> list[int]:
    return [
        p
        for f, group in enumerate(problem.groups)
        if group.cached
        for p in problem.options_of(f)
        if problem.schemes[p] != "bf16"
    ]


def _rounds_inputs(scheme: str) -> bool:
    return scheme != "bf16" and parse_scheme(scheme).activation is not None


def weight_bits(scheme: str) -> int:
    """Of the elements of a scheme's weights; 16 where they are left as they are."""
    if scheme == "bf16" or scheme.startswith("kv:"):
        return 16
    weight = parse_scheme(scheme).weight
    return 16 if weight is None else weight.element.bits


def _uniform(problem: Problem, scheme: str, cache: str) -> Iterator[tuple[str, Schemes]]:
    choice_F = uniform_choice(problem, scheme, cache=cache)
    if choice_F is not None and (scheme, cache) != ("bf16", "bf16"):
        label = scheme if cache == "bf16" else f"{scheme} {cache}"
        yield f"uniform {label}", problem.schemes_of(choice_F)


def _searched(label: str, problem: Problem, budgets: Budgets) -> Iterator[tuple[str, Schemes]]:
    try:
        yield label, problem.schemes_of(choose(problem, budgets).choice_F)
    except BudgetError:
        return


@dataclass(frozen=True, slots=True)
class MeasuredText:
    """A model and a text, and what recipes measured on it, kept in a file."""

    options: argparse.Namespace
    table: Table
    known: dict[str, tuple[float, ...]]  #: grows
    objective: list[MeasuredKl]  #: one, from the first recipe that is not known on

    def measure(self, label: str, schemes: Schemes) -> Measurement:
        """A recipe's KL; measured where the file does not have it."""
        options, header = self.options, self.table.header
        sha256 = load_text(options.text).sha256
        base = [header.index_sha256, sha256, options.tokens, options.sequence_length]
        chosen = sorted((name, one) for name, one in schemes.items() if one != "bf16")
        digest = hashlib.sha256(json.dumps([*base, chosen]).encode())
        key = digest.hexdigest()[:24]
        if key not in self.known:
            if not self.objective:
                self.objective.append(_objective(options))
            recipe = recipe_from_table(self.table, schemes, made_by={}, budget={})
            self.known[key] = tuple(self.objective[0].evaluate(recipe))
            with (options.work / _MEASURED).open("a", encoding="utf-8") as file:
                print(json.dumps([key, label, self.known[key]]), file=file)
            print(label, file=sys.stderr, flush=True)
        return Measurement(self.known[key])


@contextmanager
def measured_text(options: argparse.Namespace, table: Table) -> Iterator[MeasuredText]:
    """What was measured before; the model is loaded where something is missing."""
    path, objective = options.work / _MEASURED, list[MeasuredKl]()
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    known = {key: tuple(windows) for key, _, windows in map(json.loads, lines)}
    try:
        yield MeasuredText(options, table, known, objective)
    finally:
        for one in objective:
            one.close()


def _objective(options: argparse.Namespace) -> MeasuredKl:
    return MeasuredKl(
        str(options.model),
        load_text(options.text),
        tokens=options.tokens,
        sequence_length=options.sequence_length,
        stats=options.work / "stats",
    )
