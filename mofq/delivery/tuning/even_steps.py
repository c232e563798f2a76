"""Steps that cost about the same in each parameter where the gradient is noise.

A parameter moves by its gradient over the root mean square of it, as Adam's do; where that is
larger than the median's of all, by as much less. What loss answers to most, such as scales of
groups with massive inputs, has the largest gradients, and steps of one size would add more noise
there than is gained elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

#: How slowly means of squares of gradients forget, and how far beyond its root one counts.
_FORGETS, _MOST = 0.95, 3.0
#: Far below any gradient.
_TINY = 1e-30
#: Bits of a float32 that are counted at once.
_HALF = 16


class EvenSteps:
    """Steps on parameters that are all in memory."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._squares: list[Tensor] = []

    def step(self, rate: float) -> None:
        """Move all by their ``grad``, a parameter of median gradients by about ``rate``."""
        gradients = [
            torch.zeros_like(one) if one.grad is None else one.grad for one in self._parameters
        ]
        before: Sequence[Tensor | None] = self._squares or [None] * len(gradients)
        self._squares = [mean_square(*both) for both in zip(before, gradients, strict=True)]
        median = median_of(lambda: self._squares)
        every = zip(self._parameters, gradients, self._squares, strict=True)
        for one, gradient, square in every:
            move(one.data, gradient, square, median=median, rate=rate)


def mean_square(before: Tensor | None, gradient: Tensor) -> Tensor:
    """The running mean of squares after one more gradient; before the first it is None."""
    square = gradient.square()
    return _FORGETS * (square if before is None else before) + (1 - _FORGETS) * square


def move(
    parameter: Tensor, gradient: Tensor, square: Tensor, *, median: float, rate: float
) -> None:
    """Move a parameter in place.

    Args:
        parameter: Of any shape, as what follows.
        gradient: Of it.
        square: Running mean of squares, that of the gradient included.
        median: Of these of all parameters.
        rate: How far one of median gradients goes, about.
    """
    size = square.sqrt() + _TINY
    less = (torch.tensor(median, device=size.device).sqrt() / size).clamp(max=1)
    parameter -= rate * less * (gradient / size).clamp(-_MOST, _MOST)


def median_of(parts: Callable[[], Iterable[Tensor]]) -> float:
    """The median of all positive numbers, the lower one of two; 0 where there are none.

    Found by counting, the upper bits first: float32 that are positive are in the order of their
    bits. So of many parts one is in memory at a time.

    Args:
        parts: Gives all of them, float32, each time it is called.
    """
    upper = sum(torch.bincount(bits >> _HALF, minlength=1 << _HALF) for bits in _bits(parts))
    if not isinstance(upper, Tensor) or not (count := int(upper.sum())):
        return 0.0
    rank = (count - 1) // 2
    first, rank = _at_rank(upper, rank)
    lower = sum(
        torch.bincount(bits[bits >> _HALF == first] & ((1 << _HALF) - 1), minlength=1 << _HALF)
        for bits in _bits(parts)
    )
    assert isinstance(lower, Tensor)
    second, _ = _at_rank(lower, rank)
    found = torch.tensor(first << _HALF | second, dtype=torch.int32)
    return float(found.view(torch.float32))


def _bits(parts: Callable[[], Iterable[Tensor]]) -> Iterable[Tensor]:
    """Of the positive numbers of each part."""
    return (one[one > 0].view(torch.int32) for one in parts())


def _at_rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """In which bin the number of a rank is, and its rank within."""
    until = counts.cumsum(0)
    found = int((until <= rank).sum())
    return found, rank - int(until[found] - counts[found])
