"""The modules of transformers 5 that linear layers are in, and whether they are what they seem.

The experts of a mixture are one module, with fused parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

#: What transformers' decorator of experts says of those that are run here.
_PLAIN = {
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
_ANOTHER_FORMULA = "which compute something else than down(gate and up) for each token"
_PROBE_TOKENS = 4
#: Of random inputs: as after a norm, and large enough to reach a limit that a class sets.
_PROBE_SCALES = (1.0, 1000.0)
#: Of the largest output; far above the rounding of bf16, far below another formula.
_PROBE_TOLERANCE = 0.02


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, found by its name: nothing of transformers loads.

    Source: ``Conv1D`` in transformers 5, ``pytorch_utils.py``.
    """
    kind = type(module)
    return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by its weight, and does no more than add its bias.

    Classes that inherit from `nn.Linear` may compute something else; those with a forward of
    their own are compared with the product on a few random vectors.

    Args:
        module: Any.
    """
    if type(module).forward is nn.Linear.forward or is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear) or module.weight.device.type == "meta":
        return False
    weight_OI = module.weight
    random = torch.Generator().manual_seed(0)
    x_TI = torch.randn(_PROBE_TOKENS, weight_OI.shape[-1], generator=random)
    x_TI = x_TI.to(weight_OI.device, weight_OI.dtype)
    with torch.no_grad():
        try:
            theirs = module(x_TI)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        ours = functional.linear(x_TI, weight_OI, module.bias)
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    return torch.allclose(theirs.float(), ours.float(), rtol=0, atol=_close(ours))


class ExpertLinear(Protocol):
    """Multiplies the tokens of one expert by one of its weights."""

    def __call__(self, parameter: str, expert: int, x_TI: Tensor, token_T: Tensor, /) -> Tensor:
        """A parameter (`first_parameter`, ``down_proj``), an expert, its inputs, which tokens."""
        ...


def first_parameter(experts: nn.Module) -> str:
    """The parameter that reads the inputs: ``gate_up_proj``, or ``up_proj`` without a gate."""
    return "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"


def find_activation(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a module of experts computes between its two weights."""
    module: Any = experts
    if first_parameter(experts) == "up_proj":
        activation: Callable[[Tensor], Tensor] = module.act_fn
        return activation
    own: Callable[[Tensor], Tensor] | None = getattr(module, "_apply_gate", None)
    if own is not None:
        return own

    def gated(gate_up_TO: Tensor) -> Tensor:
        gate, up = gate_up_TO.chunk(2, dim=-1)
        product: Tensor = module.act_fn(gate) * up
        return product

    return gated


def run_experts(
    hidden_TI: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    first: str,
    activation: Callable[[Tensor], Tensor],
    linear: ExpertLinear,
) -> Tensor:
    """Route each token through its experts, one expert after the other.

    Args:
        hidden_TI: Inputs, ``[T, hidden]``.
        top_k_index: The experts of each token, ``[T, top_k]``, int64.
        top_k_weights: What each of them counts, ``[T, top_k]``.
        first: From `first_parameter`.
        activation: From `find_activation`.
        linear: Computes what the parameters of an expert give.

    Returns:
        ``[T, hidden]``.

    Source: the eager forward of ``MixtralExperts`` in transformers 5, in the same order of
    operations.
    """
    output_TI = torch.zeros_like(hidden_TI)
    for expert in torch.unique(top_k_index).tolist():
        # By rank among the token's experts, then by token, as in transformers.
        rank, token = torch.where((top_k_index == expert).T)
        y = activation(linear(first, expert, hidden_TI[token], token))
        y = linear("down_proj", expert, y, token)
        y = y * top_k_weights[token, rank, None]
        output_TI.index_add_(0, token, y.to(output_TI.dtype))
    return output_TI


def experts_problem(experts: nn.Module) -> str | None:
    """Why `run_experts` does not compute what a module of experts does, or None.

    What the module says of itself is read, and then its own forward is compared on a few random
    tokens: classes differ in what they do beside the two weights, which they do not state.

    Args:
        experts: In the place and on the device where it runs.
    """
    kind = f"experts of class {type(experts).__name__}"
    for attribute, value in _PLAIN.items():
        if getattr(experts, attribute, value) is not value:
            return f"{kind}, whose {attribute} is not {value}"
    first = first_parameter(experts)
    parameters = dict(experts.named_parameters(recurse=False))
    if not {first, "down_proj"} <= parameters.keys():
        return f"{kind}, whose parameters are {', '.join(parameters) or 'none'}"
    if parameters[first].device.type == "meta":
        return None
    is_same = all(_probe(experts, parameters, first, scale) for scale in _PROBE_SCALES)
    return None if is_same else f"{kind}, {_ANOTHER_FORMULA}"


def _probe(
    experts: nn.Module, parameters: dict[str, nn.Parameter], first: str, scale: float
) -> bool:
    """Whether both forwards give the same for a few tokens."""
    weight_EOI = parameters[first]
    random = torch.Generator().manual_seed(0)
    hidden_TI = scale * torch.randn(_PROBE_TOKENS, weight_EOI.shape[-1], generator=random)
    index = torch.arange(_PROBE_TOKENS)[:, None] % weight_EOI.shape[0]
    share = torch.ones(_PROBE_TOKENS, 1)
    given = tuple(tensor.to(weight_EOI.device) for tensor in (hidden_TI, index, share))
    x_TI, share = given[0].to(weight_EOI.dtype), given[2].to(weight_EOI.dtype)

    def linear(parameter: str, expert: int, x_TI: Tensor, _token_T: Tensor, /) -> Tensor:
        return functional.linear(x_TI, parameters[parameter][expert])

    with torch.no_grad():
        try:
            theirs = experts(x_TI, given[1], share)
            ours = run_experts(
                x_TI,
                given[1],
                share,
                first=first,
                activation=find_activation(experts),
                linear=linear,
            )
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False
    if not bool(torch.isfinite(ours).all()):  # float16, of large inputs: nothing to compare
        return bool(theirs.shape == ours.shape)
    return theirs.shape == ours.shape and torch.allclose(
        theirs.float(), ours.float(), rtol=0, atol=_close(ours)
    )


def _close(values: Tensor) -> float:
    return _PROBE_TOLERANCE * float(values.abs().max())
