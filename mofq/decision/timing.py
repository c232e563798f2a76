"""Time as a budget and as a figure: what a request's device and workload make of a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mofq.decision.budgets import Budgets, LinearBudget
from mofq.decision.expert_visits import active_budget
from mofq.decision.problem import Problem
from mofq.decision.request import Request, TimeRequest
from mofq.engines import ENGINES, find_engine
from mofq.engines.devices import DeviceModel
from mofq.engines.groups import experts_apart
from mofq.engines.latency import attention_seconds, group_seconds, other_seconds
from mofq.evidence.table import Table
from mofq.exceptions import BudgetError, option
from mofq.model.kv_schemes import cache_bits, is_cache_scheme, parse_cache_scheme
from mofq.numbers.schemes import parse_scheme


def request_budgets(table: Table, problem: Problem, request: Request) -> Budgets:
    """The budgets of a request, those of time and active weights as costs of options.

    Args:
        table: Whose fusion groups the problem has.
        problem: From `request_problem`.
        request: Budgets, and the time that is asked for.

    Raises:
        BudgetError: The engine is not one for the device, or the workload leaves something open.
    """
    budgets, time = request.budgets, request.time
    if budgets.max_active_bits is not None:
        active = active_budget(table, problem, budgets.max_active_bits)
        budgets = replace(budgets, linear=(*budgets.linear, active))
    if time is None:
        return budgets
    check_device(request.engine, time)
    if experts_apart(table.header.groups):
        raise BudgetError(
            f"{option('device_model')}: times are those of kernels that take all experts of a "
            f"decoder layer in one scheme, and the table decides experts apart. Give "
            f"{option('max_active_bits')}, or measure without {option('experts')}."
        )
    if time.max_seconds is None:
        return budgets
    # In milliseconds, as people say it: messages are in the unit of the budget.
    budget = LinearBudget(
        "max_time",
        "ms",
        cost_P=1e3 * _option_seconds(table, problem, time),
        limit=1e3 * time.max_seconds,
        constant=1e3 * constant_seconds(table, time),
    )
    return replace(budgets, linear=(*budgets.linear, budget))


def check_device(engine: str | None, time: TimeRequest) -> None:
    """Refuse a device of another generation than the engine's rules are for.

    Raises:
        BudgetError: As said; the message names the engines of the device.
    """
    if engine is None:
        return
    devices = find_engine(engine).devices
    if devices not in (1, time.workload.tp):
        raise BudgetError(
            f"{option('engine', engine)} has {devices} devices, and the workload "
            f"tp={time.workload.tp}. Write tp={devices} in {option('workload')}."
        )
    if find_engine(engine).capability is None:
        return
    fitting = engines_for(time.device)
    if engine.partition(":")[0] not in fitting:
        raise BudgetError(
            f"{option('engine', engine)} is not for the device model {time.device.name}. "
            + (
                f"Engines for it: {', '.join(fitting)}."
                if fitting
                else f"Leave {option('engine')} out."
            )
        )


def engines_for(device: DeviceModel) -> tuple[str, ...]:
    """The engines whose rules are those of a CUDA device's generation."""
    known = [one.capability for one in ENGINES.values() if one.capability is not None]
    older = [one for one in known if device.capability is not None and one <= device.capability]
    generation = max(older, default=None)
    if generation is None:
        return ()
    return tuple(name for name, one in ENGINES.items() if one.capability == generation)


def constant_seconds(table: Table, time: TimeRequest) -> float:
    """What no choice changes [s]; see `mofq.engines.latency.other_seconds`."""
    groups = table.header.groups
    # An lm_head that is a group has a time of its own, and what is left is looked up.
    has_head = any(group.layers[0].module == "lm_head" for group in groups)
    has_embedding = any(group.layers[0].role is not None for group in groups)
    return other_seconds(
        groups,
        time.device,
        time.workload,
        other_bytes=0 if has_head else table.header.other_bytes,
        has_own_lm_head=not has_embedding
        and any(name.endswith("lm_head") for name in table.header.unquantized),
    )


def recipe_seconds(table: Table, schemes: Mapping[str, str], time: TimeRequest) -> float:
    """The least time of a forward pass under fusion group -> scheme [s]."""
    parts = [
        group_seconds(group, parse_scheme(schemes[group.name]), time.device, time.workload)
        for group in table.header.groups
    ]
    cached = {cache.name: schemes.get(cache.name, "bf16") for cache in table.caches}
    parts += _cache_seconds(table, cached, time).values()
    return math.fsum([constant_seconds(table, time), *parts])


def _cache_seconds(table: Table, schemes: Mapping[str, str], time: TimeRequest) -> dict[str, float]:
    """What the format of each layer's cache adds to its attention, against bf16 [s]."""
    bits = {
        cache.name: cache_bits(parse_cache_scheme(schemes[cache.name]), cache)
        for cache in table.caches
        if schemes[cache.name] != "bf16"
    }
    if not bits:
        return dict.fromkeys(schemes, 0.0)
    kept, whole = (
        attention_seconds(table.header.groups, time.device, time.workload, cache_bits=one)
        for one in (bits, {})
    )
    return {name: kept.get(name, 0.0) - whole.get(name, 0.0) for name in schemes}


def time_of(table: Table, schemes: Mapping[str, str], request: Request) -> float | None:
    """The predicted time of a recipe [s]; None where no device was named."""
    return None if request.time is None else recipe_seconds(table, schemes, request.time)


def unquantized_seconds(table: Table, request: Request) -> float | None:
    """The same for the model as it is."""
    return time_of(table, {group.name: "bf16" for group in table.header.groups}, request)


def _option_seconds(table: Table, problem: Problem, time: TimeRequest) -> np.ndarray:
    groups = {group.name: group for group in table.header.groups}
    names = [cache.name for cache in table.caches]
    in_cache = {
        scheme: _cache_seconds(table, dict.fromkeys(names, scheme), time)
        for scheme in dict.fromkeys(problem.schemes)
        if is_cache_scheme(scheme) or scheme == "bf16"
    }
    seconds = [
        in_cache[scheme][problem.groups[group].name]
        if problem.groups[group].cached
        else group_seconds(
            groups[problem.groups[group].name], parse_scheme(scheme), time.device, time.workload
        )
        for group, scheme in zip(problem.group_P.tolist(), problem.schemes, strict=True)
    ]
    return np.array(seconds, dtype=np.float64)
