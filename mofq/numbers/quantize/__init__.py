"""Quantizes: the reference definition of every scheme, in plain torch.

``quantize_weight`` chooses scales and rounds, ``dequantize_weight`` undoes it,
``fake_quantize_weight`` and ``fake_quantize_activation`` do both. Scales are
multipliers. The formulas are in ``scales`` (how a scale is found), ``scale_rules``
(how the ``mse`` rule searches), ``rounding`` (how a number is rounded) and
``gptq`` (how ``~gptq`` rounds a column after the others).
"""

from __future__ import annotations

from mofq.numbers.quantize.activations import fake_quantize_activation, fake_quantize_cache
from mofq.numbers.quantize.fake_quant_linear import FakeQuantLinear
from mofq.numbers.quantize.gptq import (
    Feedback,
    damped_hessian,
    factorise_hessian,
    one_thread,
)
from mofq.numbers.quantize.rounding import round_to_format
from mofq.numbers.quantize.weights import (
    QuantizedWeight,
    dequantize_weight,
    descend_from,
    fake_quantize_weight,
    quantize_weight,
    quantize_with_scales,
)

__all__ = [
    "FakeQuantLinear",
    "Feedback",
    "QuantizedWeight",
    "damped_hessian",
    "dequantize_weight",
    "descend_from",
    "factorise_hessian",
    "fake_quantize_activation",
    "fake_quantize_cache",
    "fake_quantize_weight",
    "one_thread",
    "quantize_weight",
    "quantize_with_scales",
    "round_to_format",
]
