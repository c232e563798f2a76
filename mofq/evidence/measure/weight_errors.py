"""What every weight scheme of a layer does to a block of its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.evidence.measure.layer_inputs import PreparedLayer
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.quantize.rounding_errors import is_candidate, sum_squares, to_bands
from mofq.numbers.schemes import TensorScheme


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
                tensor_amax=layer.tensor_amax,
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
    return torch.tensor(amax, dtype=torch.float32, device=block_RI.device)
