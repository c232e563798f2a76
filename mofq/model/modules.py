"""The modules of transformers 5 that linear layers are in, and whether they are what they seem.

The experts of a mixture are one module, with fused parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

#: The norm of each expert's output, where a module of experts has one.
OUTPUT_NORM = "post_expert_norm"
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
    return _is_close(theirs, ours)


class ExpertLinear(Protocol):
    """Multiplies the tokens of one expert by one of its weights."""

    def __call__(self, parameter: str, expert: int, x_TI: Tensor, token_T: Tensor, /) -> Tensor:
        """A parameter (`ExpertsKind.first`, ``down_proj``), an expert, its inputs, which tokens."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertsKind:
    """What a module of experts computes, and how it holds its weights.

    Each expert has a weight in ``first`` [E, intermediate, hidden], twice as many rows with a
    gate, and one in ``down_proj`` [E, hidden, intermediate]; both with the last two dimensions
    swapped where ``transposed``. Biases are called as the weights are, with ``_bias``.
    """

    first: str  #: ``gate_up_proj``, or ``up_proj`` without a gate
    count: int  #: of experts with weights
    transposed: bool
    activation: Callable[[Tensor], Tensor]  #: between the two weights
    #: Experts after those with weights give their input back; elsewhere there are none.
    returns_inputs: bool
    #: Of the output of each expert, before it is counted; None: it stays as it is.
    norm: Callable[[Tensor], Tensor] | None = None


def find_kind(experts: nn.Module) -> ExpertsKind:
    """What a module of experts of transformers is.

    Args:
        experts: With the two parameters of `ExpertsKind`.
    """
    module: Any = experts
    first = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
    down_EOI = module.down_proj
    # Only some classes say it. With a gate the shapes do.
    is_swapped = first == "gate_up_proj" and module.gate_up_proj.shape[2] == 2 * down_EOI.shape[1]
    return ExpertsKind(
        first,
        down_EOI.shape[0],
        bool(getattr(module, "is_transposed", is_swapped)),
        _find_activation(module, first),
        hasattr(module, "identity_expert"),
        getattr(module, OUTPUT_NORM, None),
    )


def _find_activation(module: Any, first: str) -> Callable[[Tensor], Tensor]:
    if first == "up_proj":
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


def find_bias(experts: nn.Module, parameter: str, expert: int) -> Tensor | None:
    """What an expert adds to its product with a parameter, [O]."""
    bias_EO: Tensor | None = getattr(experts, f"{parameter}_bias", None)
    return None if bias_EO is None else bias_EO[expert]


def multiply(
    experts: nn.Module, kind: ExpertsKind, parameter: str, expert: int, x_TI: Tensor
) -> Tensor:
    """The product of some tokens with a weight of an expert, and its bias, [T, O]."""
    weight: Tensor = getattr(experts, parameter)[expert]
    weight_OI = weight.T if kind.transposed else weight
    return functional.linear(x_TI, weight_OI, find_bias(experts, parameter, expert))


def run_experts(
    kind: ExpertsKind,
    hidden_TI: Tensor,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
    *,
    linear: ExpertLinear,
) -> Tensor:
    """Route each token through its experts, one expert after the other.

    Args:
        kind: From `find_kind`.
        hidden_TI: Inputs, ``[T, hidden]``. Without the two below they are those of each expert, one
            expert after the other, ``[E * T, hidden]``, zero where it is not chosen (Llama 4).
        top_k_index: The experts of each token, ``[T, top_k]``, int64.
        top_k_weights: What each of them counts, ``[T, top_k]``.
        linear: Computes what the parameters of an expert give.

    Returns:
        Of the shape of ``hidden_TI``.

    Source: the eager forwards of ``MixtralExperts``, ``GptOssExperts``, ``LongcatFlashExperts``,
    ``Llama4TextExperts`` and ``MuseSparkExperts`` in transformers 5, in their order of operations.
    """
    output_TI = torch.zeros_like(hidden_TI)
    tokens = len(hidden_TI)
    if top_k_index is None:
        tokens //= kind.count
        owner = torch.arange(len(hidden_TI), device=hidden_TI.device) // tokens
        is_chosen = (hidden_TI != 0).any(-1)
        top_k_index = torch.where(is_chosen, owner, kind.count)[:, None]
    # By expert, then by rank among the token's experts, then by token, as in transformers; what
    # each of them gets is known at once, for which a GPU is waited for once and not for each.
    chosen_A = top_k_index.T.flatten()
    experts_E, count_E = chosen_A.unique(return_counts=True)
    order_A = chosen_A.argsort(stable=True)
    counts: list[list[int]] = torch.stack([experts_E, count_E], 1).tolist()
    parts = order_A.split([count for _, count in counts])
    for (expert, _), part in zip(counts, parts, strict=True):
        rank, row = part // len(top_k_index), part % len(top_k_index)
        y = hidden_TI[row]
        if expert < kind.count:
            y = kind.activation(linear(kind.first, expert, y, row % tokens))
            y = linear("down_proj", expert, y, row % tokens)
            y = y if kind.norm is None else kind.norm(y)
        elif not kind.returns_inputs:
            continue
        if top_k_weights is not None:
            y = y * top_k_weights[row, rank, None]
        output_TI.index_add_(0, row, y.to(output_TI.dtype))
    return output_TI


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Have something else run in the place of a module's forward; the result undoes it.

    Its class's method is in force again then, which a bound copy would keep alive in a cycle.
    """
    before = vars(module).get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


def experts_problem(experts: nn.Module) -> str | None:
    """Why `run_experts` does not compute what a module of experts does, or None.

    Its own forward is compared on a few random tokens: classes differ in what they do beside the
    two weights, and hardly say so.

    Args:
        experts: In the place and on the device where it runs.
    """
    name = f"experts of class {type(experts).__name__}"
    parameters = dict(experts.named_parameters(recurse=False))
    first = parameters.get("gate_up_proj", parameters.get("up_proj"))
    if first is None or "down_proj" not in parameters:
        return f"{name}, whose parameters are {', '.join(parameters) or 'none'}"
    if first.device.type == "meta":
        return None
    is_same = all(_probe(experts, first, scale) for scale in _PROBE_SCALES)
    return None if is_same else f"{name}, {_ANOTHER_FORMULA}"


def _probe(experts: nn.Module, first: Tensor, scale: float) -> bool:
    """Whether both forwards give the same for a few tokens."""
    kind = find_kind(experts)
    random = torch.Generator().manual_seed(0)
    wide = first.shape[1 if kind.transposed else 2]
    hidden_TI = scale * torch.randn(_PROBE_TOKENS, wide, generator=random)
    # First and last: after those with weights there may be others.
    token = torch.arange(_PROBE_TOKENS)
    index = torch.stack([token % first.shape[0], -1 - token % first.shape[0]], 1) % first.shape[0]
    share = torch.rand(_PROBE_TOKENS, 2, generator=random)
    given: tuple[Tensor, ...] = (hidden_TI.to(first), index.to(first.device), share.to(first))
    if len(signature(type(experts).forward).parameters) == 2:  # it gets each expert's inputs
        given = (given[0].repeat(first.shape[0], 1),)

    def linear(parameter: str, expert: int, x_TI: Tensor, _token_T: Tensor, /) -> Tensor:
        return multiply(experts, kind, parameter, expert, x_TI)

    with torch.no_grad():
        try:
            theirs = experts(*given)
            ours = run_experts(kind, *given, linear=linear)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False
    if not bool(torch.isfinite(ours).all()):  # float16, of large inputs: nothing to compare
        return bool(theirs.shape == ours.shape)
    return theirs.shape == ours.shape and _is_close(theirs, ours)


def _is_close(theirs: Tensor, ours: Tensor) -> bool:
    tolerance = _PROBE_TOLERANCE * float(ours.abs().max())
    return torch.allclose(theirs.float(), ours.float(), rtol=0, atol=tolerance)
