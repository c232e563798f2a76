"""What calibration says of a layer's inputs, for schemes whose codes follow from it.

Two kinds of schemes are fitted to statistics. Both see a layer's inputs ``x_t`` and output
gradients ``g_t`` over the sequences ``n`` of every corpus ``c`` of a stats folder; each
corpus has the same weight, whatever its length:

``@nats``
    The importance of column j, which its squared rounding errors are weighed by when a scale
    is searched: ``sum_c mean_n sum_o (sum_t g_to x_tj)^2``. The predicted cost of a rounding
    error is ``(sum_j dW_oj G_oj)^2`` for each row, ``G = sum_t g_t x_t^T`` over a sequence
    (docs/sensitivity.md); errors of columns are taken for independent, and rows are averaged
    over, because a row's own eight sequences say too little of it. Kept to 8 bits.
``~gptq``
    The Hessian ``sum_c mean_n sum_t |g_t|^2 x_t x_t^T``, factorised: see
    ``mofq.numbers.quantize.gptq``. Where the inputs of all sequences are in the folder, and not
    those of a few alone, it is the mean over all. The same for ``~descent``. A token counts as
    much as the model's prediction depends on the layer's output there. GPTQ itself gives all
    tokens the same weight, and in a model with massive activations that makes it good at the few
    tokens that hold them and matter least.

The same numbers come out of the same folder on any number of threads: sequences are summed in
their order, each on one thread. An expert that no token reached has importance one and no
feedback: it is rounded as ``@mse`` and to nearest.

Codes that were fitted to a text look better on it than they are. ``part`` leaves half of the
sequences of every corpus out of the fit, so that they can judge it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from mofq.evidence.calibration.sequence_file import LayerSamples, SequenceFile
from mofq.evidence.calibration.stats import CorpusPlan, Stats, open_sequences
from mofq.exceptions import StatsError, option
from mofq.model.layers import LinearLayer
from mofq.numbers.quantize import Feedback, one_thread
from mofq.numbers.quantize.gptq import RunAll, factorise_flipped, run_in_turn
from mofq.numbers.schemes import TensorScheme

#: Columns of a Hessian that are summed at once: few, since only what is left of the diagonal is.
_STRIP = 512
#: Which sequences of each corpus a fit sees: all, or those of one half.
Part = Literal["all", "first", "second"]


class FitArguments(TypedDict):
    """Arguments of ``quantize_weight``."""

    importance: Tensor | None
    feedback: Feedback | None


class SeenSequence(NamedTuple):
    """What a Hessian is made of, of one sequence."""

    x_TI: Tensor  #: inputs, bfloat16
    norm_T: Tensor  #: of the gradient at each token, float64
    share: float  #: what the sequence counts
    #: Corpus, which of its sequences, layer whose inputs these are: the same for layers that
    #: read the very same.
    key: tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class LayerFit:
    """What the schemes of one layer are fitted to; None where none asks for it."""

    importance_I: Tensor | None = None  #: float32
    feedback: Feedback | None = None

    def to(self, device: str) -> LayerFit:
        """The same on a device, once for all blocks of rows: the factors of a wide layer are GB."""
        importance_I, feedback = self.importance_I, self.feedback
        return LayerFit(
            None if importance_I is None else importance_I.to(device),
            None if feedback is None else feedback.to(device),
        )

    def arguments(self, scheme: TensorScheme) -> FitArguments:
        """What ``quantize_weight`` is to be given for a scheme."""
        by_feedback = scheme.rounds_by_hessian
        by_importance = scheme.scale_rule == "nats" and not by_feedback
        return {
            "importance": self.importance_I if by_importance else None,
            "feedback": self.feedback if by_feedback else None,
        }


NO_FIT = LayerFit()


def needs_stats(layer: str) -> StatsError:
    """What to say where a fitted scheme is to be applied without its statistics."""
    return StatsError(
        f"{layer}: its codes are fitted to calibration statistics (@nats, ~gptq or ~descent), and "
        f"there are none here. Give the folder that was measured with, as {option('stats')}."
    )


class Fits:
    """A stats folder that schemes are fitted to; use it in a ``with`` statement."""

    def __init__(
        self, stats: Stats, *, files: Mapping[str, Sequence[SequenceFile]] | None = None
    ) -> None:
        """Open every sequence.

        Args:
            stats: An open stats folder.
            files: Its kept sequences, corpus by corpus, where whoever asks has them open.

        Raises:
            StatsError: One is missing or damaged.
        """
        self.stats = stats
        self._stack = ExitStack()
        if files is None:
            self._stack, files = open_sequences(stats)
        self._files = files
        self._inputs: dict[str, list[SequenceFile]] = {}
        if files:
            more, others = open_sequences(stats, inputs=True)
            self._stack.enter_context(more)
            self._inputs = {
                corpus: _in_order(stats.plan.corpus(corpus), kept, others[corpus])
                for corpus, kept in files.items()
            }

    def __enter__(self) -> Fits:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(
        self,
        layer: LinearLayer,
        weights: Iterable[TensorScheme | None],
        *,
        part: Part = "all",
        run_all: RunAll = run_in_turn,
    ) -> LayerFit:
        """Fit a layer.

        Args:
            layer: Any of the model's.
            weights: The schemes that it will be quantized by.
            part: The sequences to fit to.
            run_all: Runs the work on strips and tiles of a Hessian, on any number of threads.

        Returns:
            What those of the schemes need that are fitted at all.

        Raises:
            StatsError: The stats do not know the layer, or are damaged.
            SchemeError: The Hessian cannot be factorised.
        """
        fitted = [weight for weight in weights if weight is not None and weight.is_fitted]
        by_feedback = [weight for weight in fitted if weight.rounds_by_hessian]
        with one_thread():
            return LayerFit(
                self._importance(layer, part) if len(by_feedback) < len(fitted) else None,
                self._feedback(
                    layer,
                    part,
                    run_all,
                    keep=any(weight.rounding == "descent" for weight in by_feedback),
                )
                if by_feedback
                else None,
            )

    def importance(self, layer: LinearLayer) -> Tensor:
        """Of the columns of a layer, [in_features], float32: what ``@nats`` needs."""
        with one_thread():
            return self._importance(layer, "all")

    def seen(self, layer: LinearLayer, part: Part = "all") -> Iterator[SeenSequence]:
        """What ``~gptq`` needs of the sequences that reached a layer, in order."""
        for corpus, files in self._inputs.items():
            plan = self.stats.plan.corpus(corpus)
            numbers = range(plan.sequences) if len(files) == plan.sequences else plan.kept_indices
            chosen = range(len(files))[_inputs_of(plan, part, len(files))]
            for index in chosen:
                found = files[index].weighted(layer.name)
                if found is not None:
                    key = (corpus, numbers[index], found.source)
                    yield SeenSequence(found.x_TI, found.norm_T, 1.0 / len(chosen), key)

    def _importance(self, layer: LinearLayer, part: Part) -> Tensor:
        total_I = torch.zeros(layer.in_features, dtype=torch.float64)
        for samples, share in self._samples(layer, part):
            # In float64: what processors round differently must not reach a code.
            x_TI = samples.x_TI.double()
            for grad_TO in samples.grad_DTO:
                gradient_OI = grad_TO.double().T @ x_TI
                total_I += share * gradient_OI.square().sum(0)
        if not bool(total_I.any()):
            return torch.ones(layer.in_features)
        # Above 0, so that no column is free to be rounded anyhow; 8 bits, as x and g have.
        relative_I = torch.clamp(total_I / total_I.max(), min=2.0**-40)
        return relative_I.bfloat16().float()

    def _feedback(self, layer: LinearLayer, part: Part, run_all: RunAll, *, keep: bool) -> Feedback:
        columns = layer.in_features
        # From the last column to the first, as it is factorised, and its lower triangle alone.
        total_II = torch.zeros(columns, columns, dtype=torch.float64)
        for one in self.seen(layer, part):
            weighted_TI = (one.x_TI.double() * one.norm_T[:, None]).flip(1)
            run_all(
                partial(_add_strip, total_II, weighted_TI, start, share=one.share)
                for start in range(0, columns, _STRIP)
            )
        return factorise_flipped(total_II, name=layer.name, run_all=run_all, keep=keep)

    def _samples(self, layer: LinearLayer, part: Part) -> Iterator[tuple[LayerSamples, float]]:
        """The samples of the sequences that reached a layer, and what each sequence counts."""
        for files in self._files.values():
            chosen = files[part_of(len(files), part)]
            for file in chosen:
                samples = file.read(layer.name)
                if samples is not None:
                    yield samples, 1.0 / len(chosen)


def _in_order(
    plan: CorpusPlan, kept: Sequence[SequenceFile], others: Sequence[SequenceFile]
) -> list[SequenceFile]:
    """The sequences of a corpus whose inputs are kept, as they stand in its text."""
    if not others:
        return list(kept)
    ours, theirs, indices = iter(kept), iter(others), set(plan.kept_indices)
    return [next(ours if n in indices else theirs) for n in range(plan.sequences)]


def _inputs_of(plan: CorpusPlan, part: Part, count: int) -> slice:
    """Of the sequences whose inputs are kept, those of a part: neighbours of its kept ones."""
    chosen = part_of(len(plan.kept_indices), part)
    if count < plan.sequences:
        return chosen
    clusters = plan.clusters[chosen]
    return slice(clusters[0].start, clusters[-1].stop) if clusters else slice(0, 0)


def _add_strip(total_II: Tensor, weighted_TI: Tensor, start: int, *, share: float) -> None:
    """Add a sequence to some rows of a Hessian, up to its diagonal."""
    stop = min(start + _STRIP, len(total_II))
    strip_SI = weighted_TI[:, start:stop].T @ weighted_TI[:, :stop]
    total_II[start:stop, :stop] += strip_SI.mul_(share)


def part_of(sequences: int, part: Part) -> slice:
    """Which of a corpus's sequences a part has; the first half has the odd one."""
    middle = (sequences + 1) // 2
    return {
        "all": slice(0, sequences),
        "first": slice(0, middle),
        "second": slice(middle, sequences),
    }[part]
