"""Why the sensitivity is estimated as it is: what each of its parts gains, by measurement.

    python scripts/bench/estimators.py MODEL --text FILE [--windows 8] [--sequence-length 512]

Runs windows of a text forward, and backward with two draws of sampled labels and two of random
signs (`mofq.evidence.calibration.calibrate.sample_scores`), and prints for a few schemes, summed
over all layers:

- the noise of one draw of labels, and of one draw of signs, and how much windows differ;
- the squares of whole sequences' signed sums against the sum of squares over rows (weights) or
  tokens (inputs), which must agree in the mean where rows and tokens are independent;
- what layers that share an input do together against the sum of what each does alone;
- how far half of the windows are from all of them, as they are and corrected by gains.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from mofq.evidence.calibration.calibrate import sample_scores
from mofq.evidence.calibration.capture import Captured, capture_layers
from mofq.evidence.corpora import load_text
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import LinearLayer, ModelLayers, find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import fake_quantize_activation, fake_quantize_weight
from mofq.numbers.schemes import parse_scheme
from scripts.shared.command import markdown_table, script_parser
from scripts.shared.windows import model_windows

FloatArray = NDArray[np.float64]

WEIGHTS = ("int8.channel", "fp8_e4m3.channel", "fp8_e4m3.unscaled", "int4.g32", "int4.channel@mse")
INPUTS = ("bf16+int8.token", "bf16+fp8_e4m3.token", "bf16+fp8_e4m3.unscaled", "bf16+mxfp8")
#: Two draws of labels, then two of signs.
DRAWS = 4


@dataclass(frozen=True, slots=True)
class Sums:
    """Of one scheme, [windows, draws, layers], or fusion groups for inputs."""

    independent: FloatArray  #: squares of rows or tokens, layers that share an input together
    coherent: FloatArray  #: squares of whole sequences
    alone: FloatArray  #: squares of tokens, each layer by itself
    gain: FloatArray


def main() -> None:
    """Run the windows and print the comparison."""
    options = parse_options()
    checkpoint = open_checkpoint(options.model)
    layers = find_layers(checkpoint)
    model = load_model(checkpoint.folder)
    weights = {
        layer.name: read_layer_rows(checkpoint, layer, 0, layer.out_features).float()
        for layer in layers.grouped_layers
    }
    windows_NT = model_windows(
        checkpoint,
        load_text(options.text),
        windows=options.windows,
        sequence_length=options.sequence_length,
    )
    found: dict[str, list[list[list[tuple[float, ...]]]]] = {}
    for number, window_T in enumerate(windows_NT):
        with capture_layers(model, layers) as captured:
            _backward(model, window_T, number)
        for scheme, of_draws in _window_sums(captured, layers, weights).items():
            found.setdefault(scheme, []).append(of_draws)
        print(f"{number + 1}/{len(windows_NT)}", flush=True)
    sums = {scheme: Sums(*np.moveaxis(np.array(values), 3, 0)) for scheme, values in found.items()}
    print("\n".join(report_lines(sums)))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("model", help="folder of a model without experts")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    return parser.parse_args()


def _backward(model: PreTrainedModel, window_T: Tensor, number: int) -> None:
    logits_TV = model(window_T[None]).logits[0]
    p_TV = logits_TV.detach().softmax(-1)
    generator = torch.Generator().manual_seed(number)
    for draw in range(DRAWS):
        if draw < 2:
            score_TV = p_TV.clone()
            label_T1 = torch.multinomial(p_TV, 1, generator=generator)
            score_TV.scatter_add_(1, label_T1, -torch.ones_like(label_T1, dtype=p_TV.dtype))
        else:
            score_TV = sample_scores(logits_TV.detach(), seed=DRAWS * number + draw)
        logits_TV.backward(score_TV, retain_graph=draw < DRAWS - 1)


def _window_sums(
    captured: Captured, layers: ModelLayers, weights: dict[str, Tensor]
) -> dict[str, list[list[tuple[float, ...]]]]:
    """Scheme -> draw -> layer or fusion group -> the numbers of `Sums`."""
    found: dict[str, list[list[tuple[float, ...]]]] = {
        scheme: [[] for _ in range(DRAWS)] for scheme in (*WEIGHTS, *INPUTS)
    }
    for draw in range(DRAWS):
        for group in layers.groups:
            for layer in group.layers:
                for scheme in WEIGHTS:
                    sums = _weight_sums(captured, layer, weights[layer.name], scheme, draw)
                    found[scheme][draw].append(sums)
            for scheme in INPUTS:
                sums = _input_sums(captured, group.layers, weights, scheme, draw)
                found[scheme][draw].append(sums)
    return found


def _weight_sums(
    captured: Captured, layer: LinearLayer, weight_OI: Tensor, scheme: str, draw: int
) -> tuple[float, ...]:
    parsed = parse_scheme(scheme).weight
    assert parsed is not None
    delta_OI = fake_quantize_weight(weight_OI, parsed) - weight_OI
    grad_TO = captured.grads[layer.name][draw].float()
    gradient_OI = grad_TO.T @ captured.x[captured.source[layer.name]].float()
    row_O = (delta_OI * gradient_OI).sum(1).double()
    squares = float(row_O.square().sum())
    return squares, float(row_O.sum()) ** 2, squares, float(gradient_OI.square().sum())


def _input_sums(
    captured: Captured,
    layers: Sequence[LinearLayer],
    weights: dict[str, Tensor],
    scheme: str,
    draw: int,
) -> tuple[float, ...]:
    parsed = parse_scheme(scheme).activation
    assert parsed is not None
    source = captured.source[layers[0].name]
    x_TI = captured.x[source].float()
    delta_TI = fake_quantize_activation(x_TI, parsed) - x_TI
    parts = [captured.grads[one.name][draw].float() @ weights[one.name] for one in layers]
    token_LT = torch.stack([(part_TI * delta_TI).sum(1) for part_TI in parts]).double()
    together_T = token_LT.sum(0)
    return (
        float(together_T.square().sum()),
        float(together_T.sum()) ** 2,
        float(token_LT.square().sum()),
        float(captured.input_gains[source][draw]),
    )


def report_lines(sums: dict[str, Sums]) -> list[str]:
    """Everything as one Markdown table."""
    heads = [
        *("scheme", "noise, labels", "noise, signs", "between windows", "whole / squares"),
        *("shared / alone", "half the windows", "with gains"),
    ]
    return markdown_table(heads, [_row(scheme, one) for scheme, one in sums.items()])


def _row(scheme: str, one: Sums) -> list[str]:
    total_ND = one.independent.sum(2)
    mean = total_ND.mean()
    labels = (total_ND[:, 0] - total_ND[:, 1]) / 2**0.5 / mean
    signs = (total_ND[:, 2] - total_ND[:, 3]) / 2**0.5 / mean
    ratio_L = one.coherent.mean((0, 1)) / one.independent.mean((0, 1))
    plain, with_gains = _half_errors(one.independent[:, 2], one.gain[:, 2])
    return [
        scheme,
        f"{np.sqrt(np.square(labels).mean()):.1%}",
        f"{np.sqrt(np.square(signs).mean()):.1%}",
        f"{total_ND.mean(1).std(ddof=1) / mean:.1%}",
        f"{ratio_L.mean():.2f} ± {ratio_L.std() / len(ratio_L) ** 0.5:.2f}",
        f"{one.independent.sum() / one.alone.sum():.2f}",
        f"{plain:.1%}",
        f"{with_gains:.1%}",
    ]


def _half_errors(error_NL: FloatArray, gain_NL: FloatArray) -> tuple[float, float]:
    """How far the sum over layers of half the windows is from that of all, typically."""
    rng = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(300):
        half = rng.permutation(len(error_NL))[: len(error_NL) // 2]
        mean_L = error_NL[half].mean(0)
        ratio_L = gain_NL.mean(0) / gain_NL[half].mean(0)
        plain.append(mean_L.sum() / error_NL.mean(0).sum() - 1)
        corrected.append((mean_L * ratio_L).sum() / error_NL.mean(0).sum() - 1)
    return float(np.std(plain)), float(np.std(corrected))


if __name__ == "__main__":
    main()
