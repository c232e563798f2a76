"""TorchAO's tensors and kernels in a model in memory, holding the codes that were measured.

TorchAO's own configs choose scales by rules of their own (INT8 weights and inputs over twice
the maximum by 255, FP8 scales in the inputs' dtype). Here its tensor classes are made from the
codes and scales of ``quantize``, and inputs are rounded as they were measured before its kernels
multiply them; where a class rounds them itself (microscaling), its rounding is the measured one.
"""

from __future__ import annotations

from mofq.delivery.apply.torchao.apply import apply
from mofq.delivery.apply.torchao.deviation import weight_deviation
from mofq.delivery.apply.torchao.linear import TorchaoLinear

__all__ = ["TorchaoLinear", "apply", "weight_deviation"]
