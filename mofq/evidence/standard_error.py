"""How far the mean of samples may be from the mean of all that might have been drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def standard_errors(values_PN: Any) -> Any:
    """Of the means over the last axis.

    Args:
        values_PN: Samples, ``[..., N]``, an array of numpy or a tensor of torch, of floats.

    Returns:
        ``[...]``, of the same library: the sample's standard deviation, divided by ``sqrt(N)``;
        infinite where there are fewer than two samples.
    """
    count = values_PN.shape[-1]
    if count < 2:
        return values_PN.sum(-1) + math.inf
    # Both libraries divide the squares by N - 1, each under a name of its own.
    one_less = {"ddof": 1} if isinstance(values_PN, np.ndarray) else {"correction": 1}
    return values_PN.std(-1, **one_less) / math.sqrt(count)


def standard_error(values_N: Any) -> float | None:
    """Of the mean of some samples, ``[N]`` as in `standard_errors`; None of one alone."""
    return float(standard_errors(values_N)) if len(values_N) > 1 else None
