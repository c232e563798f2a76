"""A quantized model in memory that is tuned in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.delivery.tuning.codes import LearnedCodes
from mofq.delivery.tuning.even_steps import EvenSteps
from mofq.delivery.tuning.norms import Norm, TunedNorm
from mofq.delivery.tuning.products import in_bfloat16
from mofq.delivery.tuning.tune import BATCH, Rates, Split, send_divergence
from mofq.delivery.validation.divergence import OriginalLogits, compare_windows
from mofq.evidence.code_changes import CodeChanges
from mofq.files.progress import Progress, Steps


def judge(
    model: PreTrainedModel,
    windows_NT: Tensor,
    original: OriginalLogits,
    *,
    tell: Callable[[], None],
) -> Tensor:
    """KL of each sequence [nats per token], float64.

    Args:
        model: Quantized.
        windows_NT: Token ids, int64.
        original: What the original predicts on these.
        tell: Called after each.
    """
    found = []
    for score in compare_windows(model, windows_NT, original=original):
        found.append(score.kl_nats / windows_NT.shape[1])
        tell()
    return torch.tensor(found, dtype=torch.float64)


@dataclass(slots=True)
class Resident:
    """As `Tunable` says, with all weights in memory."""

    model: PreTrainedModel  #: to which a recipe was applied; frozen, in eval mode
    norms: Sequence[Norm]  #: of the model
    codes: Sequence[LearnedCodes]  #: of its layers, those that are learned; they may be none
    split: Split
    stepped: OriginalLogits  #: of the sequences that are stepped on
    held_out: OriginalLogits
    steps: int
    is_judged: bool = False  #: before any step
    progress: Progress | None = None  #: called with ``"tune"``, sequences run, and all of them
    _tuned: list[TunedNorm] = field(init=False)
    _even: list[EvenSteps] = field(init=False)
    _rates: Rates = field(init=False)
    _tell: Steps = field(init=False)

    def __post_init__(self) -> None:
        """Begin with everything as it is."""
        self._tuned = [TunedNorm.of(norm) for norm in self.norms]
        moved = [one.moved_C for one in self._tuned]
        factors = [one.factor_AG for one in self.codes if one.factor_AG is not None]
        self._even = [EvenSteps(one) for one in (moved, factors) if one]
        self._rates = Rates(self.steps, [one.error for one in self.codes])
        total = self.steps * BATCH + (2 - self.is_judged) * len(self.split.held_out_NT)
        self._tell = Steps(self.progress, "tune", total)

    @property
    def is_empty(self) -> bool:
        """As `Tunable` says."""
        return not self.norms and not self.codes

    def judge(self, when: str) -> Tensor:
        """As `Tunable` says."""
        del when
        return judge(self.model, self.split.held_out_NT, self.held_out, tell=self._tell)

    def step(self, number: int, indices: Sequence[int]) -> None:
        """As `Tunable` says."""
        for norm in self.norms:
            norm.parameter.requires_grad_(True)
        for one in self.codes:
            one.begin_step()
        device = self.model.get_input_embeddings().weight.device
        for index in indices:
            token_T = self.split.stepped_NT[index]
            with in_bfloat16(self.model, device):
                logits_TV = self.model(token_T[None].to(device)).logits[0]
            send_divergence(logits_TV, self.stepped.read(index))
            self._tell()
        for norm, tuned in zip(self.norms, self._tuned, strict=True):
            tuned.take_gradient(norm.parameter.grad)
            norm.parameter.grad = None
            norm.parameter.requires_grad_(False)
        for one in self.codes:
            one.step_codes(self._rates.of_codes(number))
        for one in self.codes:
            one.end_step()
        for relative in self._even:
            relative.step(self._rates.relative(number))
        for norm, tuned in zip(self.norms, self._tuned, strict=True):
            norm.parameter.copy_(tuned.value_C)
        for one in self.codes:
            one.put()

    def tensors(self) -> dict[str, Tensor]:
        """As `Tunable` says."""
        return {name: one for norm in self._tuned for name, one in norm.changed().items()}

    def changes(self) -> dict[str, CodeChanges]:
        """As `Tunable` says."""
        return {one.name: one.changes() for one in self.codes}
