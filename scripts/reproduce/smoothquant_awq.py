"""SmoothQuant (arXiv:2211.10438), AWQ (arXiv:2306.00978) and bi-smoothing on one model.

    python scripts/reproduce/smoothquant_awq.py MODEL --stats STATS --calibration FILE \
        --text FILE --work FOLDER

Rewrites the model by each method for INT8 per channel and token, and by AWQ for INT4 groups of
128. Prints what rewriting itself costs (the bf16 rounding of the moved weights), the KL of the
uniform scheme before and after against the model that it was applied to, and what a search over
INT8 and FP8 per fusion group makes of the rewritten model, calibrated anew.

`--methods` names some of the methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from mofq.decision.recipe import Recipe, load_recipe
from mofq.model.loading import load_model
from scripts.shared.command import mofq, print_markdown, with_error
from scripts.shared.reproduction import (
    Measured,
    Version,
    arguments,
    calibrated_anew,
    measure_recipes,
    measure_versions,
    reference_of,
    rewritten,
    uniform_of,
)

INT8 = ("int8.channel+int8.token",)
INT4 = ("int4.g128", "int4.g64", "int4.g32")
#: Label -> method and further words of `mofq rewrite`.
METHODS: dict[str, tuple[str, ...]] = {
    "smoothquant": ("smoothquant",),
    "bismooth": ("bismooth",),
    "bismooth, powers of two": ("bismooth", "--powers-of-two"),
    "awq": ("awq",),
}


def main(given: Sequence[str] | None = None) -> None:
    """Rewrite, measure, search, print."""
    paths = (
        ("--stats", "from mofq calibrate"),
        ("--calibration", "text that the stats are of"),
        ("--text", "that nothing was calibrated on"),
    )
    some = [("--methods", "some of: " + ";".join(METHODS))]
    options = arguments(__doc__, given, *paths, optional=some)
    methods = options.methods.split(";") if options.methods else list(METHODS)
    print_markdown(
        ["model", "KL of rewriting", "scheme", "KL [nats/token]"],
        [row for label in ["plain", *methods] for row in uniform_rows(options, label, methods)],
    )
    print_markdown(
        ["model", "bits/weight", "KL predicted", "KL of INT8/FP8 searched [nats/token]"],
        [searched_row(options, label) for label in ["plain", *methods] if label != "awq"],
    )


def uniform_rows(
    options: argparse.Namespace, label: str, methods: Sequence[str]
) -> list[list[str]]:
    """The uniform schemes that a model was rewritten for."""
    is_plain, folder = label == "plain", folder_of(options, label)
    recipes = {}
    if label != "awq":
        recipes["INT8"] = uniform_of(str(folder), *INT8)
    if label == "awq" or (is_plain and "awq" in methods):
        recipes["INT4 g128"] = uniform_of(str(folder), *INT4)
    cost = "–"
    if not is_plain:
        cost = f"{rewriting_cost(options, folder).kl:.1e}"
    return [
        [label, cost, name, with_error(one.kl, one.kl_stderr)]
        for name, one in measured(options, folder, recipes).items()
    ]


def searched_row(options: argparse.Namespace, label: str) -> list[str]:
    """The best mixture of INT8 and FP8 in nats, by statistics of this very model."""
    name, work = file_name(label), options.work
    folder = folder_of(options, label)
    path = work / f"{name}.yaml"
    if not path.exists():
        stats = options.stats
        if label != "plain":
            anew = work / f"{name}-stats"
            stats = calibrated_anew(folder, options.calibration, anew, like=options.stats)
        table = work / f"{name}.jsonl"
        mofq("measure", folder, "--space", "w8a8", "--stats", stats, "-o", table)
        mofq("search", table, "--max-bits", "8.2", "-o", path)
    found = load_recipe(path)
    one = measured(options, folder, {"searched": found})["searched"]
    predicted = f"{found.kl_nats_per_token:.4f}"
    return [label, f"{one.bits_per_weight:.3f}", predicted, with_error(one.kl, one.kl_stderr)]


def folder_of(options: argparse.Namespace, label: str) -> Path:
    """The model as it is, or rewritten."""
    if label == "plain":
        return Path(options.model)
    folder = options.work / file_name(label)
    return rewritten(options.model, options.stats, folder, *METHODS[label])


def rewriting_cost(options: argparse.Namespace, folder: Path) -> Measured:
    """The rewritten model against the original, nothing quantized."""
    version = Version(str(folder), 16.0, lambda _model: load_model(folder))
    return measure_versions(reference_of(options), {str(folder): version})[str(folder)]


def measured(
    options: argparse.Namespace, folder: Path, recipes: Mapping[str, Recipe]
) -> dict[str, Measured]:
    """What recipes do to a model, on the text."""
    return measure_recipes(reference_of(options, model=folder), recipes)


def file_name(label: str) -> str:
    """A label as the name of a file."""
    return label.replace(", ", "-").replace(" ", "-")


if __name__ == "__main__":
    main()
