"""Single rows of a mixture, by one cost of exchanges for all routers and by one for each.

    python scripts/bench/routers.py MODEL --calibration FILE --text FILE --rows N --work FOLDER

In a folder of ``interval.py`` that measured rows, with the same options. A table has the cost of
exchanges ``A`` and what moves the margins ``V`` summed over all routers, so that a group is charged
for exchanges at routers before it too. Beside that stand two other ways: by a backward pass from
the margins of each router, ``sum_r sqrt(A_r V_r / 2 pi)``; and without another pass, where the
``V`` of a group is divided among the routers behind it as their ``A_r``. Prints how rows, and how
recipes that were measured there, are predicted in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mofq.decision import Problem
from mofq.decision.prediction import predict
from mofq.decision.problem import FloatArray, IntArray
from mofq.evidence.calibration.calibrate import run_sequence, score_seed, seeds_of
from mofq.evidence.calibration.capture import Captured, capture_layers
from mofq.evidence.calibration.gains import read_gains
from mofq.evidence.calibration.routers import Routers
from mofq.evidence.calibration.routing import margin_gains
from mofq.evidence.calibration.stats import Stats, read_stats
from mofq.evidence.corpora import load_text
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import PARTS, find_layers
from mofq.model.loading import load_model
from scripts.bench.interval import parse_interval
from scripts.bench.interval_recipes import (
    MeasuredText,
    measured_text,
    prepared_table,
    searched_recipes,
    single_rows,
    whole_problem,
)
from scripts.shared.command import print_markdown
from scripts.shared.windows import model_windows

#: Rows whose standard error over windows is above this share of what they measured say little.
_CLEAR = 0.2


@dataclass(frozen=True, slots=True)
class Router:
    """One router, over all sequences of the calibration."""

    cost: float  #: A, nats per token for each unit of score
    gain: Mapping[str, float]  #: layer -> V, up to what it has in nats


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the routers apart and print the table."""
    options = parse_interval(__doc__, arguments)
    table = prepared_table(options)
    problem, checkpoint = whole_problem(table), open_checkpoint(options.model)
    stats = read_stats(options.work / "stats")
    routers = _routers(checkpoint, stats, options.calibration)
    nats_F = np.array([_nats(stats, names) for names in _members(checkpoint, problem)])
    assert problem.flip_FC is not None
    cost_R = np.array([one.cost for one in routers])
    members = _members(checkpoint, problem)
    gain_RF = np.array(
        [[sum(one.gain.get(name, 0.0) for name in names) for names in members] for one in routers]
    )
    apart_RF = cost_R[:, None] * gain_RF / nats_F / math.pi
    behind_RF = cost_R[:, None] * (gain_RF > 0)
    share_RF = behind_RF / np.maximum(behind_RF.sum(axis=0), np.finfo(np.float64).tiny)
    ways = {
        "none": np.zeros((1, len(members))),
        "one for all": problem.flip_FC.T,
        "by a pass each": apart_RF,
        "by those behind": cost_R[:, None] / cost_R.sum() * problem.flip_FC[:, 0] * share_RF,
    }
    recipes = searched_recipes(table, path=options.work / "recipes.json", seed=0)
    lines = []
    with measured_text(options, table) as text:
        rows = list(single_rows(problem, options.rows))
        of_recipes = [
            (label, problem.choice_of(schemes))
            for label, schemes in list(recipes.items())[: options.recipes]
        ]
        for kind, choices in (("rows", rows), ("recipes", of_recipes)):
            for way, rate_RF in ways.items():
                lines.append([kind, way, *_scores(problem, rate_RF, text, choices)])
    heads = ("", "costs of routers", "number", "log-correlation", "median of predicted / measured")
    print_markdown((*heads, "spread", "clear", "median", "spread"), lines)


def _routers(checkpoint: Checkpoint, stats: Stats, source: str) -> list[Router]:
    """Each router of the calibration's sequences by itself."""
    layers, model = find_layers(checkpoint), load_model(checkpoint.folder)
    plan, corpus = stats.plan, stats.plan.corpora[0]
    windows_NT = model_windows(
        checkpoint,
        load_text(source),
        windows=corpus.sequences,
        sequence_length=plan.sequence_length,
    )
    found: list[list[tuple[float, dict[str, float]]]] = []
    with capture_layers(model, layers, kv_cache=bool(plan.kv_cache), routing=True) as captured:
        for index, token_T in enumerate(windows_NT):
            captured.clear()
            run_sequence(model, token_T, seeds_of(plan, corpus, index), keep_graph=True)
            seed = score_seed(plan.seed, corpus.name, index, plan.draws)
            found.append(list(_apart(captured, seed)))
    return [
        Router(
            cost=float(np.mean([cost for cost, _ in one])),
            gain=_summed(gains for _, gains in one),
        )
        for one in zip(*found, strict=True)
    ]


def _summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Over sequences; an expert may be in some of them."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _apart(captured: Captured, seed: int) -> Iterator[tuple[float, dict[str, float]]]:
    """Cost and gains of every router in a sequence."""
    assert captured.routers is not None
    for exchange in captured.routers.exchanges:
        objective = Routers([exchange]).objective(seed=seed)
        assert objective is not None
        gains = margin_gains(captured, partial(objective.backward, retain_graph=True))
        yield float(exchange.density_cost_T.mean()), gains


def _members(checkpoint: Checkpoint, problem: Problem) -> list[list[str]]:
    """The layers of each group, or the parts of a cache."""
    layers = find_layers(checkpoint)
    members = {group.name: [layer.name for layer in group.layers] for group in layers.groups}
    members |= {cache.name: [cache.part(part) for part in PARTS] for cache in layers.caches}
    return [members[group.name] for group in problem.groups]


def _nats(stats: Stats, layers: Iterable[str]) -> float:
    """The gain in nats of some layers, over all sequences."""
    names = tuple(layers)
    gains = map(read_gains, stats.gains_files(stats.plan.corpora[0].name))
    return sum(sum(one[name].weight) for one in gains for name in names) / stats.plan.draws


def _scores(
    problem: Problem,
    rate_RF: FloatArray,
    text: MeasuredText,
    choices: Sequence[tuple[str, IntArray]],
) -> list[str]:
    """How choices are predicted with rates of each router."""
    pairs, is_clear = [], []
    for label, choice_F in choices:
        measured = text.measure(label, problem.schemes_of(choice_F))
        alone = predict(replace(problem, flip_FC=None), choice_F).value
        flips = float(np.sqrt(rate_RF @ problem.error_PC[choice_F, 0]).sum())
        pairs.append((alone + flips, measured.kl))
        is_clear.append(measured.stderr < _CLEAR * measured.kl)
    logs = np.log(pairs)
    ratio = logs[:, 0] - logs[:, 1]
    return [
        str(len(pairs)),
        f"{np.corrcoef(logs.T)[0, 1]:.4f}",
        *_median(ratio),
        str(sum(is_clear)),
        *_median(ratio[is_clear]),
    ]


def _median(ratio: FloatArray) -> tuple[str, str]:
    """Of logarithms: the median and the spread."""
    return f"{math.exp(float(np.median(ratio))):.3f}", f"{math.exp(float(ratio.std())):.2f}×"


if __name__ == "__main__":
    main()
