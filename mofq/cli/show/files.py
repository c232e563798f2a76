"""What the commands say that write a file or a folder: where it is, and what comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofq.api.formatting import short_bytes
from mofq.api.options import Windows
from mofq.cli.flags import default_flag
from mofq.cli.show.terminal import next_step, note, print_table, say, stats_option

if TYPE_CHECKING:
    from mofq.api import (
        CalibrateResult,
        ExploreResult,
        ExportResult,
        MeasureResult,
        PlotResult,
        RecipeFromResult,
        RewriteResult,
        TuneResult,
        UniformResult,
    )


def show_calibration(result: CalibrateResult) -> None:
    """`mofq calibrate`."""
    for line in result.summary():
        note(line)
    table = result.folder.parent / "table.jsonl"
    space = ("--space", "serving", "--engine", "ENGINE")
    asked = map(default_flag, result.stats.plan.vocabulary or ())
    next_step("measure", result.model, *space, *asked, "--stats", result.folder, "-o", table)


def show_measurement(result: MeasureResult) -> None:
    """`mofq measure`."""
    for line in result.summary():
        note(line)
    engine = () if result.engine is None else ("--engine", result.engine)
    recipe = result.output.parent / "recipe.yaml"
    next_step("search", result.output, *engine, "--max-bits", "BITS", "-o", recipe)


def show_rewriting(result: RewriteResult) -> None:
    """`mofq rewrite`."""
    if result.rotation is not None:
        note(_rotated(result))
        return
    rows = []
    for one in result.choices:
        moved = one.strength
        strength = "–" if moved is None else f"{moved.alpha:g}, {moved.beta:.3g}"
        nats = (f"{one.nats_before:.3g}", f"{one.nats_after:.3g}")
        rows.append([one.site.group, one.scheme, strength, *nats])
    title = f"{result.method}: KL of each site [nats/token]"
    print_table(title, ["site", "scheme", "strength", "before", "after"], rows)
    content = result.to_json()
    note(
        f"{result.output}: {content['moved']} of {len(rows)} sites moved; predicted KL of their "
        f"layers {content['kl_before']:.4g} before, {content['kl_after']:.4g} after; "
        f"{content['seconds']:.1f} s. Calibrate this folder before it is measured."
    )


def _rotated(result: RewriteResult) -> str:
    rotation, untied = result.rotation, ""
    assert rotation is not None
    if result.untied_bytes:
        untied = (
            f" The lm_head was the embedding and is a tensor of its own now: "
            f"{short_bytes(result.untied_bytes)} more."
        )
    return (
        f"{result.output}: {rotation.hidden} channels of the residual stream rotated, and "
        f"{rotation.head} of each head's values, with seed {rotation.seed}; {result.seconds:.1f} s."
        f"{untied} Calibrate this folder before it is measured."
    )


def show_tuning(result: TuneResult) -> None:
    """`mofq tune`."""
    gain, seconds = result.tuning.gain, f"{result.seconds:.1f} s"
    if result.helps:
        note(f"{result.output}: {result.tuning.what}, KL {gain}; {seconds}.")
    else:
        note(
            f"{result.output}: the recipe as it was. Tuned it has KL {gain}: not surely less "
            f"(95 %); {seconds}."
        )
    words = [*stats_option(result.recipe, result.stats), "--text", "OTHER_TEXT"]
    if (length := result.tuning.sequence_length) != Windows().sequence_length:
        words += ["--sequence-length", str(length)]
    next_step("validate", result.model, str(result.output), *words)


def show_export(result: ExportResult) -> None:
    """`mofq export`."""
    done = result.checkpoint
    if done is None:
        note(f"{result.output}: for {result.to}.")
        return
    size = short_bytes(done.checkpoint_bytes)
    note(f"{result.output}: {size} of tensors for {result.to}, {result.seconds:.1f} s.")
    say(str(result.how_to_use))
    stats = stats_option(result.recipe, result.stats)
    next_step("validate", result.model, result.output, *stats, "--text", "FILE")


def show_page(result: ExploreResult) -> None:
    """`mofq explore`."""
    size, seconds = short_bytes(result.bytes), round(result.seconds, 2)
    note(f"{result.output}: {result.recipes} recipes of the frontier, {size}, {seconds:.1f} s")


def show_figure(result: PlotResult) -> None:
    """`mofq plot`."""
    note(f"{result.output}: {result.kind} of {result.source}")


def show_uniform(result: UniformResult) -> None:
    """`mofq recipe uniform`."""
    note(f"{result.output}: {result.recipe.bits_per_weight:.4f} bits per weight.")


def show_recipe_from(result: RecipeFromResult) -> None:
    """`mofq recipe from`."""
    note(f"{result.output}: {result.recipe.bits_per_weight:.4f} bits per weight.")
    rows = [[name, str(count)] for name, count in result.fusion_groups.most_common()]
    print_table(f"{result.folder} was made of", ["scheme", "fusion groups"], rows)
