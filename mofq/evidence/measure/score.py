"""Scores every scheme of one linear layer while its weight streams by, block by block.

For a perturbation ``e_t`` of the layer's output at token ``t`` of a sequence of ``T``
tokens, the KL divergence is to second order ``E[(sum_t g_t . e_t)^2] / 2`` nats, ``g_t``
the gradient of ``-sum log p(y)`` under labels ``y`` sampled from the model itself, or any
random vector of the same covariance (`mofq.evidence.calibration.calibrate.sample_scores`).

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
  and v; gate and up; the experts that a token visits) share ``dx_t`` too, so ``v_t`` is the
  sum over them: `with_shared_inputs`.
- **Lookups.** An embedding's are products with one-hot vectors:
  `mofq.evidence.measure.embedding_lookups`.
- **Both.** ``e_t = (W + dW)(x_t + dx_t) - W x_t = dW xq_t + W dx_t``: the sum of the two,
  ``G`` taken with the quantized inputs.

Where the stats keep the inputs and gradients of a few of the sequences that were run, the sums
are corrected by what is known of all of them: ``mofq.evidence.measure.gain_correction``.

How these were chosen is measured in ``scripts/bench/prediction.py``.

The weight goes by in blocks of rows of a fixed size, each scored by itself, and their sums
are added in the order of the rows: how many blocks are scored at once changes no number.

Source: the second-order expansion of KL, S. Amari, "Natural gradient works efficiently in
learning", 1998, section 3.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mofq.evidence.measure.embedding_lookups import lookup_errors, project_lookups
from mofq.evidence.measure.gain_correction import SampleGains, corrected
from mofq.evidence.measure.layer_inputs import Inputs, PreparedLayer
from mofq.evidence.measure.magnitudes import ExtentSums, rows_extent
from mofq.evidence.measure.samples import CHUNK_TOKENS
from mofq.exceptions import SchemeError
from mofq.model.layers import LinearLayer
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.quantize.rounding_errors import is_candidate, sum_squares, to_bands
from mofq.numbers.schemes import TensorScheme

#: Inputs of neighbouring tokens that are multiplied out at once, float32 [bytes], in whole chunks.
#: A constant of the numerics, as a chunk is.
_RUN_BYTES = 32_000_000
#: Rows of outer products of gradients and inputs at once.
_ROWS = 128
#: Such products, and as much of inputs, held at once on a GPU [bytes].
_GPU_GRADIENT_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class CorpusSums:
    """What a block of rows adds to the score of a corpus, float64."""

    row_NS: Tensor  #: sum over rows of squares
    size_NS: Tensor  #: the same of the weights themselves, in the place of their rounding errors
    token_AMC: Tensor  #: of each activation scheme's rounding errors, signed
    output_S: Tensor

    def __add__(self, other: CorpusSums) -> CorpusSums:
        return CorpusSums(
            self.row_NS + other.row_NS,
            self.size_NS + other.size_NS,
            self.token_AMC + other.token_AMC,
            self.output_S + other.output_S,
        )


@dataclass(frozen=True, slots=True)
class BlockSums:
    """What a block of rows adds to the score of its layer, float64."""

    extent: ExtentSums  #: of the weights, their squares among it
    along_W: Tensor  #: products of each weight scheme's rounding errors with the weights
    error_WI: Tensor  #: squares of each weight scheme's rounding errors
    corpora: Mapping[str, CorpusSums]

    def __add__(self, other: BlockSums) -> BlockSums:
        return BlockSums(
            self.extent + other.extent,
            self.along_W + other.along_W,
            self.error_WI + other.error_WI,
            {corpus: sums + other.corpora[corpus] for corpus, sums in self.corpora.items()},
        )


@dataclass(frozen=True, slots=True)
class InputErrors:
    """What rounding the inputs of one layer does, token by token."""

    source: str  #: the layer whose inputs these are; others may share them
    token_AMC: Tensor  #: signed, under each of A activation schemes, float64
    offset_MC: Tensor  #: each token's place in its chunk, or -1
    scheme_A: tuple[tuple[int, ...], ...]  #: the schemes with each activation scheme
    tokens: int  #: T of one sequence
    gains: SampleGains | None  #: of the inputs


@dataclass(frozen=True, slots=True)
class CorpusScore:
    """What one corpus says of one layer under each of S schemes."""

    error_NS: Tensor  #: nats per token of each sequence, float64
    #: The same, of a change of size of each row by itself, by the square of its share.
    size_NS: Tensor
    #: Summed over outputs, averaged over the tokens of the corpus, float64: an expert's, of which
    #: few tokens come by, counts as little as they are.
    output_mse_S: Tensor
    inputs: InputErrors | None = None
    weight_gains: SampleGains | None = None  #: that the weights' part is corrected by


@dataclass(frozen=True, slots=True)
class LayerScore:
    """All that is measured of one layer, or of one part of it, under each of S schemes."""

    name: str  #: of the layer
    part: str  #: see `mofq.evidence.measure.crossfit`
    relative_weight_error_S: Tensor  #: float64
    weight_energy: float  #: sum of squares
    error_energy_S: Tensor  #: sum of squares of the rounding error, float64
    along_S: Tensor  #: sum of products of the rounding error with the weights, float64
    corpora: Mapping[str, CorpusScore]  #: those of which a token reached the layer
    static_amax: float | None  #: largest magnitude of the inputs; None where there are none
    extent: ExtentSums  #: of the weight
    input_extents: Mapping[str, ExtentSums]  #: corpus -> of the inputs


def score_rows(layer: PreparedLayer, rows_RI: Tensor, *, start: int) -> BlockSums:
    """Quantize a block of rows by every scheme, and add up what that does.

    Args:
        layer: The layer.
        rows_RI: Rows ``start`` and following, on the CPU.
        start: The first of them.

    Returns:
        Sums over the block.

    Raises:
        SchemeError: A weight is not finite, or a scheme does not fit.
    """
    dtype = torch.bfloat16 if rows_RI.dtype == torch.bfloat16 else torch.float32
    block_RI = rows_RI.to(device=layer.device, dtype=dtype)
    rounded = round_block(layer, block_RI)
    if not bool(torch.isfinite(rounded.square_I).all()):
        _check_finite(layer, block_RI, start)
    corpora = {}
    if layer.inputs:
        assert rounded.delta_WRI is not None
        weight_RI, stop = block_RI.float(), start + len(block_RI)
        for corpus, inputs in layer.inputs.items():
            grad_MCR = inputs.grad_MCO[:, :, start:stop].float()
            corpora[corpus] = _corpus_sums(
                layer, inputs, grad_MCR, weight_RI, rounded.delta_WRI, start
            )
    number = start // layer.blocks[0][1]
    extent = rows_extent(block_RI, number=number, amax_I=rounded.amax_I, square_I=rounded.square_I)
    return BlockSums(
        extent=extent, along_W=_along(block_RI, rounded), error_WI=rounded.error_WI, corpora=corpora
    )


def _along(block_RI: Tensor, rounded: RoundedBlock) -> Tensor:
    """Products of the rounding errors with the weights; 0 where the errors are not known."""
    if rounded.delta_WRI is None:
        return rounded.error_WI.new_zeros(len(rounded.error_WI))
    product_WRI = rounded.delta_WRI * block_RI.float()
    return product_WRI.sum((1, 2), dtype=torch.float64)


def _check_finite(layer: PreparedLayer, block_RI: Tensor, start: int) -> None:
    finite_RI = torch.isfinite(block_RI)
    if not bool(finite_RI.all()):
        row, column = (~finite_RI).nonzero()[0].tolist()
        raise SchemeError(
            f"{layer.name}: needed finite weights, found {block_RI[row, column].item()} at "
            f"[{start + row}, {column}]. The checkpoint is damaged, or was saved after training "
            f"diverged; nothing was measured of this layer."
        )


def _corpus_sums(
    layer: PreparedLayer,
    inputs: Inputs,
    grad_MCR: Tensor,
    weight_RI: Tensor,
    delta_WRI: Tensor,
    start: int,
) -> CorpusSums:
    schemes = layer.schemes
    row_NS = weight_RI.new_zeros((inputs.sequences, len(schemes)), dtype=torch.float64)
    size_NS = torch.zeros_like(row_NS)
    output_S = row_NS.new_zeros(len(schemes))
    token_AMC = row_NS.new_zeros((len(layer.activations), *grad_MCR.shape[:2]))
    columns = {
        activation: [i for i, s in enumerate(schemes) if s.activation == activation]
        for activation in inputs.x
    }
    weighted = {
        activation: [i for i in some if schemes[i].weight is not None]
        for activation, some in columns.items()
    }
    factors_SRI = {  # rounding errors, and last the weights themselves
        activation: torch.cat(
            [
                delta_WRI[[layer.weights.index(schemes[i].weight) for i in some]],
                weight_RI[None],
            ]
        )
        for activation, some in weighted.items()
        if some
    }
    projected, changes = _over_tokens(inputs, grad_MCR, weight_RI, factors_SRI)
    lookup, looked_up_RNS = inputs.lookup, None
    if lookup is not None and None in factors_SRI:
        looked_up_RNS = project_lookups(lookup, factors_SRI[None], start=start)
    for activation, some in columns.items():
        change_MCR = changes.get(activation)
        if change_MCR is not None:
            token_MC = (grad_MCR * change_MCR).sum(2, dtype=torch.float64)
            token_AMC[layer.activations.index(activation)] = token_MC
            alone = [i for i in some if schemes[i].weight is None]
            output_S[alone] = _mean_squares(change_MCR.flatten(0, 1)[inputs.sample_T, None])
        if activation in factors_SRI:
            whole_RNS = projected[activation].unflatten(1, (inputs.sequences, -1)).sum(2)
            if looked_up_RNS is not None:
                whole_RNS += looked_up_RNS
            found_NS = whole_RNS.square().sum(0, dtype=torch.float64)
            row_NS[:, weighted[activation]] = found_NS[:, :-1]
            size_NS[:, weighted[activation]] = found_NS[:, -1:]
            deltas_SRI = factors_SRI.pop(activation)[:-1]
            if lookup is not None and not len(inputs.sample_T):
                output_S[weighted[activation]] = lookup_errors(lookup, deltas_SRI, start=start)
            else:
                output_S[weighted[activation]] = _output_errors(
                    inputs, activation, deltas_SRI, change_MCR
                )
    return CorpusSums(row_NS, size_NS, token_AMC, output_S)


def _over_tokens(
    inputs: Inputs,
    grad_MCR: Tensor,
    weight_RI: Tensor,
    factors_SRI: Mapping[TensorScheme | None, Tensor],
) -> tuple[dict[TensorScheme | None, Tensor], dict[TensorScheme | None, Tensor]]:
    """What takes all tokens, a run of neighbouring chunks after another.

    Returns:
        Rows times the outer products of gradients and inputs over each of U runs, [R, U, S], under
        each activation scheme that rows are given for; and the change of the outputs under each,
        [M, C, R].
    """
    chunks, tokens, rows = grad_MCR.shape
    channels, new = weight_RI.shape[1], weight_RI.new_empty
    run = _run_chunks(chunks // inputs.sequences, 4 * tokens * channels)
    runs, rows_at_once = chunks // run, min(rows, _ROWS)
    at_once = 1  # so that all runs are multiplied alike, however many there are
    if weight_RI.device.type != "cpu":
        held_bytes = 4 * channels * max(run * tokens, rows_at_once)
        at_once = min(runs, max(1, _GPU_GRADIENT_BYTES // held_bytes))
    plain_MCI, other_MCI = (new(at_once * run, tokens, channels) for _ in range(2))
    outer = new(at_once * rows_at_once * channels)
    gradient_URT = grad_MCR.reshape(runs, run * tokens, rows).transpose(1, 2)
    projected = {key: new(rows, runs, len(some)) for key, some in factors_SRI.items()}
    changes: dict[TensorScheme | None, Tensor] = {
        key: new(chunks, tokens, rows) for key in inputs.x if key is not None
    }
    for first in range(0, runs, at_once):
        some = slice(first, min(first + at_once, runs))
        start, stop = first * run, some.stop * run
        plain = inputs.x[None].chunks(start, stop, out=plain_MCI)
        for activation, stored in inputs.x.items():
            x_MCI = plain if activation is None else stored.chunks(start, stop, out=other_MCI)
            if activation in projected:
                projected[activation][:, some] = _project(
                    x_MCI.view(len(x_MCI) // run, run * tokens, channels),
                    gradient_URT[some],
                    factors_SRI[activation],
                    outer,
                )
            if activation is not None:
                changes[activation][start:stop] = x_MCI.sub_(plain) @ weight_RI.T
    return projected, changes


def _run_chunks(chunks: int, chunk_bytes: int) -> int:
    """Chunks of a run: of those of a sequence, a divisor, so that all runs are as long."""
    most = min(chunks, max(1, _RUN_BYTES // max(1, chunk_bytes)))
    return next(run for run in range(most, 0, -1) if chunks % run == 0)


def _project(x_UTI: Tensor, gradient_URT: Tensor, factors_SRI: Tensor, outer: Tensor) -> Tensor:
    """Rows times the outer products of gradients and inputs over U runs of tokens, [R, U, S].

    The outer products of some rows at once are written to ``outer``.
    """
    factors_RIS = factors_SRI.permute(1, 2, 0)
    parts = []
    for start in range(0, len(factors_RIS), _ROWS):
        some_URT = gradient_URT[:, start : start + _ROWS]
        shape = (*some_URT.shape[:2], x_UTI.shape[2])
        outer_URI = outer[: math.prod(shape)].view(shape)
        torch.bmm(some_URT, x_UTI, out=outer_URI)
        parts.append(torch.bmm(outer_URI.transpose(0, 1), factors_RIS[start : start + _ROWS]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _output_errors(
    inputs: Inputs,
    activation: TensorScheme | None,
    delta_SRI: Tensor,
    change_MCR: Tensor | None,
) -> Tensor:
    """Mean squared error of the outputs of some tokens, summed over the rows, [schemes]."""
    x_TI = inputs.x[activation].tokens(inputs.sample_T)
    error_TSR = (x_TI @ delta_SRI.flatten(0, 1).T).unflatten(1, delta_SRI.shape[:2])
    if change_MCR is not None:
        error_TSR += change_MCR.flatten(0, 1)[inputs.sample_T, None]
    return _mean_squares(error_TSR)


def _mean_squares(error_TSR: Tensor) -> Tensor:
    return error_TSR.square().sum(2).mean(0, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class RoundedBlock:
    """Sums over the rows of a block, and the rounding errors where they are needed."""

    amax_I: Tensor  #: largest magnitude of each column, float32
    square_I: Tensor  #: squares of the weights, float64
    error_WI: Tensor  #: squares of each weight scheme's rounding errors, float64
    delta_WRI: Tensor | None  #: the rounding errors, where the layer has inputs, float32


def round_block(layer: PreparedLayer, block_RI: Tensor) -> RoundedBlock:
    """Round a block of rows by every weight scheme of its layer.

    Args:
        layer: The layer.
        block_RI: Some of its rows, bfloat16 or float32.

    Returns:
        The sums; not finite where a weight is not, or where its square is not.

    Raises:
        SchemeError: A scheme does not fit.
    """
    columns = block_RI.shape[1]
    if not layer.needs_deltas:
        found = layer.block_pass(to_bands(block_RI, layer.weights), _amax(layer, block_RI))
        sums_WRI = found.reshape(len(found), -1, columns)
        amax_I, delta_WRI = sums_WRI[-1].amax(0), None
        sums_WRI = sums_WRI[:-1]
    else:
        weight_RI = block_RI.float()
        delta_WRI = quantize_block(layer, block_RI)
        amax_I = weight_RI.abs().amax(0)
        sums_WRI = torch.cat([sum_squares(delta_WRI), sum_squares(weight_RI[None])])
    sums_WI = sums_WRI.sum(1).double()
    return RoundedBlock(amax_I, sums_WI[-1], sums_WI[:-1], delta_WRI)


def quantize_block(layer: PreparedLayer, block_RI: Tensor) -> Tensor:
    """Rounding errors of a block of rows under every weight scheme of its layer.

    Args:
        layer: The layer.
        block_RI: Some of its rows, bfloat16 or float32, finite.

    Returns:
        Quantized minus original weight, [W, R, I], float32, in the order of
        ``layer.weights``.

    Raises:
        SchemeError: A scheme does not fit.
    """
    candidates = [weight for weight in layer.weights if is_candidate(weight)]
    delta_WRI = _candidate_deltas(layer, candidates, block_RI)
    if len(candidates) == len(layer.weights):
        return delta_WRI
    weight_RI = block_RI.float()
    deltas = dict(zip(candidates, delta_WRI, strict=True))
    for weight in layer.weights:
        if weight not in deltas:
            quantized_RI = fake_quantize_weight(
                weight_RI,
                weight,
                tensor_amax=layer.stored_amax
                if weight.has_stored_global_scale
                else layer.tensor_amax,
                name=layer.name,
                **layer.fit.arguments(weight),
            )
            deltas[weight] = quantized_RI - weight_RI
    return torch.stack([deltas[weight] for weight in layer.weights])


def _candidate_deltas(
    layer: PreparedLayer, candidates: list[TensorScheme], block_RI: Tensor
) -> Tensor:
    rows, columns = block_RI.shape
    if not candidates:
        return torch.empty((0, rows, columns), dtype=torch.float32, device=block_RI.device)
    found = layer.block_pass(to_bands(block_RI, candidates), _amax(layer, block_RI))
    return found.reshape(len(found), -1, columns)[:, :rows]


def _amax(layer: PreparedLayer, block_RI: Tensor) -> Tensor:
    amax = 0.0 if layer.tensor_amax is None else layer.tensor_amax
    return torch.full((), amax, dtype=torch.float32, device=block_RI.device)  # made there


def layer_score(layer: PreparedLayer, sums: BlockSums) -> LayerScore:
    """The score of a layer from the sums of all its blocks, added in their order."""
    weight_I = sums.extent.square_I
    is_zero_I = weight_I == 0
    ratio_WI = sums.error_WI / torch.where(is_zero_I, 1.0, weight_I)
    relative_W = torch.where(is_zero_I, 0.0, ratio_WI).mean(1)
    return LayerScore(
        name=layer.name,
        part=layer.part,
        relative_weight_error_S=_of_schemes(layer, relative_W),
        weight_energy=float(weight_I.sum()),
        error_energy_S=_of_schemes(layer, sums.error_WI.sum(1)),
        along_S=_of_schemes(layer, sums.along_W),
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
    token_NA = sums.token_AMC.square().sum(2).unflatten(1, (inputs.sequences, -1)).sum(2).T
    of_weight, of_input = (
        (inputs.gains.weight, inputs.gains.input) if inputs.gains else (None, None)
    )
    error_NS = corrected(sums.row_NS, of_weight).clone()
    token_NA = corrected(token_NA, of_input)
    for i, scheme in enumerate(layer.schemes):
        if scheme.activation is not None:
            error_NS[:, i] += token_NA[:, layer.activations.index(scheme.activation)]
    return CorpusScore(
        error_NS=(error_NS / (2 * inputs.tokens)).cpu(),
        size_NS=(corrected(sums.size_NS, of_weight) / (2 * inputs.tokens)).cpu(),
        output_mse_S=sums.output_S.cpu() * _share_of_tokens(inputs),
        inputs=InputErrors(
            inputs.source,
            sums.token_AMC.cpu(),
            inputs.offset_MC,
            scheme_A=tuple(
                tuple(i for i, s in enumerate(layer.schemes) if s.activation == activation)
                for activation in layer.activations
            ),
            tokens=inputs.tokens,
            gains=of_input,
        ),
        weight_gains=of_weight,
    )


def _share_of_tokens(inputs: Inputs) -> float:
    """Of the corpus's tokens, those that the layer sees."""
    if inputs.lookup is not None:
        return 1.0
    return int((inputs.offset_MC >= 0).sum()) / (inputs.sequences * inputs.tokens)


def with_shared_inputs(
    scores: Mapping[str, LayerScore], layers: Sequence[LinearLayer]
) -> dict[str, LayerScore]:
    """Add to each layer what it and others do together when the inputs that they share are rounded.

    ``(sum_l a_l)^2`` over layers ``l`` that read the same vector at a token is given to them as
    ``a_l sum_k a_k``: a layer's part may be negative, their sum is not. q, k and v share all of
    their tokens; gate and up of the experts share those that are routed to several of them.

    Args:
        scores: Layer name -> its score, all layers of a fusion group.
        layers: Those of the fusion group.

    Returns:
        The scores; those of layers that share no inputs are the same.
    """
    shared_by = {layer.name: layer.shares_input for layer in layers if layer.shares_input}
    sharing: dict[tuple[str, str], list[InputErrors]] = defaultdict(list)
    for name, score in scores.items():
        for corpus, one in score.corpora.items():
            if one.inputs is not None and one.inputs.source:
                sharing[corpus, shared_by.get(name, one.inputs.source)].append(one.inputs)
    joint = {key: _joint_errors(some) for key, some in sharing.items() if len(some) > 1}

    def joined(name: str, corpus: str, one: CorpusScore) -> CorpusScore:
        source = one.inputs.source if one.inputs is not None else ""
        return _with_cross_terms(one, joint.get((corpus, shared_by.get(name, source))))

    return {
        name: replace(
            score,
            corpora={corpus: joined(name, corpus, one) for corpus, one in score.corpora.items()},
        )
        for name, score in scores.items()
    }


def _joint_errors(sharing: Sequence[InputErrors]) -> Tensor:
    """What rounding the same vectors does in all that read them, [A, M, tokens of a chunk]."""
    schemes, chunks, _ = sharing[0].token_AMC.shape
    joint_AMP = torch.zeros((schemes, chunks, CHUNK_TOKENS), dtype=torch.float64)
    for one in sharing:
        joint_AMP.scatter_add_(2, _places(one), one.token_AMC)
    return joint_AMP


def _places(errors: InputErrors) -> Tensor:
    # Where there is no token, the error is 0 and any place will do.
    return errors.offset_MC.clamp(min=0).expand_as(errors.token_AMC)


def _with_cross_terms(one: CorpusScore, joint_AMP: Tensor | None) -> CorpusScore:
    """Add the products with the errors of the other layers that read the same inputs."""
    own = one.inputs
    if own is None or joint_AMP is None:
        return one
    others_AMC = joint_AMP.gather(2, _places(own)) - own.token_AMC
    cross_AM = (own.token_AMC * others_AMC).sum(2)
    cross_NA = cross_AM.unflatten(1, (len(one.error_NS), -1)).sum(2).T / (2 * own.tokens)
    cross_NA = corrected(cross_NA, own.gains)
    error_NS = one.error_NS.clone()
    for schemes, cross_N in zip(own.scheme_A, cross_NA.T, strict=True):
        error_NS[:, schemes] += cross_N[:, None]
    return replace(one, error_NS=error_NS)
