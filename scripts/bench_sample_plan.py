"""How many calibration sequences, how long, and how many label draws: by measurement.

    python scripts/bench_sample_plan.py MODEL --calibration FILE --text FILE --plot plan.png

Calibrates under several plans, measures the space of bench_prediction.py under each, and
compares the predictions of every plan, and of parts of its sequences, with the KL divergence
measured on another text; the file of measured KL is shared with bench_prediction.py. Also
compares three estimators: one square for each sequence, one for each chunk of 64 tokens, and
the one that mofq uses (one for each row of a weight, one for each token of an input).
Everything is kept in the folder --work; a second run continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from bench_calibration import SPACE, fill_table, run_calibration
from bench_report import SMALL_KL, markdown_table
from bench_versions import Pair, choose_pairs, uniform_recipes
from kl_truth import Truths, Version, measure_truths, open_truths, text_windows
from numpy.typing import NDArray
from prediction_scores import fit

from mofq.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.corpora import load_text
from mofq.layers import ModelLayers, find_layers
from mofq.search_space import load_search_space, offer_schemes
from mofq.table import Row, Table

FloatArray = NDArray[np.float64]

ESTIMATORS = ("by row and token", "by chunk of 64", "by sequence")


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """What a calibration keeps."""

    sequences: int
    sequence_length: int
    draws: int

    @property
    def name(self) -> str:
        """For files and tables."""
        draws = f" x {self.draws} draws" if self.draws > 1 else ""
        return f"{self.sequences} x {self.sequence_length}{draws}"


PLANS = (
    SamplePlan(16, 512, draws=1),
    SamplePlan(16, 256, draws=1),
    SamplePlan(64, 64, draws=1),
    SamplePlan(8, 512, draws=2),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Predictions from some of a plan's sequences; the mean over several such parts."""

    sequence_length: int
    draws: int
    sequences: int
    estimator: str
    log_correlation: float  #: of pairs
    pair_median_ratio: float
    pair_spread: float
    recipe_median_ratio: float  #: of uniform recipes of small KL
    recipe_median_error: float  #: of |predicted / measured - 1|
    recipe_worst_error: float

    @property
    def tokens(self) -> int:
        """Tokens whose inputs are kept."""
        return self.sequences * self.sequence_length


def main() -> None:
    """Run what is not there yet and print the comparison."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(options.model)
    layers = find_layers(checkpoint)
    tables = {plan: _table_of(plan, checkpoint, layers, options) for plan in PLANS}
    windows_NT = text_windows(
        checkpoint,
        load_text(options.text),
        windows=options.tokens // options.text_length,
        sequence_length=options.text_length,
    )
    path = options.truth or options.work / "truth.jsonl"
    truths = open_truths(path, index_sha256=checkpoint.index_sha256, windows_NT=windows_NT)
    offers = offer_schemes(load_search_space(SPACE), layers.groups, has_stats=True)
    pairs = choose_pairs(offers, options.pairs, seed=options.seed)
    recipes = [one.version for one in uniform_recipes(tables[PLANS[0]])]
    versions = [*(pair.version for pair in pairs), *recipes]
    measure_truths(truths, versions, checkpoint=checkpoint, layers=layers, path=path)
    recipes = [one for one in recipes if np.mean(truths.of(one)) < SMALL_KL]
    outcomes = [
        outcome
        for plan, table in tables.items()
        for outcome in plan_outcomes(plan, table, truths, pairs, recipes)
    ]
    if options.json:
        print(json.dumps([asdict(one) for one in outcomes], indent=1))
    else:
        print("\n".join(report_lines(outcomes, _truth_noise(truths, versions))))
    if options.plot:
        draw(outcomes, options.plot)


def _table_of(
    plan: SamplePlan, checkpoint: Checkpoint, layers: ModelLayers, options: argparse.Namespace
) -> Table:
    folder = options.work / plan.name.replace(" ", "")
    corpus = load_text(options.calibration, name="calibration")
    stats = run_calibration(checkpoint, layers, corpus, folder=folder, **asdict(plan))
    space = load_search_space(SPACE)
    path = folder.with_suffix(".jsonl")
    return fill_table(checkpoint, layers, space, stats=stats, path=path)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="text to measure the KL divergence on")
    parser.add_argument("--pairs", type=int, default=60, help="random (group, scheme) pairs")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, in windows")
    parser.add_argument("--text-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-sample-plan"))
    parser.add_argument("--truth", type=Path, help="file of measured KL (default: in --work)")
    parser.add_argument("--plot", type=Path, help="PNG or SVG to write")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    return parser.parse_args()


def plan_outcomes(
    plan: SamplePlan,
    table: Table,
    truths: Truths,
    pairs: Sequence[Pair],
    recipes: Sequence[Version],
) -> Iterator[Outcome]:
    """Every estimator on growing parts of a plan's sequences."""
    corpus = next(c for unit, c in table.measures if unit == "kl_nats_per_token")
    rows = {
        (row.group, row.scheme): row
        for row in table.rows
        if row.unit == "kl_nats_per_token" and row.corpus == corpus
    }
    for estimator in ESTIMATORS if plan == PLANS[0] else ESTIMATORS[:1]:
        kept = {key: sequence_errors(row, plan, estimator) for key, row in rows.items()}
        pair_PN = np.array([kept[pair.group, pair.scheme] for pair in pairs])
        recipe_RN = np.array([_sum_of(kept, one) for one in recipes])
        measured = [float(np.mean(truths.of(pair.version))) for pair in pairs]
        recipes_measured = [float(np.mean(truths.of(one))) for one in recipes]
        for count in part_sizes(plan.sequences):
            parts = [
                (
                    fit(pair_PN[:, part].mean(1), measured),
                    fit(recipe_RN[:, part].mean(1), recipes_measured),
                )
                for part in even_parts(plan.sequences, count)
            ]
            yield Outcome(
                plan.sequence_length,
                plan.draws,
                count,
                estimator,
                log_correlation=float(np.mean([p.log_correlation for p, _ in parts])),
                pair_median_ratio=float(np.mean([p.median_ratio for p, _ in parts])),
                pair_spread=float(np.mean([p.spread for p, _ in parts])),
                recipe_median_ratio=float(np.mean([r.median_ratio for _, r in parts])),
                recipe_median_error=float(np.mean([r.median_error for _, r in parts])),
                recipe_worst_error=float(np.mean([r.worst_error for _, r in parts])),
            )


def _sum_of(kept: Mapping[tuple[str, str], FloatArray], version: Version) -> FloatArray:
    return np.sum([kept[item] for item in version.schemes.items()], axis=0)


def sequence_errors(row: Row, plan: SamplePlan, estimator: str) -> FloatArray:
    """Nats per token of each sequence, label draws averaged.

    Args:
        row: In nats, with its samples.
        plan: That the row's stats were made by.
        estimator: One of `ESTIMATORS`.

    Returns:
        [sequences].
    """
    assert row.sample_errors is not None
    assert row.projections is not None
    samples = plan.sequences * plan.draws
    projection_NM = np.asarray(row.projections).reshape(samples, -1)
    length = plan.sequence_length
    errors_N = {
        "by row and token": np.asarray(row.sample_errors),
        "by chunk of 64": np.square(projection_NM).sum(1) / (2 * length),
        "by sequence": np.square(projection_NM.sum(1)) / (2 * length),
    }[estimator]
    return np.asarray(errors_N.reshape(plan.sequences, plan.draws).mean(1))


def part_sizes(sequences: int) -> list[int]:
    """The number of sequences and its halves, down to a sixteenth of it; at least 2."""
    return [sequences >> n for n in range(4, -1, -1) if sequences >> n >= 2]


def even_parts(sequences: int, count: int) -> list[slice]:
    """All ways to take every k-th of the sequences so that ``count`` are taken."""
    step = sequences // count
    return [slice(first, None, step) for first in range(step)]


def _truth_noise(truths: Truths, versions: Sequence[Version]) -> float:
    """Median relative standard error of what was measured, over its windows."""
    values = np.array([truths.of(one) for one in versions])
    stderr = values.std(axis=1, ddof=1) / values.shape[1] ** 0.5
    return float(np.median(stderr / values.mean(axis=1)))


def report_lines(outcomes: Sequence[Outcome], truth_noise: float) -> list[str]:
    """Everything as Markdown."""
    heads = [
        "length", "draws", "sequences", "tokens", "estimator", "log-correlation", "median ratio",
        "spread", "recipes: median ratio", "median off", "worst off",
    ]  # fmt: skip
    return [
        *markdown_table(heads, [_row(one) for one in outcomes]),
        "",
        f"The measured values have themselves a relative standard error of {truth_noise:.1%} "
        f"(median).",
    ]


def _row(one: Outcome) -> list[str]:
    return [
        str(one.sequence_length),
        str(one.draws),
        str(one.sequences),
        str(one.tokens),
        one.estimator,
        f"{one.log_correlation:.4f}",
        f"{one.pair_median_ratio:.3f}",
        f"{one.pair_spread:.3f}×",
        f"{one.recipe_median_ratio:.3f}",
        f"{one.recipe_median_error:.1%}",
        f"{one.recipe_worst_error:.1%}",
    ]


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Prediction error against tokens kept: pairs on the left, uniform recipes on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    lines: dict[tuple[int, int, str], list[Outcome]] = {}
    for one in outcomes:
        lines.setdefault((one.sequence_length, one.draws, one.estimator), []).append(one)
    for (length, draws, estimator), some in lines.items():
        label = f"{length} tokens" + (f", {draws} draws" if draws > 1 else "")
        label += "" if estimator == ESTIMATORS[0] else f", {estimator}"
        style = "o-" if estimator == ESTIMATORS[0] else "s--"
        tokens = [one.tokens for one in some]
        left.plot(tokens, [one.pair_spread for one in some], style, label=label)
        errors = [100 * one.recipe_median_error for one in some]
        right.plot(tokens, errors, style, label=label)
    left.set_title("pairs of fusion group and scheme")
    left.set_ylabel("spread of predicted / measured KL [factor]")
    right.set_title("uniform recipes")
    right.set_ylabel("median error of the predicted KL [%]")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("calibration tokens kept")
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
