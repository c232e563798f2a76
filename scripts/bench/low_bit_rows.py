"""Rows of few bits beside the KL of a small part of their rounding errors.

    python scripts/bench/low_bit_rows.py MODEL --calibration FILE --work FOLDER

For each fusion group and scheme a quarter of the rounding error is added to the weights, and the KL
that it causes on sequences of the calibration, divided by the square of a quarter, is what the
expansion of second order should say, without its higher orders. Beside it stand four ways to take
the change of size out of the rounding errors ``d`` of rows, from gradients and inputs ``G`` of the
kept sequences: none; by the share ``a`` of the weights ``W`` in ``d``, as the table has it: the sum
of ``(d.G)^2 - (a W.G)^2`` over rows; the same of ``((d - a W).G)^2``, row by row; and this by the
share of what the model answers, ``sum (d.G)(W.G) / sum (W.G)^2`` over rows and sequences. And the
row of the table itself, from all sequences that were run, with how often the KL is inside of its
interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.decision import request_problem
from mofq.decision.prediction import predict_row
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.corpora import load_text
from mofq.evidence.measure.samples import SampleReader
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import FusionGroup, find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.schemes import parse_scheme
from scripts.shared.command import measured_table, model_parser, parse_into_work, print_markdown
from scripts.shared.windows import model_windows

_SPACE = Path(__file__).with_suffix(".yaml")
_PART = 0.25
_NEAR = 0.1
_WAYS = (
    "squares of rows",
    "share of the weights",
    "share of the weights, row by row",
    "share of the answers, row by row",
)
_ROW = "the table's row"
_CORPUS = "text"
#: Of the sequences of the calibration, every second one is run.
_STEP = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare every group under every scheme and print sums and spreads."""
    parser = model_parser(__doc__, ("--calibration", "text file, or the name of a bundled text"))
    parser.add_argument("--sequence-length", type=int, default=256, help="of calibration")
    options = parse_into_work(parser, arguments)
    length = options.sequence_length
    table = measured_table(options, _SPACE, _CORPUS, "--sequence-length", length)
    problem = request_problem(read_table(table))
    stats, checkpoint = read_stats(options.work / "stats"), open_checkpoint(options.model)
    layers = {group.name: group for group in find_layers(checkpoint).groups}
    model = load_model(checkpoint.folder)
    windows_NT = model_windows(
        checkpoint,
        load_text(options.calibration),
        windows=stats.plan.corpora[0].sequences,
        sequence_length=length,
    )[::_STEP]
    original_NTV = _log_softmax(model, windows_NT)
    rows = []
    with SampleReader(stats) as reader:
        for name in (one for one in dict.fromkeys(problem.schemes) if one != "bf16"):
            found, inside = [], []
            for number, group in enumerate(problem.groups):
                pairs = dict(_rounding(checkpoint, layers[group.name], name))
                truth = _part_of_kl(model, windows_NT, original_NTV, pairs)
                option = next(p for p in problem.options_of(number) if problem.schemes[p] == name)
                row = predict_row(problem, option)
                inside.append(row.lower <= truth <= row.upper)
                estimates = [*_estimates(reader, pairs), row.value]
                found.append([one / truth for one in estimates] + [truth])
            ratio_GW, truth_G = np.array(found)[:, :-1], np.array(found)[:, -1]
            for way, ratio_G in zip((*_WAYS, _ROW), ratio_GW.T, strict=True):
                total = float((ratio_G * truth_G).sum() / truth_G.sum())
                spread = math.exp(float(np.log(ratio_G).std()))
                ends = f"{ratio_G.min():.2f} to {ratio_G.max():.2f}"
                within = f"{np.mean(np.abs(ratio_G - 1) <= _NEAR):.0%}"
                kept = f"{np.mean(inside):.0%}" if way == _ROW else ""
                rows.append([name, way, f"{total:.3f}", f"{spread:.2f}×", ends, within, kept])
    heads = ("scheme", "taken out", "sum of groups", "spread", "groups", "groups within 10 %")
    print_markdown((*heads, "inside of its interval"), rows)


def _rounding(
    checkpoint: Checkpoint, group: FusionGroup, scheme: str
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Weights and rounding errors of each layer of a group."""
    weight_scheme = parse_scheme(scheme).weight
    assert weight_scheme is not None
    for layer in group.layers:
        weight_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features).float()
        rounded_OI = fake_quantize_weight(weight_OI, weight_scheme, name=layer.name)
        yield layer.name, (weight_OI, rounded_OI - weight_OI)


@torch.inference_mode()
def _log_softmax(model: PreTrainedModel, windows_NT: Tensor) -> Tensor:
    return torch.log_softmax(model(windows_NT).logits, -1)


@torch.inference_mode()
def _part_of_kl(
    model: PreTrainedModel,
    windows_NT: Tensor,
    original_NTV: Tensor,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
) -> float:
    """KL of a part of the rounding errors over the square of the part [nats per token]."""
    for name, (weight_OI, delta_OI) in pairs.items():
        model.get_submodule(name).weight.copy_(weight_OI + _PART * delta_OI)
    changed_NTV = _log_softmax(model, windows_NT)
    for name, (weight_OI, _) in pairs.items():
        model.get_submodule(name).weight.copy_(weight_OI)
    kl_NT = (original_NTV.exp() * (original_NTV - changed_NTV)).sum(-1)
    return float(kl_NT.double().mean()) / _PART**2


def _estimates(reader: SampleReader, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[float]:
    """The row of a group in each way [nats per token]."""
    squares = dict.fromkeys(_WAYS, 0.0)
    joint: dict[str, Tensor] = {}
    for name, (weight_OI, delta_OI) in pairs.items():
        samples, scaling = reader.read(_CORPUS, name), reader.scaling(_CORPUS, name)
        assert samples is not None
        assert scaling is not None
        x_NTI = samples.x_MCI.float().reshape(samples.sequences, -1, samples.x_MCI.shape[-1])
        grad_NTO = samples.grad_MCO.float().reshape(*x_NTI.shape[:2], -1)
        gradient_NOI = torch.einsum("nto,nti->noi", grad_NTO, x_NTI)
        error_NO = (gradient_NOI * delta_OI).sum(-1).double()
        size_NO = (gradient_NOI * weight_OI).sum(-1).double()
        answer_R = torch.tensor([one for cluster in scaling for one in cluster]).double()
        of_weights = float((delta_OI * weight_OI).sum() / weight_OI.square().sum())
        of_answers = float((error_NO * size_NO).sum() / size_NO.square().sum())
        shares = dict(zip(_WAYS, (0.0, of_weights, of_weights, of_answers), strict=True))
        scale = 2 * samples.tokens * samples.sequences
        for way, share in shares.items():
            # As rows of the table: its own square is taken out, and that over all rows put in.
            rest = error_NO.square().sum() - share**2 * size_NO.square().sum()
            if way in _WAYS[2:]:
                rest = (error_NO - share * size_NO).square().sum()
            squares[way] += float(rest) / scale
            joint[way] = joint.get(way, torch.zeros_like(answer_R)) + share * answer_R
    return [squares[way] + float(joint[way].square().mean()) for way in _WAYS]


if __name__ == "__main__":
    main()
