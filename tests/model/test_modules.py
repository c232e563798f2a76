"""What transformers' modules compute, against the formulas that are run in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mofq.model.modules import experts_problem, is_plain_linear


class Experts(nn.Module):
    """Two gated experts, as transformers writes them."""

    def __init__(self, *, limit: float | None = None, gated: bool = True) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        first = nn.Parameter(torch.randn(2, 16 if gated else 8, 4, generator=random))
        self.register_parameter("gate_up_proj" if gated else "up_proj", first)
        self.down_proj = nn.Parameter(torch.randn(2, 4, 8, generator=random))
        self.act_fn = nn.SiLU()
        self.limit, self.gated = limit, gated

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for token, (experts, shares) in enumerate(zip(index, weights, strict=True)):
            for expert, share in zip(experts.tolist(), shares, strict=True):
                first = self.gate_up_proj if self.gated else self.up_proj
                inner = functional.linear(hidden[token], first[expert])
                if self.gated:
                    gate, up = inner.chunk(2)
                    if self.limit is not None:
                        up = up.clamp(-self.limit, self.limit)
                    inner = self.act_fn(gate) * up
                else:
                    inner = self.act_fn(inner)
                output[token] += share * functional.linear(inner, self.down_proj[expert])
        return output


@pytest.mark.parametrize("gated", [True, False])
def test_experts_that_are_two_products_and_an_activation_have_no_problem(gated: bool) -> None:
    assert experts_problem(Experts(gated=gated)) is None


def test_experts_with_a_limit_that_only_large_inputs_reach_are_refused() -> None:
    problem = experts_problem(Experts(limit=100.0))
    assert problem is not None
    assert problem.startswith("experts of class Experts, which compute something else")


def test_experts_that_state_their_own_gate_are_run_with_it() -> None:
    class Limited(Experts):
        def _apply_gate(self, inner: Tensor) -> Tensor:
            gate, up = inner.chunk(2, dim=-1)
            return self.act_fn(gate) * up.clamp(-100.0, 100.0)

    assert experts_problem(Limited(limit=100.0)) is None


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("is_transposed", True), ("has_bias", True), ("is_concatenated", False)],
)
def test_experts_of_another_layout_are_refused_by_what_they_say(
    attribute: str, value: bool
) -> None:
    experts: Any = Experts()
    setattr(experts, attribute, value)
    assert (
        experts_problem(experts)
        == f"experts of class Experts, whose {attribute} is not {not value}"
    )


def test_experts_with_other_parameters_are_refused() -> None:
    assert experts_problem(nn.Linear(2, 2)) == (
        "experts of class Linear, whose parameters are weight, bias"
    )


def test_a_linear_module_is_plain_where_it_computes_a_product() -> None:
    class Written(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.T + self.bias

    class Grouped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Router(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return super().forward(input), None

    assert [is_plain_linear(kind(8, 4)) for kind in (nn.Linear, Written, Grouped, Router)] == [
        True,
        True,
        False,
        False,
    ]
    assert is_plain_linear(Conv1D(4, 8))
    assert not is_plain_linear(nn.Embedding(8, 4))
