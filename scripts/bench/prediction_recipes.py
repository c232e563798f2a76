"""The quantized versions of a model that predictions are tested on. A part of the bench scripts."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from mofq.decision import Budgets, Estimate, Problem, choose, predict, request_problem, usage
from mofq.decision.uniform import uniform_choice
from mofq.evidence.spaces import Offer
from mofq.evidence.table import Table
from mofq.numbers.schemes import parse_scheme
from scripts.shared.kl_truth import Version

#: Weights, activations, both; weights are taken twice as often, having most schemes.
KINDS = ("W", "A", "both")
_CYCLE = ("W", "A", "W", "both")

MIXED_BITS = (5.25, 5.5, 6.0, 6.5)
MIXED_KL = (0.02, 0.05)
RANDOM_RECIPES = 3
#: Share of the groups that a random recipe of every format gives one of the coarsest schemes.
_COARSE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Pair:
    """One fusion group under one scheme, and nothing else quantized."""

    group: str
    scheme: str

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return kind_of(self.scheme)

    @property
    def version(self) -> Version:
        """As a version of the model."""
        return Version(f"{self.group} {self.scheme}", {self.group: self.scheme})


@dataclass(frozen=True, slots=True)
class PredictedRecipe:
    """A recipe for the whole model and what mofq says of it."""

    version: Version
    is_uniform: bool
    bits_per_weight: float
    predicted: Estimate  #: the sum of the errors of its choices


def kind_of(scheme: str) -> str:
    """Which of `KINDS` a scheme quantizes."""
    parsed = parse_scheme(scheme)
    if parsed.weight is None:
        return "A"
    return "W" if parsed.activation is None else "both"


def choose_pairs(offers: Sequence[Offer], count: int, *, seed: int) -> list[Pair]:
    """Random pairs without repetition; more of them begin with the same ones.

    Args:
        offers: What each fusion group may get.
        count: How many.
        seed: Of the choice.
    """
    rng = random.Random(seed)
    pools: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    for offer in offers:
        for scheme in offer.schemes:
            if not scheme.is_unquantized:
                pools[kind_of(scheme.name)].append(Pair(offer.group.name, scheme.name))
    for pool in pools.values():
        rng.shuffle(pool)
    pairs: list[Pair] = []
    turn = 0
    while len(pairs) < count and any(pools.values()):
        pool = pools[_CYCLE[turn % len(_CYCLE)]]
        turn += 1
        if pool:
            pairs.append(pool.pop())
    return pairs


def uniform_recipes(table: Table) -> list[PredictedRecipe]:
    """Every scheme that all fusion groups may get."""
    problem = request_problem(table)
    recipes = []
    for name in dict.fromkeys(problem.schemes):
        choice_F = uniform_choice(problem, name)
        if name != "bf16" and choice_F is not None:
            recipes.append(_predicted(f"uniform {name}", problem, choice_F, is_uniform=True))
    return recipes


def mixed_recipes(table: Table, *, seed: int) -> list[PredictedRecipe]:
    """Recipes of several solvers at several budgets, and random ones.

    Those of a solver are predicted as `mofq search` does: cross-fitted.
    """
    recipes = [*_solved_recipes(table), *_random_recipes(table, seed)]
    first: dict[tuple[tuple[str, str], ...], PredictedRecipe] = {}
    for one in recipes:
        first.setdefault(tuple(sorted(one.version.schemes.items())), one)
    return list(first.values())


def eight_bit_mixture(table: Table, solver: str = "exact") -> PredictedRecipe:
    """INT8 or FP8 for weights and activations, by fusion group: `search_spaces/w8a8.yaml`."""
    problem = _restricted(table, lambda scheme: kind_of(scheme) == "both")
    return _solved(f"{solver} W8A8", problem, Budgets(), solver)


def _solved_recipes(table: Table) -> list[PredictedRecipe]:
    weights = _restricted(table, lambda scheme: kind_of(scheme) == "W")
    everything = request_problem(table)
    recipes = [eight_bit_mixture(table), eight_bit_mixture(table, solver="greedy")]
    for bits in MIXED_BITS:
        recipes.append(_solved(f"exact W {bits} bits", weights, Budgets(max_bits=bits), "exact"))
    recipes.append(_solved("greedy W 8.1 bits", weights, Budgets(max_bits=8.1), "greedy"))
    for kl in MIXED_KL:
        recipes.append(_solved(f"exact max_kl {kl}", everything, Budgets(max_kl=kl), "exact"))
    return recipes


def _restricted(table: Table, is_wanted: Callable[[str], bool]) -> Problem:
    return request_problem(
        table, is_legal=lambda _group, scheme: scheme != "bf16" and is_wanted(scheme)
    )


def _solved(label: str, problem: Problem, budgets: Budgets, solver: str) -> PredictedRecipe:
    chosen = choose(problem, budgets, solver=solver)
    return _predicted(label, problem, chosen.choice_F, prediction=chosen.reported)


def _random_recipes(table: Table, seed: int) -> list[PredictedRecipe]:
    problem = request_problem(table)
    fine = {name for name in problem.schemes if name != "bf16" and not _is_coarse(name)}
    recipes = []
    for number in range(RANDOM_RECIPES):
        rng = random.Random(f"{seed}/{number}")
        recipes.append(_random(f"random of fine {number}", problem, rng, fine, coarse_share=0.0))
    for number in range(RANDOM_RECIPES):
        rng = random.Random(f"{seed}/{number}/coarse")
        recipes.append(_random(f"random {number}", problem, rng, fine, coarse_share=_COARSE_SHARE))
    return recipes


def _is_coarse(scheme: str) -> bool:
    weight = parse_scheme(scheme).weight
    return weight is not None and weight.element.bits < 6


def _random(
    label: str,
    problem: Problem,
    rng: random.Random,
    fine: Collection[str],
    *,
    coarse_share: float,
) -> PredictedRecipe:
    choice = []
    for group in range(len(problem.groups)):
        is_coarse = rng.random() < coarse_share
        at = [
            p
            for p in problem.options_of(group)
            if problem.schemes[p] != "bf16" and (problem.schemes[p] not in fine) == is_coarse
        ]
        choice.append(rng.choice(at))
    return _predicted(label, problem, np.array(choice))


def _predicted(
    label: str,
    problem: Problem,
    choice_F: np.ndarray,
    *,
    is_uniform: bool = False,
    prediction: Estimate | None = None,
) -> PredictedRecipe:
    prediction = predict(problem, choice_F) if prediction is None else prediction
    return PredictedRecipe(
        Version(label, problem.schemes_of(choice_F)),
        is_uniform,
        bits_per_weight=usage(problem, choice_F).bits_per_weight,
        predicted=prediction,
    )
