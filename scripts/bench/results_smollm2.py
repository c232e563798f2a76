"""The README's table: uniform schemes, greedy and exact recipes, measured on one text.

    python scripts/bench/results_smollm2.py MODEL --calibration FILE --text FILE --work FOLDER

Calibrates, measures the search spaces ``w8a8`` and ``w4a16``, searches, validates every
candidate against one run of the original, prints a Markdown table and draws the figures.
What is in the work folder already is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mofq.decision.recipe import Recipe, load_recipe
from mofq.delivery.validation import Validation, validate_many
from mofq.evidence.corpora import load_text
from scripts.shared.command import (
    calibrate,
    model_parser,
    mofq,
    optional,
    parse_into_work,
    print_markdown,
    with_error,
)

UNIFORM = (
    "int8.channel+int8.token",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "fp8_e4m3.unscaled+fp8_e4m3.unscaled",
    "int8.channel",
    "int4.channel",
    "fp4_e2m1.channel",
    "int4.g64",
    "fp4_e2m1.g64",
    "int4.g32",
    "int4.g32@fullrange",
    "int4.g32@mse",
    "fp4_e2m1.g32",
    "fp4_e2m1.g32@mse",
)


@dataclass(frozen=True, slots=True)
class Searched:
    """A recipe that a search makes."""

    name: str
    space: str
    options: tuple[str, ...]


SEARCHED = (
    Searched(
        "greedy, weight error", "w8a8", ("--solver", "greedy", "--unit", "relative_weight_error")
    ),
    Searched("greedy, nats", "w8a8", ("--solver", "greedy")),
    Searched("exact, nats", "w8a8", ("--max-bits", "8.03")),
    Searched(
        "greedy, weight error",
        "w4a16",
        ("--solver", "greedy", "--unit", "relative_weight_error", "--max-bits", "4.51"),
    ),
    Searched(
        "exact, weight error", "w4a16", ("--unit", "relative_weight_error", "--max-bits", "4.51")
    ),
    Searched("exact, nats", "w4a16", ("--max-bits", "4.51")),
    Searched("exact, nats", "w4a16", ("--max-bits", "4.26")),
)


def make_recipes(model: str, calibration: str, work: Path) -> dict[str, Path]:
    """Every candidate's recipe: its label and file."""
    stats = calibrate(model, [f"en={calibration}"], work / "stats")
    recipes = {}
    for scheme in UNIFORM:
        path = work / f"uniform-{scheme}.yaml"
        if not path.exists():
            mofq("recipe", "uniform", model, scheme, "-o", path)
        recipes[f"uniform `{scheme}`"] = path
    for space in dict.fromkeys(one.space for one in SEARCHED):
        table = work / f"{space}.jsonl"
        mofq("measure", model, "--space", space, "--stats", stats, "-o", table)
    for number, one in enumerate(SEARCHED):
        path = work / f"searched-{number}.yaml"
        mofq("search", work / f"{one.space}.jsonl", *one.options, "-o", path)
        recipes[f"**{one.name}**, `--space {one.space} {' '.join(one.options)}`"] = path
    return recipes


def row(label: str, validation: Validation, recipe: Recipe) -> list[str]:
    """One line of the table."""
    return [
        label,
        f"{validation.bits_per_weight:.3f}",
        optional(recipe.kl_nats_per_token),
        with_error(validation.kl_nats_per_token, validation.kl_stderr or 0),
        f"{validation.perplexity:.2f}",
        f"{100 * validation.top1_agreement:.1f} %",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the recipes, validate them, print the table."""
    paths = (
        ("--calibration", "text file"),
        ("--text", "text file that nothing was calibrated on"),
    )
    options = parse_into_work(model_parser(__doc__, *paths, tokens=8192), arguments)
    made = make_recipes(options.model, options.calibration, options.work)
    recipes = {label: load_recipe(path) for label, path in made.items()}
    done = validate_many(
        options.model, list(recipes.values()), load_text(options.text), tokens=options.tokens
    )
    rows = []
    for (label, recipe), validation in zip(recipes.items(), done, strict=True):
        assert validation.enforced, f"{label} is not enforced"
        rows.append(row(label, validation, recipe))
    columns = ["bits/weight", "KL predicted", "KL measured [nats/token]", "perplexity", "top-1"]
    print_markdown(["", *columns], rows)
    print(f"perplexity of the original: {done[0].perplexity_original:.2f}")
    w8a8, w4a16 = options.work / "w8a8.jsonl", options.work / "w4a16.jsonl"
    exact = options.work / "searched-2.yaml"
    mofq("plot", w8a8, exact, "--kind", "map", "-o", options.work / "map.png")
    mofq("plot", w4a16, "--kind", "frontier", "-o", options.work / "frontier.png")


if __name__ == "__main__":
    main()
