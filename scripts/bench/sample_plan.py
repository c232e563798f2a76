"""How many calibration sequences, how many of them kept, how long, how many draws: by measurement.

    python scripts/bench/sample_plan.py MODEL --calibration FILE --text FILE --plot plan.png

Takes finished stats of the calibration text (--stats), or calibrates 32 sequences of 512 tokens
(--sequence-length) and keeps 8. Parts of these are stats of smaller plans; other lengths and
draws are calibrated.
Measures a small space under each plan and compares the predictions with the KL divergence
measured on windows of the calibration text between its sequences (the same kind of text), and
of another text; the file of measured KL is shared with prediction.py. Everything is kept
in the folder --work; a second run continues.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from mofq.evidence.calibration.gains import gains_path
from mofq.evidence.calibration.sequence_file import sequence_path
from mofq.evidence.calibration.stats import Stats, finish_stats, open_plan, read_stats
from mofq.evidence.corpora import load_text
from mofq.evidence.spaces import load_search_space, offer_schemes
from mofq.evidence.table import Table
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import ModelLayers, find_layers
from scripts.bench.calibration import SPACE, fill_table, run_calibration
from scripts.bench.prediction_recipes import Pair, choose_pairs, uniform_recipes
from scripts.bench.prediction_report import ANOTHER, SAME, SMALL_KL
from scripts.shared.command import markdown_table, script_parser
from scripts.shared.kl_truth import Truths, Version, measure_truths, text_windows, windows_between
from scripts.shared.prediction_scores import fit

PLAN_SPACE = Path(__file__).parent / "plan_space.yaml"


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """What a calibration runs and keeps."""

    sequences: int
    keep: int
    shorter: int = 1  #: how many times shorter than --sequence-length its sequences are
    draws: int = 1

    @property
    def name(self) -> str:
        """For files and tables."""
        length = f", 1/{self.shorter} as long" if self.shorter > 1 else ""
        draws = f", {self.draws} draws" if self.draws > 1 else ""
        return f"{self.keep} of {self.sequences}{length}{draws}"

    @property
    def file_name(self) -> str:
        """Without what a path should not have."""
        return f"{self.keep}-of-{self.sequences}-shorter-{self.shorter}-draws-{self.draws}"

    @property
    def kept(self) -> float:
        """What is kept, in sequences of full length."""
        return self.keep / self.shorter


BASE = SamplePlan(32, 8)
#: Parts of the base: the same sequences, fewer.
PARTS = (
    *(SamplePlan(2, 2), SamplePlan(4, 4), SamplePlan(8, 8)),
    *(SamplePlan(8, 2), SamplePlan(16, 4), SamplePlan(16, 8)),
    *(SamplePlan(32, 2), SamplePlan(32, 4)),
)
#: Calibrated by themselves; each keeps as many tokens and draws as the base.
OTHERS = (
    SamplePlan(16, 16, shorter=2),
    SamplePlan(64, 64, shorter=8),
    SamplePlan(4, 4, draws=2),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a plan's predictions compare with what was measured on one text."""

    plan: SamplePlan
    text: str
    log_correlation: float  #: of pairs
    pair_median_ratio: float
    pair_spread: float
    recipe_median_ratio: float  #: of uniform recipes of small KL
    recipe_worst_error: float  #: of |predicted / measured - 1|


def main() -> None:
    """Run what is not there yet and print the comparison."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(options.model)
    layers = find_layers(checkpoint)
    tables = dict(_tables(checkpoint, layers, options))
    offers = offer_schemes(load_search_space(SPACE), layers.groups, has_stats=True)
    schemes = {scheme.name for scheme in load_search_space(PLAN_SPACE).schemes}
    pairs = [p for p in choose_pairs(offers, options.pairs, seed=0) if p.scheme in schemes]
    recipes = [one.version for one in uniform_recipes(tables[BASE])]
    versions = [*(pair.version for pair in pairs), *recipes]
    outcomes = []
    for text, windows_NT in _texts(checkpoint, options).items():
        path = options.truth or options.work / "truth.jsonl"
        truths = measure_truths(
            windows_NT, versions, checkpoint=checkpoint, layers=layers, path=path
        )
        outcomes += [
            outcome_of(plan, table, truths, pairs, recipes, text=text)
            for plan, table in tables.items()
        ]
    if options.json:
        print(json.dumps([asdict(one) for one in outcomes], indent=1))
    else:
        print("\n".join(report_lines(outcomes)))
    if options.plot:
        draw(outcomes, options.plot)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="text to measure the KL divergence on")
    parser.add_argument("--stats", type=Path, help="finished stats: 8 of 32 sequences kept")
    parser.add_argument("--pairs", type=int, default=60, help="random (group, scheme) pairs")
    parser.add_argument("--sequence-length", type=int, default=512, help="of windows too")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text, in windows")
    parser.add_argument("--parts-only", action="store_true", help="calibrate no other plans")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-sample-plan"))
    parser.add_argument("--truth", type=Path, help="file of measured KL (default: in --work)")
    parser.add_argument("--plot", type=Path, help="PNG or SVG to write")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    return parser.parse_args()


def _tables(
    checkpoint: Checkpoint, layers: ModelLayers, options: argparse.Namespace
) -> Iterator[tuple[SamplePlan, Table]]:
    corpus = load_text(options.calibration, name="calibration")
    space = load_search_space(PLAN_SPACE)

    def calibrated(plan: SamplePlan) -> Stats:
        return run_calibration(
            checkpoint,
            layers,
            corpus,
            folder=options.work / plan.file_name,
            sequences=plan.sequences,
            keep=plan.keep,
            sequence_length=options.sequence_length // plan.shorter,
            draws=plan.draws,
        )

    base = calibrated(BASE) if options.stats is None else read_stats(options.stats)
    stats = {BASE: base} | {
        plan: part_of(base, plan, options.work / plan.file_name) for plan in PARTS
    }
    if not options.parts_only:
        stats |= {plan: calibrated(plan) for plan in OTHERS}
    for plan, one in stats.items():
        path = options.work / f"{plan.file_name}.jsonl"
        yield plan, fill_table(checkpoint, layers, space, stats=one, path=path)


def part_of(base: Stats, plan: SamplePlan, folder: Path) -> Stats:
    """The stats that a calibration of fewer of the same sequences would have written.

    Args:
        base: Whose kept sequences are the middle ones of clusters of one size.
        plan: Of at most as many sequences, and at most as many kept.
        folder: Gets links to the base's files.
    """
    if (folder / "stats.json").exists():
        return read_stats(folder)
    corpus = base.plan.corpora[0]
    whole = plan.keep == plan.sequences
    part = replace(corpus, sequences=plan.sequences, kept=None if whole else plan.keep)
    step = len(corpus.kept_indices) // plan.keep
    kept = corpus.kept_indices[(step - 1) // 2 :: step]
    others = _others(corpus.sequences, kept, plan.sequences)
    with open_plan(folder, replace(base.plan, corpora=(part,))):
        (folder / part.name).mkdir(exist_ok=True)
        for number, cluster in enumerate(part.clusters):
            middle = part.kept_indices[number]
            own = [n for n in others if n * plan.keep // corpus.sequences == number]
            taken = dict(zip((n for n in cluster if n != middle), own, strict=True))
            taken[middle] = kept[number]
            _link(sequence_path, base, folder, {middle: kept[number]})
            _link(gains_path, base, folder, taken)
        return finish_stats(folder, replace(base.plan, corpora=(part,)))


def _others(sequences: int, kept: Sequence[int], count: int) -> list[int]:
    """Sequences beside the kept ones, as many for each, so that ``count`` are taken."""
    found = []
    size, wanted = sequences // len(kept), count // len(kept) - 1
    for number, middle in enumerate(kept):
        rest = [n for n in range(number * size, (number + 1) * size) if n != middle]
        found += [rest[(2 * n + 1) * len(rest) // (2 * wanted)] for n in range(wanted)]
    return found


def _link(path_of: object, base: Stats, folder: Path, numbers: dict[int, int]) -> None:
    assert callable(path_of)
    corpus = base.plan.corpora[0].name
    for new, old in numbers.items():
        target = path_of(folder, corpus, new)
        target.unlink(missing_ok=True)
        os.link(path_of(base.folder, corpus, old), target)


def _texts(checkpoint: Checkpoint, options: argparse.Namespace) -> dict[str, Tensor]:
    length = options.sequence_length
    windows = options.tokens // length
    return {
        ANOTHER: text_windows(
            checkpoint, load_text(options.text), windows=windows, sequence_length=length
        ),
        SAME: windows_between(
            checkpoint,
            load_text(options.calibration),
            sequences=BASE.sequences,
            windows=windows,
            sequence_length=length,
        ),
    }


def outcome_of(
    plan: SamplePlan,
    table: Table,
    truths: Truths,
    pairs: Sequence[Pair],
    recipes: Sequence[Version],
    *,
    text: str,
) -> Outcome:
    """Compare one plan's predictions with what was measured."""
    corpus = next(c for unit, c in table.measures if unit == "kl_nats_per_token")
    errors = {
        (row.group, row.scheme): row.error
        for row in table.rows
        if row.unit == "kl_nats_per_token" and row.corpus == corpus
    }
    of_pairs = fit(
        [errors[pair.group, pair.scheme] for pair in pairs],
        [float(np.mean(truths.of(pair.version))) for pair in pairs],
    )
    small = [one for one in recipes if np.mean(truths.of(one)) < SMALL_KL]
    of_recipes = fit(
        [sum(errors[item] for item in one.schemes.items()) for one in small],
        [float(np.mean(truths.of(one))) for one in small],
    )
    return Outcome(
        plan,
        text,
        log_correlation=of_pairs.log_correlation,
        pair_median_ratio=of_pairs.median_ratio,
        pair_spread=of_pairs.spread,
        recipe_median_ratio=of_recipes.median_ratio,
        recipe_worst_error=of_recipes.worst_error,
    )


def report_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Everything as Markdown."""
    heads = ["plan", "log-correlation", "median ratio", "spread", "recipes: ratio", "worst off"]
    lines = []
    for text in dict.fromkeys(one.text for one in outcomes):
        rows = [_row(one) for one in outcomes if one.text == text]
        lines += [f"Measured on {text}:", "", *markdown_table(heads, rows), ""]
    return lines[:-1]


def _row(one: Outcome) -> list[str]:
    return [
        one.plan.name,
        f"{one.log_correlation:.4f}",
        f"{one.pair_median_ratio:.3f}",
        f"{one.pair_spread:.3f}×",
        f"{one.recipe_median_ratio:.3f}",
        f"{one.recipe_worst_error:.1%}",
    ]


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Spread of pairs against sequences kept, one line for each number of sequences run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = list(dict.fromkeys(one.text for one in outcomes))
    figure, all_axes = pyplot.subplots(
        1, len(texts), figsize=(11, 4.5), sharey=True, layout="constrained"
    )
    for axes, text in zip(np.atleast_1d(all_axes), texts, strict=True):
        some = [one for one in outcomes if one.text == text]
        parts = [one for one in some if one.plan in (BASE, *PARTS)]
        lines = {"all that run": [one for one in parts if one.plan.keep == one.plan.sequences]}
        for run in sorted({one.plan.sequences for one in parts} - {2, 4}):
            of_run = [one for one in parts if one.plan.sequences == run]
            lines[f"{run} run"] = sorted(of_run, key=lambda one: one.plan.keep)
        for label, line in lines.items():
            style = "s--" if label == "all that run" else "o-"
            kept = [one.plan.kept for one in line]
            axes.plot(kept, [one.pair_spread for one in line], style, label=label)
        for one in some:
            if one.plan in OTHERS:
                label = one.plan.name
                axes.plot([one.plan.kept], [one.pair_spread], "x", label=label)
        axes.set_title(f"measured on {text}".partition(",")[0], fontsize="medium")
        axes.set_xscale("log", base=2)
        axes.set_xticks([2, 4, 8], ["2", "4", "8"])
        axes.set_xlabel("sequences of full length kept")
        axes.grid(alpha=0.3)
        axes.legend()
    np.atleast_1d(all_axes)[0].set_ylabel("spread of predicted / measured KL of pairs [factor]")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
