"""The tables that prediction.py prints. A part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mofq.evidence.standard_error import standard_error
from mofq.evidence.table import Row, Table
from scripts.bench.calibration import CalibrationTime, MeasureTime
from scripts.bench.prediction_recipes import KINDS, Pair, PredictedRecipe
from scripts.shared.command import markdown_table, optional
from scripts.shared.kl_truth import Truths
from scripts.shared.prediction_scores import Fit, OtherScores, fit, rank_correlation

#: Which text was measured on.
ANOTHER = "another text"
SAME = "the calibration text, between the sequences of the calibration"

#: Recipes that lose more than this are outside of what a second-order prediction promises.
SMALL_KL = 0.1


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that was predicted and measured."""

    table: Table
    truths: Mapping[str, Truths]  #: text -> what was measured on it
    pairs: tuple[Pair, ...]
    others: tuple[OtherScores, ...]  #: of each pair
    recipes: tuple[PredictedRecipe, ...]
    calibration_time: CalibrationTime
    measure_time: MeasureTime | None
    stats_bytes: int


@dataclass(frozen=True, slots=True)
class PairResult:
    """One pair under every score."""

    group: str
    scheme: str
    kind: str
    measured: float  #: nats per token
    measured_stderr: float
    predicted: float
    predicted_stderr: float
    relative_weight_error: float
    output_mse: float
    weight_mse: float
    diagonal_fisher: float


@dataclass(frozen=True, slots=True)
class RecipeResult:
    """One recipe for the whole model; all in nats per token."""

    label: str
    is_uniform: bool
    bits_per_weight: float
    measured: float
    measured_stderr: float
    predicted: float
    predicted_stderr: float


def pair_results(result: Result, text: str) -> list[PairResult]:
    """Measured and predicted values of every pair on one text."""
    corpus = next(c for unit, c in result.table.measures if unit == "kl_nats_per_token")
    rows: dict[tuple[str, str, str], Row] = {
        (row.group, row.scheme, row.unit): row
        for row in result.table.rows
        if row.corpus in (None, corpus)
    }
    results = []
    for pair, other in zip(result.pairs, result.others, strict=True):
        nats = rows[pair.group, pair.scheme, "kl_nats_per_token"]
        measured, stderr = _mean(result.truths[text].of(pair.version))
        results.append(
            PairResult(
                pair.group,
                pair.scheme,
                pair.kind,
                measured=measured,
                measured_stderr=stderr,
                predicted=nats.error,
                predicted_stderr=nats.stderr or 0.0,
                relative_weight_error=rows[pair.group, pair.scheme, "relative_weight_error"].error,
                output_mse=rows[pair.group, pair.scheme, "output_mse"].error,
                weight_mse=other.weight_mse,
                diagonal_fisher=other.diagonal_fisher,
            )
        )
    return results


def recipe_results(result: Result, text: str) -> list[RecipeResult]:
    """Measured and predicted values of every recipe on one text, the uniform ones first."""
    results = []
    for one in sorted(result.recipes, key=lambda one: not one.is_uniform):
        measured, stderr = _mean(result.truths[text].of(one.version))
        results.append(
            RecipeResult(
                one.version.label,
                one.is_uniform,
                one.bits_per_weight,
                measured=measured,
                measured_stderr=stderr,
                predicted=one.predicted.value,
                predicted_stderr=one.predicted.stderr or 0.0,
            )
        )
    return results


def _mean(values: Sequence[float]) -> tuple[float, float]:
    array = np.asarray(values)
    return float(array.mean()), standard_error(array) or 0.0


#: Score -> what of a pair it is.
SCORES: dict[str, Callable[[PairResult], float]] = {
    "predicted KL": lambda one: one.predicted,
    "diagonal Fisher": lambda one: one.diagonal_fisher,
    "output MSE (Gram-weighted)": lambda one: one.output_mse,
    "weight error, relative": lambda one: one.relative_weight_error,
    "weight MSE": lambda one: one.weight_mse,
}


def fits(pairs: Sequence[PairResult]) -> dict[str, Fit]:
    """Of all pairs, and of each kind."""
    return {
        kind: fit([p.predicted for p in some], [p.measured for p in some])
        for kind, some in _by_kind(pairs).items()
        if len(some) > 2
    }


def _by_kind(pairs: Sequence[PairResult]) -> dict[str, list[PairResult]]:
    return {"all": list(pairs)} | {k: [p for p in pairs if p.kind == k] for k in KINDS}


def rankings(pairs: Sequence[PairResult]) -> dict[str, dict[str, float | None]]:
    """Spearman's correlation of each score with the measured KL: all pairs, and each kind."""
    return {
        name: {
            kind: rank_correlation([score(p) for p in some], [p.measured for p in some])
            for kind, some in _by_kind(pairs).items()
        }
        for name, score in SCORES.items()
    }


def recipe_fits(recipes: Sequence[RecipeResult]) -> dict[str, Fit]:
    """Predictions of the uniform and mixed recipes of small KL."""
    small = [one for one in recipes if one.measured < SMALL_KL]
    found = {}
    for name, wanted in {"uniform": [True], "mixed": [False], "all": [True, False]}.items():
        some = [one for one in small if one.is_uniform in wanted]
        if len(some) > 2:
            measured = [one.measured for one in some]
            found[name] = fit([one.predicted for one in some], measured)
    return found


def report_values(result: Result) -> dict[str, Any]:
    """Everything as JSON values."""
    time = result.measure_time
    return {
        "model": result.table.header.model_name,
        "texts": {text: _text_values(result, text) for text in result.truths},
        "calibration_time": asdict(result.calibration_time),
        "measure_time": None if time is None else asdict(time),
        "stats_bytes": result.stats_bytes,
    }


def _text_values(result: Result, text: str) -> dict[str, Any]:
    pairs, recipes = pair_results(result, text), recipe_results(result, text)
    return {
        "windows": len(result.truths[text].windows_NT),
        "sequence_length": result.truths[text].windows_NT.shape[1],
        "pairs": [asdict(one) for one in pairs],
        "fits": {kind: asdict(one) for kind, one in fits(pairs).items()},
        "spearman": rankings(pairs),
        "recipes": [asdict(one) for one in recipes],
        "recipe_fits": {name: asdict(one) for name, one in recipe_fits(recipes).items()},
    }


def report_lines(result: Result) -> list[str]:
    """Everything as Markdown."""
    lines = [line for text in result.truths for line in _text_lines(result, text)]
    return [*lines, *_time_lines(result)]


def _text_lines(result: Result, text: str) -> list[str]:
    pairs, recipes = pair_results(result, text), recipe_results(result, text)
    count, length = result.truths[text].windows_NT.shape
    return [
        f"## Measured on {count} windows of {length} tokens of {text}",
        "",
        f"{len(pairs)} pairs of fusion group and scheme:",
        "",
        *markdown_table(_FIT_HEADS, [_fit_row(k, f) for k, f in fits(pairs).items()]),
        "",
        *markdown_table(
            ["Spearman with measured KL", "all", *KINDS],
            [
                [name, *(optional(value, ".3f") for value in row.values())]
                for name, row in rankings(pairs).items()
            ],
        ),
        "",
        "Recipes for the whole model:",
        "",
        *markdown_table(_RECIPE_HEADS, [_recipe_row(one) for one in recipes]),
        "",
        f"Those with a measured KL below {SMALL_KL}:",
        "",
        *markdown_table(_FIT_HEADS, [_fit_row(k, f) for k, f in recipe_fits(recipes).items()]),
        "",
    ]


_FIT_HEADS = ["", "number", "log-correlation", "median ratio", "spread", "median off", "worst off"]
_RECIPE_HEADS = ["recipe", "bits", "measured", "predicted", "ratio"]


def _fit_row(name: str, one: Fit) -> list[str]:
    return [
        name,
        str(one.count),
        f"{one.log_correlation:.4f}",
        f"{one.median_ratio:.3f}",
        f"{one.spread:.2f}×",
        f"{one.median_error:.1%}",
        f"{one.worst_error:.1%}",
    ]


def _recipe_row(one: RecipeResult) -> list[str]:
    return [
        one.label,
        f"{one.bits_per_weight:.2f}",
        f"{one.measured:.5f} ± {one.measured_stderr:.5f}",
        f"{one.predicted:.5f} ± {one.predicted_stderr:.5f}",
        f"{one.predicted / one.measured:.3f}",
    ]


def _time_lines(result: Result) -> list[str]:
    plain = result.calibration_time
    lines = [
        f"calibrate: {plain.calibrate_seconds / plain.plain_seconds:.2f} times the plain passes "
        f"({plain.calibrate_seconds:.1f} s of CPU time against {plain.plain_seconds:.1f} s for "
        f"{plain.sequences} sequences, {plain.threads} threads, load {plain.load:.1f})"
    ]
    time = result.measure_time
    if time is not None:
        lines.append(
            f"measure: {time.seconds:.0f} s, {time.cpu_seconds:.0f} s of CPU time, for "
            f"{time.schemes} schemes on {time.linear_layers} layers "
            f"({time.threads} threads, load {time.load:.1f})"
        )
    return [*lines, f"stats: {result.stats_bytes / 1e9:.2f} GB"]
