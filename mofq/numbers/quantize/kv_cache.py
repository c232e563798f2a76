"""Fake-quantizes what attention caches: all heads of a token under one scale, or each alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mofq.numbers.quantize.activations import fake_quantize_activation
from mofq.numbers.schemes import TensorScheme


def fake_quantize_cache(
    x_BTHD: Tensor,
    scheme: TensorScheme,
    *,
    by_head: bool = False,
    static_amax: Sequence[float] = (),
    name: str = "cache",
) -> Tensor:
    """Quantize and dequantize the keys, or the values, of an attention layer.

    Args:
        x_BTHD: [..., tokens, kv_heads, head_size], any floating dtype; computed in float32.
        scheme: Of one row: all heads of a token after one another, or one head.
        by_head: Whether a row is one head.
        static_amax: Largest magnitudes in calibration, where the scheme needs them: one, or
            with ``by_head`` one for each head. Larger numbers saturate.
        name: Of the cache, for messages.

    Returns:
        As ``x_BTHD``, same shape and dtype.

    Raises:
        SchemeError: ``static_amax`` is missing, or groups do not divide the channels.
    """
    amax: list[float | None] = list(static_amax) or [None]
    if not by_head:
        flat_BTI = fake_quantize_activation(
            x_BTHD.flatten(-2), scheme, static_amax=amax[0], name=name
        )
        return flat_BTI.reshape(x_BTHD.shape)
    if not scheme.needs_tensor_amax:
        return fake_quantize_activation(x_BTHD, scheme, name=name)
    heads = amax * x_BTHD.shape[-2] if len(amax) == 1 else amax
    return torch.stack(
        [
            fake_quantize_activation(x_BTD, scheme, static_amax=one, name=name)
            for x_BTD, one in zip(x_BTHD.unbind(-2), heads, strict=True)
        ],
        dim=-2,
    )
