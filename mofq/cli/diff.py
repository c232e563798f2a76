"""``mofq diff``."""

from __future__ import annotations

from pathlib import Path

from mofq.cli.tables import open_for_reading
from mofq.cli.terminal import print_json, print_table, with_error
from mofq.decide.difference import Difference, GroupDifference, compare_recipes
from mofq.recipe import Recipe, load_recipe


def run_diff(first: Path, second: Path, *, table: Path | None, as_json: bool) -> None:
    """Fusion groups that differ between two recipes, and what the difference costs."""
    a, b = load_recipe(first), load_recipe(second)
    found = compare_recipes(a, b, None if table is None else open_for_reading(table))
    if as_json:
        print_json(_content(a, b, found))
        return
    rows = [_row(one, priced=table is not None) for one in found.groups]
    figures = [
        ["bits per weight", *(_figure(one.bits_per_weight, ".4f") for one in (a, b))],
        ["KL, predicted [nats/token]", *(_figure(one.kl_nats_per_token, ".4g") for one in (a, b))],
    ]
    if found.total is not None:
        rows += [[*line, "", ""] for line in figures]
        rows.append(["all together", "", "", "", _signed(found.total.value, found.total.stderr)])
    else:
        rows += figures
    columns = ["", first.name, second.name]
    columns += ["bytes", f"{found.unit}, paired"] if found.total is not None else []
    title = f"{len(found.groups)} of {len(a.groups)} fusion groups differ"
    print_table(title, columns, rows)


def _row(one: GroupDifference, *, priced: bool) -> list[str]:
    row = [one.group, one.before or "–", one.after or "–"]
    if not priced:
        return row
    error = "–" if one.error is None else _signed(one.error.value, one.error.stderr)
    return [*row, "–" if one.bytes is None else f"{one.bytes:+,}", error]


def _signed(value: float, stderr: float | None) -> str:
    return ("+" if value >= 0 else "") + with_error(value, stderr)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _content(a: Recipe, b: Recipe, found: Difference) -> dict[str, object]:
    content: dict[str, object] = {
        "changed": {one.group: [one.before, one.after] for one in found.groups},
        "bits_per_weight": [a.bits_per_weight, b.bits_per_weight],
        "kl_nats_per_token": [a.kl_nats_per_token, b.kl_nats_per_token],
    }
    if found.total is not None:
        content["unit"] = found.unit
        content["difference"] = {"error": found.total.value, "stderr": found.total.stderr}
        content["groups"] = {
            one.group: {
                "bytes": one.bytes,
                "error": None if one.error is None else one.error.value,
                "stderr": None if one.error is None else one.error.stderr,
            }
            for one in found.groups
        }
    return content
