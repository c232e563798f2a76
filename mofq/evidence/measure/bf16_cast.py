"""A layer of an FP8 source that stays unquantized is written in bf16: that is measured too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mofq.model.checkpoint.safetensors_header import FP8_DTYPES
from mofq.model.layers import FusionGroup
from mofq.numbers.formats import SCALE_FORMATS, FloatFormat
from mofq.numbers.schemes import Granularity, Scheme, TensorScheme

#: No scheme may be named with it: what is left alone is called bf16 whatever it is stored in.
_BF16 = FloatFormat(
    "bf16",
    8,
    7,
    bias=127,
    max=torch.finfo(torch.bfloat16).max,
    source="Intel, BFLOAT16 Hardware Numerics Definition, 2018",
)
_WRITTEN = TensorScheme(
    element=_BF16,
    granularity=Granularity("unscaled", 0, 0),
    symmetric=True,
    scale=SCALE_FORMATS["bf16"],
    scale_rule="absmax",
    rounding="nearest",
)


def written_schemes(group: FusionGroup, schemes: Sequence[Scheme]) -> list[Scheme]:
    """The schemes of a fusion group as they are measured.

    Args:
        group: The fusion group.
        schemes: As they are called.

    Returns:
        The same in the same order; in an FP8 source, those without a weight scheme round the
        weight to bf16.
    """
    if not any(layer.dtype in FP8_DTYPES for layer in group.layers):
        return list(schemes)
    return [replace(s, weight=_WRITTEN) if s.weight is None else s for s in schemes]
