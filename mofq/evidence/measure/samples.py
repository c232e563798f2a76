"""The samples of one layer, arranged for scoring: chunks of neighbouring tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from mofq.evidence.calibration.gains import read_gains
from mofq.evidence.calibration.sequence_file import LayerSamples, LookupSamples
from mofq.evidence.calibration.stats import Stats, open_sequences
from mofq.evidence.measure.gain_correction import LayerGains, layer_gains

#: Neighbouring tokens that are multiplied together. A constant of the numerics: other chunks
#: give other last digits.
CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class LookedUpRows:
    """Which rows of an embedding each of N samples looked up."""

    row_NT: Tensor  #: int64
    grad_NTI: Tensor  #: gradients of these rows, bfloat16


@dataclass(frozen=True, slots=True)
class ChunkedSamples:
    """Inputs and output gradients of one layer over one corpus.

    M chunks of at most C tokens; a sequence with several draws counts once for each
    draw. Chunks of fewer tokens end in zeros, which add nothing to any sum.
    """

    x_MCI: Tensor  #: inputs, bfloat16
    grad_MCO: Tensor  #: output gradients, bfloat16
    offset_MC: Tensor  #: each token's place in its chunk; -1 for the zeros behind the last, int64
    sequences: int  #: N; chunks of one sequence follow one another, M // N of them
    tokens: int  #: T, labelled positions of one sequence
    source: str = ""  #: the layer whose inputs these are; see `calibration.sequence_file`
    gains: LayerGains | None = None  #: None: all sequences that were run are here
    draws: int = 1  #: of each sequence; so many samples of a sequence follow one another
    lookup: LookedUpRows | None = None  #: of an embedding; of one that is no lm_head, C is 0

    @property
    def is_token_MC(self) -> Tensor:
        """Where a token is and not the zeros behind the last one."""
        return self.offset_MC >= 0


#: Of each kept sequence, a number for each draw of all sequences that it stands for.
SampleAnswers = tuple[tuple[float, ...], ...]


class SampleReader:
    """The sequences of a stats folder, all open; use it in a ``with`` statement.

    The headers of a mixture with thousands of experts are large, and are read once.
    """

    def __init__(self, stats: Stats) -> None:
        """Open every sequence.

        Raises:
            StatsError: One is missing or damaged.
        """
        self._draws = stats.plan.draws
        self._length = stats.plan.sequence_length
        self._plans = {corpus.name: corpus for corpus in stats.plan.corpora}
        self._gains = {
            name: [read_gains(file) for file in stats.gains_files(name)] for name in self._plans
        }
        self._stack, self.files = open_sequences(stats)
        #: Of each corpus, the layers whose inputs those that were read last are, and these.
        self._last: dict[str, tuple[list[str | None], Tensor]] = {}

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_all(self, layer: str, corpora: Iterable[str]) -> dict[str, ChunkedSamples]:
        """Read one layer's samples of those of some corpora of which a token reached it."""
        found = {corpus: self.read(corpus, layer) for corpus in corpora}
        return {corpus: one for corpus, one in found.items() if one is not None}

    def read(self, corpus: str, layer: str) -> ChunkedSamples | None:
        """Read one layer's samples of a corpus.

        Args:
            corpus: Its name in the stats.
            layer: Module name.

        Returns:
            The samples; None where no token of the corpus reached the layer.

        Raises:
            StatsError: The stats do not know the layer.
        """
        sequences = [file.read(layer) for file in self.files[corpus]]
        sources = [None if one is None else one.source for one in sequences]
        of_last, last = self._last.get(corpus, ([], None))
        found = arrange_samples(
            sequences,
            draws=self._draws,
            sequence_length=self._length,
            shared_MCI=last if sources == of_last else None,
        )
        if found is None:
            return None
        self._last[corpus] = sources, found.x_MCI
        if self._plans[corpus].kept is None:
            return found
        gains = layer_gains(self._plans[corpus], self._gains[corpus], layer)
        return replace(found, gains=gains)

    def scaling(self, corpus: str, layer: str) -> SampleAnswers | None:
        """What a change of size of all weights of a layer does.

        Args:
            corpus: Its name in the stats.
            layer: Module name.

        Returns:
            Signed; the mean of their squares is in nats per token for a change by the whole
            size. None in statistics of before it was kept.
        """
        root = math.sqrt(2 * self._length)
        answers = [gains[layer].scaling for gains in self._gains[corpus]]
        if not answers or not all(answers):
            return None
        clusters = self._plans[corpus].clusters
        return tuple(
            tuple(one / root for n in cluster for one in answers[n]) for cluster in clusters
        )


def arrange_samples(
    sequences: Sequence[LayerSamples | None],
    *,
    draws: int,
    sequence_length: int,
    shared_MCI: Tensor | None = None,
) -> ChunkedSamples | None:
    """Cut one layer's sequences into chunks.

    Args:
        sequences: In order; None where no token reached the layer.
        draws: Of the output's gradient for each sequence, D.
        sequence_length: Tokens of each sequence, T.
        shared_MCI: The chunks of a layer that reads the very same inputs.

    Returns:
        Chunks of all draws of the first sequence, then of the second, and so on; None where
        no sequence has a token.
    """
    seen = [one for one in sequences if one is not None]
    if not seen:
        return None
    chunks = -(-sequence_length // CHUNK_TOKENS)
    width = max(_longest_chunk(one) for one in seen)
    shape = (len(sequences) * draws * chunks, width)
    like = seen[0]
    x_MCI = shared_MCI
    if x_MCI is None:
        x_MCI = like.x_TI.new_zeros((*shape, like.x_TI.shape[-1]))
    grad_MCO = like.grad_DTO.new_zeros((*shape, like.grad_DTO.shape[-1]))
    offset_MC = torch.full(shape, -1)
    for first, (one, draw) in zip(
        range(0, shape[0], chunks), product(sequences, range(draws)), strict=True
    ):
        if one is None:
            continue
        chunk_T, slot_T, position_T = _places(one, chunks)
        place = (first + chunk_T, slot_T)
        if shared_MCI is None:
            x_MCI[place] = one.x_TI
        grad_MCO[place] = one.grad_DTO[draw]
        offset_MC[place] = position_T % CHUNK_TOKENS
    return ChunkedSamples(
        x_MCI,
        grad_MCO,
        offset_MC,
        sequences=len(sequences) * draws,
        tokens=sequence_length,
        source=like.source,
        draws=draws,
        lookup=_looked_up([one.lookup for one in seen if one.lookup is not None]),
    )


def _looked_up(sequences: Sequence[LookupSamples]) -> LookedUpRows | None:
    """The lookups of all sequences, a sequence's draws after one another."""
    if not sequences:
        return None
    draws = len(sequences[0].grad_DTI)
    row_NT = torch.stack([one.row_T for one in sequences]).repeat_interleave(draws, 0)
    return LookedUpRows(row_NT, torch.cat([one.grad_DTI for one in sequences]))


def _positions(samples: LayerSamples) -> Tensor:
    if samples.token_T is not None:
        return samples.token_T
    return torch.arange(samples.x_TI.shape[0])


def _longest_chunk(samples: LayerSamples) -> int:
    return max(torch.bincount(_positions(samples) // CHUNK_TOKENS).tolist(), default=0)


def _places(samples: LayerSamples, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk of every token, its place there, and its position in the sequence."""
    position_T = _positions(samples)
    chunk_T = position_T // CHUNK_TOKENS
    # Tokens are in order, so a token's place in its chunk is its distance from the first.
    first_M = torch.searchsorted(chunk_T, torch.arange(chunks))
    return chunk_T, torch.arange(len(chunk_T)) - first_M[chunk_T], position_T
