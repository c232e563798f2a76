"""Why a layer has the scheme that it has: its alternatives, and what each would cost the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mofq.decision.budgets import Budgets, finer_layers_P, max_kl_constraints, offered
from mofq.decision.decision import Decision
from mofq.decision.offered_schemes import refused_schemes, spaces_of
from mofq.decision.prediction import Estimate, paired_loss, predict_row
from mofq.decision.problem import FloatArray, Problem, option_bits
from mofq.decision.request import Request
from mofq.decision.ties import TIE_STDERRS
from mofq.evidence.table import Table
from mofq.exceptions import MofqError, nearest_name, option
from mofq.model.layers import layers_of

_NOT_MEASURED = (
    "was not measured of this fusion group; `mofq run` measures fitted codes where they are chosen"
)
_ONE_FORMAT = "an engine keeps one format of the cache for the whole model, and that is another one"


@dataclass(frozen=True, slots=True)
class Alternative:
    """One scheme that the fusion group could have, beside the one that it has."""

    scheme: str
    bits_per_weight: float
    bytes: int
    error: float  #: in the unit of the explanation
    stderr: float | None  #: in nats with what rows are off by, see `predict_row`
    low: float | None  #: of the 95 % interval; None: not known
    high: float | None
    difference: Estimate | None  #: error minus the chosen one's, paired; None: it is the chosen
    #: Error plus what its bytes, ms and finer layers are worth, minus the same of the chosen.
    priced_difference: float | None  #: None: the solver knows no prices
    is_offered: bool  #: False: gains too little for a finer scheme (``min_gain``)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The decision on one fusion group."""

    group: str
    layers: tuple[str, ...]
    unit: str
    chosen: str
    why: str  #: one sentence
    prices: Mapping[str, float]  #: error that one more byte, layer or ms of a budget would save
    alternatives: tuple[Alternative, ...]  #: with the chosen one, the best deal first
    has_flips: bool  #: changes of experts are predicted, and in none of these errors
    rejected: Mapping[str, str]  #: scheme -> why it was not to be had


def explain(table: Table, request: Request, decision: Decision, layer: str) -> Explanation:
    """Why a layer's fusion group has the scheme that a decision gave it.

    A budget that is used up has a shadow price: the error that one more byte of it would
    save. At this price a scheme that is n bytes smaller frees n times the price for other
    layers. The best deal is the scheme of least error plus priced bytes; the optimum
    consists of best deals but for a few groups that fill the budget's last bytes.

    Args:
        table: What was decided on.
        request: As it was decided.
        decision: From `decide`, or after measuring.
        layer: Of a linear layer, or of a fusion group.

    Raises:
        MofqError: There is no such layer.
    """
    problem, budgets, chosen_F = decision.problem, decision.budgets, decision.choice_F
    check_layers(table, [layer])
    number = _find_group(problem, layer)
    prices = {name: price for name, price in (decision.prices or {}).items() if price > 0}
    priced_P = None if decision.prices is None else _priced(problem, budgets, prices)
    offered_P, beside_P = offered(problem, budgets), problem.beside(chosen_F)
    options = problem.options_of(number)
    alternatives = [
        _alternative(problem, option, int(chosen_F[number]), priced_P, bool(offered_P[option]))
        for option in options
        if beside_P[option]
    ]
    apart = {problem.schemes[option]: _ONE_FORMAT for option in options if not beside_P[option]}
    alternatives.sort(key=lambda one: (one.priced_difference or 0.0, one.error))
    group = problem.groups[number]
    chosen = problem.schemes[chosen_F[number]]
    was_measured = decision.recipe.result.kl_measured is not None
    return Explanation(
        group.name,
        group.layers,
        problem.unit,
        chosen,
        why=_why(chosen, alternatives, prices, was_measured=was_measured),
        prices=prices,
        alternatives=tuple(alternatives),
        has_flips=problem.flip_FC is not None,
        rejected=_unmeasured(table, request, group.name)
        | refused_schemes(table, request).get(group.name, {})
        | apart,
    )


def _unmeasured(table: Table, request: Request, group: str) -> dict[str, str]:
    """Schemes of the search spaces that a fusion group has no row of -> that it has none.

    Of several in one entry of a space, only the first that fits is measured.
    """
    measured = {row.scheme for row in table.rows if row.group == group}
    if group not in {one.name for one in table.header.groups}:
        return {}  # a layer's cache, which has formats of its own
    return {
        entry[0]: _NOT_MEASURED
        for space in spaces_of(table, request.space)
        for entry in space.candidates or [(name,) for name in space.schemes]
        if measured.isdisjoint(entry)
    }


def check_layers(table: Table, layers: Iterable[str]) -> None:
    """Refuse to explain what is no layer, before the long work.

    Raises:
        MofqError: The message suggests the nearest name.
    """
    known = {layer.name for layer in layers_of(table.header.groups)}
    known |= {group.name for group in table.header.groups}
    known |= {cache.name for cache in table.caches}
    for name in layers:
        if name not in known:
            near = nearest_name(name, known)
            raise MofqError(
                f"{option('explain')}: no layer or fusion group is called {name!r}." + near
            )


def _find_group(problem: Problem, layer: str) -> int:
    return next(
        number
        for number, group in enumerate(problem.groups)
        if layer == group.name or layer in group.layers
    )


def _priced(problem: Problem, budgets: Budgets, prices: Mapping[str, float]) -> FloatArray:
    """The error of every option, and what it uses of each budget at the budget's price."""
    costs: dict[str, np.ndarray] = {one.name: one.cost_P for one in budgets.linear}
    costs |= {
        "max_bits": problem.layer_bytes_P,
        "max_bytes": problem.size_P,
        "bytes": problem.size_P,  # of the smallest recipe, where size is minimised
        "max_finer": finer_layers_P(problem),
        "max_kv_bits": problem.cache_bits_P,
    }
    if "max_kl" in prices:  # where no samples are kept
        costs["max_kl"] = np.max([one.cost_P for one in max_kl_constraints(problem, 0.0)], axis=0)
    total_P = problem.cost_PK.max(axis=1)
    for name, price in prices.items():
        total_P = total_P + price * costs[name]
    return np.asarray(total_P)


def _alternative(
    problem: Problem,
    option: int,
    chosen: int,
    priced_P: FloatArray | None,
    is_offered: bool,
) -> Alternative:
    size = int(problem.bytes_P[option])
    row = predict_row(problem, option)
    difference = None
    if option != chosen and problem.sample_errors is not None:
        difference = paired_loss(problem, np.array([chosen]), np.array([option]))
    elif option != chosen:
        difference = Estimate(row.value - float(problem.cost_PK[chosen].max()), stderr=None)
    return Alternative(
        problem.schemes[option],
        bits_per_weight=option_bits(problem, option),
        bytes=size,
        error=row.value,
        stderr=row.stderr,
        low=None if row.stderr is None else row.lower,
        high=None if row.stderr is None else row.upper,
        difference=difference,
        priced_difference=(
            None if priced_P is None else float(priced_P[option] - priced_P[chosen])
        ),
        is_offered=is_offered,
    )


def _why(
    chosen: str,
    alternatives: list[Alternative],
    prices: Mapping[str, float],
    *,
    was_measured: bool,
) -> str:
    others = [one for one in alternatives if one.difference is not None and one.is_offered]
    if not others:
        return f"{chosen} is the only scheme that may be chosen here."
    if others[0].priced_difference is None:
        return f"{chosen} is what the solver's rule takes; it weighs no bytes against error."
    best = min(others, key=lambda one: one.priced_difference or 0.0)
    if (best.priced_difference or 0.0) >= 0:
        if prices:
            return (
                f"{chosen} is the best deal: every other scheme has more error plus bytes, at what "
                f"bytes are worth elsewhere in the model."
            )
        return f"{chosen} has the least error, and no budget is in its way."
    gain = best.difference
    assert gain is not None
    if gain.stderr is not None and abs(gain.value) <= TIE_STDERRS * gain.stderr:
        return f"{chosen} is not told apart from {best.scheme} by the samples, and is simpler."
    if was_measured:
        return f"{best.scheme} was predicted to be the better deal; measuring preferred {chosen}."
    return (
        f"{best.scheme} is the better deal by itself; {chosen} fills what the other layers leave "
        f"of the budget."
    )
