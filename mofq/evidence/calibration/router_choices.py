"""What a router takes the largest of: the scores that it chooses by, seen from outside.

Many routers do not choose by the scores that they return. DeepSeek-V3's adds a bias to each
expert's score, and first takes the groups of experts whose best are largest. All of them call
``topk``, so the calls of a router's forward are noted; and where its forward is run again with the
result of one call exchanged, it gives the experts and weights that the exchange leads to, whatever
it computes in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """For each token the K largest of some scores."""

    scores_TC: Tensor  #: of C candidates, with their graph; minus infinity where one may not be
    index_TK: Tensor

    @property
    def is_free(self) -> bool:
        """Whether it is of one row a token, and leaves candidates out."""
        return self.scores_TC.dim() == 2 and self.index_TK.shape[-1] < self.scores_TC.shape[-1]

    def next_best(self) -> tuple[Tensor, Tensor, Tensor]:
        """The least of the chosen and the best of the others, [T, 1] each, and the margin [T].

        A token without another candidate has the largest margin there is, which no gradient
        comes from.
        """
        count = self.index_TK.shape[-1]
        ordered = self.scores_TC.topk(count + 1, dim=-1)
        margin_T = ordered.values[:, count - 1] - ordered.values[:, count]
        none_T = torch.full_like(margin_T, torch.finfo(margin_T.dtype).max)
        margin_T = torch.where(margin_T.isfinite(), margin_T, none_T)
        return ordered.indices[:, count - 1 : count], ordered.indices[:, count:], margin_T

    def exchanged(self) -> Tensor:
        """The choice with the best of the others in the place of the least of the chosen."""
        leaves_T1, comes_T1, _ = self.next_best()
        return torch.where(self.index_TK == leaves_T1, comes_T1, self.index_TK)


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """One run of a router."""

    scores_TE: Tensor  #: that it returned
    index_TK: Tensor  #: the experts that it chose
    choices: tuple[Choice, ...]  #: in the order of its calls
    #: From a position in ``choices`` to the weights and experts, [T, K] each, that the router
    #: gives where that choice is exchanged.
    exchange: Callable[[int], tuple[Tensor, Tensor]]

    @property
    def chooses_by_scores(self) -> bool:
        """Whether the returned scores order the experts of every token as what it chooses by."""
        if not self._is_seen or not self.scores_TE.requires_grad:
            return False
        order_TE = self.scores_TE.argsort(dim=-1, descending=True)
        return bool((self.choices[-1].scores_TC.gather(-1, order_TE).diff(dim=-1) <= 0).all())

    @property
    def free_choices(self) -> list[int]:
        """Positions in ``choices`` of those that an error of the inputs might change."""
        if not self._is_seen:
            return []
        tokens = len(self.index_TK)
        return [
            n
            for n, one in enumerate(self.choices)
            if one.is_free and len(one.scores_TC) == tokens and one.scores_TC.requires_grad
        ]

    @property
    def _is_seen(self) -> bool:
        """Whether the experts are the result of the last choice."""
        return bool(self.choices) and self.choices[-1].index_TK is self.index_TK


class SeenChoices(TorchFunctionMode):
    """As long as the context lasts, notes calls of ``topk``, and may exchange one's result.

    Args:
        exchange: The number of the call; None: no result is exchanged.
    """

    def __init__(self, exchange: int | None = None) -> None:
        super().__init__()
        self.exchange = exchange
        self.seen: list[Choice] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and look at it where it is ``topk``."""
        found = func(*args, **(kwargs or {}))
        if func not in _TOPK:
            return found
        choice = Choice(args[0] if args else kwargs["input"], found.indices)
        self.seen.append(choice)
        if self.exchange != len(self.seen) - 1:
            return found
        index_TK = choice.exchanged()
        return torch.return_types.topk((choice.scores_TC.gather(-1, index_TK), index_TK))
