"""Recipes of few bits: what is predicted with and without what groups do together, and measured.

    python scripts/bench/low_bits.py MODEL --calibration FILE --text FILE --work FOLDER

Rounding to 2 and 3 bits makes all weights smaller, and what that does in one layer another may undo
or double (``mofq.decision.size_answers``). For each budget one recipe is searched in
``low_bits.yaml``; its KL is predicted as a sum over its fusion groups, each by itself, and with
what they do together, and is measured on another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mofq.decision import request_problem
from mofq.decision.prediction import predict
from mofq.decision.recipe import load_recipe
from mofq.evidence.table import read_table
from scripts.shared.command import (
    measured_table,
    model_parser,
    mofq,
    parse_into_work,
    print_markdown,
    with_error,
)
from scripts.shared.reproduction import measure_recipes, reference_of

SPACE = Path(__file__).with_suffix(".yaml")
#: The space's smallest scheme has 2.5 bits, and some layers of it are hardly worse in 3.
BUDGETS = (2.55, 2.8, 3.2, 3.6, 4.2, 5.0)
_COLUMNS = ("at most", "as a sum", "together", "cross-fitted", "measured", "predicted / measured")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the recipes, measure them, print the table."""
    paths = (
        ("--calibration", "text file, or the name of a bundled text"),
        ("--text", "text to measure on"),
    )
    parser = model_parser(__doc__, *paths, tokens=8192)
    parser.add_argument("--sequence-length", type=int, default=512, help="of calibration")
    options = parse_into_work(parser, arguments)
    table = measured_table(options, SPACE, "en", "--sequence-length", options.sequence_length)
    files = {bits: options.work / f"recipe-{bits}.yaml" for bits in BUDGETS}
    for bits, path in files.items():
        mofq("search", table, "--max-bits", bits, "-o", path)
    problem = request_problem(read_table(table))
    recipes = {str(bits): load_recipe(path) for bits, path in files.items()}
    done = measure_recipes(reference_of(options), recipes, stats=options.work / "stats")
    rows = []
    for bits, recipe in recipes.items():
        choice_F = problem.choice_of({one.name: one.scheme for one in recipe.groups})
        together = predict(problem, choice_F).value
        as_a_sum = predict(replace(problem, answers=None), choice_F).value
        crossfitted, measured = recipe.kl_nats_per_token or 0.0, done[bits]
        rows.append(
            [
                f"{bits} bits",
                *(f"{value:.4f}" for value in (as_a_sum, together, crossfitted)),
                with_error(measured.kl, measured.kl_stderr),
                f"{crossfitted / measured.kl:.2f}",
            ]
        )
    print_markdown(_COLUMNS, rows)


if __name__ == "__main__":
    main()
