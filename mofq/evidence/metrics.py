"""Errors as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of logits worked on at once: a large vocabulary makes every temporary of
# a whole window hundreds of megabytes.
_ROWS = 128


def kl_divergence(logits_original_TV: Tensor, logits_quantized_TV: Tensor) -> Tensor:
    """KL divergence of two next-token distributions, at every position.

    Args:
        logits_original_TV: Logits of the reference, ``[T, V]``, any float dtype.
        logits_quantized_TV: Logits of the approximation, ``[T, V]``.

    Returns:
        ``KL(original || quantized)``, ``[T]``, float64 [nats]. Logarithms are
        taken in float32, sums over the vocabulary in float64.

    Raises:
        ValueError: The shapes differ.
    """
    _check_shapes(logits_original_TV, logits_quantized_TV)
    parts = []
    for original, quantized in zip(
        torch.split(logits_original_TV, _ROWS), torch.split(logits_quantized_TV, _ROWS), strict=True
    ):
        log_p = original.float().log_softmax(dim=-1)
        log_q = quantized.float().log_softmax(dim=-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64))
    return torch.cat(parts)


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Negative log probability of given tokens.

    Args:
        logits_TV: Logits, ``[T, V]``, any float dtype.
        targets_T: The token that each position should predict, ``[T]``, int64.

    Returns:
        ``[T]``, float64 [nats]; ``exp`` of its mean is the perplexity.
    """
    parts = []
    for logits, targets in zip(
        torch.split(logits_TV, _ROWS), torch.split(targets_T, _ROWS), strict=True
    ):
        log_p = logits.float().log_softmax(dim=-1)
        parts.append(-log_p.gather(1, targets[:, None])[:, 0].double())
    return torch.cat(parts)


def top1_agreement(logits_original_TV: Tensor, logits_quantized_TV: Tensor) -> Tensor:
    """Where two distributions have the same most probable token.

    Args:
        logits_original_TV: ``[T, V]``.
        logits_quantized_TV: ``[T, V]``.

    Returns:
        ``[T]``, bool.

    Raises:
        ValueError: The shapes differ.
    """
    _check_shapes(logits_original_TV, logits_quantized_TV)
    return logits_original_TV.argmax(dim=-1) == logits_quantized_TV.argmax(dim=-1)


def _check_shapes(original: Tensor, quantized: Tensor) -> None:
    if original.shape != quantized.shape:
        raise ValueError(
            f"logits differ in shape: {tuple(original.shape)} and {tuple(quantized.shape)}"
        )
