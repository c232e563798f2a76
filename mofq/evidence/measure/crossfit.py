"""Scores fitted schemes on sequences that they were not fitted to.

A scheme whose codes follow from the calibration (``@nats``, ``~gptq``) does better on that text
than on any other: on SmolLM2, in 4 bits, GPTQ's codes by about a third. So a layer is measured
in parts: the schemes that are not fitted, on all sequences; those that are, twice: fitted to one
half of the sequences and judged by the other half, and the reverse. What is shipped is fitted to
all sequences; few of the schemes that are measured are shipped, so that is done where a recipe is
applied. Half the text makes a slightly worse fit than the whole, so that the prediction, if
anything, is on the high side; how it compares with measured KL is in
docs/rounding-and-rewrites.md. Errors of weights are the mean of those of both fits; of an expert
that one half alone reached, those of its only fit.

An expert that the kept sequences of one half alone reached is judged there, by codes that no
sequence was fitted to; in the other half it loses in proportion to its gains.

To the rest of the code a part is a layer like any other; only this file knows of fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mofq.evidence.calibration.stats import Stats
from mofq.evidence.fits import Part, part_of
from mofq.evidence.measure.fit_ahead import Asked, FitsAhead
from mofq.evidence.measure.gain_correction import cluster_shares, corrected
from mofq.evidence.measure.layer_inputs import PreparedLayer
from mofq.evidence.measure.samples import ChunkedSamples
from mofq.evidence.measure.score import CorpusScore, LayerScore
from mofq.exceptions import StatsError
from mofq.model.layers import LinearLayer
from mofq.numbers.schemes import Scheme, TensorScheme

#: The parts of a layer: schemes that are not fitted; and those that are, as each half judges them,
#: fitted to the other half.
PLAIN = "plain"
_HALVES: dict[Part, Part] = {"first": "second", "second": "first"}


def check_sequences(stats: Stats, schemes: Sequence[Scheme]) -> None:
    """Refuse to fit to a corpus that cannot be halved.

    Raises:
        StatsError: One sequence of it is kept, and some scheme is fitted.
    """
    fitted = [scheme.name for scheme in schemes if scheme.is_fitted]
    for corpus in stats.plan.corpora:
        kept = len(corpus.kept_indices)
        if fitted and kept < 2:
            raise StatsError(
                f"{stats.folder}: {fitted[0]} is fitted to one half of the sequences of a corpus "
                f"and judged by the other, and corpus {corpus.name!r} has {kept}. "
                f"Calibrate with more; 8 are usual."
            )


def prepare_parts(
    prepare: Callable[..., PreparedLayer],
    layer: LinearLayer,
    schemes: Sequence[Scheme],
    *,
    samples: Mapping[str, ChunkedSamples],
    fits: FitsAhead | None,
) -> Iterator[PreparedLayer]:
    """A layer as the parts that it is measured in.

    Args:
        prepare: ``prepare_layer`` but for part, schemes, samples, static_amax and fit.
        layer: The layer.
        schemes: All of its candidates.
        samples: Corpus name -> samples of this layer.
        fits: Gives those of `fits_of`, of all layers in their order; needed if a scheme is fitted.

    Yields:
        A layer for each of ``parts_of(schemes)``, for ``join_parts``.
    """
    plain, fitted = _divide(schemes)
    first = prepare(part=PLAIN, schemes=plain, samples=samples)
    yield first
    if not fitted:
        return
    assert fits is not None
    weights = _weights(fitted)
    of_fitted = partial(prepare, schemes=fitted, static_amax=first.static_amax)
    for judge, fitting in _HALVES.items():
        fit = fits.of(layer, weights, part=fitting)
        yield of_fitted(part=judge, samples=_half(samples, judge), fit=fit)


def fits_of(layer: LinearLayer, schemes: Sequence[Scheme]) -> Iterator[Asked]:
    """The fits that the parts of a layer need, in their order."""
    _, fitted = _divide(schemes)
    if fitted:
        for part in _HALVES.values():
            yield Asked(layer, _weights(fitted), part)


def _weights(schemes: Sequence[Scheme]) -> tuple[TensorScheme, ...]:
    return tuple(scheme.quantized_weight for scheme in schemes)


def parts_of(schemes: Sequence[Scheme]) -> tuple[str, ...]:
    """The parts that a layer is measured in under some schemes."""
    return (PLAIN, *_HALVES) if any(scheme.is_fitted for scheme in schemes) else (PLAIN,)


def join_parts(schemes: Sequence[Scheme], parts: Mapping[str, LayerScore]) -> LayerScore:
    """The score of a layer from those of its parts.

    Args:
        schemes: As given to ``prepare_parts``.
        parts: Part -> its score, of all ``parts_of(schemes)``.

    Returns:
        As if all schemes had been measured at once.
    """
    plain, fitted = _divide(schemes)
    first = parts[PLAIN]
    if not fitted:
        return first
    # An expert that one half alone reached was fitted to that half alone.
    fitted_to = [parts[judge] for judge, fitting in _HALVES.items() if parts[fitting].corpora]
    halves = fitted_to or [parts[judge] for judge in _HALVES]
    order = [*plain, *fitted]
    column_S = [order.index(scheme) for scheme in schemes]
    return replace(
        first,
        relative_weight_error_S=_join(
            first.relative_weight_error_S,
            _mean([half.relative_weight_error_S for half in halves]),
            column_S,
        ),
        error_energy_S=_join(
            first.error_energy_S, _mean([half.error_energy_S for half in halves]), column_S
        ),
        along_S=_join(first.along_S, _mean([half.along_S for half in halves]), column_S),
        corpora={
            corpus: _join_schemes(
                ours,
                _join_halves(
                    parts["first"].corpora.get(corpus), parts["second"].corpora.get(corpus), ours
                ),
                column_S,
            )
            for corpus, ours in first.corpora.items()
        },
    )


def _mean(found: list[Tensor]) -> Tensor:
    return torch.stack(found).mean(0)


def _join(first: Tensor, second: Tensor, column_S: list[int]) -> Tensor:
    return torch.cat([first, second], -1)[..., column_S]


def _join_schemes(first: CorpusScore, second: CorpusScore, column_S: list[int]) -> CorpusScore:
    """Scores of some schemes and of others as those of all."""
    place = {column: i for i, column in enumerate(column_S)}
    ours, theirs = first.inputs, second.inputs
    assert ours is not None
    assert theirs is not None
    count = first.error_NS.shape[1]
    columns = [*ours.scheme_A, *(tuple(count + i for i in some) for some in theirs.scheme_A)]
    return replace(
        first,
        error_NS=_join(first.error_NS, second.error_NS, column_S),
        size_NS=_join(first.size_NS, second.size_NS, column_S),
        output_mse_S=_join(first.output_mse_S, second.output_mse_S, column_S),
        inputs=replace(
            ours,
            token_AMC=torch.cat([ours.token_AMC, theirs.token_AMC]),
            scheme_A=tuple(tuple(sorted(place[i] for i in some)) for some in columns),
        ),
    )


def _divide(schemes: Sequence[Scheme]) -> tuple[list[Scheme], list[Scheme]]:
    """Those that are not fitted, and those that are."""
    plain = [scheme for scheme in schemes if not scheme.is_fitted]
    return plain, [scheme for scheme in schemes if scheme.is_fitted]


def _half(samples: Mapping[str, ChunkedSamples], half: Part) -> dict[str, ChunkedSamples]:
    """One half of every corpus's sequences; of an expert, only corpora with a token there."""
    parts = {
        corpus: _half_of(one, part_of(one.sequences // one.draws, half))
        for corpus, one in samples.items()
    }
    return {corpus: one for corpus, one in parts.items() if bool(one.is_token_MC.any())}


def _half_of(samples: ChunkedSamples, sequences: slice) -> ChunkedSamples:
    own = slice(sequences.start * samples.draws, sequences.stop * samples.draws)
    chunks_each = len(samples.x_MCI) // samples.sequences
    chunks = slice(own.start * chunks_each, own.stop * chunks_each)
    gains = samples.gains
    return replace(
        samples,
        x_MCI=samples.x_MCI[chunks],
        grad_MCO=samples.grad_MCO[chunks],
        offset_MC=samples.offset_MC[chunks],
        sequences=own.stop - own.start,
        gains=None if gains is None else gains.of(own),
    )


def _join_halves(
    first: CorpusScore | None, second: CorpusScore | None, whole: CorpusScore
) -> CorpusScore:
    """Sequences one after another; the output error is the mean over them.

    Args:
        first: None where no kept token of the half reached the layer.
        second: The same of the other half; one of them is there.
        whole: Of other schemes, with as many sequences as both halves.
    """
    samples = len(whole.error_NS)
    if first is None:
        assert second is not None
        first = _unseen_half(second, whole, slice(0, samples - len(second.error_NS)))
    elif second is None:
        second = _unseen_half(first, whole, slice(len(first.error_NS), samples))
    halves = (first, second)
    output_S = torch.stack([half.output_mse_S * len(half.error_NS) for half in halves]).sum(0)
    assert first.inputs is not None
    assert second.inputs is not None
    assert whole.inputs is not None
    return CorpusScore(
        error_NS=torch.cat([first.error_NS, second.error_NS]),
        size_NS=torch.cat([first.size_NS, second.size_NS]),
        output_mse_S=output_S / samples,
        inputs=replace(
            first.inputs,
            token_AMC=torch.cat([first.inputs.token_AMC, second.inputs.token_AMC], 1),
            offset_MC=whole.inputs.offset_MC,
        ),
    )


def _unseen_half(half: CorpusScore, whole: CorpusScore, own: slice) -> CorpusScore:
    """The score of the sequences of one half, where no token of those kept reached the layer.

    The other sequences of their clusters may have reached it, which the gains say: as the layer
    loses in the half that did reach it, in proportion to its gains, so it does here.

    Args:
        half: The score of the other half.
        whole: Of other schemes, on all sequences.
        own: The samples that no token is of.
    """
    inputs = half.inputs
    assert inputs is not None
    assert whole.inputs is not None
    schemes, activations = half.error_NS.shape[1], inputs.token_AMC
    token_NA = activations.square().sum(2).unflatten(1, (len(half.error_NS), -1)).sum(2).T
    token_A = corrected(token_NA, inputs.gains).mean(0) / (2 * inputs.tokens)
    input_S = torch.zeros(schemes, dtype=torch.float64)
    for some, value in zip(inputs.scheme_A, token_A, strict=True):
        input_S[list(some)] = value
    of_weight = cluster_shares(half.weight_gains, whole.weight_gains, own)
    of_input = cluster_shares(inputs.gains, whole.inputs.gains, own)
    chunks = whole.inputs.token_AMC.shape[1] - activations.shape[1]
    return replace(
        half,
        error_NS=of_weight[:, None] * (half.error_NS.mean(0) - input_S)
        + of_input[:, None] * input_S,
        size_NS=of_weight[:, None] * half.size_NS.mean(0),
        output_mse_S=torch.zeros_like(half.output_mse_S),
        inputs=replace(
            inputs, token_AMC=activations.new_zeros(len(activations), chunks, activations.shape[2])
        ),
    )
