"""What `mofq search` shows: the recipe's figures, refusals, and why a layer has its scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofq.api.formatting import short_bytes, signed_error, with_error, with_interval
from mofq.cli.flags import with_flags
from mofq.cli.show.histogram import print_histogram
from mofq.cli.show.terminal import next_step, note, print_table, say, stats_option
from mofq.exceptions import Remark

if TYPE_CHECKING:
    from mofq.api import RunResult, SearchResult
    from mofq.decision import Decision
    from mofq.decision.explain import Alternative, Explanation
    from mofq.decision.prediction import Estimate
    from mofq.decision.recipe import RecipeResult

#: Budget that is not of bytes -> what its price is of, and how many of its units that is.
_PRICED = {
    "max_time": ("0.1 ms", 0.1),
    "max_finer": ("one finer layer", 1.0),
    "max_active_bits": ("0.1 bits", 0.1),
    "max_kv_bits": ("1 kB a token", 8e3),
    "max_kl": ("0.001 nats", 1e-3),
}


def show_search(result: SearchResult) -> None:
    """Figures and a histogram of schemes, refusals, explanations, and what comes next."""
    _print_decision(result.decision, title=str(result.output))
    for selection in result.selections:
        note(selection.remark)
    for each in result.refused:
        note(str(each))
    for one in result.explained:
        _print_explanation(one, size=result.recipe.result.checkpoint_bytes or 0)
    if result.engine is None:
        note_engines(result)
    stats = stats_option(result.recipe)
    next_step("validate", "MODEL", str(result.output), *stats, "--text", "FILE")


def note_engines(result: SearchResult | RunResult) -> None:
    """Say which engines serve a recipe that was decided for none in particular."""
    recipe = result.recipe
    if set(recipe.schemes.values()) == {"bf16"} and not recipe.kv_cache:
        return
    names = result.served_by()
    if names:
        note(f"Served as measured by: {', '.join(names)}.")
    else:
        note(
            "No engine serves all of these schemes as measured. Search with --engine and the name "
            "of yours (`mofq engines`), which is then offered nothing else."
        )


def predicted_text(result: RecipeResult) -> str:
    """The predicted KL of a recipe with its interval, as far as its file says."""
    ends = result.kl_low, result.kl_high
    return with_interval(result.kl_nats_per_token, *ends, stderr=result.kl_stderr)


def _print_decision(decision: Decision, *, title: str) -> None:
    from mofq.decision import KL_UNIT
    from mofq.decision.uniform import has_uniform

    recipe, result = decision.recipe, decision.recipe.result
    rows = [
        ["bits per weight", f"{result.bits_per_weight or 0:.4f}"],
        ["checkpoint", short_bytes(result.checkpoint_bytes or 0)],
    ]
    if result.active_bits is not None:
        read = f"{short_bytes(round(result.active_bytes_per_token or 0))} a token"
        rows.append(["of the weights that a token reads", f"{result.active_bits:.4f}, {read}"])
    if result.kv_bits is not None:
        per_token = f"{short_bytes(round(result.kv_bytes_per_token or 0))} a token"
        rows.append(["KV cache, bits per number", f"{result.kv_bits:.4f}, {per_token}"])
    if recipe.made_by.get("unit") == KL_UNIT:
        rows.append(["KL, predicted, 95 % [nats/token]", predicted_text(result)])
        if result.kl_routing:
            rows.append(["of it by tokens that change experts", f"{result.kl_routing:.2g}"])
    else:
        rows.append([f"error [{recipe.made_by.get('unit')}]", f"{result.error or 0:.4g}"])
    if result.kl_measured is not None:
        measured = with_error(result.kl_measured, result.kl_measured_stderr)
        rows.append(["KL, measured on the text of the search", measured])
    if decision.uniform is not None:
        scheme = str(result.uniform_scheme)
        where = "" if has_uniform(decision.problem, scheme) else ", where layers have a choice"
        name = f"best uniform of no more bytes: {scheme}{where}"
        rows.append([name, _uniform_text(decision.uniform)])
    rows += [] if result.seconds is None else [_time_row(decision, result.seconds)]
    if decision.finer_layers:
        layers, weights = result.finer_fraction or 0, result.finer_weight_fraction or 0
        shares = f"{100 * layers:.2f} % of the layers, {100 * weights:.2f} % of their weights"
        rows.append(["finer than base", shares])
    if decision.tied_layers:
        moved = f"{decision.tied_layers}, taken by {decision.moved_layers}"
        rows.append(["layers with a simpler scheme within two standard errors", moved])
    print_table(title, ["", ""], rows)
    print_histogram(recipe)
    for line in decision.notes:
        note(line)


def _uniform_text(uniform: Estimate) -> str:
    if uniform.stderr is None:
        return f"{uniform.value:.3g}"
    return with_interval(uniform.value, uniform.lower, uniform.upper)


def _time_row(decision: Decision, seconds: float) -> list[str]:
    from mofq.engines.latency import shown_seconds

    budget, before = decision.recipe.budget, decision.unquantized_seconds
    assert before is not None
    what = f"{budget['workload']} on {budget['device']}, at least"
    times = f"{shown_seconds(seconds)}; unquantized {shown_seconds(before)}"
    return [what, f"{times} ({before / seconds:.2f}×)"]


def _print_explanation(explanation: Explanation, *, size: int) -> None:
    """Its alternatives, why, and what more of budgets is worth: of bytes, up to 1 % of the size."""
    from mofq.decision.budgets import option_of
    from mofq.decision.model_error import row_error
    from mofq.decision.problem import KL_UNIT

    columns = ["scheme", "bits", "error, 95 %", "against the chosen", "with bytes priced"]
    rows = [_alternative(one) for one in explanation.alternatives]
    if any(not one.is_offered for one in explanation.alternatives):
        columns.append("")
        for row, one in zip(rows, explanation.alternatives, strict=True):
            row.append("" if one.is_offered else "gains too little (min_gain)")
    members = ", ".join(layer.rsplit(".", 1)[-1] for layer in explanation.layers)
    title = f"{explanation.group} ({members}): {explanation.chosen}  [{explanation.unit}]"
    print_table(title, columns, rows)
    say(explanation.why)
    if explanation.unit == KL_UNIT and any(
        one.error > row_error().largest for one in explanation.alternatives
    ):
        note(
            f"Errors above {row_error().largest:g} are more than any single layer was compared "
            "with a measurement at: they may be much too small."
        )
    if explanation.has_flips:
        note(
            "Errors are of tokens that stay with their experts; what changes of experts cost is "
            "predicted of the recipe alone."
        )
    for budget, price in explanation.prices.items():
        step = 10 ** max(0, len(str(size)) - 3)
        what, times = _PRICED.get(budget, (short_bytes(step), step))
        # Where size is minimised, no option asked for the bytes.
        name = budget if budget == "bytes" else with_flags(Remark(option_of(budget)))
        say(f"{name}: {what} more would save {price * times:.3g} {explanation.unit}.")
    by_reason: dict[str, list[str]] = {}
    for scheme, reason in explanation.rejected.items():
        by_reason.setdefault(reason, []).append(scheme)
    for reason, schemes in by_reason.items():
        note(f"not to be had: {', '.join(schemes)}: {with_flags(reason)}")


def _alternative(one: Alternative) -> list[str]:
    difference = "◀ chosen"
    if one.difference is not None:
        difference = signed_error(one.difference.value, one.difference.stderr)
    return [
        one.scheme,
        f"{one.bits_per_weight:.3f}",
        with_interval(one.error, one.low, one.high),
        difference,
        "–" if one.priced_difference is None else f"{one.priced_difference:+.2g}",
    ]
