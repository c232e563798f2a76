"""The samples of one layer, arranged for scoring: chunks of neighbouring tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.calibration.stats import LayerSamples, Stats, read_layer

#: Tokens of one signed projection; see `mofq.measure.score`.
CHUNK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class ChunkedSamples:
    """Inputs and output gradients of one layer over one corpus.

    M chunks of at most C tokens; a sequence with several label draws counts once for each
    draw. Chunks of fewer tokens end in zeros, which add nothing to any sum.
    """

    x_MCI: Tensor  #: inputs, bfloat16
    grad_MCO: Tensor  #: output gradients, bfloat16
    sequences: int  #: N; chunks of one sequence follow one another, M // N of them
    tokens: int  #: T, labelled positions of one sequence

    @property
    def is_empty(self) -> bool:
        """Whether no token reached the layer (an expert)."""
        return self.x_MCI.shape[1] == 0


def read_samples(stats: Stats, corpus: str, layer: str) -> ChunkedSamples | None:
    """Read one layer's samples of a corpus.

    Args:
        stats: An open stats folder.
        corpus: Its name there.
        layer: Module name.

    Returns:
        The samples; None where no token of the corpus reached the layer.

    Raises:
        StatsError: The stats do not know the layer.
    """
    length = stats.plan.sequence_length
    sequences = [read_layer(file, layer) for file in stats.sequence_files(corpus)]
    seen = [one for one in sequences if one is not None]
    if not seen:
        return None
    chunks = -(-length // CHUNK_TOKENS)
    width = max(_longest_chunk(one, length) for one in seen)
    parts = [
        _chunk(one, draw, chunks, width) if one is not None else _nothing(seen[0], chunks, width)
        for one in sequences
        for draw in range(stats.plan.draws)
    ]
    return ChunkedSamples(
        x_MCI=torch.cat([x for x, _ in parts]),
        grad_MCO=torch.cat([grad for _, grad in parts]),
        sequences=len(parts),
        tokens=length,
    )


def _positions(samples: LayerSamples) -> Tensor:
    if samples.token_T is not None:
        return samples.token_T
    return torch.arange(samples.x_TI.shape[0])


def _longest_chunk(samples: LayerSamples, length: int) -> int:
    if samples.token_T is None:
        return min(CHUNK_TOKENS, length)
    return int(torch.bincount(samples.token_T // CHUNK_TOKENS, minlength=1).max())


def _chunk(samples: LayerSamples, draw: int, chunks: int, width: int) -> tuple[Tensor, Tensor]:
    position_T = _positions(samples)
    chunk_T = position_T // CHUNK_TOKENS
    # Tokens are in order, so a token's place in its chunk is its distance from the first.
    first_M = torch.searchsorted(chunk_T, torch.arange(chunks))
    slot_T = torch.arange(len(position_T)) - first_M[chunk_T]
    grad_TO = samples.grad_DTO[draw]
    return (
        _scattered(samples.x_TI, chunk_T, slot_T, (chunks, width)),
        _scattered(grad_TO, chunk_T, slot_T, (chunks, width)),
    )


def _scattered(values: Tensor, chunk_T: Tensor, slot_T: Tensor, shape: Sequence[int]) -> Tensor:
    placed = values.new_zeros((*shape, values.shape[-1]))
    placed[chunk_T, slot_T] = values
    return placed


def _nothing(like: LayerSamples, chunks: int, width: int) -> tuple[Tensor, Tensor]:
    x_MCI = like.x_TI.new_zeros((chunks, width, like.x_TI.shape[-1]))
    return x_MCI, like.grad_DTO.new_zeros((chunks, width, like.grad_DTO.shape[-1]))
