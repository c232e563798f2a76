"""Quantizes: the reference definition of every scheme, in plain torch.

``quantize_weight`` chooses scales and rounds, ``dequantize_weight`` undoes it,
``fake_quantize_weight`` and ``fake_quantize_activation`` do both. Scales are
multipliers. The formulas stand in ``scales`` (how a scale is found), ``search``
(how the ``mse`` rule searches), ``rounding`` (how a number is rounded) and
``feedback`` (how ``~gptq`` rounds a column after the others).
"""

from __future__ import annotations

from mofq.quantize.activations import fake_quantize_activation
from mofq.quantize.cache import fake_quantize_cache
from mofq.quantize.feedback import Feedback, factorise_hessian, one_thread
from mofq.quantize.linear import FakeQuantLinear
from mofq.quantize.rounding import round_to_format
from mofq.quantize.weights import (
    QuantizedWeight,
    dequantize_weight,
    fake_quantize_weight,
    quantize_weight,
    quantize_with_scales,
)

__all__ = [
    "FakeQuantLinear",
    "Feedback",
    "QuantizedWeight",
    "dequantize_weight",
    "factorise_hessian",
    "fake_quantize_activation",
    "fake_quantize_cache",
    "fake_quantize_weight",
    "one_thread",
    "quantize_weight",
    "quantize_with_scales",
    "round_to_format",
]
