"""What transformers' modules compute, against the formulas that are run in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mofq.delivery.apply.fake_quant_experts import FakeQuantExperts
from mofq.model.modules import (
    experts_problem,
    find_kind,
    is_plain_linear,
    multiply,
    run_experts,
)


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


class Swapped(Experts):
    """The same weights, [E, in, out], and biases."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            weight_EIO = nn.Parameter(
                self.get_parameter(name).detach().transpose(1, 2).contiguous()
            )
            self.register_parameter(name, weight_EIO)
            self.register_parameter(f"{name}_bias", nn.Parameter(weight_EIO.detach()[:, 0] * 2))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for token, (experts, shares) in enumerate(zip(index, weights, strict=True)):
            for expert, share in zip(experts.tolist(), shares, strict=True):
                inner = hidden[token] @ self.gate_up_proj[expert] + self.gate_up_proj_bias[expert]
                gate, up = inner.chunk(2)
                inner = self.act_fn(gate) * up
                out = inner @ self.down_proj[expert] + self.down_proj_bias[expert]
                output[token] += share * out
        return output


class GivenRows(Swapped):
    """As Llama 4 is called: each expert's own inputs, one expert after the other; no biases."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate_up_proj_bias, self.down_proj_bias

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        x_ETI = hidden.view(2, -1, hidden.shape[-1])
        gate, up = torch.bmm(x_ETI, self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(self.act_fn(gate) * up, self.down_proj).flatten(0, 1)


class WithInputs(Experts):
    """A third expert gives back what it reads, as in LongCat."""

    def __init__(self) -> None:
        super().__init__()
        self.identity_expert = nn.Identity()
        more = torch.cat([self.gate_up_proj.detach(), torch.zeros(1, 16, 4)])
        self.gate_up_proj = nn.Parameter(more)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        known = super().forward(hidden, index.clamp(max=1), weights * (index < 2))
        return known + (weights * (index == 2)).sum(1, keepdim=True) * hidden


@pytest.mark.parametrize("kind", [Swapped, GivenRows, WithInputs])
def test_experts_of_another_layout_are_run_as_they_are_multiplied(kind: type[Experts]) -> None:
    experts = kind()
    assert experts_problem(experts) is None
    assert find_kind(experts).transposed == (kind is not WithInputs)


def test_experts_that_are_given_their_rows_are_shown_the_chosen_ones_alone() -> None:
    experts, seen = GivenRows(), []
    kind = find_kind(experts)
    hidden_TI = torch.randn(6, 4)  # three tokens for each of two experts
    hidden_TI[[1, 2, 3]] = 0

    def linear(parameter: str, expert: int, x_TI: Tensor, token_T: Tensor, /) -> Tensor:
        if parameter == kind.first:
            seen.append((expert, token_T.tolist()))
        return multiply(experts, kind, parameter, expert, x_TI)

    found_TI = run_experts(kind, hidden_TI, linear=linear)
    assert seen == [(0, [0]), (1, [1, 2])]
    assert torch.allclose(found_TI, experts(hidden_TI), atol=1e-6)


def test_experts_that_count_a_token_otherwise_than_by_its_weight_are_refused() -> None:
    class Squared(Experts):
        def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return super().forward(hidden, index, weights.square())

    assert "compute something else" in (experts_problem(Squared()) or "")


class Normed(Experts):
    """The output of each expert is normalized before it is counted, as in Muse Spark."""

    def __init__(self) -> None:
        super().__init__()
        self.post_expert_norm = nn.RMSNorm(4)
        self.post_expert_norm.weight.detach().copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for rank in range(index.shape[1]):
            every = torch.ones(len(hidden), 1)
            one = super().forward(hidden, index[:, rank : rank + 1], every)
            output += weights[:, rank : rank + 1] * self.post_expert_norm(one)
        return output


def test_experts_whose_outputs_are_normalized_are_run_with_the_norm() -> None:
    experts = Normed()
    assert experts_problem(experts) is None
    assert find_kind(experts).norm is experts.post_expert_norm
    assert find_kind(Experts()).norm is None
    replaced = FakeQuantExperts(experts)
    parameters = dict(replaced.named_parameters())
    assert parameters["post_expert_norm.weight"] is experts.post_expert_norm.weight
    hidden_TI, index_TK = torch.randn(5, 4), torch.tensor([[0, 1]] * 5)
    share_TK = torch.rand(5, 2)
    needed_TI = experts(hidden_TI, index_TK, share_TK)
    assert torch.allclose(replaced(hidden_TI, index_TK, share_TK), needed_TI, atol=1e-6)


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
