"""``mofq search``."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from mofq.cli.checks import check_output
from mofq.cli.explained import explanation_json, print_explanation
from mofq.cli.histogram import print_histogram
from mofq.cli.measured import search_measured
from mofq.cli.search_options import SearchOptions, check_options, search_request
from mofq.cli.tables import open_for_reading
from mofq.cli.terminal import (
    next_step,
    note,
    print_json,
    print_table,
    short_bytes,
    stats_for,
    with_error,
)

if TYPE_CHECKING:
    from mofq.decision import Decision, Request
    from mofq.decision.explain import Explanation
    from mofq.decision.recipe import Recipe
    from mofq.decision.refused import Refused
    from mofq.evidence.table import Table


def run_search(options: SearchOptions, *, as_json: bool) -> None:
    """Decide, write the recipe, and print what it is."""
    start = monotonic()
    decision = search_table(options)
    explained = _explain(options, decision)
    refused = _refused(options)
    if as_json:
        print_json(
            {
                "recipe": str(options.output),
                **decision.recipe.result,
                "finer_layers": list(decision.finer_layers),
                "tied_layers": decision.tied_layers,
                "moved_layers": decision.moved_layers,
                "prices": None if decision.prices is None else dict(decision.prices),
                "notes": list(decision.notes),
                "schemes": dict(Counter(decision.recipe.schemes.values())),
                "kv_cache": dict(Counter(one.scheme for one in decision.recipe.kv_cache)),
                "refused": [asdict(one) for one in refused],
                "served_by": list(_served_by(options.table, decision.recipe)),
                "explained": [explanation_json(one) for one in explained],
                "elapsed_seconds": round(monotonic() - start, 3),
            }
        )
        return
    print_decision(decision, title=str(options.output))
    for each in refused:
        names = ", ".join(each.schemes)
        note(f"not offered to {each.groups} fusion groups: {names}: {each.reason}")
    for one in explained:
        print_explanation(one)
    if options.engine is None:
        note_engines(options.table, decision.recipe)
    next_step("validate", "MODEL", options.output, *stats_for(decision.recipe), "--text", "FILE")


def _served_by(path: Path, recipe: Recipe) -> tuple[str, ...]:
    from mofq.decision.refused import serving_engines
    from mofq.evidence.table import read_table

    return serving_engines(read_table(path), recipe)


def note_engines(path: Path, recipe: Recipe) -> None:
    """Say which engines serve a recipe that was decided for none in particular."""
    if set(recipe.schemes.values()) == {"bf16"} and not recipe.kv_cache:
        return
    names = _served_by(path, recipe)
    if names:
        note(f"Served as measured by: {', '.join(names)}.")
    else:
        note(
            "No engine serves all of these schemes as measured. Search with --engine and the name "
            "of yours (`mofq engines`), which is then offered nothing else."
        )


def search_table(options: SearchOptions) -> Decision:
    """Read the table, decide, write the recipe."""
    from mofq.decision.explain import check_layers
    from mofq.decision.recipe import write_recipe

    check_options(options)
    check_output(options.output, options.table, options.space, options.text)
    table, request = open_for_reading(options.table), search_request(options)
    check_layers(table, options.explain)
    decision = (search_measured if options.is_measured else _decide)(options, table, request)
    write_recipe(decision.recipe, options.output)
    return decision


def _explain(options: SearchOptions, decision: Decision) -> list[Explanation]:
    if not options.explain:
        return []
    from mofq.decision.explain import explain
    from mofq.evidence.table import read_table

    table, request = read_table(options.table), search_request(options)
    return [explain(table, request, decision, layer) for layer in options.explain]


def _refused(options: SearchOptions) -> tuple[Refused, ...]:
    if options.engine is None:
        return ()
    from mofq.decision.refused import engine_refusals
    from mofq.evidence.table import read_table

    return engine_refusals(read_table(options.table), search_request(options))


def _decide(options: SearchOptions, table: Table, request: Request) -> Decision:
    from mofq.decision import decide

    return decide(table, request)


def print_decision(decision: Decision, *, title: str) -> None:
    """A table of figures, a histogram of schemes, and notes."""
    from mofq.decision.solvers import KL_UNIT

    recipe, result = decision.recipe, decision.recipe.result

    def number(key: str) -> float | None:
        value = result.get(key)
        return float(value) if isinstance(value, int | float) else None

    rows = [
        ["bits per weight", f"{number('bits_per_weight') or 0:.4f}"],
        ["checkpoint", short_bytes(int(number("checkpoint_bytes") or 0))],
    ]
    if number("kv_bits") is not None:
        per_token = f"{short_bytes(round(number('kv_bytes_per_token') or 0))} a token"
        rows.append(["KV cache, bits per number", f"{number('kv_bits'):.4f}, {per_token}"])
    if recipe.made_by.get("unit") == KL_UNIT:
        predicted = with_error(number("kl_nats_per_token"), number("kl_stderr"))
        rows.append(["KL, predicted [nats/token]", predicted])
    else:
        rows.append([f"error [{recipe.made_by.get('unit')}]", f"{number('error') or 0:.4g}"])
    if number("kl_measured") is not None:
        measured = with_error(number("kl_measured"), number("kl_measured_stderr"))
        rows.append(["KL, measured on the text of the search", measured])
    if decision.uniform_error is not None:
        name = f"best uniform of no more bytes: {result['uniform_scheme']}"
        rows.append([name, f"{decision.uniform_error:.3g}"])
    rows += [] if number("seconds") is None else [_time_row(decision)]
    if decision.finer_layers:
        layers, weights = number("finer_fraction") or 0, number("finer_weight_fraction") or 0
        shares = f"{100 * layers:.2f} % of the layers, {100 * weights:.2f} % of their weights"
        rows.append(["finer than base", shares])
    if decision.tied_layers:
        moved = f"{decision.tied_layers}, of which {decision.moved_layers} take it"
        rows.append(["layers within noise of a simpler scheme", moved])
    print_table(title, ["", ""], rows)
    print_histogram(recipe)
    for line in decision.notes:
        note(line)


def _time_row(decision: Decision) -> list[str]:
    from mofq.engines.latency import shown_seconds

    budget, result = decision.recipe.budget, decision.recipe.result
    seconds, before = result["seconds"], decision.unquantized_seconds
    assert isinstance(seconds, float)
    assert before is not None
    what = f"{budget['workload']} on {budget['device']}, at least"
    times = f"{shown_seconds(seconds)}; unquantized {shown_seconds(before)}"
    return [what, f"{times} ({before / seconds:.2f}×)"]
