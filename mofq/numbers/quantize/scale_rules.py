"""Scales of tiles by the rule that a scheme names."""

from __future__ import annotations

from torch import Tensor

from mofq.numbers.quantize.scale_search import search_scales
from mofq.numbers.quantize.scales import Scales, choose_scales, global_scale_of, symmetric_scale
from mofq.numbers.schemes import TensorScheme


def tile_scales(
    x_ARGK: Tensor,
    scheme: TensorScheme,
    *,
    tensor_amax: Tensor | None = None,
    importance_ARGK: Tensor | None = None,
) -> Scales | None:
    """Scales of tiles by the scheme's own rule; nothing is checked.

    Args:
        x_ARGK: Tiles (see ``scales``), float32, finite.
        scheme: Any.
        tensor_amax: float32 scalar; needed if ``scheme.needs_tensor_amax``.
        importance_ARGK: Broadcastable to the tiles; for the rule ``nats``.

    Returns:
        The scales, or None where the scheme is unscaled.
    """
    if not scheme.has_scale:
        return None
    global_scale = None if tensor_amax is None else global_scale_of(scheme, tensor_amax)
    if scheme.granularity.kind == "tensor":
        assert tensor_amax is not None
        amax = tensor_amax.reshape(1, 1, 1, 1)
        return Scales(symmetric_scale(amax, scheme, global_scale=global_scale), None, global_scale)
    if scheme.scale_rule in ("mse", "nats", "fouroversix"):
        return search_scales(
            x_ARGK, scheme, global_scale=global_scale, importance_ARGK=importance_ARGK
        )
    return choose_scales(x_ARGK, scheme, global_scale=global_scale)
