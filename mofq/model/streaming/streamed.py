"""A model that is run unit by unit over many sequences, forward; weights are read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.exceptions import StreamingError, option
from mofq.model.streaming.replay import Replayer, StreamedSequence, detached, keep, replaying, run
from mofq.model.streaming.weights import Readers, UnitWeights, open_unit_weights
from mofq.model.streaming.writer import Writer

_HOW = "cannot be run layer by layer"
#: Called with the steps that are done.
OnStep = Callable[[int], None]
#: What a unit whose weights are there, by its path, is changed by while it runs.
Within = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """A model whose weights come and go; from `open_streamed`."""

    weights: UnitWeights
    replayer: Replayer
    writer: Writer  #: waited for before what it writes is looked for

    @property
    def model(self) -> PreTrainedModel:
        """Its modules; most parameters have no values."""
        return self.weights.model

    @property
    def head(self) -> str:
        """The path of the unit that computes logits."""
        return self.weights.head

    def unit_at(self, sequence: StreamedSequence, step: int) -> str:
        """Which unit is called at a step, before which all are done."""
        call, _ = self.replayer.reach(sequence, step)
        return call.unit

    def next_unit(self, unit: str, *, backwards: bool = False) -> str | None:
        """Which unit will probably follow: that which stands next to it in the model.

        None where there is none, or where none needs its weights: embeddings, backwards.
        """
        names = list(self.weights.units)
        at = names.index(unit) + (-1 if backwards else 1)
        if not 0 <= at < len(names):
            return None
        is_embedding = isinstance(self.weights.units[names[at]], nn.Embedding)
        return None if backwards and is_embedding else names[at]

    def forward(
        self,
        sequences: Sequence[StreamedSequence],
        *,
        for_gradients: bool = False,
        forget: bool = False,
        within: Within | None = None,
        on_step: OnStep | None = None,
    ) -> int:
        """Run every sequence up to the head, and keep what each unit returns.

        Args:
            sequences: What of them is done already is not done again.
            for_gradients: Compute as a run does that gradients are taken of: torch chooses
                kernels by it.
            forget: Keep only what a later unit looks at.
            within: What each unit runs in; None: as it is.
            on_step: Called with the steps that are done.

        Returns:
            The step of the head: how many come before it.

        Raises:
            StreamingError: The model cannot be run so.
        """
        for step in count():
            unit = self.unit_at(sequences[0], step)
            if unit == self.head:
                return step
            left = [one for one in sequences if not one.has(step)]
            if left:
                changed = nullcontext() if within is None else within(unit)
                with self.weights.loaded(unit, ahead=self.next_unit(unit)), changed:
                    for sequence in left:
                        self.run_step(sequence, step, unit, for_gradients=for_gradients)
                    self.writer.wait()
            if forget:
                self.replayer.forget(sequences, step)
            if on_step is not None:
                on_step(step + 1)
        raise AssertionError

    def run_step(
        self, sequence: StreamedSequence, step: int, unit: str, *, for_gradients: bool = False
    ) -> None:
        """Call the unit, whose weights are there, for one sequence, and keep what it returns.

        `writer` is waited for before the next step.
        """
        call, _ = self.replayer.reach(sequence, step, with_gradients=for_gradients)
        if call.unit != unit:
            raise StreamingError(
                f"{type(self.model).__name__} calls {call.unit} for one sequence and {unit} for "
                "another"
            )
        if for_gradients:
            call, _ = detached(call)
        with torch.set_grad_enabled(for_gradients):
            keep(run(call), call, sequence.record(step), writer=self.writer)

    def logits(self, sequence: StreamedSequence, step: int) -> Tensor:
        """Logits [T, V] of a sequence, with the head's weights there and no gradients."""
        with torch.no_grad():
            return self.replayer.finish(sequence, step)[0]


@contextmanager
def open_streamed(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    tensors: Readers | None = None,
) -> Iterator[StreamedModel]:
    """A model to be run unit by unit; the arguments are those of `load_model`.

    Raises:
        CheckpointError: As `load_model`.
        StreamingError: The model's weights cannot be told apart by its modules.
    """
    try:
        with (
            open_unit_weights(folder, dtype=dtype, device=device, tensors=tensors) as weights,
            replaying(weights.model, weights.units, weights.head, weights.device) as replayer,
            Writer(weights.device) as writer,
        ):
            yield StreamedModel(weights, replayer, writer)
    except StreamingError as problem:
        if _HOW in problem.template:  # of another model, opened inside
            raise
        raise _cannot(folder, problem.template) from problem
    except RuntimeError as problem:
        if "meta tensor" not in str(problem):
            raise
        # Code of the model that looks at a weight past the module that has it.
        raise _cannot(folder, " ".join(str(problem).split())) from problem


def _cannot(folder: Path, reason: str) -> StreamingError:
    return StreamingError(
        f"{folder}: {_HOW}: {reason.rstrip('.!')}. Run it whole: {option('execution', 'resident')}."
    )
