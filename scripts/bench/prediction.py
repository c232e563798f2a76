"""Compare the KL divergence that mofq predicts with the one that is measured.

    python scripts/bench/prediction.py MODEL --calibration FILE --text FILE [--stats DIR]

Calibrates on one text (or takes --stats), measures a space of schemes from INT8 per channel
to FP4 per channel, for weights, activations and both, and compares the predictions with the
KL divergence really measured on another text: of random (fusion group, scheme) pairs, of
uniform recipes, and of mixed ones. With --same-text also on windows of the calibration text
that lie between the sequences of the calibration: the same kind of text, and none of it seen.
Prints how other scores rank the same pairs, and how long `calibrate` and `measure` take.
Everything is kept in the folder --work: a second run continues, and computes nothing twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from mofq.evidence.calibration.stats import Stats, read_stats, write_json
from mofq.evidence.corpora import load_text
from mofq.evidence.spaces import load_search_space, offer_schemes
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import ModelLayers, find_layers
from mofq.numbers.schemes import parse_scheme
from scripts.bench.calibration import (
    SPACE,
    CalibrationTime,
    calibration_time,
    fill_table,
    measure_time,
    note,
    run_calibration,
)
from scripts.bench.prediction_recipes import Pair, choose_pairs, mixed_recipes, uniform_recipes
from scripts.bench.prediction_report import ANOTHER, SAME, Result, report_lines, report_values
from scripts.shared.command import script_parser
from scripts.shared.kl_truth import measure_truths, text_windows, windows_between
from scripts.shared.prediction_scores import OtherScores, other_scores


def main() -> None:
    """Run what is not there yet and print the comparison."""
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(options.model)
    layers = find_layers(checkpoint)
    space = load_search_space(options.space)
    offers = offer_schemes(space, layers.groups, has_stats=True)
    pairs = choose_pairs(offers, options.pairs, seed=options.seed)
    windows_NT = text_windows(
        checkpoint,
        load_text(options.text),
        windows=options.tokens // options.sequence_length,
        sequence_length=options.sequence_length,
    )
    measure_kl = partial(
        measure_truths,
        checkpoint=checkpoint,
        layers=layers,
        path=options.truth or options.work / "truth.jsonl",
    )
    if options.pairs_only:
        measure_kl(windows_NT, [pair.version for pair in pairs])
        return
    stats = _stats(checkpoint, layers, options)
    path = options.work / "table.jsonl"
    table = fill_table(checkpoint, layers, space, stats=stats, path=path)
    recipes = [*uniform_recipes(table), *mixed_recipes(table, seed=options.seed)]
    versions = [*(pair.version for pair in pairs), *(one.version for one in recipes)]
    truths = {ANOTHER: measure_kl(windows_NT, versions)}
    if options.same_text:
        truths[SAME] = measure_kl(_windows_between(checkpoint, stats, options), versions)
    result = Result(
        table=table,
        truths=truths,
        pairs=tuple(pairs),
        others=tuple(_score_otherwise(checkpoint, layers, stats, pairs, options.work)),
        recipes=tuple(recipes),
        calibration_time=_calibration_time(checkpoint, layers, options),
        measure_time=measure_time(path),
        stats_bytes=sum(f.stat().st_size for f in stats.folder.rglob("*") if f.is_file()),
    )
    if options.json:
        print(json.dumps(report_values(result), indent=1))
    else:
        print("\n".join(report_lines(result)))


def _windows_between(checkpoint: Checkpoint, stats: Stats, options: argparse.Namespace) -> Tensor:
    """Windows of the calibration text that the stats were not made from."""
    return windows_between(
        checkpoint,
        load_text(options.calibration),
        sequences=stats.plan.corpora[0].sequences,
        windows=options.tokens // options.sequence_length,
        sequence_length=stats.plan.sequence_length,
    )


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="text to measure the KL divergence on")
    parser.add_argument("--stats", type=Path, help="finished stats of the calibration text")
    parser.add_argument("--space", default=str(SPACE), help="search space to measure")
    parser.add_argument("--pairs", type=int, default=60, help="random (group, scheme) pairs")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text, in windows")
    parser.add_argument("--sequences", type=int, default=32, help="to calibrate on")
    parser.add_argument("--keep", type=int, default=8, help="of how many samples are kept")
    parser.add_argument("--timed-sequences", type=int, default=4, help="to time calibration on")
    parser.add_argument("--sequence-length", type=int, default=512, help="of both")
    parser.add_argument("--seed", type=int, default=0, help="of pairs and random recipes")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-prediction"))
    parser.add_argument("--truth", type=Path, help="file of measured KL (default: in --work)")
    parser.add_argument("--pairs-only", action="store_true", help="only measure the pairs' KL")
    parser.add_argument(
        "--same-text",
        action="store_true",
        help="measure on the rest of the calibration text too",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser.parse_args()


def _stats(checkpoint: Checkpoint, layers: ModelLayers, options: argparse.Namespace) -> Stats:
    """The stats that were given, or those of the work folder, calibrated where need be."""
    if options.stats is not None:
        return read_stats(options.stats)
    return run_calibration(
        checkpoint,
        layers,
        load_text(options.calibration),
        folder=options.work / "stats",
        sequences=options.sequences,
        keep=options.keep,
        sequence_length=options.sequence_length,
    )


def _calibration_time(
    checkpoint: Checkpoint, layers: ModelLayers, options: argparse.Namespace
) -> CalibrationTime:
    path = options.work / "calibration-time.json"
    if not path.exists():
        time = calibration_time(
            checkpoint,
            layers,
            load_text(options.calibration),
            sequences=options.timed_sequences,
            sequence_length=options.sequence_length,
        )
        write_json(path, asdict(time))
    return CalibrationTime(**json.loads(path.read_text("utf-8")))


def _score_otherwise(
    checkpoint: Checkpoint, layers: ModelLayers, stats: Stats, pairs: Sequence[Pair], work: Path
) -> list[OtherScores]:
    """What other methods say of the pairs; kept in the work folder."""
    path = work / "other-scores.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    known = kept["scores"] if kept.get("stats") == stats.sha256 else {}
    groups = {group.name: group for group in layers.groups}
    for done, pair in enumerate(pairs):
        if pair.version.label not in known:
            scheme = parse_scheme(pair.scheme)
            known[pair.version.label] = asdict(
                other_scores(checkpoint, stats, groups[pair.group], scheme)
            )
            note("other scores", done + 1, len(pairs))
    write_json(path, {"stats": stats.sha256, "scores": known})
    return [OtherScores(**known[pair.version.label]) for pair in pairs]


if __name__ == "__main__":
    main()
