"""GPTQ (arXiv:2210.17323) on INT4 and FP4, alone and after MoFQ: predicted beside measured.

    python scripts/reproduce/gptq.py MODEL --stats STATS --text FILE --work FOLDER

Prints two Markdown tables. The first has one format for every layer, each rounded to nearest and
by GPTQ under the scale rules absmax, mse and nats; "predicted" is the table's cross-fitted figure.
The second has MoFQ's choice between INT4 and FP4 per layer (arXiv:2305.12356: the lower squared
error of the tensor), GPTQ alone on each format, and GPTQ on MoFQ's choice.

The table of `--space w4a16_fitted` is measured into the work folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mofq.decision.recipe import Recipe
from mofq.evidence.table import Table
from scripts.shared.command import print_markdown, with_error
from scripts.shared.reproduction import (
    Measured,
    arguments,
    measure_recipes,
    predicted,
    recipe,
    reference_of,
    rows_by_scheme,
    table_of,
    uniform,
)

ROUNDINGS = ("", "@mse", "@nats", "~gptq", "@mse~gptq", "@nats~gptq")
#: Label -> schemes in order of preference: a size that does not divide a layer gives way.
FORMATS: dict[str, tuple[str, ...]] = {
    "int4.g[128,64,32]": ("int4.g128", "int4.g64", "int4.g32"),
    "int4.g32": ("int4.g32",),
    "fp4_e2m1.g32": ("fp4_e2m1.g32",),
}
INT, FP = "int4.g32", "fp4_e2m1.g32"


def uniform_recipes(table: Table) -> dict[str, Recipe]:
    """One format and rounding for every layer."""
    return {
        label + rounding: found
        for label, schemes in FORMATS.items()
        for rounding in ROUNDINGS
        if (found := uniform(table, *(scheme + rounding for scheme in schemes))) is not None
    }


def mofq_recipe(table: Table, rounding: str) -> Recipe:
    """For each fusion group INT4 or FP4 by the tensors' error under `@mse`, then a rounding."""
    errors = rows_by_scheme(table, "relative_weight_error")
    return recipe(
        table,
        {
            group: (INT if rows[f"{INT}@mse"].error <= rows[f"{FP}@mse"].error else FP) + rounding
            for group, rows in errors.items()
        },
    )


def lines(
    table: Table, recipes: Mapping[str, Recipe], done: Mapping[str, Measured]
) -> list[list[str]]:
    """One row for each recipe."""
    return [
        [
            f"`{label}`",
            f"{done[label].bits_per_weight:.3f}",
            f"{predicted(table, one):.4f}",
            with_error(done[label].kl, done[label].kl_stderr),
            f"{done[label].perplexity:.2f}",
        ]
        for label, one in recipes.items()
    ]


def main(given: Sequence[str] | None = None) -> None:
    """Measure the space, then every recipe on the text."""
    paths = (("--stats", "from mofq calibrate"), ("--text", "that nothing was calibrated on"))
    options = arguments(__doc__, given, *paths)
    table = table_of(
        options.model,
        "w4a16_fitted",
        stats=options.stats,
        path=options.work / "w4a16_fitted.jsonl",
        begun=options.begun,
    )
    alone = uniform_recipes(table)
    mixed = {f"MoFQ{rounding}": mofq_recipe(table, rounding) for rounding in ("@mse", "@mse~gptq")}
    done = measure_recipes(reference_of(options), {**alone, **mixed}, stats=options.stats)
    columns = ["", "bits/weight", "KL predicted", "KL measured [nats/token]", "perplexity"]
    print_markdown(columns, lines(table, alone, done))
    both = {f"{one}@mse~gptq": alone[f"{one}@mse~gptq"] for one in (INT, FP)}
    print_markdown(columns, lines(table, {**mixed, **both}, done))
    print(f"Perplexity of the original: {next(iter(done.values())).perplexity_original:.2f}.")


if __name__ == "__main__":
    main()
