"""Scores every scheme of one linear layer while its weight streams by, block by block.

For a perturbation ``e_t`` of the layer's output at token ``t`` of a sequence of ``T``
tokens, the KL divergence is to second order ``E[(sum_t g_t . e_t)^2] / 2`` nats, ``g_t``
the gradient of ``-sum log p(y)`` under labels ``y`` sampled from the model itself, or any
random vector of the same covariance (`mofq.evidence.calibration.passes.sample_scores`).

Its plain estimate, one square for each sequence, is unbiased and needs hundreds of
sequences. What rounding does has more structure, and this module uses it:

- **Weights.** ``e_t = dW x_t``, so the sum is ``<dW, G>`` with ``G = sum_t g_t x_t^T`` over
  the whole sequence. The rounding errors of different rows of a weight are independent, so
  the cross terms between rows vanish: ``sum_o (dW_o . G_o)^2`` has the same expectation and
  a hundred times less variance. Tokens are not independent (they share ``dW``), so ``G``
  is summed over the sequence before anything is squared.
- **Activations.** ``e_t = W dx_t``. The rounding errors of different tokens are independent
  and those of one token's channels are not (one scale; a massive channel zeroes the rest):
  ``sum_t (v_t . dx_t)^2`` with ``v_t = W^T g_t``. Layers that read the very same inputs (q, k
  and v; gate and up) share ``dx_t`` too, so ``v_t`` is the sum over them: `with_shared_inputs`.
- **Both.** ``e_t = (W + dW)(x_t + dx_t) - W x_t = dW xq_t + W dx_t``: the sum of the two,
  ``G`` taken with the quantized inputs.

Where the stats keep the inputs and gradients of a few of the sequences that were run, the sums
are corrected by what is known of all of them: ``mofq.evidence.measure.gains``.

How these were chosen is measured in ``scripts/bench/prediction.py``. Beside them the signed
sums over chunks of 64 tokens are kept: with them errors of different layers can be added
before they are squared. Where 64 does not divide a sequence they are scaled, all alike, so
that their mean square over twice 64 is in nats per token.

The weight goes by in blocks of rows of a fixed size, each scored by itself, and their sums
are added in the order of the rows: how many blocks are scored at once changes no number.

Source: the second-order expansion of KL, S. Amari, "Natural gradient works efficiently in
learning", 1998, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mofq.evidence.measure.block import BlockSums, CorpusSums
from mofq.evidence.measure.gains import SampleGains, corrected, projection_factor
from mofq.evidence.measure.layer_inputs import PreparedLayer
from mofq.evidence.measure.magnitudes import ExtentSums
from mofq.evidence.measure.samples import CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class InputErrors:
    """What rounding the inputs of one layer does, token by token."""

    source: str  #: the layer whose inputs these are; others may share them
    token_AMC: Tensor  #: signed, under each of A activation schemes, float64
    scheme_A: tuple[tuple[int, ...], ...]  #: the schemes with each activation scheme
    tokens: int  #: T of one sequence
    gains: SampleGains | None  #: of the inputs


@dataclass(frozen=True, slots=True)
class CorpusScore:
    """What one corpus says of one layer under each of S schemes."""

    error_NS: Tensor  #: nats per token of each sequence, float64
    projection_MS: Tensor  #: signed sum over each chunk, float64
    output_mse_S: Tensor  #: summed over outputs, averaged over tokens, float64
    inputs: InputErrors | None = None
    sampled_tokens: int = 0  #: that ``output_mse_S`` is averaged over
    weight_gains: SampleGains | None = None  #: that the weights' part is corrected by


@dataclass(frozen=True, slots=True)
class LayerScore:
    """All that is measured of one layer under each of S schemes."""

    relative_weight_error_S: Tensor  #: float64
    weight_energy: float  #: sum of squares
    error_energy_S: Tensor  #: sum of squares of the rounding error, float64
    corpora: Mapping[str, CorpusScore]  #: those of which a token reached the layer
    static_amax: float | None  #: largest magnitude of the inputs; None where there are none
    extent: ExtentSums  #: of the weight
    input_extents: Mapping[str, ExtentSums]  #: corpus -> of the inputs


def add_blocks(layer: PreparedLayer, blocks: Sequence[BlockSums]) -> LayerScore:
    """The score of a layer from the sums of its blocks.

    Args:
        layer: The layer.
        blocks: One for each of its blocks, in their order.
    """
    sums = reduce(add, blocks)
    weight_I = sums.extent.square_I
    is_zero_I = weight_I == 0
    ratio_WI = sums.error_WI / torch.where(is_zero_I, 1.0, weight_I)
    relative_W = torch.where(is_zero_I, 0.0, ratio_WI).mean(1)
    return LayerScore(
        relative_weight_error_S=_of_schemes(layer, relative_W),
        weight_energy=float(weight_I.sum()),
        error_energy_S=_of_schemes(layer, sums.error_WI.sum(1)),
        corpora={corpus: _corpus_score(layer, corpus, one) for corpus, one in sums.corpora.items()},
        static_amax=layer.static_amax,
        extent=sums.extent,
        input_extents=layer.input_extents,
    )


def _of_schemes(layer: PreparedLayer, value_W: Tensor) -> Tensor:
    """Values of weight schemes, as each scheme has them; 0 where the weight is left as it is."""
    value = dict(zip(layer.weights, value_W.tolist(), strict=True))
    values = [value[s.weight] if s.weight else 0.0 for s in layer.schemes]
    return torch.tensor(values, dtype=torch.float64)


def _corpus_score(layer: PreparedLayer, corpus: str, sums: CorpusSums) -> CorpusScore:
    inputs = layer.inputs[corpus]
    chunks = len(sums.projection_MS) // inputs.sequences
    token_NA = sums.token_AMC.square().sum(2).unflatten(1, (inputs.sequences, -1)).sum(2).T
    of_weight, of_input = (
        (inputs.gains.weight, inputs.gains.input) if inputs.gains else (None, None)
    )
    error_NS = corrected(sums.row_NS, of_weight).clone()
    projection_MS = sums.projection_MS * projection_factor(of_weight)
    token_NA, factor = corrected(token_NA, of_input), projection_factor(of_input)
    for i, scheme in enumerate(layer.schemes):
        if scheme.activation is not None:
            column = layer.activations.index(scheme.activation)
            error_NS[:, i] += token_NA[:, column]
            projection_MS[:, i] += factor * sums.token_AMC[column].sum(1)
    full = chunks * min(CHUNK_TOKENS, inputs.tokens)
    return CorpusScore(
        error_NS=(error_NS / (2 * inputs.tokens)).cpu(),
        projection_MS=(projection_MS * math.sqrt(full / inputs.tokens)).cpu(),
        output_mse_S=sums.output_S.cpu(),
        inputs=InputErrors(
            inputs.source,
            sums.token_AMC.cpu(),
            scheme_A=tuple(
                tuple(i for i, s in enumerate(layer.schemes) if s.activation == activation)
                for activation in layer.activations
            ),
            tokens=inputs.tokens,
            gains=of_input,
        ),
        sampled_tokens=len(inputs.sample_T),
        weight_gains=of_weight,
    )


def with_shared_inputs(scores: Mapping[str, LayerScore]) -> dict[str, LayerScore]:
    """Add to each layer what it and others do together when the inputs that they share are rounded.

    ``(sum_l a_l)^2`` over layers ``l`` of one source is given to them as ``a_l sum_k a_k``: a
    layer's part may be negative, their sum is not.

    Args:
        scores: Layer name -> its score, all layers of a fusion group.

    Returns:
        The scores; those of layers that share no inputs are the same.
    """
    return {
        name: replace(
            score,
            corpora={
                corpus: _with_cross_terms(one, _sharing(scores, corpus, one))
                for corpus, one in score.corpora.items()
            },
        )
        for name, score in scores.items()
    }


def _sharing(scores: Mapping[str, LayerScore], corpus: str, one: CorpusScore) -> list[InputErrors]:
    """The input errors of the other layers that read the same inputs."""
    if one.inputs is None or not one.inputs.source:
        return []
    others = [s.corpora[corpus].inputs for s in scores.values() if corpus in s.corpora]
    return [
        other
        for other in others
        if other is not None and other is not one.inputs and other.source == one.inputs.source
    ]


def _with_cross_terms(one: CorpusScore, others: Sequence[InputErrors]) -> CorpusScore:
    own = one.inputs
    if own is None or not others:
        return one
    together_AMC = sum((other.token_AMC for other in others), torch.zeros(()))
    cross_AM = (own.token_AMC * together_AMC).sum(2)
    cross_NA = cross_AM.unflatten(1, (len(one.error_NS), -1)).sum(2).T / (2 * own.tokens)
    cross_NA = corrected(cross_NA, own.gains)
    error_NS = one.error_NS.clone()
    for schemes, cross_N in zip(own.scheme_A, cross_NA.T, strict=True):
        error_NS[:, schemes] += cross_N[:, None]
    return replace(one, error_NS=error_NS)
