"""How well numbers predict other numbers, and the scores that nats are compared with.

A part of the bench scripts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from mofq.evidence.calibration.stats import Stats
from mofq.evidence.measure.samples import SampleReader
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import FusionGroup, share_amax
from mofq.numbers.quantize import fake_quantize_activation, fake_quantize_weight
from mofq.numbers.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Fit:
    """How predictions compare with what was measured."""

    count: int
    log_correlation: float  #: Pearson's, of the logarithms
    median_ratio: float  #: predicted / measured
    spread: float  #: exp of the standard deviation of the log ratio: a factor
    median_error: float  #: median of |predicted / measured - 1|
    worst_error: float  #: largest of them


def fit(predicted: Sequence[float], measured: Sequence[float]) -> Fit:
    """Compare predictions with measurements, all positive.

    Args:
        predicted: At least two.
        measured: As many.
    """
    p, m = np.log(np.asarray(predicted)), np.log(np.asarray(measured))
    errors = np.abs(np.expm1(p - m))
    return Fit(
        count=len(p),
        log_correlation=float(np.corrcoef(p, m)[0, 1]),
        median_ratio=math.exp(float(np.median(p - m))),
        spread=math.exp(float((p - m).std(ddof=1))),
        median_error=float(np.median(errors)),
        worst_error=float(errors.max()),
    )


def rank_correlation(scores: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's; None where all scores are equal."""
    if len(set(scores)) < 2:
        return None
    return float(spearmanr(scores, measured).statistic)


@dataclass(frozen=True, slots=True)
class OtherScores:
    """What other methods would say of one fusion group under one scheme."""

    weight_mse: float  #: mean squared rounding error of the weights [weight units squared]
    diagonal_fisher: float  #: see `other_scores` [nats per token]


def other_scores(
    checkpoint: Checkpoint, stats: Stats, group: FusionGroup, scheme: Scheme
) -> OtherScores:
    """Score a choice without the covariances that the sensitivity in nats keeps.

    The diagonal Fisher score is half of ``sum_o mean_t(g_to^2) mean_t(e_to^2)``, ``e`` the
    change of a layer's output and ``g`` the gradient: what remains of the Fisher
    information when outputs and tokens are taken as independent.

    Args:
        checkpoint: The model.
        stats: Its calibration; the first corpus is used.
        group: Without experts.
        scheme: Any.
    """
    corpus = stats.plan.corpora[0].name
    weights = {
        layer.name: read_layer_rows(checkpoint, layer, 0, layer.out_features).float()
        for layer in group.layers
    }
    amax = share_amax(group, {name: float(w.abs().max()) for name, w in weights.items()})
    squares, fisher = 0.0, 0.0
    for layer in group.layers:
        weight_OI = weights[layer.name]
        quantized_OI = weight_OI
        if scheme.weight is not None:
            shared = amax[layer.name] if scheme.weight.needs_tensor_amax else None
            quantized_OI = fake_quantize_weight(
                weight_OI, scheme.weight, tensor_amax=shared, name=layer.name
            )
        squares += float((quantized_OI - weight_OI).square().sum(dtype=torch.float64))
        with SampleReader(stats) as reader:
            samples = reader.read(corpus, layer.name)
        if samples is not None:
            x_TI = samples.x_MCI.flatten(0, 1).float()
            grad_TO = samples.grad_MCO.flatten(0, 1).float()
            fisher += _diagonal_fisher(x_TI, grad_TO, weight_OI, quantized_OI, scheme)
    return OtherScores(squares / sum(layer.weights for layer in group.layers), fisher)


def _diagonal_fisher(
    x_TI: Tensor, grad_TO: Tensor, weight_OI: Tensor, quantized_OI: Tensor, scheme: Scheme
) -> float:
    changed_TI = x_TI
    if scheme.activation is not None:
        changed_TI = fake_quantize_activation(x_TI, scheme.activation)
    error_TO = changed_TI @ quantized_OI.T - x_TI @ weight_OI.T
    return float((grad_TO.square().mean(0) * error_TO.square().mean(0)).sum()) / 2
