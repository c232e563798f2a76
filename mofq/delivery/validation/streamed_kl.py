"""Measures the KL of one recipe after another, with one decoder layer in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mofq.decision.recipe import Recipe, recipe_text
from mofq.delivery.apply.apply_by_unit import Applied, unit_modules
from mofq.delivery.apply.emulate import apply_group, prepare
from mofq.delivery.recipe_fits import check_fits
from mofq.delivery.validation.divergence import check_logits, score_window
from mofq.delivery.validation.measured_kl import Objective
from mofq.delivery.validation.streamed import (
    Run,
    Subject,
    check_room,
    check_units,
    run_layers,
)
from mofq.evidence.corpora import Bos, Corpus
from mofq.files.progress import Progress, Steps
from mofq.model.streaming.streamed import open_streamed

#: Recipes that run together at most: of those that are only expected some are not asked for.
_TOGETHER = 8


class StreamedKl(Objective):
    """As `mofq.delivery.validation.measured_kl.MeasuredKl`, layer by layer.

    The original runs once. A recipe reads the weights again and runs all windows, and so do up to
    seven that are expected, with it; the numbers are those of a model in memory.
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
            needed = check_room(
                self._folder, 2, self.windows_NT, model=self._streamed.model, dtype=dtype
            )
            free = shutil.disk_usage(self._folder).free
            self._together = max(1, min(_TOGETHER, 2 * free // needed - 1))
            self._expected: Iterator[Recipe] = iter(())
            self._found: dict[str, list[float]] = {}  #: of the last that ran, by their texts
            self._original = Subject(self._folder / "original")
            self._original.set_windows(self.windows_NT)
            run = Run(self._streamed, [self._original])
            tell = Steps(progress, "original", len(self._streamed.weights.units))
            self._head = run_layers(run, tell)
        except BaseException:
            self.close()
            raise

    def expect(self, recipes: Iterable[Recipe]) -> None:
        """As `Objective` says; they run together with the next that is evaluated."""
        self._expected = iter(recipes)

    def evaluate(self, recipe: Recipe) -> Iterator[float]:
        """As `Objective` says; all windows run at once, and those of what is expected with them."""
        key = recipe_text(recipe)
        if key not in self._found:
            together = {key: recipe}
            while len(together) < self._together and (one := next(self._expected, None)):
                together.setdefault(recipe_text(one), one)
            found = self._run(list(together.values()))
            self._found = dict(zip(together, found, strict=True))
        return iter(self._found[key])

    def _run(self, recipes: Sequence[Recipe]) -> list[list[float]]:
        """The KL of each window, for each recipe; weights are read once."""
        streamed, unit = self._streamed, self._streamed.head
        found: list[list[float]] = [[] for _ in recipes]
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            run = Run(
                streamed,
                [self._subject(one, Path(folder) / str(n)) for n, one in enumerate(recipes)],
            )
            check_units(run, self.checkpoint)
            run_layers(run, lambda: None)
            with streamed.weights.loaded(unit):
                modules = unit_modules(streamed.model, unit, run.recipes, times=self.windows)
                for index, theirs in enumerate(self._original.sequences):
                    reference_TV = streamed.logits(theirs, self._head)
                    check_logits(reference_TV, what="the original model")
                    for kls, subject in zip(found, run.subjects, strict=True):
                        own = subject.sequences[index]
                        assert subject.applied is not None
                        with modules.applied(subject.applied):
                            logits_TV = streamed.logits(own, self._head)
                        check_logits(logits_TV, what="the quantized model")
                        score = score_window(reference_TV, logits_TV, own.token_T)
                        kls.append(score.kl_nats / self.windows_NT.shape[1])
        return found

    def _subject(self, recipe: Recipe, folder: Path) -> Subject:
        """A recipe with its windows; all is checked."""
        fits = self._open_fits(recipe)
        prepared = prepare(
            self._streamed.model,
            recipe,
            check=partial(check_fits, fits),
            checkpoint=self.checkpoint,
        )
        applied = Applied(prepared, partial(apply_group, fits=fits), self._streamed.head)
        subject = Subject(folder, applied=applied)
        subject.set_windows(self.windows_NT)
        return subject
