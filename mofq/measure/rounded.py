"""What every weight scheme of a layer does to a block of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mofq.measure.prepared import PreparedLayer
from mofq.quantize import fake_quantize_weight


def quantize_block(layer: PreparedLayer, weight_RI: Tensor, *, start: int) -> Tensor:
    """Rounding errors of a block of rows under every weight scheme of its layer.

    Args:
        layer: The layer.
        weight_RI: Rows ``start`` and following, float32, finite.
        start: The first of them, for what a scheme knows of single rows.

    Returns:
        Quantized minus original weight, [W, R, I], float32, in the order of
        ``layer.weights``.

    Raises:
        SchemeError: A scheme does not fit.
    """
    delta_WRI = weight_RI.new_empty((len(layer.weights), *weight_RI.shape))
    for weight, delta_RI in zip(layer.weights, delta_WRI, strict=True):
        quantized_RI = fake_quantize_weight(
            weight_RI, weight, tensor_amax=layer.tensor_amax, name=layer.name
        )
        torch.sub(quantized_RI, weight_RI, out=delta_RI)
    return delta_WRI
