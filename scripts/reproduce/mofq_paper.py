"""MoFQ (arXiv:2305.12356) on one model: who chooses FP, by which metric, and what it brings.

    python scripts/reproduce/mofq_paper.py MODEL --stats STATS --text FILE --work FOLDER

Prints three Markdown tables and draws a figure:

1. The share of linear layers for which FP beats INT, for each pair of formats of one width and
   granularity, by the tensors' squared error, by the output's, and by nats.
2. What FP4 gains by giving the codes of NaN and infinity to numbers.
3. The measured KL of INT alone, of FP alone and of the three mixtures.
4. ``crest.png``: the squared error of FP over that of INT of every layer's weights and inputs
   against their crest factor, largest magnitude over root mean square within what shares a
   scale. arXiv:2510.25602 derives where they cross.

The table of `--space mofq` is measured into the work folder; `--begun` names tables of the
same model and stats that have some of its rows already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from torch import Tensor

from mofq.decision.recipe import Recipe
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.measure.samples import SampleReader
from mofq.evidence.table import Table
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import find_layers
from mofq.numbers.quantize import fake_quantize_activation, fake_quantize_weight
from mofq.numbers.schemes import TensorScheme, parse_scheme
from scripts.shared.command import print_markdown, with_error
from scripts.shared.reproduction import (
    arguments,
    measure_recipes,
    recipe,
    reference_of,
    rows_by_scheme,
    table_of,
)

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter

#: Tokens of a layer's inputs that errors and crest factors are taken over.
TOKENS = 256


@dataclass(frozen=True, slots=True)
class Pair:
    """INT and FP of one width; several spellings where a group size may not divide a layer."""

    label: str
    integer: tuple[str, ...]
    floating: tuple[str, ...]
    is_measured: bool = False  #: whether mixtures of it are run


PAIRS = (
    Pair("W4, channel", ("int4.channel",), ("fp4_e2m1.channel",), is_measured=True),
    Pair("W4, group 64 or 128", ("int4.g128", "int4.g64"), ("fp4_e2m1.g128", "fp4_e2m1.g64")),
    Pair("W4, group 32", ("int4.g32",), ("fp4_e2m1.g32",), is_measured=True),
    Pair("W8, channel", ("int8.channel",), ("fp8_e4m3.channel",)),
    Pair(
        "W8A8, channel and token",
        ("int8.channel+int8.token",),
        ("fp8_e4m3.channel+fp8_e4m3.token",),
        is_measured=True,
    ),
    Pair("W8A8, group 32", ("int8.g32+int8.g32",), ("fp8_e4m3.g32+fp8_e4m3.g32",)),
)
METRICS = ("tensor error", "output error", "nats")


@dataclass(frozen=True, slots=True)
class Crest:
    """A tensor of one layer: its crest factor and both formats' errors relative to its energy."""

    kind: str
    crest: float
    integer: float
    floating: float


#: What is drawn: INT against FP of one width and granularity, of weights or of inputs.
KINDS = {
    "weights, 8 bits, channel": ("int8.channel", "fp8_e4m3.channel"),
    "weights, 8 bits, group 32": ("int8.g32", "fp8_e4m3.g32"),
    "inputs, 8 bits, token": ("bf16+int8.token", "bf16+fp8_e4m3.token"),
    "inputs, 8 bits, group 32": ("bf16+int8.g32", "bf16+fp8_e4m3.g32"),
    "weights, 4 bits, channel": ("int4.channel", "fp4_e2m1.channel"),
    "weights, 4 bits, group 32": ("int4.g32", "fp4_e2m1.g32"),
    "inputs, 4 bits, group 32": ("bf16+int4.g32", "bf16+fp4_e2m1.g32"),
}


def relative_error(x: Tensor, fake: Tensor) -> float:
    """Squared error over energy."""
    return float((fake - x).square().sum() / x.square().sum())


def input_errors(
    stats: str, table: Table, activations: Sequence[TensorScheme]
) -> dict[tuple[str, TensorScheme], float]:
    """Relative squared error of every fusion group's inputs; its layers share them."""
    errors = {}
    for group, x_TI in inputs_of(stats, table):
        amax = float(x_TI.abs().max())
        for activation in activations:
            fake = fake_quantize_activation(x_TI, activation, static_amax=amax)
            errors[group, activation] = relative_error(x_TI, fake)
    return errors


def inputs_of(stats: str, table: Table) -> Iterator[tuple[str, Tensor]]:
    """Some inputs of every fusion group, evenly spread over all sequences, float32."""
    found = read_stats(Path(stats))
    corpus = found.plan.corpora[0].name
    with SampleReader(found) as reader:
        for group in table.header.groups:
            samples = reader.read(corpus, group.layers[0].name)
            assert samples is not None
            x_TI = samples.x_MCI.flatten(0, 1)[samples.is_token_MC.flatten()]
            yield group.name, x_TI[:: max(1, len(x_TI) // TOKENS)].float()


def errors_by_metric(table: Table, stats: str) -> dict[str, dict[str, dict[str, float]]]:
    """Metric -> fusion group -> scheme -> error."""
    outputs = rows_by_scheme(table, "output_mse", table.measures[-1][1])
    nats = rows_by_scheme(table, "kl_nats_per_token", table.measures[-1][1])
    schemes = {name for rows in nats.values() for name in rows}
    activations = {a for name in schemes if (a := parse_scheme(name).activation) is not None}
    of_inputs = input_errors(stats, table, sorted(activations, key=repr))
    tensors: dict[str, dict[str, float]] = {}
    for group, rows in nats.items():
        tensors[group] = {}
        for name, row in rows.items():
            error = 0.0 if row.sqnr_db is None else 10 ** (-row.sqnr_db / 10)
            activation = parse_scheme(name).activation
            if activation is not None:
                error += of_inputs[group, activation]
            tensors[group][name] = error
    return {
        "tensor error": tensors,
        "output error": {
            g: {n: row.error for n, row in rows.items()} for g, rows in outputs.items()
        },
        "nats": {g: {n: row.error for n, row in rows.items()} for g, rows in nats.items()},
    }


def first_of(names: Sequence[str], errors: Mapping[str, float]) -> str:
    """The first spelling that the fusion group was measured in."""
    return next(name for name in names if name in errors)


def choose(pair: Pair, errors: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Fusion group -> the scheme of lower error, INT where both are equal."""
    return {
        group: min(
            (first_of(pair.integer, of), first_of(pair.floating, of)), key=lambda name: of[name]
        )
        for group, of in errors.items()
    }


def print_shares(table: Table, errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """The first table."""
    layers = {group.name: len(group.layers) for group in table.header.groups}
    rows = []
    for pair in PAIRS:
        shares = []
        for metric in METRICS:
            chosen = choose(pair, errors[metric])
            floating = sum(layers[g] for g, name in chosen.items() if name.startswith("fp"))
            shares.append(f"{100 * floating / sum(layers.values()):.0f} %")
        rows.append([pair.label, *shares])
    print_markdown(["layers that choose FP by", *METRICS], rows)


def print_reallocation(errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """The second table: FP4 with all codes against FP4 that reserves the top exponent."""
    rows = []
    for granularity in (("channel",), ("g128", "g64"), ("g32",)):
        changes = []
        for metric in METRICS:
            ratios = []
            for of in errors[metric].values():
                ours = of[first_of([f"fp4_e2m1.{g}" for g in granularity], of)]
                theirs = of[first_of([f"fp4_e2m1_ieee.{g}" for g in granularity], of)]
                ratios.append(math.log(ours / theirs))
            mean = math.exp(sum(ratios) / len(ratios))
            changes.append(f"{100 * (mean - 1):+.0f} %")
        rows.append([" or ".join(granularity), *changes])
    print_markdown(["FP4 with all codes for numbers, change of", *METRICS], rows)


def mixtures(
    table: Table, errors: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> dict[str, Recipe]:
    """Label -> recipe: INT, FP, and what each metric chooses."""
    recipes = {}
    for pair in PAIRS:
        if not pair.is_measured:
            continue
        groups = errors["nats"]
        for label, names in (("INT", pair.integer), ("FP", pair.floating)):
            schemes = {group: first_of(names, of) for group, of in groups.items()}
            recipes[f"{pair.label}: {label}"] = recipe(table, schemes)
        if pair.floating[0].startswith("fp4"):
            reserved = {g: n.replace("e2m1", "e2m1_ieee") for g, n in schemes.items()}
            recipes[f"{pair.label}: FP with reserved codes"] = recipe(table, reserved)
        for metric in METRICS:
            chosen = choose(pair, errors[metric])
            recipes[f"{pair.label}: MoFQ by {metric}"] = recipe(table, chosen)
    return recipes


def crests(checkpoint: Checkpoint, stats: str, table: Table) -> list[Crest]:
    """Every layer's weights, every fusion group's inputs."""
    found = []
    for layer in find_layers(checkpoint).grouped_layers:
        weight_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features).float()
        found += [_crest(kind, weight_OI) for kind in KINDS if kind.startswith("weights")]
    for _, x_TI in inputs_of(stats, table):
        found += [_crest(kind, x_TI) for kind in KINDS if kind.startswith("inputs")]
    return found


def _crest(kind: str, x_TI: Tensor) -> Crest:
    errors = []
    columns = 32 if kind.endswith("32") else x_TI.shape[1]
    for name in KINDS[kind]:
        scheme = parse_scheme(name)
        if scheme.activation is not None:
            errors.append(relative_error(x_TI, fake_quantize_activation(x_TI, scheme.activation)))
        else:
            assert scheme.weight is not None
            errors.append(relative_error(x_TI, fake_quantize_weight(x_TI, scheme.weight)))
    groups = x_TI.reshape(-1, columns)
    groups = groups[groups.abs().amax(1) > 0]
    crest = groups.abs().amax(1) / groups.square().mean(1).sqrt()
    return Crest(kind, float(crest.mean()), errors[0], errors[1])


def crossing(points: Sequence[Crest]) -> float | None:
    """The crest factor above which FP is better, with the fewest layers on the wrong side.

    None where all are on one side.
    """
    ordered = sorted(points, key=lambda one: one.crest)
    wins = [one.floating < one.integer for one in ordered]
    if all(wins) or not any(wins):
        return None
    # Wrong if the limit lies below point n: INT's wins from n on, and FP's before.
    wrong = [wins[:n].count(True) + wins[n:].count(False) for n in range(len(wins) + 1)]
    least = [n for n, count in enumerate(wrong) if count == min(wrong)]
    n = min(max(least[len(least) // 2], 1), len(ordered) - 1)
    return math.sqrt(ordered[n - 1].crest * ordered[n].crest)


def draw(points: Sequence[Crest], path: Path) -> None:
    """The figure, and a line for each kind on stdout."""
    figure, axes = pyplot.subplots(figsize=(9, 6), constrained_layout=True)
    rows = []
    for kind in KINDS:
        own = [point for point in points if point.kind == kind]
        ratios = [point.floating / point.integer for point in own]
        axes.scatter([p.crest for p in own], ratios, s=12, alpha=0.7, label=kind)
        at = crossing(own)
        wins = sum(ratio < 1 for ratio in ratios)
        rows.append(
            [
                kind,
                f"{min(p.crest for p in own):.1f} – {max(p.crest for p in own):.1f}",
                f"{wins} of {len(own)}",
                "–" if at is None else f"{at:.1f}",
            ]
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", ylabel="squared error, FP over INT")
    axes.set_xlabel("crest factor: largest magnitude over root mean square, mean over scales")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print_markdown(["", "crest factors", "FP better", "cross at"], rows)


def main(given: Sequence[str] | None = None) -> None:
    """All tables and the figure."""
    options = arguments(
        __doc__, given, ("--stats", "from `mofq calibrate`"), ("--text", "held-out text")
    )
    table = table_of(
        options.model,
        "mofq",
        stats=options.stats,
        path=options.work / "mofq.jsonl",
        begun=options.begun,
    )
    errors = errors_by_metric(table, options.stats)
    print_shares(table, errors)
    print_reallocation(errors)
    draw(crests(open_checkpoint(options.model), options.stats, table), options.work / "crest.png")
    done = measure_recipes(reference_of(options), mixtures(table, errors))
    rows = [
        [
            label,
            f"{one.bits_per_weight:.3f}",
            with_error(one.kl, one.kl_stderr),
            f"{one.perplexity:.2f}",
        ]
        for label, one in done.items()
    ]
    print_markdown(["", "bits/weight", "KL measured [nats/token]", "perplexity"], rows)


if __name__ == "__main__":
    main()
