"""Watches the routers of a mixture: margins, and what exchanges of experts would cost.

See `mofq.evidence.calibration.routing`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mofq.model.modules import ExpertsKind, multiply, run_experts

#: The share of a sequence's tokens whose margins are small enough to know the density at 0.
_NEAR = 0.15


@dataclass(slots=True)
class Exchange:
    """At one router: each token's margin, and what its exchange would do."""

    experts: str  #: path of the module of experts that it chooses from
    margin_T: Tensor  #: with its graph
    difference_TI: Tensor  #: of the experts' output
    cost_T: Tensor  #: of an exchange, summed over the draws that ran backward [nats]
    draws: int = 0

    @property
    def density_cost_T(self) -> Tensor:
        """``c d`` of each token: 0 where its margin is not small."""
        margin_T = self.margin_T.detach().float()
        near = margin_T.quantile(_NEAR)
        if not near > 0:
            return torch.zeros_like(margin_T)
        return self.cost_T / max(1, self.draws) * (margin_T < near) / near


@dataclass(slots=True)
class Routers:
    """The routers of a model while it runs; filled by hooks, emptied by `clear`."""

    exchanges: list[Exchange] = field(default_factory=list)
    #: Scores [T, E] and choice [T, K] of the router that ran last.
    last: tuple[Tensor, Tensor] | None = None

    def clear(self) -> None:
        """Forget the sequence."""
        self.exchanges.clear()
        self.last = None

    def see_experts(
        self,
        module: nn.Module,
        kind: ExpertsKind,
        given: Sequence[Tensor],
        output_TI: Tensor,
        *,
        path: str,
    ) -> None:
        """Note what exchanges would do at a module of experts that has just run.

        Args:
            module: Of experts.
            kind: From `find_kind`.
            given: Its input, and the experts of each token and their weights, [T, K] each; where
                these are not given nothing is noted.
            output_TI: What it gave.
            path: Of the module.
        """
        if len(given) != 3:
            return
        hidden_TI, index_TK, weight_TK = given
        if self.last is None or self.last[1] is not index_TK or not output_TI.requires_grad:
            return
        scores_TE, count = self.last[0], index_TK.shape[-1]
        ordered = scores_TE.topk(count + 1, dim=-1)
        if not torch.equal(ordered.indices[:, :count].sort().values, index_TK.sort().values):
            return  # it chooses by something else than these scores
        leaves_T1, comes_T1 = ordered.indices[:, count - 1 : count], ordered.indices[:, count:]
        with torch.no_grad():
            weight_T1 = (weight_TK * (index_TK == leaves_T1)).sum(-1, keepdim=True)
            run = partial(_run_plain, module, kind, hidden_TI.detach())
            difference_TI = run(comes_T1, weight_T1) - run(leaves_T1, weight_T1)
        margin_T = ordered.values[:, count - 1] - ordered.values[:, count]
        exchange = Exchange(
            path, margin_T, difference_TI, torch.zeros(len(margin_T), device=margin_T.device)
        )
        self.exchanges.append(exchange)
        output_TI.register_hook(partial(_add_cost, exchange))

    def objective(self, *, seed: int) -> Tensor | None:
        """What runs backward from the margins; None where there are none.

        Args:
            seed: Of the sequence. Each router's random signs have a seed of their own, so that it
                does not matter which other routers are seen with it.
        """
        parts = []
        for one in self.exchanges:
            generator = torch.Generator().manual_seed(_seed_at(seed, one.experts))
            sign_T = torch.randint(2, one.margin_T.shape, generator=generator) * 2 - 1
            weight_T = one.density_cost_T.sqrt() * sign_T.to(one.cost_T.device)
            parts.append((weight_T.to(one.margin_T.dtype) * one.margin_T).sum().cpu())
        return torch.stack(parts).sum() if parts else None

    @property
    def costs(self) -> list[float]:
        """Of each router, nats per token for each unit of score; their sum is ``A``."""
        return [float(one.density_cost_T.mean()) for one in self.exchanges]


def _seed_at(seed: int, experts: str) -> int:
    digest = hashlib.sha256(f"{seed}/{experts}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _add_cost(exchange: Exchange, grad: Tensor) -> None:
    along_T = (grad.reshape(exchange.difference_TI.shape) * exchange.difference_TI).sum(-1)
    exchange.cost_T += along_T.float().square() / 2
    exchange.draws += 1


def _run_plain(
    module: nn.Module, kind: ExpertsKind, hidden_TI: Tensor, expert_T1: Tensor, weight_T1: Tensor
) -> Tensor:
    """The output of one expert for each token."""

    def linear(parameter: str, expert: int, x_TI: Tensor, _token_T: Tensor) -> Tensor:
        return multiply(module, kind, parameter, expert, x_TI)

    return run_experts(kind, hidden_TI, expert_T1, weight_T1, linear=linear)


def watch_routers(modules: Iterable[nn.Module], routers: Routers) -> list[RemovableHandle]:
    """Note what each router scores and chooses.

    Args:
        modules: That may be routers: one that gives scores, weights and choice is.
        routers: Where it is noted.

    Returns:
        What ends it.
    """

    def note(_module: nn.Module, _inputs: object, output: object) -> None:
        match output:
            case (Tensor() as scores_TE, Tensor(), Tensor() as index_TK):
                routers.last = (scores_TE, index_TK)
            case _:
                routers.last = None

    return [module.register_forward_hook(note) for module in modules]
