"""Rounding that lets gradients pass as if it were not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor, round_to: Callable[[Tensor], Tensor]) -> Tensor:
        return round_to(x)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(round_to: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Round, and give ``x`` the gradient of the outcome where gradients are followed.

    Args:
        round_to: Gives a tensor of the same shape.
        x: Any.

    Source: Y. Bengio, N. Léonard, A. Courville, "Estimating or propagating gradients through
    stochastic neurons for conditional computation", arXiv:1308.3432, section 4.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return round_to(x)
    rounded: Tensor = _StraightThrough.apply(x, round_to)  # type: ignore[no-untyped-call]
    return rounded
