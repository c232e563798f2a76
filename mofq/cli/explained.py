"""How `mofq search --explain` shows why a layer has its scheme."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mofq.cli.terminal import note, print_table, say, with_error

if TYPE_CHECKING:
    from mofq.decision.explain import Alternative, Explanation

#: Budget -> what its price is of, and how many of its units that is.
_PRICED = {
    "max_time": ("0.1 ms", 0.1),
    "max_finer": ("one finer layer", 1.0),
    "max_kv_bits": ("1 kB a token", 8e3),
    "max_kl": ("0.001 nats", 1e-3),
    "": ("1 MB", 1e6),
}


def print_explanation(explanation: Explanation) -> None:
    """The alternatives as a table, the reason, the prices, and what could not be chosen."""
    chosen = next(one for one in explanation.alternatives if one.difference is None)
    rows = [_row(one, chosen) for one in explanation.alternatives]
    columns = ["scheme", "bits", "bytes", "error", "against the chosen", "with bytes priced", ""]
    members = ", ".join(layer.rsplit(".", 1)[-1] for layer in explanation.layers)
    title = f"{explanation.group} ({members}): {explanation.chosen}  [{explanation.unit}]"
    print_table(title, columns, rows)
    say(explanation.why)
    for budget, price in explanation.prices.items():
        what, times = _PRICED.get(budget, _PRICED[""])
        say(f"{budget}: {what} more would save {price * times:.3g} {explanation.unit}.")
    by_reason: dict[str, list[str]] = {}
    for scheme, reason in explanation.rejected.items():
        by_reason.setdefault(reason, []).append(scheme)
    for reason, schemes in by_reason.items():
        note(f"not to be had: {', '.join(schemes)}: {reason}")


def _row(one: Alternative, chosen: Alternative) -> list[str]:
    difference = "–"
    if one.difference is not None:
        sign = "+" if one.difference.value >= 0 else ""
        difference = sign + with_error(one.difference.value, one.difference.stderr)
    remark = "◀ chosen" if one.difference is None else ""
    if not one.is_offered:
        remark = "gains too little (min_gain)"
    return [
        one.scheme,
        f"{one.bits_per_weight:.3f}",
        f"{one.bytes - chosen.bytes:+,}" if one is not chosen else f"{one.bytes:,}",
        with_error(one.error, one.stderr),
        difference,
        "–" if one.priced_difference is None else f"{one.priced_difference:+.2g}",
        remark,
    ]


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """The same for machines."""
    return asdict(explanation)
