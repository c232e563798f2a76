"""From the scores of a fusion group's layers to the rows of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mofq.evidence.measure.gain_correction import not_negative
from mofq.evidence.measure.samples import SampleAnswers
from mofq.evidence.measure.score import CorpusScore, LayerScore, with_shared_inputs
from mofq.evidence.standard_error import standard_error
from mofq.evidence.table import Row
from mofq.exceptions import StatsError
from mofq.model.layers import FusionGroup, LinearLayer
from mofq.model.sizes import group_bytes
from mofq.numbers.schemes import Scheme

#: The share of a row's squares that must be left where the change of size is taken out of them.
#: Less is left where few rows of a weight have most of the cost and change less than the whole
#: does: their rest then undoes the change, and what is left would say that rounding costs nothing.
_LEAST_REST = 0.5


def group_rows(
    group: FusionGroup,
    schemes: Sequence[Scheme],
    scores: Mapping[str, LayerScore],
    *,
    corpora: Sequence[str],
    draws: int = 1,
    scaling: Mapping[str, Mapping[str, SampleAnswers]] = MappingProxyType({}),
) -> list[Row]:
    """The rows of one fusion group: the sum over its layers in every unit.

    Args:
        group: The fusion group.
        schemes: In the order of the scores.
        scores: Layer name -> its score.
        corpora: Names in the stats, in order; empty without stats.
        draws: Of each sequence, one after another in the scores.
        scaling: Corpus -> layer -> what the model answers when all its weights change their size.

    Returns:
        One row for each scheme and unit, and corpus where the unit has one.

    Raises:
        StatsError: No layer of the group saw a token of some corpus.
    """
    shared = with_shared_inputs(scores, group.layers)
    filled = {corpus: _fill_unseen(group, shared, corpus) for corpus in corpora}
    rows = []
    for i, scheme in enumerate(schemes):
        common = _common(group, scheme, scores, i)
        weights = sum(layer.weights for layer in group.layers)
        relative = sum(
            float(scores[layer.name].relative_weight_error_S[i]) * layer.weights
            for layer in group.layers
        )
        rows.append(
            Row(
                unit="relative_weight_error",
                corpus=None,
                error=relative / weights,
                stderr=None,
                **common,
            )
        )
        for corpus in corpora:
            parts = list(filled[corpus].values())
            error_N = torch.stack([part.error_NS[:, i] for part in parts]).sum(0)
            answers = None
            if corpus in scaling:
                shares = {name: size_share(scores[name], i) for name in filled[corpus]}
                rest_N = error_N
                for name, part in filled[corpus].items():
                    rest_N = rest_N - shares[name] ** 2 * part.size_NS[:, i]
                if rest_N.mean() >= _LEAST_REST * error_N.mean():
                    answers, error_N = _joint_answers(scaling[corpus], shares), rest_N
            kept_N = kept_errors(error_N, draws)
            if answers is not None:
                kept_N = (kept_N + _mean_squares(answers)).float().double()
            rows += _corpus_rows(corpus, parts, i, common, kept_N, answers)
    return rows


def _common(
    group: FusionGroup, scheme: Scheme, scores: Mapping[str, LayerScore], i: int
) -> dict[str, Any]:
    signal = math.fsum(scores[layer.name].weight_energy for layer in group.layers)
    noise = math.fsum(float(scores[layer.name].error_energy_S[i]) for layer in group.layers)
    return {
        "group": group.name,
        "scheme": scheme.name,
        "bytes": group_bytes(group, scheme),
        "sqnr_db": 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None,
        "static_amax": _static_amax(group, scores) if scheme.has_static_inputs else None,
    }


def _static_amax(group: FusionGroup, scores: Mapping[str, LayerScore]) -> dict[str, float]:
    """Largest input of each layer; an expert that saw no token gets that of all of its kind."""
    found = {layer.name: scores[layer.name].static_amax for layer in group.layers}
    of_kind: dict[str, float] = {}
    for layer in group.layers:
        of_kind[layer.module] = max(of_kind.get(layer.module, 0.0), found[layer.name] or 0.0)
    return {
        layer.name: of_kind[layer.module] if (amax := found[layer.name]) is None else amax
        for layer in group.layers
    }


def _corpus_rows(
    corpus: str,
    parts: Sequence[CorpusScore],
    i: int,
    common: Mapping[str, Any],
    kept_N: Tensor,
    answers: SampleAnswers | None,
) -> list[Row]:
    output_mse = math.fsum(float(part.output_mse_S[i]) for part in parts)
    return [
        Row(unit="output_mse", corpus=corpus, error=output_mse, stderr=None, **common),
        Row(
            unit="kl_nats_per_token",
            corpus=corpus,
            error=float(kept_N.mean()),
            stderr=standard_error(kept_N),
            sample_errors=tuple(kept_N.tolist()),
            answers=answers if answers is not None and any(map(any, answers)) else None,
            **common,
        ),
    ]


def size_share(score: LayerScore, i: int) -> float:
    """By what share a scheme makes the weights of a layer larger, most often below zero.

    The rounding error of a row is ``a W_o + R_o``: a change of its size, which all rows share, and
    a rest, which is independent of that of others. Squares of rows have the first row by row; in
    its place comes its square over the whole group. Of a layer without samples it is not known: 0.
    """
    return float(score.along_S[i]) / score.weight_energy if score.weight_energy > 0 else 0.0


def _joint_answers(
    scaling: Mapping[str, SampleAnswers], shares: Mapping[str, float]
) -> SampleAnswers:
    """What the changes of size of all layers do together, as float32 holds it."""
    joint = None
    for name, share in shares.items():
        own = [share * torch.tensor(one, dtype=torch.float64) for one in scaling[name]]
        joint = own if joint is None else [a + b for a, b in zip(joint, own, strict=True)]
    return tuple(tuple(one.float().tolist()) for one in joint or ())


def _mean_squares(answers: SampleAnswers) -> Tensor:
    """Of each sample, [N], float64."""
    return torch.stack([torch.tensor(one, dtype=torch.float64).square().mean() for one in answers])


def kept_errors(error_N: Tensor, draws: int) -> Tensor:
    """What a row keeps of the errors of all samples, one number for each sequence.

    Draws of one sequence are of the same text, so they are averaged: as samples of their own
    they would make the standard error too small.

    Args:
        error_N: A sequence's draws one after another.
        draws: Of each sequence.

    Returns:
        [sequences], float64, as float32 holds them: the row's error is the mean of what it keeps.
    """
    return not_negative(error_N.unflatten(0, (-1, draws)).mean(1)).float().double()


def _fill_unseen(
    group: FusionGroup, scores: Mapping[str, LayerScore], corpus: str
) -> dict[str, CorpusScore]:
    """Scores of every layer; experts that saw no token get those of their kind.

    An expert without a token has no false zero: under each scheme it is given the mean
    error of the experts of the same projection that did see tokens, scaled by its own
    relative weight error against theirs. It is a bound more than an estimate, since an
    expert that calibration never reached is rarely reached in use.
    """
    seen = {
        layer.name: scores[layer.name].corpora[corpus]
        for layer in group.layers
        if corpus in scores[layer.name].corpora
    }
    filled = {}
    for layer in group.layers:
        if layer.name in seen:
            filled[layer.name] = seen[layer.name]
            continue
        same_kind = [la for la in group.layers if la.name in seen and la.module == layer.module]
        if not same_kind:
            raise StatsError(
                f"{group.name}: no token of corpus {corpus!r} reached {layer.name} or a layer "
                f"like it. Calibrate on more text."
            )
        filled[layer.name] = _mean_score(layer, same_kind, scores, corpus)
    return filled


def _mean_score(
    layer: LinearLayer,
    same_kind: Sequence[LinearLayer],
    scores: Mapping[str, LayerScore],
    corpus: str,
) -> CorpusScore:
    own_S = scores[layer.name].relative_weight_error_S
    theirs_S = torch.stack([scores[la.name].relative_weight_error_S for la in same_kind]).mean(0)
    ratio_S = torch.where(theirs_S > 0, own_S / theirs_S.clamp(min=1e-300), 1.0)
    parts = [scores[la.name].corpora[corpus] for la in same_kind]
    return CorpusScore(
        error_NS=torch.stack([p.error_NS for p in parts]).mean(0) * ratio_S,
        size_NS=torch.zeros_like(parts[0].size_NS),
        output_mse_S=torch.stack([p.output_mse_S for p in parts]).mean(0) * ratio_S,
    )
