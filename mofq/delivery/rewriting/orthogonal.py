"""Orthogonal matrices that spread what stands out in one channel over all of them.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows. One of Sylvester's exists for every
power of two; Paley's construction has one of order ``q + 1`` for a prime ``q = 3 (mod 4)``, and of
``2 (q + 1)`` for ``q = 1 (mod 4)``; and the Kronecker product of two is one. With random signs it
is a randomized Hadamard matrix. A width that none of these has takes a random orthogonal matrix.

Source: R. E. A. C. Paley, "On orthogonal matrices", 1933; randomized Hadamard matrices for
quantization: QuIP#, arXiv:2402.04396, and QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from scipy.linalg import hadamard
from torch import Tensor

#: Order of a factor that is a power of two, at most: a larger one is multiplied by in parts.
_LARGEST_POWER = 64


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix ``Q = diag(signs) (F1 x F2 x …) / sqrt(n)``, x the Kronecker product.

    With factors of 1 and -1, sums of numbers of few bits are exact in float64, in any order, until
    they are scaled: the same bits come out on every machine.
    """

    signs_I: Tensor  #: float64
    factors: tuple[Tensor, ...]  #: square, float64; the product of their orders is the width
    scale: float

    @property
    def width(self) -> int:
        """How many channels it mixes."""
        return len(self.signs_I)

    @property
    def is_exact(self) -> bool:
        """Whether its factors are 1 and -1."""
        return all(bool((factor.abs() == 1).all()) for factor in self.factors)

    def turn(self, rows: Tensor, *, is_scaled: bool = True) -> Tensor:
        """``x Q`` of every ``width`` neighbours along the last dimension.

        Args:
            rows: [..., any multiple of the width].
            is_scaled: Whether to multiply by the scale.

        Returns:
            Of the same shape, float64.
        """
        parts = rows.double().unflatten(-1, (-1, self.width)) * self.signs_I
        mixed = self._mixed(parts, of_rows=0).flatten(-2)
        return mixed * self.scale if is_scaled else mixed

    def turn_back(self, rows: Tensor) -> Tensor:
        """``x Q^T``, which undoes `turn`."""
        parts = self._mixed(rows.double().unflatten(-1, (-1, self.width)), of_rows=1)
        return (parts * self.signs_I * self.scale).flatten(-2)

    def _mixed(self, parts: Tensor, *, of_rows: int) -> Tensor:
        """The product with the factors, or with their transposes."""
        parts = parts.unflatten(-1, [len(factor) for factor in self.factors])
        for at, factor in enumerate(self.factors, start=parts.ndim - len(self.factors)):
            parts = torch.tensordot(parts, factor, ([at], [of_rows])).movedim(-1, at)
        return parts.flatten(-len(self.factors))


def random_rotation(width: int, seed: int) -> Rotation:
    """A randomized Hadamard matrix, or where none is known a random orthogonal matrix.

    Args:
        width: Its order.
        seed: Of what is random in it.
    """
    random = torch.Generator().manual_seed(seed)
    hadamard_factors = _hadamard_factors(width)
    if hadamard_factors is not None:
        signs_I = torch.randint(0, 2, (width,), generator=random).double() * 2 - 1
        return Rotation(signs_I, hadamard_factors, width**-0.5)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))
    # The decomposition leaves the signs of columns open; so it is one, and uniformly distributed.
    return Rotation(torch.ones(width, dtype=torch.float64), (q * r.diagonal().sign(),), 1.0)


@cache
def _hadamard_factors(width: int) -> tuple[Tensor, ...] | None:
    """Hadamard matrices whose orders multiply to a width; None where none are known."""
    powers = (width & -width).bit_length()
    for power in reversed(range(powers)):
        paley = _paley(width >> power)
        if paley is not None:
            every = (paley, *_sylvester(2**power))
            return tuple(factor for factor in every if len(factor) > 1) or every
    return None


def _sylvester(order: int) -> tuple[Tensor, ...]:
    """A power of two, in factors that are not too large."""
    factors = []
    while order > 1:
        part = min(order, _LARGEST_POWER)
        factors.append(torch.from_numpy(hadamard(part, dtype=float)))
        order //= part
    return tuple(factors)


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of an order that Paley's constructions have, or of order 1; else None."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1):  # first construction: S + I with S skew
        s = torch.ones(order, order, dtype=torch.float64)
        s[1:, 0] = -1
        s[1:, 1:] = _residues(order - 1)
        return s.fill_diagonal_(1)
    q = order // 2 - 1
    if q % 4 != 1 or not _is_prime(q):
        return None
    c = torch.ones(q + 1, q + 1, dtype=torch.float64)  # second: C symmetric
    c[1:, 1:] = _residues(q)
    c.fill_diagonal_(0)
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(c, one) + torch.kron(torch.eye(q + 1, dtype=torch.float64), other)


def _residues(q: int) -> Tensor:
    """Whether ``i - j`` is a square modulo q: 1 or -1, and 0 on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    value = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    at = torch.arange(q)
    return value.double()[(at[:, None] - at) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
