"""What errors in the rows of an embedding do where these rows are looked up.

A token ``t`` whose row is ``r_t`` puts ``dE[r_t]`` into the model, where the gradient is ``e_t``: a
product of the matrix with ``onehot(r_t)``, whose gradient is a row. So ``G`` of a lookup is
``sum_t onehot(r_t) e_t^T``, and that of an embedding that is the lm_head too is the sum of both,
whose errors meet before they are squared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mofq.evidence.measure.samples import LookedUpRows


def project_lookups(lookup: LookedUpRows, factors_SRI: Tensor, *, start: int) -> Tensor:
    """Rows times what their lookups have of ``G``, in each sample.

    Args:
        lookup: Which rows the samples looked up.
        factors_SRI: Rows ``start`` and following, under each of S schemes, float32.
        start: The first of them.

    Returns:
        [rows, samples, schemes], float32.
    """
    schemes, rows, _ = factors_SRI.shape
    samples = len(lookup.row_NT)
    sample_K, row_K, grad_KI = _within(lookup, start, start + rows)
    found = factors_SRI.new_zeros(rows * samples, schemes)
    for scheme, factor_RI in enumerate(factors_SRI):
        product_K = (factor_RI[row_K] * grad_KI).sum(1)
        found[:, scheme].index_add_(0, row_K * samples + sample_K, product_K)
    return found.view(rows, samples, schemes)


def lookup_errors(lookup: LookedUpRows, delta_SRI: Tensor, *, start: int) -> Tensor:
    """Squares of what is looked up of some rows' errors, over all tokens' number, [S], float64."""
    _, row_K, _ = _within(lookup, start, start + delta_SRI.shape[1])
    square_SR = delta_SRI.square().sum(2, dtype=torch.float64)
    return square_SR[:, row_K].sum(1) / lookup.row_NT.numel()


def _within(lookup: LookedUpRows, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, row from ``start`` on, and gradient of the K tokens that look up these rows."""
    sample_K, token_K = ((lookup.row_NT >= start) & (lookup.row_NT < stop)).nonzero(as_tuple=True)
    row_K = lookup.row_NT[sample_K, token_K] - start
    return sample_K, row_K, lookup.grad_NTI[sample_K, token_K].float()
