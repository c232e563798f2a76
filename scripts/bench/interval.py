"""Recipes from 2 to 8 bits of one model: what is predicted, with its interval, and measured.

    python scripts/bench/interval.py MODEL --calibration FILE --text FILE --work FOLDER

Some forty recipes, uniform, searched and random, of weights, activations and the KV cache, are
measured on another text than was calibrated on. Prints how many lie inside of the interval that is
predicted, and how far off predictions are. With --rows so many single rows of the table: one fusion
group under one scheme, and all others as they are. With --budgets also searches under so many
budgets of KL, with and without formats of fewer than 4 bits: whether the predicted recipe keeps the
budget, whether the proved one does, and how much larger it is than the smallest point of the
frontier that measures within it. What was measured is kept in the folder, and measured once.

``interval_fit.py`` makes the error models of predictions and of single rows from such folders.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mofq.decision import Budgets, Problem
from mofq.decision.choice import expand_chosen
from mofq.decision.model_error import ModelError, model_error, row_error
from mofq.decision.prediction import INTERVAL_STDERRS, Estimate, predict, with_model_error
from mofq.decision.problem import IntArray
from mofq.demo import demo_mixture_folder, demo_model_folder
from mofq.evidence.table import Table
from scripts.bench.interval_budgets import print_budgets
from scripts.bench.interval_recipes import (
    SPACE,
    MeasuredText,
    measured_text,
    prepared_table,
    searched_recipes,
    single_rows,
    whole_problem,
)
from scripts.shared.command import model_parser, parse_into_work, print_markdown, with_error

#: The worst is of what measures less [nats per token].
_SMALL = 0.1

_BUNDLED = {
    demo_model_folder().resolve(): "bundled",
    demo_mixture_folder().resolve(): "bundled mixture",
}


@dataclass(frozen=True, slots=True)
class Compared:
    """A recipe [nats per token]."""

    label: str
    expansion: float  #: of second order, cross-fitted
    expansion_stderr: float  #: of the sampled sequences
    measured: float
    measured_stderr: float  #: over windows
    has_flips: bool  #: changes of experts are predicted

    @property
    def predicted(self) -> Estimate:
        """As commands say it of a recipe."""
        return self._by(model_error(has_flips=self.has_flips))

    @property
    def predicted_row(self) -> Estimate:
        """As commands say it of a single row."""
        return self._by(row_error())

    def _by(self, model: ModelError) -> Estimate:
        return with_model_error(Estimate(self.expansion, self.expansion_stderr), model)

    @property
    def is_inside(self) -> bool:
        """Whether what was measured is inside of the interval, without any allowance."""
        return self.predicted.lower <= self.measured <= self.predicted.upper

    @property
    def is_inside_of_row(self) -> bool:
        """As `is_inside`, of a single row."""
        return self.predicted_row.lower <= self.measured <= self.predicted_row.upper

    @property
    def is_inside_of_noise(self) -> bool:
        """Whether it is with two standard errors of both, its own in quadrature."""
        both = math.hypot(self.predicted.stderr or 0.0, self.measured_stderr)
        return abs(self.predicted.value - self.measured) <= INTERVAL_STDERRS * both


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the tables."""
    options = parse_interval(__doc__, arguments)
    table = prepared_table(options)
    recipes = searched_recipes(table, path=options.work / "recipes.json", seed=0)
    problem = whole_problem(table)
    compared = []
    with measured_text(options, table) as text:
        for label, schemes in list(recipes.items())[: options.recipes]:
            choice_F = problem.choice_of(schemes)
            expansion = expand_chosen(problem, Budgets(), choice_F)
            compared.append(_compared(label, expansion, text, problem, choice_F))
        rows = [
            _compared(label, predict(problem, choice_F), text, problem, choice_F)
            for label, choice_F in single_rows(problem, options.rows)
        ]
        _write(options, table, compared, rows)
        print_recipes(compared)
        print_scores([(_model_name(options, table), compared)])
        if rows:
            print_rows(_model_name(options, table), rows)
        if options.budgets:
            print_budgets(table, text, count=options.budgets, points=options.points)


def parse_interval(
    documentation: str | None, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """The options of a folder of this script, None for the command line's own."""
    paths = (
        ("--calibration", "text file, or the name of a bundled text"),
        ("--text", "text to measure on"),
    )
    parser = model_parser(documentation, *paths, tokens=8192)
    parser.add_argument("--sequence-length", type=int, default=512, help="of both")
    parser.add_argument("--sequences", type=int, default=32, help="to calibrate on")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration's draws")
    parser.add_argument("--space", default=str(SPACE), help="search space to measure")
    parser.add_argument("--recipes", type=int, help="so many of them; all by default")
    parser.add_argument("--rows", type=int, default=0, help="of the table, each by itself")
    parser.add_argument("--budgets", type=int, default=0, help="of KL, in each space")
    parser.add_argument(
        "--points", type=int, help="of the frontier that are measured below each proved recipe; all"
    )
    return parse_into_work(parser, arguments)


def _compared(
    label: str, expansion: Estimate, text: MeasuredText, problem: Problem, choice_F: IntArray
) -> Compared:
    measured = text.measure(label, problem.schemes_of(choice_F))
    values = (expansion.value, expansion.stderr or 0.0, measured.kl, measured.stderr)
    return Compared(label, *values, has_flips=problem.flip_FC is not None)


def _write(
    options: argparse.Namespace,
    table: Table,
    compared: Sequence[Compared],
    rows: Sequence[Compared],
) -> None:
    content = {
        "model": _model_name(options, table),
        "calibration": str(options.calibration),
        "text": str(options.text),
        "tokens": options.tokens,
        "recipes": [asdict(one) for one in compared],
        "rows": [asdict(one) for one in rows],
    }
    (options.work / "interval.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _model_name(options: argparse.Namespace, table: Table) -> str:
    """The folder's; of what is bundled one that says so."""
    return _BUNDLED.get(Path(options.model).resolve(), table.header.model_name)


def print_recipes(compared: Sequence[Compared]) -> None:
    """One row for each, by what it measured."""
    rows = [
        [
            one.label,
            f"{one.expansion:.5f}",
            f"{one.predicted.value:.5f} ({one.predicted.lower:.5f} to {one.predicted.upper:.5f})",
            with_error(one.measured, one.measured_stderr, digits=5),
            f"{one.predicted.value / one.measured:.3f}",
            "" if one.is_inside else "outside",
        ]
        for one in sorted(compared, key=lambda one: one.measured)
    ]
    columns = ("recipe", "expansion", "predicted, 95 %", "measured", "ratio", "")
    print_markdown(columns, rows)


def print_scores(runs: Sequence[tuple[str, Sequence[Compared]]]) -> None:
    """How often what was measured is inside of the interval, and how far off predictions are."""
    rows = []
    for name, compared in runs:
        in_range = [one for one in compared if not one.predicted.is_out_of_range]
        ratio = np.array([one.predicted.value / one.measured for one in in_range])
        raw = np.array([one.expansion / one.measured for one in in_range])
        small = np.array([one.measured < _SMALL for one in in_range], dtype=np.bool_)
        row = [name, f"{len(in_range)} of {len(compared)}"]
        if in_range:
            row += [
                f"{np.mean([one.is_inside for one in in_range]):.0%}",
                f"{np.mean([one.is_inside_of_noise for one in in_range]):.0%}",
                f"{np.median(raw):.3f}",
                f"{np.median(ratio):.3f}",
            ]
        if small.any():
            row += [f"{np.abs(one[small] - 1).max():.0%}" for one in (raw, ratio)]
        rows.append([*row, *[""] * (8 - len(row))])
    heads = ("", "recipes in range", "inside", "with its noise", "median: expansion", "predicted")
    print_markdown((*heads, "worst below 0.1: expansion", "predicted"), rows)


def print_rows(name: str, rows: Sequence[Compared]) -> None:
    """How single rows follow what they measure; the interval is said without changes of experts."""
    ratio = np.array([one.predicted.value / one.measured for one in rows])
    logs = np.log([[one.predicted.value, one.measured] for one in rows])
    small = np.array([one.measured < _SMALL for one in rows])
    inside = "" if rows[0].has_flips else f"{np.mean([one.is_inside_of_row for one in rows]):.0%}"
    row = [
        name,
        str(len(rows)),
        f"{np.corrcoef(logs.T)[0, 1]:.4f}",
        f"{np.median(ratio):.3f}",
        f"{math.exp(float(np.log(ratio).std())):.2f}×",
        f"{np.abs(ratio[small] - 1).max():.0%}",
        inside,
    ]
    heads = ("", "single rows", "log-correlation", "median of predicted / measured", "spread")
    print_markdown((*heads, "worst below 0.1 nats", "inside"), [row])


if __name__ == "__main__":
    main()
