"""Measures the KL of one recipe after another, with one decoder layer in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.emulate import apply_group, prepare
from mofq.delivery.apply.unit import Applied, unit_modules
from mofq.delivery.recipe_fits import check_fits, open_fits
from mofq.delivery.validation.divergence import check_logits, score_window
from mofq.delivery.validation.streamed import Run, Subject, check_units, run_layers
from mofq.delivery.validation.windows import cut_windows
from mofq.evidence.corpora import Bos, Corpus
from mofq.evidence.fits import Fits
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.streaming.streamed import open_streamed


class StreamedKl:
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
        self.checkpoint: Checkpoint = open_checkpoint(model_source)
        self.text = text
        self._stats = stats
        self._fits: Fits | None = None
        self._stack = ExitStack()
        try:
            self._streamed = self._stack.enter_context(
                open_streamed(self.checkpoint.folder, dtype=dtype, device=device)
            )
            windows = cut_windows(
                self.checkpoint,
                self._streamed.model,
                text,
                tokens=tokens,
                sequence_length=sequence_length,
                bos=bos,
            )
            self.windows_NT, self.leading = windows.tokens_NT[::step], windows.leading
            temporary = tempfile.TemporaryDirectory(prefix="mofq-")
            self._folder = Path(self._stack.enter_context(temporary))
            self._original = Subject(self._folder / "original")
            self._original.set_windows(self.windows_NT)
            run = Run(self._streamed, [self._original])
            total, done = len(self._streamed.weights.units), iter(range(1, 10**9))

            def tell() -> None:
                if progress is not None:
                    progress("original", min(next(done), total), total)

            self._head = run_layers(run, self.checkpoint, tell)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StreamedKl:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was kept of the original, and close the statistics."""
        self._stack.close()

    @property
    def windows(self) -> int:
        """How many values an evaluation yields."""
        return len(self.windows_NT)

    @property
    def tokens(self) -> int:
        """Positions that are compared."""
        return self.windows_NT.numel()

    def evaluate(self, recipe: Recipe) -> Iterator[float]:
        """Run a recipe over the windows; all of them up to the head when the first is asked for.

        Yields:
            The KL of each window, in order [nats per token].

        Raises:
            MofqError: As `MeasuredKl.evaluate`; before anything runs where the recipe does not
                fit.
        """
        if self._fits is None:  # all recipes of a search rest on the same statistics
            fits = open_fits(recipe, self._stats, index_sha256=self.checkpoint.index_sha256)
            self._fits = self._stack.enter_context(fits)
        prepared = prepare(
            self._streamed.model,
            recipe,
            check=partial(check_fits, self._fits),
            checkpoint=self.checkpoint,
        )
        applied = Applied(prepared, partial(apply_group, fits=self._fits), self._streamed.head)
        run = Run(self._streamed, [Subject(self._folder / "recipe", applied=applied)])
        check_units(run, self.checkpoint)
        return self._run(run, applied)

    def _run(self, run: Run, applied: Applied) -> Iterator[float]:
        streamed, unit = self._streamed, self._streamed.head
        (subject,) = run.subjects
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            subject.folder = Path(folder)
            subject.set_windows(self.windows_NT)
            run_layers(run, self.checkpoint, lambda: None)
            with streamed.weights.loaded(unit):
                modules = unit_modules(streamed.model, unit, [applied], times=self.windows)
                for own, theirs in zip(subject.sequences, self._original.sequences, strict=True):
                    reference_TV = streamed.logits(theirs, self._head)
                    check_logits(reference_TV, what="the original model")
                    with modules.applied(applied):
                        logits_TV = streamed.logits(own, self._head)
                    check_logits(logits_TV, what="the quantized model")
                    score = score_window(reference_TV.float(), logits_TV, own.token_T)
                    yield score.kl_nats / self.windows_NT.shape[1]
