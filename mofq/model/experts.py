"""The experts of a mixture as transformers 5 runs them: one module, with fused parameters."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

#: What transformers' decorator of experts says of the plain kind.
_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
_ANOTHER_FORMULA = "which do not compute down(act(gate) * up)"
_PROBE_TOKENS = 4
#: Of the largest output; far above the rounding of bf16, far below another formula.
_PROBE_TOLERANCE = 0.02


class ExpertLinear(Protocol):
    """Multiplies the tokens of one expert by one of its weights."""

    def __call__(self, parameter: str, expert: int, x_TI: Tensor, token_T: Tensor, /) -> Tensor:
        """``gate_up_proj`` or ``down_proj``, an expert, its inputs, and which tokens they are."""
        ...


def run_experts(
    experts: Any,
    hidden_TI: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    linear: ExpertLinear,
) -> Tensor:
    """Route each token through its experts, one expert after the other.

    Args:
        experts: Has ``act_fn``.
        hidden_TI: Inputs, ``[T, hidden]``.
        top_k_index: The experts of each token, ``[T, top_k]``, int64.
        top_k_weights: What each of them counts, ``[T, top_k]``.
        linear: Computes what ``gate_up_proj``, gate first, and ``down_proj`` give.

    Returns:
        ``[T, hidden]``.

    Source: the eager forward of ``MixtralExperts`` in transformers 5, in the same order of
    operations.
    """
    output_TI = torch.zeros_like(hidden_TI)
    for expert in torch.unique(top_k_index).tolist():
        # By rank among the token's experts, then by token, as in transformers.
        rank, token = torch.where((top_k_index == expert).T)
        gate, up = linear("gate_up_proj", expert, hidden_TI[token], token).chunk(2, dim=-1)
        y = linear("down_proj", expert, experts.act_fn(gate) * up, token)
        y = y * top_k_weights[token, rank, None]
        output_TI.index_add_(0, token, y.to(output_TI.dtype))
    return output_TI


def experts_problem(experts: nn.Module) -> str | None:
    """Why `run_experts` does not compute what a module of experts does, or None.

    What the module says of itself is read, and then its own forward is compared on a few random
    tokens: classes differ in the formula between the two weights, which they do not state.

    Args:
        experts: In the place and on the device where it runs.
    """
    kind = f"experts of class {type(experts).__name__}"
    for attribute, value in _PLAIN.items():
        if getattr(experts, attribute, None) is not value:
            return f"{kind}, whose {attribute} is not {value}"
    own: Any = experts
    weight_EOI = experts.get_parameter("gate_up_proj")
    device, dtype = weight_EOI.device, weight_EOI.dtype
    if device.type == "meta":
        return None
    random = torch.Generator().manual_seed(0)
    hidden_TI = torch.randn(_PROBE_TOKENS, weight_EOI.shape[-1], generator=random)
    index = torch.arange(_PROBE_TOKENS)[:, None] % weight_EOI.shape[0]
    share = torch.ones(_PROBE_TOKENS, 1)
    x_TI, index, share = hidden_TI.to(device, dtype), index.to(device), share.to(device, dtype)

    def linear(parameter: str, expert: int, x_TI: Tensor, _token_T: Tensor) -> Tensor:
        return functional.linear(x_TI, experts.get_parameter(parameter)[expert])

    with torch.no_grad():
        try:
            theirs = own(x_TI, index, share)
            ours = run_experts(own, x_TI, index, share, linear=linear)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return f"{kind}, {_ANOTHER_FORMULA}"
    same = theirs.shape == ours.shape and torch.allclose(
        theirs.float(), ours.float(), rtol=0, atol=_PROBE_TOLERANCE * float(ours.abs().max())
    )
    return None if same else f"{kind}, {_ANOTHER_FORMULA}"
