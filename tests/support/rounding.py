"""How far float32 sums of the same numbers may be apart that were added in different orders."""

from __future__ import annotations

import torch


def apart(summands: int) -> float:
    """How far two sums in float32 may be apart, relative to the sum of the magnitudes.

    Each is within ``summands * eps / 2`` of the true sum, in whatever order a processor adds:
    instruction sets and numbers of threads differ in it.

    Source: N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 4.2.
    """
    return summands * torch.finfo(torch.float32).eps
