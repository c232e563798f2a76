"""Tunes norms, codes and scales of a quantized model until it predicts more like the original.

What is stepped on is KL(original || quantized), some sequences of the calibration text at a time:
norms and scales relative to the gain of each channel and to each scale (`EvenSteps`), codes by
signed steps (`codes`). What is stored of them is what computes, in every pass. Sequences that no
step saw say whether it helped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor
from transformers import PreTrainedModel

from mofq.delivery.tuning.codes import LearnedCodes
from mofq.delivery.tuning.norms import Norm
from mofq.delivery.validation.divergence import (
    OriginalLogits,
    check_logits,
    compare_windows,
)
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.standard_error import standard_error
from mofq.files.progress import Progress, Steps

#: Sequences of a step.
BATCH = 4
#: The first step; later ones fall to 0 by a cosine. Of norms and scales relative to themselves, in
#: units of the error that rounding makes relative to the weights, and no more than `_MOST_RATE`.
_RATE, _MOST_RATE = 0.01, 3e-3
#: Of codes relative to the distance between two. All steps together go this part of it, but for the
#: cosine; each of few steps is no larger: what they change first is noise.
_CODE_WAY, _MOST_CODE_RATE = 1 / 4, 8e-3
#: How slowly means of squares of gradients forget, and how far beyond its root one counts.
_FORGETS, _MOST = 0.95, 3.0
#: Far below any gradient.
_TINY = 1e-30
#: Of so many sequences of a corpus one is held out.
_HOLD_OUT = 4
#: How sure it must be that something is saved: the quantile of Student's t, a bound of the 95 %
#: interval of a mean of few sequences.
_SURE = 0.975
#: Positions whose gradient is made at once.
_ROWS = 128


@dataclass(frozen=True, slots=True)
class Split:
    """Which sequences are stepped on, and which judge; token ids, [N, T], int64."""

    stepped_NT: Tensor
    held_out_NT: Tensor


def split_sequences(windows: Mapping[str, Tensor], *, most: int) -> Split:
    """Hold every fourth sequence of each corpus out.

    Args:
        windows: Corpus -> token ids, [N, T], int64.
        most: Sequences that are stepped on, at least 1; of more, some of every corpus are taken.
    """
    stepped, held_out = [], []
    for tokens_NT in windows.values():
        is_held = torch.arange(len(tokens_NT)) % _HOLD_OUT == _HOLD_OUT - 1
        stepped.append(tokens_NT[~is_held])
        held_out.append(tokens_NT[is_held])
    stepped_NT = torch.cat(stepped)
    if len(stepped_NT) > most:
        stepped_NT = stepped_NT[torch.arange(most) * len(stepped_NT) // most]
    return Split(stepped_NT, torch.cat(held_out))


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was tuned, and what the model measures on the sequences that were held out."""

    tensors: dict[str, Tensor]  #: name in the checkpoint -> norm, [C], in the checkpoint's dtype
    changes: dict[str, CodeChanges]  #: layer -> what became of its codes and scales
    before_N: Tensor  #: KL of each sequence before [nats per token], float64
    after_N: Tensor

    @property
    def saved_stderr(self) -> float:
        """Of what is saved on average, sequence by sequence [nats per token]."""
        stderr = standard_error(self.before_N - self.after_N)
        return math.inf if stderr is None else stderr

    @property
    def helps(self) -> bool:
        """Whether the KL is less by more than chance."""
        saved_N = self.before_N - self.after_N
        if len(saved_N) < 2:
            return False
        return float(saved_N.mean()) > float(stdtrit(len(saved_N) - 1, _SURE)) * self.saved_stderr


def tune_model(
    model: PreTrainedModel,
    norms: Sequence[Norm],
    codes: Sequence[LearnedCodes],
    split: Split,
    *,
    stepped: OriginalLogits,
    held_out: OriginalLogits,
    steps: int,
    progress: Progress | None,
) -> Tuned:
    """Tune the norms, codes and scales of a model, in place.

    Args:
        model: To which a recipe was applied; frozen, in eval mode.
        norms: Of the model.
        codes: Of its layers, those that are learned; they may be none.
        split: What is stepped on, and what judges.
        stepped: The original's logits of the first.
        held_out: Those of the second.
        steps: Each on `BATCH` sequences.
        progress: Called with ``"tune"``, sequences run, and all of them.

    Returns:
        What changed, and what it does.

    Raises:
        MofqError: Logits are not finite.

    Source: norms alone as what is tuned after quantizing, L. Li et al., "Norm Tweaking",
    arXiv:2309.02784, which steps on distances of layers' outputs. Of codes, see `codes`.
    """
    order = _order(len(split.stepped_NT), steps * BATCH)
    tell = Steps(progress, "tune", len(order) + 2 * len(split.held_out_NT))

    def judge() -> Tensor:
        found = []
        for score in compare_windows(model, split.held_out_NT, original=held_out):
            found.append(score.kl_nats / split.held_out_NT.shape[1])
            tell()
        return torch.tensor(found, dtype=torch.float64)

    before_N = judge()
    start = [norm.parameter.detach().float().clone() for norm in norms]
    moved = [torch.zeros_like(start_C, requires_grad=True) for start_C in start]
    factors = [one.factor_AG for one in codes if one.factor_AG is not None]
    rate = _MOST_RATE if not codes else min(_MOST_RATE, _RATE * _mean_error(codes))
    even = [EvenSteps(one) for one in (moved, factors) if one]
    for step, first in enumerate(range(0, len(order), BATCH)):
        for norm in norms:
            norm.parameter.requires_grad_(True)
        for one in codes:
            one.begin_step()
        for index in order[first : first + BATCH]:
            _run_backward(model, split.stepped_NT[index], stepped.read(index), share=1 / BATCH)
            tell()
        share = (1 + math.cos(math.pi * step / steps)) / 2
        for norm, moved_C in zip(norms, moved, strict=True):
            moved_C.grad = _take_gradient(norm)
        for one in codes:
            one.step_codes(min(_MOST_CODE_RATE, _CODE_WAY / steps) * share)
        for one in codes:
            one.end_step()
        for relative in even:
            relative.step(rate * share)
        for norm, start_C, moved_C in zip(norms, start, moved, strict=True):
            _put(norm, start_C + norm.size_C * moved_C.detach())
        for one in codes:
            one.put()
    after_N = judge()
    changed = {
        name: norm.parameter.detach().to(norm.dtype).cpu()
        for norm, start_C in zip(norms, start, strict=True)
        if not torch.equal(norm.parameter.float(), start_C)
        for name in norm.names
    }
    return Tuned(changed, {one.name: one.changes() for one in codes}, before_N, after_N)


class EvenSteps:
    """Steps that cost about the same in each parameter where the gradient is noise.

    A parameter moves by its gradient over the root mean square of it, as Adam's do; where that is
    larger than the median's of all, by as much less. What loss answers to most, such as scales of
    groups with massive inputs, has the largest gradients, and steps of one size would add more
    noise there than is gained elsewhere.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._squares: list[Tensor] = []

    def step(self, rate: float) -> None:
        """Move all by their ``grad``, a parameter of median gradients by about ``rate``."""
        squares = [_grad(one).square() for one in self._parameters]
        before = self._squares or squares
        self._squares = [
            _FORGETS * mean + (1 - _FORGETS) * new
            for mean, new in zip(before, squares, strict=True)
        ]
        every = torch.cat([one.flatten() for one in self._squares])
        seen = every[every > 0]  # no gradient reaches an expert that no token chose
        median = seen.median() if len(seen) else every.new_zeros(())
        for one, square in zip(self._parameters, self._squares, strict=True):
            size = square.sqrt() + _TINY
            less = (median.sqrt() / size).clamp(max=1)
            one.data -= rate * less * (_grad(one) / size).clamp(-_MOST, _MOST)


def _grad(one: Tensor) -> Tensor:
    return torch.zeros_like(one) if one.grad is None else one.grad


def _mean_error(codes: Sequence[LearnedCodes]) -> float:
    """Of rounding, relative to the weights, all layers alike."""
    return math.sqrt(sum(one.error**2 for one in codes) / len(codes))


def _order(count: int, visits: int) -> list[int]:
    """Which sequence is visited when: each once, in a random order, then all again in another."""
    generator = torch.Generator().manual_seed(0)
    rounds = math.ceil(visits / count)
    order = [int(i) for _ in range(rounds) for i in torch.randperm(count, generator=generator)]
    return order[:visits]


def _run_backward(
    model: PreTrainedModel, token_T: Tensor, reference_TV: Tensor, *, share: float
) -> None:
    """Add the gradient of a share of a sequence's KL per token to the parameters that want it."""
    device = model.get_input_embeddings().weight.device
    logits_TV = model(token_T[None].to(device)).logits[0]
    check_logits(logits_TV.detach(), what="the quantized model")
    gradient_TV = torch.empty_like(logits_TV)
    for start in range(0, len(token_T), _ROWS):
        rows = slice(start, start + _ROWS)
        p_RV = reference_TV[rows].to(device).softmax(-1)
        q_RV = logits_TV.detach()[rows].float().softmax(-1)
        gradient_TV[rows] = (q_RV - p_RV) * (share / len(token_T))
    logits_TV.backward(gradient_TV)


def _take_gradient(norm: Norm) -> Tensor:
    """Of the relative change of each channel; the parameter has none afterwards."""
    gradient_C = norm.parameter.grad
    norm.parameter.grad = None
    norm.parameter.requires_grad_(False)
    if gradient_C is None:  # of a tower that got no input
        return torch.zeros_like(norm.size_C)
    return gradient_C.float() * norm.size_C


def _put(norm: Norm, value_C: Tensor) -> None:
    with torch.no_grad():
        norm.parameter.copy_(value_C.to(norm.dtype))
