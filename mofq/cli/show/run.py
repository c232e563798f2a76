"""What `mofq run` and `mofq demo` show: every candidate measured on the real model."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING

from mofq.api.formatting import with_error
from mofq.api.run_folder import finished_runs
from mofq.cli.show.search import note_engines
from mofq.cli.show.terminal import next_step, print_table, say, stats_option
from mofq.cli.show.validate import predicted_text

if TYPE_CHECKING:
    from mofq.api import RunResult
    from mofq.delivery.validation import Validation


def show_run(result: RunResult) -> None:
    """Candidates in order of measured KL, the schemes of the recipe, seconds of each stage."""
    original = result.validations[result.preferred].perplexity_original
    rows = [["original", f"{result.original_bits:.4f}", "", "", f"{original:.4g}", ""]]
    ranked = sorted(result.validations.items(), key=lambda item: item[1].kl_nats_per_token)
    rows += [_row(_label(result, name), one) for name, one in ranked]
    columns = ["", "bits/weight", "KL predicted, 95 %", "KL measured", "perplexity", "top-1"]
    print_table(f"{result.title}, KL in nats per token", columns, rows)
    _show_tried(result)
    schemes = Counter(group.scheme for group in result.recipe.groups)
    counts = ", ".join(f"{count} × {name}" for name, count in schemes.most_common())
    say(f"recipe, fusion groups: {counts}")
    if result.tuning is not None:
        say(f"tuned after quantizing: {result.tuning.what}; KL {result.tuning.gain}")
    times = ", ".join(f"{stage} {time:.1f}" for stage, time in result.seconds.items())
    say(f"seconds: {times}")
    if result.export is not None:
        to = f"For {result.recipe.made_by['engine']}: {result.export.output}"
        say(result.export.how_to_use or to)
    _suggest(result)


def _show_tried(result: RunResult) -> None:
    """What was tried, each with all before it that was taken, and what the best recipe costs."""
    rows, before = [], None
    for one in result.tried:
        kl = one.kl_nats_per_token
        gain = "" if kl is None or before is None else f"{before - kl:+.3g}"
        bits = "" if one.bits_per_weight is None else f"{one.bits_per_weight:.4f}"
        shown = "no recipe" if kl is None else f"{kl:.3g}"
        name = one.name if one.is_taken else f"{one.name}: not taken"
        rows.append([name, bits, shown, gain, f"{one.seconds:.0f}"])
        before = kl if kl is not None and one.is_taken else before
    columns = ["tried", "bits/weight", "KL predicted", "gained", "seconds"]
    print_table("what was tried, the best recipe with each and all taken before", columns, rows)


def _suggest(result: RunResult) -> None:
    """What to do with the folder."""
    from mofq.decision.recipe import load_recipe
    from mofq.decision.request import request_flags

    files = result.files
    if result.export is None:
        note_engines(result)
        if result.served_by():
            stats = stats_option(result.recipe, files.stats)
            to = ("--to", "compressed-tensors", "--engine", "ENGINE", *stats, "-o", "FOLDER")
            next_step("export", result.model, files.recipe, *to)
    asked = shlex.split(request_flags(result.request))
    # Those of the same model: a rewritten one has a table of its own.
    runs = [
        one
        for one in finished_runs(files.folder)
        if load_recipe(one.recipe).rewriting == result.recipe.rewriting
    ]
    validations = (word for one in runs for word in ("--validation", one.validation))
    page = files.folder / "explorer.html"
    recipes = (one.recipe for one in runs)
    next_step("explore", result.subject.table, *recipes, *validations, *asked, "-o", page)


def _label(result: RunResult, name: str) -> str:
    if name != result.preferred:
        return "the mixture searched" if name == "recipe" else name
    schemes = {group.scheme for group in result.recipe.groups}
    return f"recipe: {schemes.pop()} everywhere" if len(schemes) == 1 else "recipe"


def _row(name: str, one: Validation) -> list[str]:
    return [
        name,
        f"{one.bits_per_weight:.4f}",
        predicted_text(one),
        with_error(one.kl_nats_per_token, one.kl_stderr),
        f"{one.perplexity:.4g}",
        f"{100 * one.top1_agreement:.2f} %",
    ]
