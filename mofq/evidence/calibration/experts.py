"""Watches the experts of a mixture, which transformers keeps as one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mofq.evidence.calibration.sequence_record import Captured
from mofq.model.layers import LinearLayer

#: (expert, parameter) -> the layers whose rows the parameter holds, and the first row of each.
ExpertLayers = Mapping[tuple[int, str], Sequence[tuple[LinearLayer, int]]]


def watch_experts(
    experts: nn.Module, layers: ExpertLayers, captured: Captured
) -> Callable[[], None]:
    """Replace the forward of an experts module by one that shows each expert's layers.

    Args:
        experts: With parameters ``gate_up_proj`` and ``down_proj`` of three dimensions.
        layers: The linear layers that they hold.
        captured: Where inputs and gradients go.

    Returns:
        A function that puts the module's own forward back.
    """
    module: Any = experts
    forward = vars(module).get("forward")
    module.forward = partial(_run_experts, module, layers, captured)
    return partial(put_forward_back, module, forward)


def put_forward_back(module: nn.Module, forward: Any) -> None:
    """Undo an assignment to ``module.forward``.

    Args:
        module: Any.
        forward: What stood in the module's own dictionary before; None where its class's
            method was in force, which a bound copy would keep alive in a cycle.
    """
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _run_experts(
    module: Any,
    layers: ExpertLayers,
    captured: Captured,
    hidden_TI: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The eager forward of transformers' experts, in the same order of operations.

    Source: ``MixtralExperts.forward`` in transformers 5.
    """
    output_TI = torch.zeros_like(hidden_TI)
    for expert in torch.unique(top_k_index).tolist():
        rank, token = torch.where((top_k_index == expert).T)
        x = hidden_TI[token]
        y = functional.linear(x, module.gate_up_proj[expert])
        _see(captured, layers[expert, "gate_up_proj"], x, y, token)
        gate, up = y.chunk(2, dim=-1)
        x = module.act_fn(gate) * up
        y = functional.linear(x, module.down_proj[expert])
        _see(captured, layers[expert, "down_proj"], x, y, token)
        y = y * top_k_weights[token, rank, None]
        output_TI.index_add_(0, token, y.to(output_TI.dtype))
    return output_TI


def _see(
    captured: Captured,
    layers: Sequence[tuple[LinearLayer, int]],
    x: Tensor,
    y: Tensor,
    token: Tensor,
) -> None:
    """Note one expert; its tokens come by rank and are kept in their order in the text."""
    source = layers[0][0].name
    if source in captured.source or not y.requires_grad:
        return
    order = token.argsort()
    captured.x[source] = x.detach()[order].to(device="cpu", dtype=torch.bfloat16)
    captured.answer(source, x)
    for layer, start in layers:
        captured.tokens[layer.name] = token[order].to("cpu")
        captured.source[layer.name] = source
        rows = slice(start, start + layer.out_features)
        y.register_hook(partial(_keep, captured, layer.name, rows, order))


def _keep(captured: Captured, layer: str, rows: slice, order: Tensor, grad: Tensor) -> None:
    part_TO = grad[order, rows].to(device="cpu", dtype=torch.bfloat16)
    captured.grads.setdefault(layer, []).append(part_TO)
