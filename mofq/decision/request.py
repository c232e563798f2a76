"""What a recipe is asked to be."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from mofq.decision.budgets import Budgets
from mofq.decision.problem import Objective
from mofq.engines.devices import DeviceModel
from mofq.engines.latency import Workload
from mofq.evidence.constraints import LayerConstraint
from mofq.evidence.spaces import Offer
from mofq.exceptions import BudgetError
from mofq.model.sizes import group_bytes, weights_of

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

    budgets: Budgets
    solver: str = "exact"
    unit: str | None = None  #: None: nats where the table has them, else what it has
    objective: Objective = "mean"
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
        ("--unit", request.unit),
        ("--engine", request.engine),
        ("--space", request.space),
        ("--max-kv-bits", None if bits is None else repr(bits).removesuffix(".0")),
        ("--kv-tokens", str(request.kv_tokens) if request.kv_tokens else None),
        *(("--kv-cache", name) for name in request.kv_formats or ()),
        *((CONSTRAINT_FLAGS[c.kind], f"{c.layers}={c.value}") for c in request.constraints),
    ]
    return "".join(f" {flag} {shlex.quote(text)}" for flag, text in named if text is not None)


def check_budget(offers: Sequence[Offer], budgets: Budgets, *, other_bytes: int) -> None:
    """Refuse a size that no choice can meet, from headers alone and before anything is measured.

    Args:
        offers: What each fusion group may get.
        budgets: Only those of size are looked at.
        other_bytes: Of the tensors outside of the fusion groups.

    Raises:
        BudgetError: The message names the smallest size.
    """
    smallest = sum(min(group_bytes(o.group, scheme) for scheme in o.choices) for o in offers)
    weights = weights_of(offer.group for offer in offers)
    if budgets.max_bits is not None and not 8 * smallest / weights <= budgets.max_bits:
        least = math.ceil(1e4 * 8 * smallest / weights) / 1e4
        raise BudgetError(
            f"max_bits: asked for {budgets.max_bits:g} bits per weight; the smallest possible in "
            f"this search space is {least:g}."
        )
    if budgets.max_bytes is not None and smallest + other_bytes > budgets.max_bytes:
        raise BudgetError(
            f"max_size: asked for {budgets.max_bytes:,} bytes; the smallest possible in this "
            f"search space is {smallest + other_bytes:,} bytes."
        )
