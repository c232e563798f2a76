"""What `mofq search` was asked for, and the request that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mofq.exceptions import MofqError, nearest_name

if TYPE_CHECKING:
    from mofq.decision import Request
    from mofq.decision.request import TimeRequest

_OBJECTIVES = ("mean", "worst-corpus")
#: Those of `mofq.decision`, and the one that measures.
_SOLVERS = ("exact", "greedy", "optuna")


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What `mofq search` was asked for."""

    table: Path
    output: Path
    solver: str = "exact"
    engine: str | None = None
    max_bits: float | None = None
    max_size: str | None = None
    max_kl: float | None = None
    max_finer: float | None = None
    max_time: str | None = None
    device_model: str | None = None
    workload: str | None = None
    max_kv_bits: float | None = None
    kv_tokens: int = 0
    kv_formats: tuple[str, ...] = ()
    explain: tuple[str, ...] = ()
    space: str | None = None
    unit: str | None = None
    objective: str = "mean"
    ties: str = "on"
    model: str | None = None
    text: str | None = None
    refine: int = 0
    tokens: int = 4096
    sequence_length: int = 512
    device: str = "cpu"
    stats: Path | None = None
    trials: int = 60
    multi_objective: bool = False
    storage: str | None = None
    workers: int = 1
    seed: int = 0

    @property
    def decides_cache(self) -> bool:
        """Whether the format of the KV cache is decided with the layers."""
        return self.max_kv_bits is not None or self.kv_tokens > 0

    @property
    def is_measured(self) -> bool:
        """Whether the model itself is run."""
        return bool(self.refine) or self.multi_objective or self.solver == "optuna"


def check_options(options: SearchOptions) -> None:
    """Refuse what cannot be, before anything is read.

    Raises:
        MofqError: The message names the option.
    """
    if options.solver not in _SOLVERS:
        raise MofqError(
            f"no solver is called {options.solver!r}." + nearest_name(options.solver, _SOLVERS)
        )
    if options.ties not in ("on", "off"):
        raise MofqError(f"--ties is on or off, not {options.ties!r}.")
    if options.objective not in _OBJECTIVES:
        raise MofqError(
            f"unknown objective {options.objective!r}."
            + nearest_name(options.objective, _OBJECTIVES)
        )
    check_cache_formats(options.kv_formats, options.decides_cache)
    if options.kv_tokens and options.max_size is None and options.max_kl is None:
        raise MofqError("--kv-tokens counts the cache into a size; give --max-size or --max-kl.")
    if options.is_measured:
        _check_measured(options)


def check_cache_formats(formats: Sequence[str], is_decided: bool) -> None:
    """Refuse formats of a cache that is not decided.

    Raises:
        MofqError: The message names the options that are missing.
    """
    if formats and not is_decided:
        raise MofqError(
            "--kv-cache says in what the cache may be kept; give --max-kv-bits, or --kv-tokens "
            "with --max-size, too: without a budget it stays as it is."
        )


def _check_measured(options: SearchOptions) -> None:
    if options.multi_objective and options.solver != "optuna":
        raise MofqError("--multi-objective is for --solver optuna.")
    if options.solver == "optuna" and options.refine:
        raise MofqError("--refine is for the exact and greedy solvers; optuna measures by itself.")
    asked = "--solver optuna" if options.solver == "optuna" else f"--refine {options.refine}"
    for name, value in (("--model", options.model), ("--text", options.text)):
        if value is None:
            raise MofqError(
                f"{asked} measures recipes on the model itself and needs {name}; the text should "
                f"be neither what was calibrated on nor what will validate."
            )


def search_request(options: SearchOptions) -> Request:
    """What is asked of the decision.

    Raises:
        BudgetError: A size, a time, a device or a workload cannot be read.
    """
    from mofq.decision import Budgets, Objective, Request
    from mofq.model.sizes import parse_size

    return Request(
        budgets=Budgets(
            max_bits=options.max_bits,
            max_bytes=None if options.max_size is None else parse_size(options.max_size),
            max_kl=options.max_kl,
            max_finer=options.max_finer,
            max_kv_bits=options.max_kv_bits,
        ),
        solver=options.solver,
        unit=options.unit,
        space=options.space,
        objective=cast("Objective", options.objective),
        engine=options.engine,
        ties=options.ties == "on",
        time=_time_request(options),
        kv_cache=options.decides_cache,
        kv_tokens=options.kv_tokens,
        kv_formats=parse_formats(options.kv_formats),
    )


def parse_formats(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The canonical names of formats of the cache; None where none is named.

    Raises:
        SchemeError: A name is not of one.
    """
    from mofq.model.kv_schemes import parse_cache_scheme

    return tuple(parse_cache_scheme(name).name for name in names) or None


def _time_request(options: SearchOptions) -> TimeRequest | None:
    from mofq.decision.request import TimeRequest
    from mofq.engines.devices import load_device_model
    from mofq.engines.latency import parse_seconds, parse_workload

    if options.device_model is None and options.workload is None and options.max_time is None:
        return None
    if options.device_model is None or options.workload is None:
        raise MofqError(
            "a time is that of a workload on a device: give --device-model, e.g. h100, and "
            "--workload, e.g. decode:batch=8,context=1024, together."
        )
    return TimeRequest(
        load_device_model(options.device_model),
        parse_workload(options.workload),
        None if options.max_time is None else parse_seconds(options.max_time),
    )
