"""What a recipe is asked to be."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from mofq.decision.budgets import Budgets
from mofq.decision.problem import Objective
from mofq.engines.devices import DeviceModel
from mofq.engines.latency import Workload
from mofq.evidence.constraints import LayerConstraint
from mofq.evidence.spaces import Offer
from mofq.exceptions import BudgetError, MofqError, TableError, nearest_name, option
from mofq.model.sizes import counted_bytes, group_bytes, weights_of

#: Of `mofq search`.
CONSTRAINT_FLAGS = {"fixed": "--fix", "at_least": "--at-least", "at_most": "--at-most"}


@dataclass(frozen=True, slots=True)
class TimeRequest:
    """A forward pass on a device: how long it may take, or only to be told how long it does."""

    device: DeviceModel
    workload: Workload
    max_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What a recipe is asked to be."""

    budgets: Budgets = field(default_factory=Budgets)
    solver: str = "exact"
    unit: str | None = None  #: None: nats where the table has them, else what it has
    objective: Objective = "mean"
    #: What each corpus counts in the mean; None: all the same.
    corpus_weights: Mapping[str, float] | None = None
    engine: str | None = None
    ties: bool = True
    space: str | None = None  #: name of a search space of the table; None: all that were measured
    time: TimeRequest | None = None
    kv_cache: bool = False  #: whether the format of the KV cache is decided too
    kv_tokens: int = 0  #: of context, whose cache counts into a budget of size
    kv_formats: tuple[str, ...] | None = None  #: of the cache, beside bf16; None: all
    constraints: tuple[LayerConstraint, ...] = ()  #: beside those of the search space


def request_flags(request: Request) -> str:
    """What may be chosen, as options of `mofq search`, each after a space; no size."""
    bits = request.budgets.max_kv_bits
    named = [
        ("--corpus-weights", weights_text(request.corpus_weights)),
        ("--unit", request.unit),
        ("--engine", request.engine),
        ("--space", request.space),
        ("--max-kv-bits", None if bits is None else repr(bits).removesuffix(".0")),
        ("--kv-tokens", str(request.kv_tokens) if request.kv_tokens else None),
        *(("--kv-cache", name) for name in request.kv_formats or ()),
        *((CONSTRAINT_FLAGS[c.kind], f"{c.layers}={c.value}") for c in request.constraints),
    ]
    return "".join(f" {flag} {shlex.quote(text)}" for flag, text in named if text is not None)


def weights_text(weights: Mapping[str, float] | None) -> str | None:
    """Weights of corpora as options and recipes write them, ``en=3,pt=1``."""
    if weights is None:
        return None
    return ",".join(f"{name}={float(one)!r}".removesuffix(".0") for name, one in weights.items())


def lowest_terms(weights: Mapping[str, float] | None) -> str | None:
    """One text of all weights of corpora that mean the same: ``pt=2,en=6`` as ``en=3,pt=1``.

    None where all corpora count the same.
    """
    if weights is None or len(set(weights.values())) == 1:
        return None
    exact = {name: Fraction(repr(float(weights[name]))) for name in sorted(weights)}
    whole = math.lcm(*(one.denominator for one in exact.values()))
    counts = {name: int(one * whole) for name, one in exact.items()}
    most = math.gcd(*counts.values())
    return ",".join(f"{name}={count // most}" for name, count in counts.items())


def read_weights(weights: str | Mapping[str, float], *, where: str) -> dict[str, float]:
    """What each corpus counts: the inverse of `weights_text`, or a mapping that is checked.

    Args:
        weights: ``en=3,pt=1``, or corpus -> what it counts.
        where: Text stands, for messages.

    Raises:
        MofqError: The text cannot be read, a weight is no number, negative or not finite, or all
            are 0.
    """
    pairs = weights.items() if isinstance(weights, Mapping) else _pairs(weights, where)
    found = {}
    for name, number in pairs:
        try:
            found[name] = float(number)
        except (TypeError, ValueError):
            found[name] = math.nan
        if not 0 <= found[name] < math.inf:
            raise MofqError(
                f"{option('corpus_weights')}: needed a number of 0 or more for {name!r}, "
                f"found {number!r}."
            )
    if not any(found.values()):
        raise MofqError(f"{option('corpus_weights')}: all are 0. Give a corpus that counts more.")
    return found


def _pairs(text: str, where: str) -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for one in text.split(","):
        name, _, number = one.strip().rpartition("=")
        try:
            pairs.append((name, float(number)))
        except ValueError:
            name = ""
        if not name or name in dict(pairs[:-1]):
            raise MofqError(
                f"{where} {text}: cannot be read at {one!r}. Write each corpus once, as "
                f"NAME=NUMBER, and a comma between them: en=3,pt=1."
            )
    return pairs


def weights_in_order(weights: Mapping[str, float], corpora: Sequence[str]) -> tuple[float, ...]:
    """The weight of each corpus.

    Args:
        weights: Corpus -> what it counts.
        corpora: All that there are.

    Raises:
        TableError: One has no weight, or there is no such corpus.
    """
    unknown = next((name for name in weights if name not in corpora), None)
    if unknown is not None:
        raise TableError(
            f"{option('corpus_weights')}: there is no corpus {unknown!r}."
            + nearest_name(unknown, corpora)
        )
    missing = next((name for name in corpora if name not in weights), None)
    if missing is not None:
        raise TableError(
            f"{option('corpus_weights')}: needed one of each corpus ({', '.join(corpora)}), "
            f"found none of {missing!r}. Give 0 to leave a corpus out."
        )
    return tuple(weights[name] for name in corpora)


def check_budget(offers: Sequence[Offer], budgets: Budgets, *, other_bytes: int) -> None:
    """Refuse a size that no choice can meet, from headers alone and before anything is measured.

    Args:
        offers: What each fusion group may get.
        budgets: Only those of size are looked at.
        other_bytes: Of the tensors outside of the fusion groups.

    Raises:
        BudgetError: The message names the smallest size.
    """
    refused = _refused_size(offers, budgets, other_bytes=other_bytes)
    if refused is None:
        return
    free = [replace(one, barred={}) for one in offers]
    barring = dict.fromkeys(why for one in offers for why in one.barred.values())
    if barring and _refused_size(free, budgets, other_bytes=other_bytes) is None:
        refused += without([one.template for one in barring])
    raise BudgetError(refused)


def _refused_size(offers: Sequence[Offer], budgets: Budgets, *, other_bytes: int) -> str | None:
    """Which budget of size no choice can meet, and the smallest size; None: they can be met."""
    smallest = sum(min(counted_bytes(o.group, scheme) for scheme in o.choices) for o in offers)
    weights = weights_of(offer.group for offer in offers)
    if budgets.max_bits is not None and not 8 * smallest / weights <= budgets.max_bits:
        least = math.ceil(1e4 * 8 * smallest / weights) / 1e4
        return (
            f"No recipe meets the budget. {option('max_bits')}: asked for {budgets.max_bits:g} "
            f"bits per weight; the smallest possible in this search space is {least:g}. "
            f"`mofq spaces` lists others."
        )
    smallest = sum(min(group_bytes(o.group, scheme) for scheme in o.choices) for o in offers)
    if budgets.max_bytes is not None and smallest + other_bytes > budgets.max_bytes:
        return (
            f"No recipe meets the budget. {option('max_size')}: asked for {budgets.max_bytes:,} "
            f"bytes; the smallest possible in this search space is {smallest + other_bytes:,} "
            f"bytes. `mofq spaces` lists others."
        )
    return None


def without(constraints: Sequence[str]) -> str:
    """The end of a message: constraints, by `named`, are why no recipe meets the budgets."""
    listed = ", ".join(f"`{one}`" for one in constraints)
    return f" Without {'it' if len(constraints) == 1 else 'them'} the budgets can be met: {listed}."
