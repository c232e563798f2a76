"""A quantized model in memory that is tuned in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.decision.recipe import Recipe
from mofq.delivery.tuning.codes import LearnedCodes, learned_layers, put_codes
from mofq.delivery.tuning.even_steps import EvenSteps
from mofq.delivery.tuning.norms import Norm, TunedNorm, find_norms
from mofq.delivery.tuning.products import in_bfloat16
from mofq.delivery.tuning.tune import Rates, Split, check_has_any, send_divergence
from mofq.delivery.validation.divergence import OriginalLogits, compare_windows
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.fits import Fits
from mofq.files.progress import Steps
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import ModelLayers


@dataclass(slots=True)
class Resident:
    """As `Tunable` says, with all weights in memory."""

    model: PreTrainedModel  #: to which the recipe was applied; frozen, in eval mode
    recipe: Recipe  #: not tuned
    layers: ModelLayers  #: of the checkpoint
    checkpoint: Checkpoint  #: that the recipe is applied to
    fits: Fits | None  #: of the recipe's own stats, where a scheme is fitted
    split: Split
    stepped: OriginalLogits  #: of the sequences that are stepped on
    held_out: OriginalLogits
    steps: int
    learns: bool  #: whether codes are
    experts: bool  #: whether those of experts are
    tell: Steps  #: called for each sequence that is run
    _start: Mapping[str, CodeChanges] = field(init=False, default_factory=dict)
    _norms: Sequence[Norm] = field(init=False)
    _codes: list[LearnedCodes] = field(init=False)
    _tuned: list[TunedNorm] = field(init=False)
    _even: list[EvenSteps] = field(init=False)
    _rates: Rates = field(init=False)

    def judge(self, when: str) -> Tensor:
        """As `Tunable` says."""
        del when
        found = []
        for score in compare_windows(self.model, self.split.held_out_NT, original=self.held_out):
            found.append(score.kl_nats / self.split.held_out_NT.shape[1])
            self.tell()
        return torch.tensor(found, dtype=torch.float64)

    def put(self, start: Mapping[str, CodeChanges]) -> None:
        """As `Tunable` says."""
        names = self._start.keys() | start.keys()
        self._start = start
        put_codes(
            *(self.model, self.recipe, self.layers, self.checkpoint),
            fits=self.fits,
            changes=start,
            names=names,
        )

    def begin(self) -> None:
        """As `Tunable` says."""
        self._norms = find_norms(self.model, self.checkpoint, self.layers.architecture)
        self._codes = []
        if self.learns:
            self._codes += learned_layers(
                *(self.model, self.recipe, self.layers, self.checkpoint),
                fits=self.fits,
                experts=self.experts,
                start=self._start,
            )
        check_has_any(self.recipe, self.checkpoint, bool(self._norms or self._codes))
        self._tuned = [TunedNorm.of(norm) for norm in self._norms]
        moved = [one.moved_C for one in self._tuned]
        factors = [one.factor_AG for one in self._codes if one.factor_AG is not None]
        self._even = [EvenSteps(one) for one in (moved, factors) if one]
        self._rates = Rates(self.steps, [one.error for one in self._codes])

    def step(self, number: int, indices: Sequence[int]) -> None:
        """As `Tunable` says."""
        for norm in self._norms:
            norm.parameter.requires_grad_(True)
        for one in self._codes:
            one.begin_step()
        device = self.model.get_input_embeddings().weight.device
        for index in indices:
            token_T = self.split.stepped_NT[index]
            with in_bfloat16(self.model, device):
                logits_TV = self.model(token_T[None].to(device)).logits[0]
            send_divergence(logits_TV, self.stepped.read(index))
            self.tell()
        for norm, tuned in zip(self._norms, self._tuned, strict=True):
            tuned.take_gradient(norm.parameter.grad)
            norm.parameter.grad = None
            norm.parameter.requires_grad_(False)
        for one in self._codes:
            one.step_codes(self._rates.of_codes(number))
        for one in self._codes:
            one.end_step()
        for relative in self._even:
            relative.step(self._rates.relative(number))
        for norm, tuned in zip(self._norms, self._tuned, strict=True):
            norm.parameter.copy_(tuned.value_C)
        for one in self._codes:
            one.put()

    def tensors(self) -> dict[str, Tensor]:
        """As `Tunable` says."""
        return {name: one for norm in self._tuned for name, one in norm.changed().items()}

    def changes(self) -> dict[str, CodeChanges]:
        """As `Tunable` says."""
        return {one.name: one.changes() for one in self._codes}
