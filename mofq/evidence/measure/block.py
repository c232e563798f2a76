"""Scores a block of rows of a linear layer under every scheme; the mathematics is in ``score``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.evidence.measure.layer_inputs import Inputs, PreparedLayer
from mofq.evidence.measure.magnitudes import ExtentSums, rows_extent
from mofq.evidence.measure.weight_errors import round_block
from mofq.exceptions import SchemeError

#: Outer products of gradients and inputs held at once [bytes].
_GRADIENT_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class CorpusSums:
    """What a block of rows adds to the score of a corpus, float64."""

    row_NS: Tensor  #: sum over rows of squares
    projection_MS: Tensor  #: of the weights' rounding errors, signed
    token_AMC: Tensor  #: of each activation scheme's rounding errors, signed
    output_S: Tensor

    def __add__(self, other: CorpusSums) -> CorpusSums:
        return CorpusSums(
            self.row_NS + other.row_NS,
            self.projection_MS + other.projection_MS,
            self.token_AMC + other.token_AMC,
            self.output_S + other.output_S,
        )


@dataclass(frozen=True, slots=True)
class BlockSums:
    """What a block of rows adds to the score of its layer, float64."""

    extent: ExtentSums  #: of the weights, their squares among it
    error_WI: Tensor  #: squares of each weight scheme's rounding errors
    corpora: Mapping[str, CorpusSums]

    def __add__(self, other: BlockSums) -> BlockSums:
        return BlockSums(
            self.extent + other.extent,
            self.error_WI + other.error_WI,
            {corpus: sums + other.corpora[corpus] for corpus, sums in self.corpora.items()},
        )


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
            corpora[corpus] = _corpus_sums(layer, inputs, grad_MCR, weight_RI, rounded.delta_WRI)
    number = start // layer.blocks[0][1]
    extent = rows_extent(block_RI, number=number, amax_I=rounded.amax_I, square_I=rounded.square_I)
    return BlockSums(extent=extent, error_WI=rounded.error_WI, corpora=corpora)


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
    layer: PreparedLayer, inputs: Inputs, grad_MCR: Tensor, weight_RI: Tensor, delta_WRI: Tensor
) -> CorpusSums:
    schemes = layer.schemes
    row_NS = weight_RI.new_zeros((inputs.sequences, len(schemes)), dtype=torch.float64)
    projection_MS = row_NS.new_zeros((len(grad_MCR), len(schemes)))
    output_S = row_NS.new_zeros(len(schemes))
    token_AMC = row_NS.new_zeros((len(layer.activations), *grad_MCR.shape[:2]))
    for activation, x_MCI in inputs.x.items():
        change_MCR = None
        if activation is not None:
            change_MCR = (x_MCI - inputs.x[None]) @ weight_RI.T
            token_MC = (grad_MCR * change_MCR).sum(2, dtype=torch.float64)
            token_AMC[layer.activations.index(activation)] = token_MC
        columns = [i for i, s in enumerate(schemes) if s.activation == activation]
        weighted = [i for i in columns if schemes[i].weight is not None]
        delta_SRI = delta_WRI[[layer.weights.index(schemes[i].weight) for i in weighted]]
        if weighted:
            row_NS[:, weighted], projection_MS[:, weighted] = _project(
                x_MCI, grad_MCR, delta_SRI, sequences=inputs.sequences
            )
            output_S[weighted] = _output_errors(inputs, x_MCI, delta_SRI, change_MCR)
        if change_MCR is not None:
            alone = [i for i in columns if schemes[i].weight is None]
            output_S[alone] = _mean_squares(change_MCR.flatten(0, 1)[inputs.sample_T, None])
    return CorpusSums(row_NS, projection_MS, token_AMC, output_S)


def _project(
    x_MCI: Tensor, grad_MCR: Tensor, delta_SRI: Tensor, *, sequences: int
) -> tuple[Tensor, Tensor]:
    """Rounding errors times the outer products of gradients and inputs, row by row.

    Returns:
        Squared over whole sequences and summed over rows, [sequences, schemes]; and signed,
        summed over rows, [M, schemes].
    """
    part_MRC = grad_MCR.transpose(1, 2)
    delta_RIS = delta_SRI.permute(1, 2, 0)
    step = max(1, _GRADIENT_BYTES // (4 * len(x_MCI) * x_MCI.shape[2]))
    parts = []
    for start in range(0, len(delta_RIS), step):
        gradient_MRI = part_MRC[:, start : start + step] @ x_MCI
        parts.append(torch.bmm(gradient_MRI.transpose(0, 1), delta_RIS[start : start + step]))
    projection_RMS = torch.cat(parts)
    whole_RNS = projection_RMS.unflatten(1, (sequences, -1)).sum(2)
    return (
        whole_RNS.square().sum(0, dtype=torch.float64),
        projection_RMS.sum(0, dtype=torch.float64),
    )


def _output_errors(
    inputs: Inputs, x_MCI: Tensor, delta_SRI: Tensor, change_MCR: Tensor | None
) -> Tensor:
    """Mean squared error of the outputs of some tokens, summed over the rows, [schemes]."""
    x_TI = x_MCI.flatten(0, 1)[inputs.sample_T]
    error_TSR = (x_TI @ delta_SRI.flatten(0, 1).T).unflatten(1, delta_SRI.shape[:2])
    if change_MCR is not None:
        error_TSR += change_MCR.flatten(0, 1)[inputs.sample_T, None]
    return _mean_squares(error_TSR)


def _mean_squares(error_TSR: Tensor) -> Tensor:
    return error_TSR.square().sum(2).mean(0, dtype=torch.float64)
