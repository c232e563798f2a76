"""Fitted schemes of an expert that the kept sequences of one half alone reached."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from rounding import apart
from test_measure_score import LENGTH, WEIGHT, some_samples

from mofq.evidence.fits import LayerFit
from mofq.evidence.measure.crossfit import join_parts, prepare_parts
from mofq.evidence.measure.gain_correction import LayerGains, SampleGains
from mofq.evidence.measure.layer_inputs import prepare_layer
from mofq.evidence.measure.samples import CHUNK_TOKENS, ChunkedSamples, arrange_samples
from mofq.evidence.measure.schedule import score_layers
from mofq.evidence.measure.score import CorpusScore, LayerScore
from mofq.numbers.quantize import dequantize_weight, quantize_weight
from mofq.numbers.schemes import parse_scheme

#: With importance one of every column, ``@nats`` rounds as ``@mse``.
SCHEMES = [
    parse_scheme(name)
    for name in (
        *("int4.g32@mse", "int4.g32@nats"),
        *("int4.channel@mse+int8.token", "int4.channel@nats+int8.token"),
    )
]
#: Of the sequences with tokens, and of those without; what a cluster has follows neither.
OWN = {"weight": (2.0, 3.0), "input": (1.0, 2.0)}
CLUSTER = {True: {"weight": (1.0, 4.0), "input": (3.0, 5.0)}}
CLUSTER[False] = {"weight": (2.5, 0.5), "input": (1.5, 4.5)}
#: Sums in float32, whose order follows the processor and the schemes beside it: over the tokens of
#: a chunk, the inputs, and the chunks of a sequence; each summand adds at most a rounding, and the
#: square doubles it. Sums over rows are in float64.
SUMMANDS = CHUNK_TOKENS + WEIGHT.shape[1] + -(-LENGTH // CHUNK_TOKENS)
ROUNDINGS = {"rtol": 2 * apart(SUMMANDS), "atol": 0.0}


class ImportanceOne:
    """Fits of a layer that says nothing of its columns; what was asked for is noted."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def of(self, layer: object, weights: object, *, part: str = "all") -> LayerFit:
        self.parts.append(part)
        return LayerFit(importance_I=torch.ones(WEIGHT.shape[1]))


class OtherHalves(ImportanceOne):
    """The same, but that the halves weigh the columns differently."""

    def of(self, layer: object, weights: object, *, part: str = "all") -> LayerFit:
        super().of(layer, weights, part=part)
        importance_I = torch.ones(WEIGHT.shape[1])
        importance_I[:: 2 if part == "first" else 3] = 50.0
        return LayerFit(importance_I=importance_I)


def gains(kind: str, is_seen: tuple[bool, ...]) -> SampleGains:
    own = [OWN[kind][n % 2] if seen else 0.0 for n, seen in enumerate(is_seen)]
    cluster = [CLUSTER[seen][kind][n % 2] for n, seen in enumerate(is_seen)]
    return SampleGains(torch.tensor(own).double(), torch.tensor(cluster).double())


def samples(is_seen: tuple[bool, ...], *, has_gains: bool) -> ChunkedSamples:
    sequences = [some_samples(seed=n) if seen else None for n, seen in enumerate(is_seen)]
    found = arrange_samples(sequences, draws=1, sequence_length=LENGTH)
    assert found is not None
    if not has_gains:
        return found
    return replace(found, gains=LayerGains(gains("weight", is_seen), gains("input", is_seen)))


def score(is_seen: tuple[bool, ...], *, has_gains: bool) -> CorpusScore:
    return layer_score(is_seen, has_gains=has_gains, fits=ImportanceOne()).corpora["a"]


def layer_score(is_seen: tuple[bool, ...], *, has_gains: bool, fits: ImportanceOne) -> LayerScore:
    prepare = partial(
        prepare_layer,
        lambda start, stop: WEIGHT[start:stop],
        (WEIGHT.shape[0], WEIGHT.shape[1]),
        name="expert",
    )
    parts = prepare_parts(
        prepare,
        None,  # type: ignore[arg-type]
        SCHEMES,
        samples={"a": samples(is_seen, has_gains=has_gains)},
        fits=fits,  # type: ignore[arg-type]
    )
    return join_parts(SCHEMES, {one.part: one for one in score_layers(parts)})


def test_schemes_are_fitted_to_either_half_and_not_to_all_where_they_are_measured() -> None:
    fits = OtherHalves()
    found = layer_score((True,) * 4, has_gains=False, fits=fits)
    assert sorted(fits.parts) == ["first", "second"]
    of_halves = [
        quantize_weight(WEIGHT, scheme, **fits.of(None, (), part=half).arguments(scheme))
        for scheme in [SCHEMES[1].quantized_weight]
        for half in ("first", "second")
    ]
    errors = [
        float(
            (dequantize_weight(one, SCHEMES[1].quantized_weight) - WEIGHT).double().square().sum()
        )
        for one in of_halves
    ]
    assert errors[0] != errors[1]
    assert float(found.error_energy_S[1]) == pytest.approx(sum(errors) / 2, rel=1e-6)


@pytest.mark.parametrize("has_gains", [False, True])
@pytest.mark.parametrize("is_seen", [(True, True, False, False), (False, False, True, True)])
def test_the_unseen_half_costs_what_its_gains_say(
    is_seen: tuple[bool, ...], has_gains: bool
) -> None:
    found = score(is_seen, has_gains=has_gains)
    assert found.error_NS.shape[0] == len(is_seen)
    mean_S = found.error_NS.mean(0)
    torch.testing.assert_close(mean_S[[1, 3]], mean_S[[0, 2]], **ROUNDINGS)
    torch.testing.assert_close(found.output_mse_S[[1, 3]], found.output_mse_S[[0, 2]], **ROUNDINGS)


def test_where_every_sequence_is_kept_the_unseen_half_costs_nothing() -> None:
    error_NS = score((True, True, False, False), has_gains=False).error_NS
    assert bool((error_NS[:2] > 0).all())
    assert not bool(error_NS[2:].any())


def test_weight_errors_of_an_expert_that_one_half_reached_are_those_of_its_only_fit() -> None:
    found = layer_score((True, True, False, False), has_gains=False, fits=OtherHalves())
    scheme = SCHEMES[1].quantized_weight
    (alone,) = (
        OtherHalves().of(None, (), part="first").arguments(scheme),  # what was fitted to it
    )
    error_OI = dequantize_weight(quantize_weight(WEIGHT, scheme, **alone), scheme) - WEIGHT
    expected = float(error_OI.double().square().sum())
    assert float(found.error_energy_S[1]) == pytest.approx(expected, rel=1e-6)
