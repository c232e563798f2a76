"""What `mofq diff` shows: the fusion groups in which two recipes differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofq.api.formatting import signed_error
from mofq.cli.show.terminal import note, print_table

if TYPE_CHECKING:
    from mofq.api import DiffResult
    from mofq.decision.recipe import Recipe
    from mofq.decision.recipe_difference import GroupDifference


def show_diff(result: DiffResult) -> None:
    """One row for each group that differs, priced where a table was given."""
    from mofq.decision.model_error import row_error
    from mofq.decision.problem import KL_UNIT
    from mofq.decision.request import weights_text

    found, (a, b) = result.difference, result.recipes
    rows = [_row(one, priced=found.total is not None) for one in found.groups]
    figures = [["bits per weight", *(_figure(one.bits_per_weight, ".4f") for one in (a, b))]]
    if result.with_cache:
        bits = (_figure(one, ".4f") for one in result.kv_bits)
        figures.append(["KV cache, bits per number", *bits])
    kl = (_figure(one.kl_nats_per_token, ".4g") for one in (a, b))
    figures.append(["KL [nats/token]", *kl])
    columns = ["", *result.names]
    if found.total is not None:
        rows += [[*line, "", ""] for line in figures]
        rows.append(
            ["all together", "", "", "", signed_error(found.total.value, found.total.stderr)]
        )
        columns += ["bytes", "error, paired"]
    else:
        rows += figures
    caches = sum(one.is_cache for one in found.groups)
    title = f"{len(found.groups) - caches} of {len(a.groups)} fusion groups differ"
    if result.with_cache:
        title += f", and {caches} of {max(len(a.kv_cache), len(b.kv_cache))} KV caches"
    if found.unit is not None:
        title += f"; errors in {found.unit}"
    if found.objective == "mean":
        title += f", mean of {weights_text(found.corpus_weights)}"
    elif found.objective is not None:
        title += f", {found.objective}"
    print_table(title, columns, rows)
    if found.unit == KL_UNIT:
        note(
            "Differences are of the second-order expansion; the KL of either recipe is corrected "
            "by what such recipes measure. ± is of the samples alone: what single groups measure "
            f"by themselves scatters by another {row_error().spread:.0%} of their error."
        )
    minimised = [_minimised(one) for one in (a, b)]
    # A table prices both on one scale.
    are_own = found.total is None and None not in (a.kl_nats_per_token, b.kl_nats_per_token)
    if are_own and minimised[0] != minimised[1]:
        pairs = zip(result.names, minimised, strict=True)
        each = "; ".join(f"that of {name} is {what}" for name, what in pairs)
        note(f"The two KL do not compare: {each}.")
    for name, recipe in zip(result.names, result.recipes, strict=True):
        if recipe.tuning is not None:
            note(
                f"{name}: {recipe.tuning.what}, of which no figure above knows: KL "
                f"{recipe.tuning.gain}."
            )
        if recipe.is_edited and found.total is None:
            note(
                f"{name}: was edited after it was found, so that its figures no longer hold. "
                f"`--table` gives those of the edit."
            )


def _minimised(recipe: Recipe) -> str:
    """What the figure of a recipe is of, where there are several corpora."""
    if recipe.made_by.get("objective") == "worst-corpus":
        return "the worst corpus"
    weights = recipe.made_by.get("corpus_weights")
    return "the mean of the corpora" + ("" if weights is None else f", {weights}")


def _row(one: GroupDifference, *, priced: bool) -> list[str]:
    row = [one.group, one.before or "–", one.after or "–"]
    if not priced:
        return row
    error = "–" if one.error is None else signed_error(one.error.value, one.error.stderr)
    size = "–" if one.bytes is None else f"{one.bytes:+,}"
    if one.cache_bytes is not None:
        size = f"{one.cache_bytes:+,g} a token"
    return [*row, size, error]


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
