"""What `mofq run` ends with: every candidate measured on the real model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mofq.cli.search import note_engines
from mofq.cli.terminal import next_step, print_table, say, stats_for, with_error

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.delivery.export.compressed_tensors import Export
    from mofq.delivery.validation import Validation


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a run."""

    folder: Path
    model: str  #: as it was given
    title: str
    recipe: Recipe  #: as it stands in the folder
    preferred: str  #: its key in ``validations``
    validations: dict[str, Validation]  #: of the searched recipe and of uniform schemes
    original_bits: float  #: bits per weight of the original
    seconds: dict[str, float]  #: of each stage
    export: Export | Path | None  #: a checkpoint, or a file for another tool


def report_json(report: Report) -> dict[str, Any]:
    """The outcome as one JSON object."""
    chosen = report.validations[report.preferred]
    export = report.export
    return {
        "folder": str(report.folder),
        "recipe": str(report.folder / "recipe.yaml"),
        "table": str(report.folder / "table.jsonl"),
        "bits_per_weight": chosen.bits_per_weight,
        "kl_nats_per_token": chosen.kl_nats_per_token,
        "predicted_kl_nats_per_token": chosen.predicted_kl_nats_per_token,
        "enforced": chosen.enforced,
        "preferred": report.preferred,
        "schemes": dict(Counter(group.scheme for group in report.recipe.groups)),
        "validations": {name: one.to_json() for name, one in report.validations.items()},
        "exported": None if export is None else str(getattr(export, "folder", export)),
        "serve_command": getattr(export, "serve_command", None),
        "seconds": {stage: round(time, 2) for stage, time in report.seconds.items()},
    }


def print_report(report: Report) -> None:
    """Candidates in order of measured KL, the schemes of the recipe, seconds of each stage."""
    original = report.validations[report.preferred].perplexity_original
    rows = [["original", f"{report.original_bits:.4f}", "", "", f"{original:.4g}", ""]]
    ranked = sorted(report.validations.items(), key=lambda item: item[1].kl_nats_per_token)
    rows += [_row(_label(report, name), one) for name, one in ranked]
    columns = ["", "bits/weight", "KL predicted", "KL measured", "perplexity", "top-1"]
    print_table(f"{report.title}, KL in nats per token", columns, rows)
    schemes = Counter(group.scheme for group in report.recipe.groups)
    counts = ", ".join(f"{count} × {name}" for name, count in schemes.most_common())
    say(f"recipe, fusion groups: {counts}")
    times = ", ".join(f"{stage} {time:.1f}" for stage, time in report.seconds.items())
    say(f"seconds: {times}")
    if isinstance(report.export, Path):
        say(f"For {report.recipe.made_by['engine']}: {report.export}")
    elif report.export is not None:
        say(f"Serve it with: {report.export.serve_command}")
    _suggest(report)


def _suggest(report: Report) -> None:
    """What to do with the folder."""
    recipe, table = report.folder / "recipe.yaml", report.folder / "table.jsonl"
    if report.export is None:
        note_engines(table, report.recipe)
        stats = stats_for(report.recipe, report.folder / "stats")
        to = ("--to", "compressed-tensors", "--engine", "ENGINE", *stats, "-o", "FOLDER")
        next_step("export", report.model, recipe, *to)
    engine = report.recipe.made_by.get("engine")
    named = () if engine is None else ("--engine", str(engine))
    validation = ("--validation", report.folder / "validation.json")
    page = report.folder / "explorer.html"
    next_step("explore", table, recipe, *validation, *named, "-o", page)


def _label(report: Report, name: str) -> str:
    if name != report.preferred:
        return "the mixture searched" if name == "recipe" else name
    schemes = {group.scheme for group in report.recipe.groups}
    return f"recipe: {schemes.pop()} everywhere" if len(schemes) == 1 else "recipe"


def _row(name: str, one: Validation) -> list[str]:
    return [
        name,
        f"{one.bits_per_weight:.4f}",
        with_error(one.predicted_kl_nats_per_token, one.predicted_kl_stderr),
        with_error(one.kl_nats_per_token, one.kl_stderr),
        f"{one.perplexity:.4g}",
        f"{100 * one.top1_agreement:.2f} %",
    ]
