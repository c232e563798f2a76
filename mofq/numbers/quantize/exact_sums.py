"""Products of matrices that come out the same in whatever order their sums are taken.

Both factors are integers below 2**22 times powers of two, one for each line that is summed along,
and no sum has more than `SUMMED` products. So it is an integer below 2**53 times a power of two,
which float64 holds: no number of rows, threads or devices changes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Most products in a sum.
SUMMED = 128
_INTEGER_BITS = 22
_SMALLEST_UNIT = 2.0**-122
_LARGEST = float(torch.finfo(torch.float32).max)
#: Columns that errors are sent on to at once: what is sent stays in the cache.
_SENT_COLUMNS = 512


def to_22_bits(x: Tensor, dim: int) -> Tensor:
    """Round every line along a dimension to integers below 2**22 times a power of two."""
    amax = torch.amax(torch.abs(x), dim=dim, keepdim=True)
    mantissa, _ = torch.frexp(amax)
    power = torch.where(amax > 0, amax / mantissa, 1.0)  # exactly a power of two
    # Not below float32's normal numbers, in which factors are kept.
    unit = torch.clamp(power * 2.0**-_INTEGER_BITS, min=_SMALLEST_UNIT)
    return torch.round(x / unit) * unit


def send(error_BO: Tensor, passed_BI: Tensor, *, into_IO: Tensor) -> None:
    """Add what the errors of a batch of columns do to other columns, each a line of its own.

    Args:
        error_BO: float64, of at most `SUMMED` columns; rounded to 22 bits here.
        passed_BI: What each of them passes on; every column in 22 bits.
        into_IO: float64; is added to.
    """
    sent_BO = to_22_bits(error_BO, 0)
    for first in range(0, len(into_IO), _SENT_COLUMNS):
        some = slice(first, first + _SENT_COLUMNS)
        into_IO[some] += passed_BI[:, some].double().T @ sent_BO


def as_float32(x: Tensor) -> Tensor:
    """The nearest float32; what is too large becomes the largest."""
    return torch.clamp(x, -_LARGEST, _LARGEST).float()
