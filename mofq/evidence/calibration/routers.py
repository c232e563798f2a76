"""Watches the routers of a mixture: margins, and what exchanges of experts would cost.

See `mofq.evidence.calibration.routing`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mofq.evidence.calibration.router_choices import Choice, Routed, SeenChoices
from mofq.model.modules import ExpertsKind, multiply, replace_forward, run_experts
from mofq.model.streaming.send_to_device import send

#: The share of a sequence's tokens whose margins are small enough to know the density at 0.
_NEAR = 0.15


@dataclass(slots=True)
class Exchange:
    """Of one choice of a router: each token's margin, and what its exchange would do."""

    name: str  #: path of the module of experts that it chooses from, and which choice
    margin_T: Tensor  #: with its graph
    difference_TI: Tensor  #: of the experts' output
    cost_T: Tensor  #: of an exchange, summed over the draws that ran backward [nats]
    draws: int = 0

    @property
    def density_cost_T(self) -> Tensor:
        """``c d`` of each token: 0 where its margin is not small."""
        margin_T = self.margin_T.detach().float()
        near = margin_T.quantile(_NEAR)
        density_T = self.cost_T / max(1, self.draws) * (margin_T < near) / near
        # And no branch, for which the host would wait for the device.
        return torch.where(near > 0, density_T, 0.0)


@dataclass(slots=True)
class Routers:
    """The routers of a model while it runs; filled by hooks, emptied by `clear`."""

    exchanges: list[Exchange] = field(default_factory=list)
    last: Routed | None = None  #: the router that ran last

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
        if len(given) != 3 or self.last is None or not output_TI.requires_grad:
            return
        hidden_TI, index_TK, weight_TK = given
        if self.last.index_TK is not index_TK:
            return
        run = partial(_run_plain, module, kind, hidden_TI.detach())
        if self.last.chooses_by_scores:
            choice = Choice(self.last.scores_TE, index_TK)
            self._note(path, choice, _change_one(choice, weight_TK, run), output_TI)
            return
        for number in self.last.free_choices:
            with torch.no_grad():
                weights_TK, experts_TK = self.last.exchange(number)
                difference_TI = run(experts_TK, weights_TK) - output_TI
            choice = self.last.choices[number]
            self._note(f"{path}/{number}", choice, difference_TI, output_TI)

    def _note(self, name: str, choice: Choice, difference_TI: Tensor, output_TI: Tensor) -> None:
        _, _, margin_T = choice.next_best()
        cost_T = torch.zeros(len(margin_T), device=margin_T.device)
        exchange = Exchange(name, margin_T, difference_TI, cost_T)
        self.exchanges.append(exchange)
        output_TI.register_hook(partial(_add_cost, exchange))

    def objective(self, *, seed: int) -> Tensor | None:
        """What runs backward from the margins; None where there are none.

        Args:
            seed: Of the sequence. The random signs of each exchange have a seed of their own, so
                that it does not matter which others are seen with it.
        """
        if not self.exchanges:
            return None
        device, parts = self.exchanges[0].margin_T.device, []
        for one in self.exchanges:
            generator = torch.Generator().manual_seed(_seed_at(seed, one.name))
            sign_T = torch.randint(2, one.margin_T.shape, generator=generator) * 2 - 1
            sign_T = send(sign_T, one.cost_T.device)
            weight_T = (one.density_cost_T.sqrt() * sign_T).to(one.margin_T.dtype)
            parts.append((weight_T * one.margin_T).sum().to(device))  # where layers are spread
        return torch.stack(parts).sum()

    @property
    def costs(self) -> list[float]:
        """Of each exchange, nats per token for each unit of score; their sum is ``A``."""
        if not self.exchanges:
            return []
        device = self.exchanges[0].margin_T.device
        found = [one.density_cost_T.mean().to(device) for one in self.exchanges]
        numbers: list[float] = torch.stack(found).tolist()
        return numbers


def _seed_at(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _add_cost(exchange: Exchange, grad: Tensor) -> None:
    along_T = (grad.reshape(exchange.difference_TI.shape) * exchange.difference_TI).sum(-1)
    exchange.cost_T += along_T.float().square() / 2
    exchange.draws += 1


@torch.no_grad()
def _change_one(
    choice: Choice, weight_TK: Tensor, run: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What the next expert gives with the weight of the last, less what that gives.

    Equal scores have equal weights, so that an exchange at a margin of 0 changes no other's.
    """
    leaves_T1, comes_T1, _ = choice.next_best()
    weight_T1 = (weight_TK * (choice.index_TK == leaves_T1)).sum(-1, keepdim=True)
    return run(comes_T1, weight_T1) - run(leaves_T1, weight_T1)


def _run_plain(
    module: nn.Module, kind: ExpertsKind, hidden_TI: Tensor, expert_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """The output of some experts for each token."""

    def linear(parameter: str, expert: int, x_TI: Tensor, _token_T: Tensor) -> Tensor:
        return multiply(module, kind, parameter, expert, x_TI)

    return run_experts(kind, hidden_TI, expert_TK, weight_TK, linear=linear)


def watch_routers(modules: Iterable[nn.Module], routers: Routers) -> Iterator[Callable[[], None]]:
    """Note what each router scores and chooses.

    Args:
        modules: That may be routers: one that gives scores, weights and choice is.
        routers: Where it is noted.

    Yields:
        For each module, what ends it.
    """
    for module in modules:
        yield replace_forward(module, partial(_run_router, module.forward, routers))


def _run_router(forward: Callable[..., Any], routers: Routers, *given: Any, **options: Any) -> Any:
    """A router's forward, noted."""
    with SeenChoices() as noted:
        output = forward(*given, **options)
    match output:
        case (Tensor() as scores_TE, Tensor(), Tensor() as index_TK):
            routers.last = Routed(
                scores_TE, index_TK, tuple(noted.seen), partial(_exchanged, forward, given, options)
            )
        case _:
            routers.last = None
    return output


def _exchanged(
    forward: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any], number: int
) -> tuple[Tensor, Tensor]:
    """Weights and experts that a router gives where one of its choices is exchanged."""
    with torch.no_grad(), SeenChoices(number):
        _, weight_TK, index_TK = forward(*given, **options)
    return weight_TK, index_TK
