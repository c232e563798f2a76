"""From the options of a search or a frontier to what `mofq.decision` is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mofq.api.options import Budget, Choices, LayerValues, Method, Timing
from mofq.exceptions import BudgetError, MofqError, option

if TYPE_CHECKING:
    from mofq.decision import Budgets, Request
    from mofq.decision.request import TimeRequest
    from mofq.evidence.constraints import ConstraintKind, LayerConstraint


def make_request(
    choices: Choices,
    *,
    budget: Budget = Budget(),
    timing: Timing = Timing(),
    method: Method = Method(),
) -> Request:
    """What is asked of the decision.

    Raises:
        MofqError: A size, a time, a device or a workload cannot be read, or an option needs another
            one that is missing.
    """
    from mofq.decision import Request

    weights = read_corpus_weights(choices.corpus_weights)
    if weights is not None and method.objective != "mean":
        raise MofqError(
            f"{option('corpus_weights')} is of the mean over corpora. Leave it or "
            f"{option('objective', method.objective)} out."
        )
    if choices.kv_formats and not choices.decides_cache:
        raise MofqError(
            f"{option('kv_formats')} says in what the cache may be kept; give "
            f"{option('max_kv_bits')}, or {option('kv_tokens')} with {option('max_size')}, too: "
            f"without a budget it stays as it is."
        )
    return Request(
        budgets=_budgets(budget, choices),
        solver=method.solver,
        unit=choices.unit,
        space=choices.space,
        objective=method.objective,
        corpus_weights=weights,
        engine=choices.engine,
        ties=method.ties == "on",
        time=_time_request(timing),
        kv_cache=choices.decides_cache,
        kv_tokens=choices.kv_tokens,
        kv_formats=_cache_formats(choices.kv_formats),
        constraints=(
            *_constraints("fixed", choices.fixed),
            *_constraints("at_least", choices.at_least),
            *_constraints("at_most", choices.at_most),
        ),
    )


def read_corpus_weights(weights: str | Mapping[str, float] | None) -> dict[str, float] | None:
    """What each corpus counts, as numbers; see `read_weights`."""
    from mofq.decision.request import read_weights

    return None if weights is None else read_weights(weights, where=option("corpus_weights"))


def _constraints(kind: ConstraintKind, values: LayerValues) -> list[LayerConstraint]:
    """Constraints from ``LAYERS=VALUE``, or from selectors with their values."""
    from mofq.evidence.constraints import parse_constraint

    if isinstance(values, Mapping):
        pairs = [(selector, str(value)) for selector, value in values.items()]
    else:
        pairs = [(one.partition("=")[0], one.partition("=")[2]) for one in values]
    return [
        parse_constraint(kind, selector, value, where=option(kind, selector))
        for selector, value in pairs
    ]


def _budgets(budget: Budget, choices: Choices) -> Budgets:
    """The budgets as numbers.

    Raises:
        BudgetError: ``max_size`` is no size.
    """
    from mofq.decision import Budgets

    return Budgets(
        max_bits=_number(budget.max_bits),
        max_bytes=_bytes(budget.max_size),
        max_kl=_number(budget.max_kl),
        max_finer=_number(budget.max_finer),
        max_kv_bits=_number(choices.max_kv_bits),
        max_active_bits=_number(budget.max_active_bits),
    )


def _bytes(size: str | float | None) -> int | None:
    from mofq.model.sizes import parse_size

    if size is None or isinstance(size, int):
        return size
    try:
        return parse_size(size if isinstance(size, str) else f"{size:.0f}")
    except BudgetError as error:
        raise BudgetError(f"{option('max_size')}: {error.template}") from None


def _number(limit: float | None) -> float | None:
    """5 and 5.0 are one budget, and one text in a recipe."""
    return None if limit is None else float(limit)


def _cache_formats(names: Sequence[str]) -> tuple[str, ...] | None:
    """The canonical names of formats of the cache; None where none is named."""
    from mofq.model.kv_schemes import parse_cache_scheme

    return tuple(parse_cache_scheme(name).name for name in names) or None


def _time_request(timing: Timing) -> TimeRequest | None:
    from mofq.decision.request import TimeRequest
    from mofq.engines.devices import load_device_model
    from mofq.engines.latency import parse_seconds, parse_workload

    if timing == Timing():
        return None
    if timing.device_model is None or timing.workload is None:
        raise MofqError(
            f"a time is that of a workload on a device: give {option('device_model')}, e.g. h100, "
            f"and {option('workload')}, e.g. decode:batch=8,context=1024, together."
        )
    device = load_device_model(timing.device_model)
    if device.unrated:
        raise BudgetError(
            f"{option('device_model', timing.device_model)}: its vendor states no peak of "
            f"{', '.join(device.unrated)}, from which times would follow. Give a YAML file with "
            f"figures that you measured."
        )
    return TimeRequest(
        device,
        parse_workload(timing.workload),
        None if timing.max_time is None else parse_seconds(timing.max_time),
    )
