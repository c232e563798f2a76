"""The table of 5.0 and 6.0 true bits per weight: every way to choose, measured on one text.

    python scripts/bench/results_bits.py MODEL --calibration FILE --text FILE --work FOLDER

Weight-only. The search spaces of ``SPACES`` are measured into one table;
calibration and Optuna's trials use one text, the measured KL another. What is in the work
folder already is not made again: a table or stats from elsewhere can be put there, and a run
that stopped goes on. Rows that may take asymmetric integers in groups of 32 or fewer stand
apart: the weights of SmolLM2 were once on such a grid, which flatters them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mofq.decision import Budgets, Problem, Request, recipe_from_table, request_problem
from mofq.decision.make_recipe import MadeBy
from mofq.decision.problem import IntArray
from mofq.decision.recipe import Recipe, RecipeResult, load_recipe, write_recipe
from mofq.decision.uniform import uniform_recipes
from mofq.evidence.standard_error import standard_errors
from mofq.evidence.table import Table, read_table
from scripts.shared.command import (
    calibrate,
    model_parser,
    mofq,
    optional,
    parse_into_work,
    print_markdown,
)
from scripts.shared.reproduction import measure_recipes, reference_of

ASYMMETRIC = Path(__file__).with_name("results_bits_asymmetric.yaml")
SPACES = (
    "w4w8_mixed",
    "serving",
    "serving_fitted",
    str(ASYMMETRIC),
)
ENGINE = "vllm-hopper"
BUDGETS = (5.0, 6.0)
#: Eight short windows of the calibration text: a trial that loses is given up after four.
OPTUNA_TEXT = ("--tokens", "2048", "--sequence-length", "256")
#: Best uniform schemes within a budget that are measured.
_UNIFORM = 2


@dataclass(frozen=True, slots=True)
class Searched:
    """A recipe that `mofq search` makes at every budget."""

    label: str
    options: tuple[str, ...]


SEARCHED = {
    "exact": Searched("**exact, nats**, `w4w8_mixed`", ("--space", "w4w8_mixed")),
    "exact-vllm-fitted": Searched(
        f"**exact, nats**, what {ENGINE} serves, `serving_fitted`: codes fitted",
        ("--engine", ENGINE, "--space", "serving_fitted"),
    ),
    "exact-vllm": Searched(
        f"**exact, nats**, what {ENGINE} serves, `serving`",
        ("--engine", ENGINE, "--space", "serving"),
    ),
    "weight": Searched(
        "exact, weight error, `w4w8_mixed`",
        ("--space", "w4w8_mixed", "--unit", "relative_weight_error"),
    ),
    "tensor": Searched(
        "exact, tensor MSE, `w4w8_mixed`", ("--space", "w4w8_mixed", "--unit", "tensor_mse")
    ),
    "greedy": Searched(
        "greedy (MoFQ), tensor MSE, `w4w8_mixed`",
        ("--space", "w4w8_mixed", "--unit", "tensor_mse", "--solver", "greedy"),
    ),
    "asymmetric": Searched("asymmetric INT4 g32 too: exact, nats", ("--space", ASYMMETRIC.stem)),
    "asymmetric-vllm": Searched(
        f"asymmetric INT4 g32 too: exact, nats, what {ENGINE} serves",
        ("--space", ASYMMETRIC.stem, "--engine", ENGINE),
    ),
}


def random_recipe(table: Table, problem: Problem, bits: float, *, seed: int) -> Recipe:
    """Schemes drawn at random that fill a budget: what a choice without knowledge costs.

    Each group draws among all of its schemes; then groups drawn at random move to a smaller
    or larger scheme, until the size is within one part in two hundred below the budget.
    """
    rng = np.random.default_rng(seed)
    options = [np.array(list(problem.options_of(g))) for g in range(len(problem.groups))]
    choice_F: IntArray = np.array([rng.choice(one) for one in options], dtype=np.int64)
    limit = bits * problem.weights / 8
    while not 0.995 * limit <= problem.bytes_of(choice_F) <= limit:
        is_over = problem.bytes_of(choice_F) > limit
        group = int(rng.integers(len(options)))
        here = problem.bytes_P[choice_F[group]]
        sizes = problem.bytes_P[options[group]]
        better = options[group][sizes < here] if is_over else options[group][sizes > here]
        if len(better):
            choice_F[group] = rng.choice(better)
    made_by: MadeBy = {"solver": "random", "seed": seed, "table_sha256": table.sha256}
    schemes = problem.schemes_of(choice_F)
    result = RecipeResult(bits_per_weight=8 * problem.bytes_of(choice_F) / problem.weights)
    return recipe_from_table(
        table, schemes, made_by=made_by, budget={"bits_per_weight": bits}, result=result
    )


def make_table(options: argparse.Namespace) -> Path:
    """Calibrate and measure, as far as that is not done."""
    table = Path(options.work / "table.jsonl")
    calibrate(options.model, [f"en={options.calibration}"], options.stats)
    for space in SPACES:
        arguments = ("--space", space, "--stats", options.stats)
        mofq("measure", options.model, *arguments, "-o", table)
    return table


def search_all(options: argparse.Namespace, table: Path, bits: float) -> dict[str, Path]:
    """Label -> recipe file, of all solvers but Optuna."""
    found = {}
    for name, one in SEARCHED.items():
        path = options.work / f"{name}-{bits}.yaml"
        mofq("search", table, "--max-bits", bits, *one.options, "-o", path)
        found[one.label] = path
    content = read_table(table)
    request = Request(Budgets(), space="w4w8_mixed")
    problem = request_problem(content, request)
    for seed in range(options.random):
        path = options.work / f"random-{seed}-{bits}.yaml"
        write_recipe(random_recipe(content, problem, bits, seed=seed), path)
        found[f"random, `w4w8_mixed`, seed {seed}"] = path
    every: dict[str, Recipe] = {}
    for space in SPACES[:-1]:
        every |= uniform_recipes(content, replace(request, space=space))
    fitting = [name for name, one in every.items() if (one.bits_per_weight or 99.0) <= bits]
    fitting.sort(key=lambda name: every[name].kl_nats_per_token or 0.0)
    for name in fitting[:_UNIFORM]:
        path = options.work / f"uniform-{name}.yaml"
        write_recipe(every[name], path)
        found[f"uniform `{name}`"] = path
    return found


def search_optuna(options: argparse.Namespace, table: Path, bits: float) -> dict[str, Path]:
    """The measured search; its study is kept, and goes on where it stopped."""
    path = options.work / f"optuna-{bits}.yaml"
    if not path.exists():
        text = ("--model", options.model, "--text", options.calibration, *OPTUNA_TEXT)
        how = ("--solver", "optuna", "--trials", options.trials, *text)
        limit = ("--space", "w4w8_mixed", "--max-bits", bits)
        mofq("search", table, *limit, *how, "-o", path)
    return {f"optuna, {options.trials} trials, `w4w8_mixed`": path}


def row(label: str, recipe: Recipe, windows: Sequence[float], best: Sequence[float]) -> list[str]:
    """One line of the table: the KL, and how much more it is than the best one's, paired."""
    more = np.subtract(windows, best)
    return [
        label,
        f"{recipe.bits_per_weight or 0:.3f}",
        optional(recipe.kl_nats_per_token),
        f"{np.mean(windows):.4f} ± {standard_errors(np.array(windows)):.4f}",
        f"{more.mean():+.4f} ± {standard_errors(more):.4f}" if more.any() else "",
    ]


def print_tables(options: argparse.Namespace, paths: Sequence[tuple[float, str, Path]]) -> None:
    """Measure what is not measured yet, and print a table for each budget."""
    recipes = {str(path): load_recipe(path) for _, _, path in paths}
    done = measure_recipes(reference_of(options), recipes, stats=options.stats)
    columns = ["bits/weight", "KL predicted", "KL measured", "against exact"]
    for bits in BUDGETS:
        best = done[str(options.work / f"exact-{bits}.yaml")].windows
        rows = [
            row(label, recipes[str(path)], done[str(path)].windows, best)
            for limit, label, path in paths
            if limit == bits
        ]
        print_markdown([f"at most {bits} bits", *columns], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the recipes, measure them, print the tables."""
    paths = (
        ("--calibration", "text file; for Optuna's trials too"),
        ("--text", "text file to measure on"),
    )
    parser = model_parser(__doc__, *paths, tokens=8192)
    parser.add_argument("--stats", type=Path, help="of `mofq calibrate`, if they are there")
    parser.add_argument("--trials", type=int, default=60, help="of Optuna; 0: none")
    parser.add_argument("--random", type=int, default=3, help="random recipes")
    options = parse_into_work(parser, arguments)
    options.stats = options.stats or options.work / "stats"
    table = make_table(options)
    made: list[tuple[float, str, Path]] = []
    for bits in BUDGETS:
        found = search_all(options, table, bits)
        if options.trials:
            found |= search_optuna(options, table, bits)
        made += [(bits, label, path) for label, path in found.items()]
    print_tables(options, made)


if __name__ == "__main__":
    main()
