"""How far statistics and measured KLs in bfloat16 are from those in float32.

    python -m scripts.bench.dtypes MODEL --calibration FILE --text FILE --work FOLDER

Calibrates a model in both dtypes on the same windows, measures the same schemes with either,
decides on both tables for the same bits, and validates uniform schemes and the float32 decision in
both. Printed are, for each scheme, rows of bfloat16 over rows of float32 (their sum over fusion
groups, the median row, the tenth and ninetieth percentile, how many lie within the row's own
standard error); how many fusion groups get another scheme, and what that costs by the float32
table; and KLs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mofq.api import Budget, Running, Windows, search, validate
from mofq.decision import KL_UNIT
from mofq.decision.recipe import Recipe
from mofq.decision.uniform import uniform_recipe
from mofq.evidence.table import Row, read_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from scripts.shared.command import calibrate, model_parser, mofq, parse_into_work, print_markdown

_DTYPES = ("float32", "bfloat16")
_SPACE = Path(__file__).with_suffix(".yaml")
_UNIFORM = ("int8.channel+int8.token", "int4.g32@mse", "int3.g32@mse")
_BITS = 5.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate, measure, decide and validate in both, and print three tables."""
    needed = (("--calibration", "text file"), ("--text", "another text file, to validate on"))
    parser = model_parser(__doc__, *needed, tokens=2048)
    parser.add_argument("--sequence-length", type=int, default=512, help="of calibration")
    options = parse_into_work(parser, arguments)
    tables, length = {}, ("--sequence-length", options.sequence_length)
    for dtype in _DTYPES:
        stats, tables[dtype] = options.work / f"stats-{dtype}", options.work / f"{dtype}.jsonl"
        named = [f"text={options.calibration}"]
        calibrate(options.model, named, stats, "--dtype", dtype, *length)
        mofq("measure", options.model, "--space", _SPACE, "--stats", stats, "-o", tables[dtype])
    _print_rows(*(_rows(tables[dtype]) for dtype in _DTYPES))
    recipes = {dtype: _decided(tables[dtype]) for dtype in _DTYPES}
    _print_decisions(recipes, _rows(tables["float32"]))
    checkpoint = open_checkpoint(options.model)
    layers = find_layers(checkpoint)
    candidates = {name: uniform_recipe(checkpoint, layers, name) for name in _UNIFORM}
    candidates[f"decided, {_BITS:g} bits"] = recipes["float32"]
    _print_kls(options.model, candidates, options.text, tokens=options.tokens)


def _rows(table: Path) -> dict[tuple[str, str], Row]:
    return {
        (row.group, row.scheme): row
        for row in read_table(table).rows
        if row.unit == KL_UNIT and row.scheme != "bf16"
    }


def _print_rows(full: dict[tuple[str, str], Row], half: dict[tuple[str, str], Row]) -> None:
    lines = []
    for scheme in dict.fromkeys(scheme for _, scheme in full):
        pairs = [(full[key], half[key]) for key in full if key[1] == scheme]
        ratio_G = np.array([b.error / a.error for a, b in pairs])
        total = sum(b.error for _, b in pairs) / sum(a.error for a, _ in pairs)
        near = np.mean([abs(b.error - a.error) <= (a.stderr or 0.0) for a, b in pairs])
        low, middle, high = np.quantile(ratio_G, (0.1, 0.5, 0.9))
        lines.append(
            [scheme, f"{total:.4f}", f"{middle:.4f}", f"{low:.3f} to {high:.3f}", f"{near:.0%}"]
        )
    print_markdown(
        ("scheme", "sum of rows", "median row", "tenth to ninetieth", "within its error"), lines
    )


def _decided(table: Path) -> Recipe:
    return search(table, budget=Budget(max_bits=_BITS)).decision.recipe


def _print_decisions(recipes: dict[str, Recipe], rows: dict[tuple[str, str], Row]) -> None:
    full, half = ({group.name: group.scheme for group in recipes[one].groups} for one in _DTYPES)
    other = [name for name, scheme in full.items() if half[name] != scheme]

    def cost(chosen: dict[str, str]) -> float:
        return sum(rows[name, one].error for name, one in chosen.items() if one != "bf16")

    said = f"{len(other)} of {len(full)} fusion groups get another scheme at {_BITS:g} bits"
    ratio = cost(half) / cost(full)
    print(
        f"{said}; by the float32 table the choice of bfloat16 costs {ratio:.4f} of the other's.\n"
    )


def _print_kls(model: str, candidates: dict[str, Recipe], text: str, *, tokens: int) -> None:
    windows = Windows(tokens=tokens)
    lines = []
    for name, recipe in candidates.items():
        a, b = (
            validate(model, recipe, text, windows=windows, running=Running(dtype=dtype)).worst
            for dtype in _DTYPES
        )
        full, half = a.kl_nats_per_token, b.kl_nats_per_token
        cells = [f"{one.kl_nats_per_token:.5f} ± {one.kl_stderr or 0:.5f}" for one in (a, b)]
        lines.append([name, *cells, f"{half / full:.4f}", f"{half - full:+.6f}"])
    print_markdown(("recipe", *_DTYPES, "ratio", "difference"), lines)


if __name__ == "__main__":
    main()
