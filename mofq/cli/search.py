"""``mofq search``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, cast

from mofq.cli.checks import check_output
from mofq.cli.measured import check_measured, search_measured
from mofq.cli.terminal import note, print_json, print_table, say, short_bytes, with_error
from mofq.exceptions import MofqError, nearest_name

if TYPE_CHECKING:
    from mofq.decide import Decision, Request
    from mofq.table import Table

_OBJECTIVES = ("mean", "worst-corpus")


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
    trials: int = 60
    storage: str | None = None
    workers: int = 1
    seed: int = 0


def run_search(options: SearchOptions, *, as_json: bool) -> None:
    """Decide, write the recipe, and print what it is."""
    start = monotonic()
    decision = search_table(options)
    result = dict(decision.recipe.result)
    if as_json:
        print_json(
            {
                "recipe": str(options.output),
                **result,
                "finer_layers": list(decision.finer_layers),
                "tied_layers": decision.tied_layers,
                "moved_layers": decision.moved_layers,
                "notes": list(decision.notes),
                "schemes": dict(Counter(decision.recipe.schemes.values())),
                "seconds": round(monotonic() - start, 3),
            }
        )
        return
    print_decision(decision, title=str(options.output))


def search_table(options: SearchOptions) -> Decision:
    """Read the table, decide, write the recipe."""
    from mofq.recipe import write_recipe
    from mofq.table import read_table

    _check_options(options)
    check_output(options.output)
    measured = options.refine or options.solver == "optuna"
    decision = (search_measured if measured else _decide)(
        options, read_table(options.table), search_request(options)
    )
    write_recipe(decision.recipe, options.output)
    return decision


def search_request(options: SearchOptions) -> Request:
    """What is asked of the decision."""
    from mofq.cost import parse_size
    from mofq.decide import Request
    from mofq.solvers import Budgets, Objective

    return Request(
        budgets=Budgets(
            max_bits=options.max_bits,
            max_bytes=None if options.max_size is None else parse_size(options.max_size),
            max_kl=options.max_kl,
            max_finer=options.max_finer,
        ),
        solver=options.solver,
        unit=options.unit,
        space=options.space,
        objective=cast("Objective", options.objective),
        engine=options.engine,
        ties=options.ties == "on",
    )


def _decide(options: SearchOptions, table: Table, request: Request) -> Decision:
    from mofq.decide import decide

    return decide(table, request)


def _check_options(options: SearchOptions) -> None:
    if options.ties not in ("on", "off"):
        raise MofqError(f"--ties is on or off, not {options.ties!r}.")
    if options.objective not in _OBJECTIVES:
        raise MofqError(
            f"unknown objective {options.objective!r}."
            + nearest_name(options.objective, _OBJECTIVES)
        )
    if options.refine or options.solver == "optuna":
        check_measured(options)


def print_decision(decision: Decision, *, title: str) -> None:
    """A table of figures, a histogram of schemes, and notes."""
    from mofq.solvers import KL_UNIT

    recipe, result = decision.recipe, decision.recipe.result

    def number(key: str) -> float | None:
        value = result.get(key)
        return float(value) if isinstance(value, int | float) else None

    rows = [
        ["bits per weight", f"{number('bits_per_weight') or 0:.4f}"],
        ["checkpoint", short_bytes(int(number("checkpoint_bytes") or 0))],
    ]
    if recipe.made_by.get("unit") == KL_UNIT:
        predicted = with_error(number("kl_nats_per_token"), number("kl_stderr"))
        joint = with_error(number("kl_joint"), number("kl_joint_stderr"))
        rows.append(["KL, predicted [nats/token]", predicted])
        rows.append(["KL, with interactions", joint])
    else:
        rows.append([f"error [{recipe.made_by.get('unit')}]", f"{number('error') or 0:.4g}"])
    if number("kl_measured") is not None:
        measured = with_error(number("kl_measured"), number("kl_measured_stderr"))
        rows.append(["KL, measured on the text of the search", measured])
    if decision.uniform_error is not None:
        name = f"best uniform of no more bytes: {result['uniform_scheme']}"
        rows.append([name, f"{decision.uniform_error:.3g}"])
    if decision.finer_layers:
        rows.append(["finer layers", f"{100 * (number('finer_fraction') or 0):.2f} %"])
    if decision.tied_layers:
        moved = f"{decision.moved_layers} moved to the simpler scheme"
        rows.append(["layers within noise", f"{decision.tied_layers}, {moved}"])
    print_table(title, ["", ""], rows)
    print_histogram(Counter(group.scheme for group in recipe.groups))
    for line in decision.notes:
        note(line)


def print_histogram(schemes: Counter[str]) -> None:
    """One line: how many fusion groups have which scheme."""
    total = sum(schemes.values())
    parts = [
        f"{name} {'█' * max(1, round(20 * count / total))} {count}"
        for name, count in schemes.most_common()
    ]
    say("fusion groups: " + "  ".join(parts))
