"""Measures the KL of one recipe after another, with one decoder layer in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.apply_by_unit import Applied, unit_modules
from mofq.delivery.apply.emulate import apply_group, prepare
from mofq.delivery.recipe_fits import check_fits
from mofq.delivery.validation.divergence import check_logits, score_window
from mofq.delivery.validation.measured_kl import Objective
from mofq.delivery.validation.streamed import (
    Run,
    Subject,
    check_disk,
    check_units,
    run_layers,
)
from mofq.evidence.corpora import Bos, Corpus
from mofq.files.progress import Progress, Steps
from mofq.model.streaming.streamed import open_streamed


class StreamedKl(Objective):
    """As `mofq.delivery.validation.measured_kl.MeasuredKl`, layer by layer.

    The original runs once. Every recipe reads the weights again and runs all windows; the numbers
    are those of a model in memory.
    """

    def __init__(
        self,
        model_source: str,
        text: Corpus,
        *,
        tokens: int,
        step: int = 1,
        sequence_length: int = 512,
        bos: Bos = "auto",
        dtype: str = "float32",
        device: str = "cpu",
        stats: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Run the original over the text up to its head; the arguments are `MeasuredKl`'s."""
        super().__init__(model_source, text, stats)
        try:
            self._streamed = self._stack.enter_context(
                open_streamed(self.checkpoint.folder, dtype=dtype, device=device)
            )
            self._cut(
                self._streamed.model,
                tokens=tokens,
                step=step,
                sequence_length=sequence_length,
                bos=bos,
            )
            temporary = tempfile.TemporaryDirectory(prefix="mofq-")
            self._folder = Path(self._stack.enter_context(temporary))
            check_disk(self._folder, 2, self.windows_NT, model=self._streamed.model, dtype=dtype)
            self._original = Subject(self._folder / "original")
            self._original.set_windows(self.windows_NT)
            run = Run(self._streamed, [self._original])
            tell = Steps(progress, "original", len(self._streamed.weights.units))
            self._head = run_layers(run, tell)
        except BaseException:
            self.close()
            raise

    def evaluate(self, recipe: Recipe) -> Iterator[float]:
        """As `Objective` says; all windows run up to the head when the first is asked for."""
        fits = self._open_fits(recipe)
        prepared = prepare(
            self._streamed.model,
            recipe,
            check=partial(check_fits, fits),
            checkpoint=self.checkpoint,
        )
        applied = Applied(prepared, partial(apply_group, fits=fits), self._streamed.head)
        run = Run(self._streamed, [Subject(self._folder / "recipe", applied=applied)])
        check_units(run, self.checkpoint)
        return self._run(run, applied)

    def _run(self, run: Run, applied: Applied) -> Iterator[float]:
        streamed, unit = self._streamed, self._streamed.head
        (subject,) = run.subjects
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            subject.folder = Path(folder)
            subject.set_windows(self.windows_NT)
            run_layers(run, lambda: None)
            with streamed.weights.loaded(unit):
                modules = unit_modules(streamed.model, unit, [applied], times=self.windows)
                for own, theirs in zip(subject.sequences, self._original.sequences, strict=True):
                    reference_TV = streamed.logits(theirs, self._head)
                    check_logits(reference_TV, what="the original model")
                    with modules.applied(applied):
                        logits_TV = streamed.logits(own, self._head)
                    check_logits(logits_TV, what="the quantized model")
                    score = score_window(reference_TV, logits_TV, own.token_T)
                    yield score.kl_nats / self.windows_NT.shape[1]
