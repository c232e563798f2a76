"""Predicts what each proposal for a site does to the model under a scheme, and takes the best.

Moving a scale ``s`` changes neither a layer's outputs nor their gradients ``g``, only what is
rounded: ``W' = W s`` and ``x' = x / s``. So the statistics of the original predict the rewritten
model, by the estimator of ``mofq measure`` (docs/sensitivity.md) in a form that needs the big
products once for all proposals:

- weights: ``sum_o (sum_i dW'_oi G_oi / s_i)^2`` with ``G = sum_t g_t x_t^T`` of a sequence;
- inputs: ``sum_t (sum_i v_ti s_i dx'_ti)^2`` with ``v = sum W^T g`` over the layers that read them.

Where codes will be fitted after scales have moved, errors of weights are those of fitted codes. A
column takes over the errors of those before it (`mofq.numbers.quantize.gptq`), so that rounding one
costs what no other input can make up for: ``sum_o rho_o sum_i D_i dW'_oi^2``, with ``D`` of the
Hessian ``sum_t |g_t|^2 x'_t x'_t^T = N D N^T`` and the share ``rho_o`` of a row in the gradients.
``D`` is that of each proposal: but for damping it would be that of the original over ``s_i^2``, and
an input that stands out raises the damping of all columns until its scale has moved.
An input that stands out is often one that others predict: to nearest its column costs most, fitted
it often does not, and scales that move as far as if it did make the others worse.

The weight's error is taken at the unrounded input. What a site does to its producer is left out:
its rows are scaled, and with them their scales, codes and gradients stay as they were wherever a
scale belongs to a row. Proposals compete with leaving the site alone, which wins a tie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from mofq.delivery.rewriting.scales import InputRanges, Strength, propose_scales
from mofq.delivery.rewriting.sites import Site
from mofq.evidence.calibration.sequence_file import SequenceFile
from mofq.evidence.calibration.stats import Stats
from mofq.exceptions import RewriteError, SchemeError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.checkpoint.tensors import read_layer_rows, read_tensor
from mofq.model.layers import LinearLayer
from mofq.numbers.quantize import fake_quantize_activation, fake_quantize_weight, one_thread
from mofq.numbers.quantize.gptq import DAMPING
from mofq.numbers.quantize.tiles import row_blocks
from mofq.numbers.schemes import Scheme, parse_scheme

#: Sequences of a corpus that proposals are predicted on; ranges are taken over all.
_JUDGES = 4
#: Proposals for a site that are predicted under a scheme that searches its scales.
_SEARCHED = 4
#: Columns of a Hessian that are factorised together.
_FACTORISED = 2048
#: Elements of a block of rows, and of the gradients of all sequences for it.
_BLOCK_ELEMENTS = 2**20
_GRADIENT_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class Choice:
    """What is done at one site."""

    site: Site
    scheme: str  #: that was predicted with
    strength: Strength | None  #: None: the site is left as it is
    scale_P: Tensor  #: as the stored tensors can hold it, float64
    nats_before: float  #: predicted KL of the site's layers [nats per token]
    nats_after: float
    method: str = ""  #: whose proposal it is


@dataclass(frozen=True, slots=True)
class _Columns:
    """What rounding costs where codes are fitted."""

    #: Of a unit of squared error in each column before its scale moved, all rows of the site
    #: together, under each of some scales.
    cost_PI: Tensor
    share_R: Mapping[str, Tensor]  #: layer -> the share of each of its rows

    def of_rows(self, layer: str, start: int, stop: int) -> Iterator[Tensor]:
        """What a unit of squared error of each weight of some rows costs [nats per token]."""
        for cost_I in self.cost_PI:
            yield self.share_R[layer][start:stop, None] * cost_I


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What one draw of one sequence says of a site; gradients are read layer by layer."""

    path: Path
    draw: int
    x_TI: Tensor  #: float32
    share: float  #: of the mean over sequences and corpora, over 2T


def choose_scales(
    checkpoint: Checkpoint,
    site: Site,
    scheme: Scheme,
    *,
    stats: Stats,
    method: str,
    powers_of_two: bool = False,
) -> Choice:
    """The best proposal of a method for a site.

    Args:
        checkpoint: The model.
        site: Of the model.
        scheme: That fits the site's layers, not fitted to statistics.
        stats: Of the model.
        method: One of ``METHODS``.
        powers_of_two: Let scales be powers of two alone.

    Returns:
        The choice: never predicted worse than leaving the site alone.

    Raises:
        StatsError: The stats do not know a layer.
        SchemeError: A weight is not finite; or an input is not, where codes will be fitted.
    """
    return choose_best(
        checkpoint, site, (scheme,), stats=stats, methods=(method,), powers_of_two=powers_of_two
    )


def choose_best(
    checkpoint: Checkpoint,
    site: Site,
    schemes: Sequence[Scheme],
    *,
    stats: Stats,
    methods: Sequence[str],
    powers_of_two: bool = False,
    fitted: Collection[str] = (),
) -> Choice:
    """The best proposal for a site of several methods, under whichever scheme is best then.

    A scheme that searches its scales (``@mse``) takes ten times as long as one that does not: under
    it only those proposals are predicted that are best without the search.

    Args:
        checkpoint: The model.
        site: Of the model.
        schemes: That the site's layers may have, not fitted to statistics.
        stats: Of the model.
        methods: Of ``METHODS``, the simplest first.
        powers_of_two: Let scales be powers of two alone.
        fitted: Names of those of the schemes whose codes will be fitted.

    Returns:
        The choice; ``nats_before`` is that of the scheme that was best before.

    Raises:
        MofqError: As `choose_scales`.
    """
    with one_thread():
        sequences = list(_read_sequences(stats, site))
        proposals = _propose(checkpoint, site, stats, methods, powers_of_two=powers_of_two)
        index = list(site.scale_of_I)

        every_scale = [one.scale_P[index] for one in proposals]
        columns = _columns(sequences, site, every_scale) if fitted else None

        @cache
        def predicted(scheme: Scheme, chosen: tuple[int, ...], is_fitted: bool) -> list[float]:
            scales = [every_scale[one] for one in chosen]
            costs = None
            if is_fitted and columns is not None:
                costs = replace(columns, cost_PI=columns.cost_PI[list(chosen)])
            return _predict(
                checkpoint, site, scheme, sequences=sequences, scales=scales, columns=costs
            )

        every: list[Choice] = []
        before: list[float] = []
        for scheme in schemes:
            chosen = tuple(range(len(proposals)))
            is_fitted, rounded = scheme.name in fitted, _without_search(scheme)
            if is_fitted:
                nats = predicted(rounded, chosen, True)
            else:
                if rounded != scheme:
                    chosen = _most_promising(predicted(rounded, chosen, False))
                nats = predicted(scheme, chosen, False)
            before.append(nats[0])
            for one, value in zip(chosen, nats, strict=True):
                every.append(replace(proposals[one], scheme=scheme.name, nats_after=value))
    # Of equal ones leaving the site alone, under whichever scheme, and else the first.
    best = min(every, key=lambda one: (one.nats_after, one.strength is not None))
    return replace(best, nats_before=min(before))


def _propose(
    checkpoint: Checkpoint,
    site: Site,
    stats: Stats,
    methods: Sequence[str],
    *,
    powers_of_two: bool,
) -> list[Choice]:
    """Leaving a site alone, and after it what methods propose; nothing is predicted yet."""
    ranges = _ranges(checkpoint, site, stats)
    ones_P = torch.ones(site.scales, dtype=torch.float64)
    found = [Choice(site, "", None, ones_P, 0.0, 0.0, method=methods[0])]
    for method in methods:
        for strength, wanted_P in propose_scales(method, ranges, powers_of_two=powers_of_two):
            scale_P = storable_scale(checkpoint, site, wanted_P)
            found.append(Choice(site, "", strength, scale_P, 0.0, 0.0, method=method))
    return found


def _most_promising(nats: Sequence[float]) -> tuple[int, ...]:
    """Leaving the site alone, and the few proposals that cost least, each by its place."""
    best = sorted(range(1, len(nats)), key=lambda place: nats[place])
    return (0, *best[:_SEARCHED])


def _without_search(scheme: Scheme) -> Scheme:
    """A scheme whose scales follow from the ranges of the weights."""
    if scheme.weight is None or not scheme.weight.has_searched_scale:
        return scheme
    weight, plus, activation = scheme.name.partition("+")
    return parse_scheme(re.sub(r"@[a-z]+", "", weight) + plus + activation)


def scales_of(
    checkpoint: Checkpoint,
    site: Site,
    strength: Strength,
    *,
    stats: Stats,
    method: str,
) -> Tensor:
    """The scales that `choose_scales` proposes for a site at one strength, float64.

    Raises:
        RewriteError: The method proposes no such strength here.
    """
    with one_thread():
        ranges = _ranges(checkpoint, site, stats)
        for proposed, scale_P in propose_scales(method, ranges, powers_of_two=False):
            if proposed == strength:
                return storable_scale(checkpoint, site, scale_P)
    raise RewriteError(
        f"{site.group}: {method} proposes no scales with alpha {strength.alpha:g} and beta "
        f"{strength.beta:g}."
    )


def storable_scale(checkpoint: Checkpoint, site: Site, scale_P: Tensor) -> Tensor:
    """The scale nearest to one wanted by which the norm of a site can be divided exactly.

    A norm's weight has few bits; what it is divided by is what its stored quotient says, and the
    layers after it are multiplied by that. A linear producer is rounded like its consumer.

    Args:
        checkpoint: The model.
        site: Any.
        scale_P: Wanted, float64.

    Returns:
        Of the same shape.
    """
    if site.producer is not None:
        return scale_P
    info = checkpoint.tensors[site.divided[0]]
    weight_P = read_tensor(info).double()
    stored_P = (weight_P / scale_P).to(TORCH_DTYPES[info.dtype]).double()
    exact = (weight_P != 0) & (stored_P != 0)
    return torch.where(exact, weight_P / torch.where(exact, stored_P, 1.0), 1.0)


def _read_sequences(stats: Stats, site: Site) -> Iterator[_Sequence]:
    plan = stats.plan
    for corpus in plan.corpora:
        files = stats.sequence_files(corpus.name)
        judges = files[:: max(1, len(files) // _JUDGES)][:_JUDGES]
        share = 1 / (len(plan.corpora) * len(judges) * plan.draws * 2 * plan.sequence_length)
        for path in judges:
            with SequenceFile(path) as file:
                samples = file.read(site.consumers[0].name)
            assert samples is not None
            x_TI = samples.x_TI.float()
            for draw in range(plan.draws):
                yield _Sequence(path, draw, x_TI, share)


def _gradients(sequences: Sequence[_Sequence], layer: str) -> list[Tensor]:
    """Of each draw, at the output of a layer, [T, O], float32."""
    found = []
    for one in sequences:
        with SequenceFile(one.path) as file:
            found.append(file.tensor(f"grad/{layer}")[one.draw].float())
    return found


def _columns(sequences: Sequence[_Sequence], site: Site, scales: Sequence[Tensor]) -> _Columns:
    """What errors of each column cost, and of it each row, where codes are fitted."""
    size_T = [torch.zeros(len(one.x_TI), dtype=torch.float64) for one in sequences]
    rows = {}
    for layer in site.consumers:
        grads = _gradients(sequences, layer.name)
        row_R = torch.zeros(layer.out_features, dtype=torch.float64)
        for at, (one, grad_TO) in enumerate(zip(sequences, grads, strict=True)):
            squared_TO = grad_TO.double().square()
            size_T[at] += squared_TO.sum(1)
            row_R += one.share * squared_TO.sum(0)
        rows[layer.name] = row_R
    total = sum(float(row_R.sum()) for row_R in rows.values())
    return _Columns(
        _pivots(sequences, size_T, scales, site.group),
        {name: row_R / (total or 1.0) for name, row_R in rows.items()},
    )


def _pivots(
    sequences: Sequence[_Sequence],
    size_T: Sequence[Tensor],
    scales: Sequence[Tensor],
    group: str,
) -> Tensor:
    """``D`` of ``N D N^T`` under each of some scales, of Hessians damped as where codes are fitted.

    Of a wide one a square of columns is factorised at a time: what columns of later squares could
    make up for is left out.

    Args:
        sequences: Of a site.
        size_T: Of each sequence, the squared gradient of each token.
        scales: Of the input channels.
        group: The site, for messages.

    Returns:
        What errors of the weights before they moved cost, [P, I].

    Raises:
        SchemeError: The Hessian is not finite.
    """
    diagonal_I = torch.zeros(sequences[0].x_TI.shape[1], dtype=torch.float64)
    for one, squared_T in zip(sequences, size_T, strict=True):
        weight_T = one.share * squared_T
        parts = [weight_T @ x_TB.double().square() for x_TB in one.x_TI.split(_FACTORISED, 1)]
        diagonal_I += torch.cat(parts)
    if not bool(torch.isfinite(diagonal_I).all()):
        raise SchemeError(
            f"{group}: an input of calibration is not finite, so no scale can be chosen by it. "
            f"Look for broken weights before it, or calibrate again."
        )
    cost_PI = torch.zeros(len(scales), len(diagonal_I), dtype=torch.float64)
    if not bool(diagonal_I.any()):
        return cost_PI
    for start in range(0, len(diagonal_I), _FACTORISED):
        own = slice(start, start + _FACTORISED)
        size = len(diagonal_I[own])
        hessian_BB = torch.zeros(size, size, dtype=torch.float64)
        for one, squared_T in zip(sequences, size_T, strict=True):
            x_TB = one.x_TI[:, own].double() * (one.share * squared_T).sqrt()[:, None]
            hessian_BB += x_TB.T @ x_TB
        for cost_I, scale_I in zip(cost_PI, scales, strict=True):
            scale_B = scale_I[own].double()
            moved_BB = hessian_BB / scale_B / scale_B[:, None]
            moved_BB.diagonal().add_(DAMPING * float((diagonal_I / scale_I.square()).mean()))
            factor_BB = torch.linalg.cholesky(moved_BB.flip(0, 1))
            cost_I[own] = (factor_BB.diagonal().flip(0) * scale_B).square()
    return cost_PI


def _ranges(checkpoint: Checkpoint, site: Site, stats: Stats) -> InputRanges:
    amax, mean = [], []
    for corpus in stats.plan.corpora:
        for path in stats.sequence_files(corpus.name):
            with SequenceFile(path) as file:
                samples = file.read(site.consumers[0].name)
            assert samples is not None
            magnitude_TI = samples.x_TI.float().abs()
            amax.append(magnitude_TI.amax(0))
            mean.append(magnitude_TI.mean(0))
    amax_I, mean_I = torch.stack(amax).amax(0), torch.stack(mean).mean(0)
    weight_I = _channel_amax(checkpoint, site)
    index_I = torch.tensor(site.scale_of_I)

    def shared(value_I: Tensor) -> Tensor:
        zeros_P = torch.zeros(site.scales, dtype=torch.float64)
        return zeros_P.scatter_reduce(0, index_I, value_I.double(), "amax")

    return InputRanges(shared(amax_I), shared(mean_I), shared(weight_I))


def _predict(
    checkpoint: Checkpoint,
    site: Site,
    scheme: Scheme,
    *,
    sequences: Sequence[_Sequence],
    scales: Sequence[Tensor],
    columns: _Columns | None,
) -> list[float]:
    """Nats per token under each of some scales of the input channels."""
    nats = torch.zeros(len(scales), dtype=torch.float64)
    into = [torch.zeros_like(one.x_TI) for one in sequences]
    amax = _scaled_amax(checkpoint, site, scheme, scales)
    for layer in site.consumers:
        _add_layer(
            checkpoint,
            layer,
            scheme,
            sequences,
            scales,
            amax,
            nats=nats,
            into=into,
            columns=columns,
        )
    if scheme.activation is not None:
        nats += _input_nats(into, scheme, sequences, scales)
    return [float(value) for value in nats]


def _add_layer(
    checkpoint: Checkpoint,
    layer: LinearLayer,
    scheme: Scheme,
    sequences: Sequence[_Sequence],
    scales: Sequence[Tensor],
    amax: Sequence[float | None],
    *,
    nats: Tensor,
    into: Sequence[Tensor],
    columns: _Columns | None,
) -> None:
    """Add what errors of a layer's weights cost, and its part of the gradients at its inputs."""
    every = _gradients(sequences, layer.name)
    tile = scheme.weight.granularity.rows if scheme.weight is not None else 1
    for start, stop in _blocks(layer, tile_rows=tile, copies=len(sequences)):
        weight_RI = read_layer_rows(checkpoint, layer, start, stop)
        grads = [grad_TO[:, start:stop] for grad_TO in every]
        if scheme.activation is not None:
            for v_TI, grad_TR in zip(into, grads, strict=True):
                v_TI += grad_TR @ weight_RI.float()
        if scheme.weight is None:
            continue
        costs: Iterable[Callable[[Tensor], Tensor]]
        if columns is None:
            products_NRI = _products(sequences, grads)
            costs = [partial(_cost_to_nearest, gradient_NRI=products_NRI)] * len(scales)
        else:
            of_rows = columns.of_rows(layer.name, start, stop)
            costs = (partial(_cost_of_fitted, cost_RI=cost_RI) for cost_RI in of_rows)
        nats += _weight_nats(weight_RI, costs, scheme, scales, amax, layer.name)


def _products(sequences: Sequence[_Sequence], grads: Sequence[Tensor]) -> Tensor:
    """The gradient of each sequence by some rows of a weight, float32."""
    pairs = zip(sequences, grads, strict=True)
    return torch.stack([(grad_TR.T @ one.x_TI) * one.share**0.5 for one, grad_TR in pairs])


def _cost_to_nearest(delta_RI: Tensor, *, gradient_NRI: Tensor) -> Tensor:
    """Nats of errors of weights that stay as they are."""
    row_NR = torch.einsum("ri,nri->nr", delta_RI, gradient_NRI)
    return row_NR.square().sum(dtype=torch.float64)


def _cost_of_fitted(delta_RI: Tensor, *, cost_RI: Tensor) -> Tensor:
    """Nats of errors that later columns take over as far as they can."""
    return (delta_RI.double().square() * cost_RI).sum()


def _scaled_amax(
    checkpoint: Checkpoint, site: Site, scheme: Scheme, scales: Sequence[Tensor]
) -> list[float | None]:
    """Largest magnitude of the scaled weights, where the scheme has a scale for the tensor."""
    if not scheme.needs_weight_amax:
        return [None] * len(scales)
    amax_I = _channel_amax(checkpoint, site).double()
    return [float((amax_I * scale_I).max()) for scale_I in scales]


def _channel_amax(checkpoint: Checkpoint, site: Site) -> Tensor:
    """Largest magnitude of the weights that read each input channel, float32."""
    amax_I = torch.zeros(site.consumers[0].in_features)
    for layer in site.consumers:
        for start, stop in _blocks(layer):
            rows_RI = read_layer_rows(checkpoint, layer, start, stop).float()
            amax_I = torch.maximum(amax_I, rows_RI.abs().amax(0))
    return amax_I


def _weight_nats(
    weight_RI: Tensor,
    costs: Iterable[Callable[[Tensor], Tensor]],
    scheme: Scheme,
    scales: Sequence[Tensor],
    amax: Sequence[float | None],
    name: str,
) -> Tensor:
    found = []
    for scale_I, largest, cost in zip(scales, amax, costs, strict=True):
        moved_RI = (weight_RI.double() * scale_I).to(weight_RI.dtype).float()
        delta_RI = fake_quantize_weight(
            moved_RI, scheme.quantized_weight, tensor_amax=largest, name=name
        )
        found.append(cost((delta_RI - moved_RI) / scale_I.float()))
    return torch.stack(found)


def _input_nats(
    into: Sequence[Tensor], scheme: Scheme, sequences: Sequence[_Sequence], scales: Sequence[Tensor]
) -> Tensor:
    assert scheme.activation is not None
    found = []
    for scale_I in scales:
        inverse_I = (1 / scale_I).float()
        amax = max(float((one.x_TI * inverse_I).abs().max()) for one in sequences)
        total = 0.0
        for v_TI, one in zip(into, sequences, strict=True):
            moved_TI = one.x_TI * inverse_I
            delta_TI = fake_quantize_activation(moved_TI, scheme.activation, static_amax=amax)
            error_T = ((delta_TI - moved_TI) * scale_I.float() * v_TI).sum(1, dtype=torch.float64)
            total += one.share * float(error_T.square().sum())
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def _blocks(
    layer: LinearLayer, *, tile_rows: int = 1, copies: int = 1
) -> Iterator[tuple[int, int]]:
    """Ranges of rows, in whole tiles, of which so many copies fit the memory."""
    return row_blocks(
        layer.out_features,
        layer.in_features,
        elements=min(_BLOCK_ELEMENTS, _GRADIENT_ELEMENTS // copies),
        tile_rows=tile_rows or layer.out_features,
    )
