"""Tunes norms, codes and scales of a quantized model until it predicts more like the original.

What is stepped on is KL(original || quantized), some sequences of the calibration text at a time:
norms and scales relative to the gain of each channel and to each scale (`even_steps`), codes by
signed steps (`codes`). What is stored of them is what computes, in every pass. Sequences that no
step saw say whether it helped. The model is in memory (`resident`), or runs layer by layer
(`streamed`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mofq.decision.recipe import Recipe
from mofq.delivery.validation.divergence import check_logits
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.standard_error import standard_error
from mofq.exceptions import RecipeError
from mofq.model.checkpoint.headers import Checkpoint

#: Sequences of a step.
BATCH = 4
#: The first step; later ones fall to 0 by a cosine. Of norms and scales relative to themselves, in
#: units of the error that rounding makes relative to the weights, and no more than `_MOST_RATE`.
_RATE, _MOST_RATE = 0.01, 3e-3
#: Of codes relative to the distance between two. All steps together go this part of it, but for the
#: cosine; each of few steps is no larger: what they change first is noise.
_CODE_WAY, _MOST_CODE_RATE = 1 / 4, 8e-3
#: Of so many sequences of a corpus one is held out.
_HOLD_OUT = 4
#: Positions whose gradient is made at once.
_ROWS = 128


@dataclass(frozen=True, slots=True)
class Split:
    """Which sequences are stepped on, and which judge; token ids, [N, T], int64."""

    stepped_NT: Tensor
    held_out_NT: Tensor


def is_held_out(index: int) -> bool:
    """Whether a sequence of a corpus judges, by its number."""
    return index % _HOLD_OUT == _HOLD_OUT - 1


def split_sequences(
    windows: Mapping[str, Tensor], judging: Mapping[str, Tensor], *, most: int
) -> Split:
    """Hold every fourth sequence of each corpus out, unless there are others that judge.

    Args:
        windows: Corpus -> token ids, [N, T], int64.
        judging: The same of other sequences; may be empty.
        most: Sequences that are stepped on; of more, some of every corpus are taken. 0: all.
    """
    stepped, held_out = [], []
    for tokens_NT in windows.values():
        numbers = range(len(tokens_NT))
        is_held = torch.tensor([not judging and is_held_out(index) for index in numbers])
        stepped.append(tokens_NT[~is_held])
        held_out.append(tokens_NT[is_held])
    stepped_NT = torch.cat(stepped)
    if 0 < most < len(stepped_NT):
        stepped_NT = stepped_NT[torch.arange(most) * len(stepped_NT) // most]
    return Split(stepped_NT, torch.cat(list(judging.values()) or held_out))


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was tuned, and what the model measures on the sequences that were held out."""

    tensors: dict[str, Tensor]  #: name in the checkpoint -> norm, [C], in the checkpoint's dtype
    changes: dict[str, CodeChanges]  #: layer -> what became of its codes and scales
    before_N: Tensor  #: KL of each sequence before [nats per token], float64
    after_N: Tensor
    compensated: int = 0  #: layers that began with codes that make up for the layers before
    steps: int = 0  #: that were made, and are in this

    @property
    def saved_stderr(self) -> float:
        """Of what is saved on average, sequence by sequence [nats per token]."""
        stderr = standard_error(self.before_N - self.after_N)
        return math.inf if stderr is None else stderr


class Tunable(Protocol):
    """A quantized model with norms, codes and scales that can move, wherever its weights are."""

    def judge(self, when: str) -> Tensor:
        """KL of each sequence that is held out [nats per token], float64.

        Args:
            when: ``"before"`` anything changed, ``"compensated"``, or ``"after"`` all steps.
        """
        ...

    def put(self, start: Mapping[str, CodeChanges]) -> None:
        """Have codes with these changes to what the schemes make, before it begins.

        Args:
            start: Layer -> changes; of every other layer it has what the scheme makes.
        """
        ...

    def begin(self) -> None:
        """Begin to move from the codes that it has.

        Raises:
            RecipeError: There is nothing that can move.
        """
        ...

    def step(self, number: int, indices: Sequence[int]) -> None:
        """Move everything once.

        Args:
            number: Of the step, from 0.
            indices: Of the sequences, those that are stepped on.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """As `Tuned` has them."""
        ...

    def changes(self) -> dict[str, CodeChanges]:
        """As `Tuned` has them."""
        ...


def check_has_any(recipe: Recipe, checkpoint: Checkpoint, has_any: bool) -> None:
    """Refuse a model in which nothing can move.

    Args:
        recipe: Of the model.
        checkpoint: That it is applied to.
        has_any: Whether anything can.

    Raises:
        RecipeError: Nothing can.
    """
    if not has_any:
        raise RecipeError(
            f"{recipe.title}: {checkpoint.folder} has no norms with weights of their own, and no "
            f"codes that can be learned."
        )


def tune_model(
    model: Tunable, split: Split, *, steps: int, start: Mapping[str, CodeChanges]
) -> Tuned:
    """Tune the norms, codes and scales of a model.

    Args:
        model: What has them.
        split: What it steps on, and what judges.
        steps: Each on `BATCH` sequences; 0: ``start`` is judged, and no more.
        start: Layer -> changes that compensate the errors of layers before. Steps go on from them
            where they are better than none.

    Returns:
        What changed, and what it does.

    Raises:
        RecipeError: There is nothing that can move.
        MofqError: Logits are not finite.

    Source: norms alone as what is tuned after quantizing, L. Li et al., "Norm Tweaking",
    arXiv:2309.02784, which steps on distances of layers' outputs. Of codes, see `codes`.
    """
    before_N = begun_N = model.judge("before")
    if start:
        model.put(start)
        begun_N = model.judge("compensated")
        if steps and float(begun_N.mean()) >= float(before_N.mean()):
            start, begun_N = {}, before_N
            model.put(start)
    compensated = Tuned({}, dict(start), before_N, begun_N, compensated=len(start))
    if not steps:
        return compensated
    model.begin()
    order = _order(len(split.stepped_NT), steps * BATCH)
    for number in range(steps):
        model.step(number, order[number * BATCH : (number + 1) * BATCH])
    after_N = model.judge("after")
    if start and float(after_N.mean()) >= float(begun_N.mean()):
        return compensated
    changes = {**start, **model.changes()}  # what is learned has what it began with
    return Tuned(model.tensors(), changes, before_N, after_N, len(start), steps)


@dataclass(frozen=True, slots=True)
class Rates:
    """How far each step goes."""

    steps: int  #: in all
    errors: Sequence[float]  #: of rounding relative to the weights, of each layer that is learned

    def of_codes(self, step: int) -> float:
        """Of the distance between two codes."""
        return min(_MOST_CODE_RATE, _CODE_WAY / self.steps) * self._share(step)

    def relative(self, step: int) -> float:
        """Of norms and scales."""
        rate = _MOST_RATE
        if self.errors:  # all layers alike
            error = math.sqrt(sum(one**2 for one in self.errors) / len(self.errors))
            rate = min(rate, _RATE * error)
        return rate * self._share(step)

    def _share(self, step: int) -> float:
        return (1 + math.cos(math.pi * step / self.steps)) / 2


def send_divergence(logits_TV: Tensor, reference_TV: Tensor) -> None:
    """Run backward from the share of one sequence of a step in the KL per token.

    Args:
        logits_TV: Of the quantized model.
        reference_TV: The original's, on any device.

    Raises:
        MofqError: The first are not finite.
    """
    check_logits(logits_TV.detach(), what="the quantized model")
    gradient_TV = torch.empty_like(logits_TV)
    for start in range(0, len(logits_TV), _ROWS):
        rows = slice(start, start + _ROWS)
        p_RV = reference_TV[rows].to(logits_TV.device).softmax(-1)
        q_RV = logits_TV.detach()[rows].float().softmax(-1)
        gradient_TV[rows] = (q_RV - p_RV) * (1 / BATCH / len(logits_TV))
    logits_TV.backward(gradient_TV)


def _order(count: int, visits: int) -> list[int]:
    """Which sequence is visited when: each once, in a random order, then all again in another."""
    generator = torch.Generator().manual_seed(0)
    rounds = math.ceil(visits / count)
    order = [int(i) for _ in range(rounds) for i in torch.randperm(count, generator=generator)]
    return order[:visits]
