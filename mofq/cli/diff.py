"""``mofq diff``."""

from __future__ import annotations

from pathlib import Path

from mofq.cli.tables import open_for_reading
from mofq.cli.terminal import print_json, print_table, with_error
from mofq.decision.difference import Difference, GroupDifference, compare_recipes
from mofq.decision.recipe import Recipe, load_recipe


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
        *_cache_figures(a, b),
        ["KL, predicted [nats/token]", *(_figure(one.kl_nats_per_token, ".4g") for one in (a, b))],
    ]
    if found.total is not None:
        rows += [[*line, "", ""] for line in figures]
        rows.append(["all together", "", "", "", _signed(found.total.value, found.total.stderr)])
    else:
        rows += figures
    columns = ["", first.name, second.name]
    columns += ["bytes", f"{found.unit}, paired"] if found.total is not None else []
    caches = sum(one.is_cache for one in found.groups)
    title = f"{len(found.groups) - caches} of {len(a.groups)} fusion groups differ"
    if a.kv_cache or b.kv_cache:
        title += f", and {caches} of {max(len(a.kv_cache), len(b.kv_cache))} KV caches"
    print_table(title, columns, rows)


def _row(one: GroupDifference, *, priced: bool) -> list[str]:
    row = [one.group, one.before or "–", one.after or "–"]
    if not priced:
        return row
    error = "–" if one.error is None else _signed(one.error.value, one.error.stderr)
    size = "–" if one.bytes is None else f"{one.bytes:+,}"
    if one.cache_bytes is not None:
        size = f"{one.cache_bytes:+,g} a token"
    return [*row, size, error]


def _cache_figures(a: Recipe, b: Recipe) -> list[list[str]]:
    """Bits per cached number; nothing where neither recipe speaks of the cache."""
    if not (a.kv_cache or b.kv_cache):
        return []
    return [["KV cache, bits per number", *(_figure(_kv_bits(one), ".4f") for one in (a, b))]]


def _kv_bits(recipe: Recipe) -> float | None:
    """As its result says; 16 where the cache is left as it is."""
    bits = recipe.result.get("kv_bits")
    if isinstance(bits, int | float):
        return float(bits)
    return None if recipe.kv_cache else 16.0


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
    if a.kv_cache or b.kv_cache:
        content["kv_bits"] = [_kv_bits(a), _kv_bits(b)]
    if found.total is not None:
        content["unit"] = found.unit
        content["difference"] = {"error": found.total.value, "stderr": found.total.stderr}
        content["groups"] = {
            one.group: {
                "bytes": one.bytes,
                "error": None if one.error is None else one.error.value,
                "stderr": None if one.error is None else one.error.stderr,
                **({"cache_bytes_per_token": one.cache_bytes} if one.is_cache else {}),
            }
            for one in found.groups
        }
    return content
