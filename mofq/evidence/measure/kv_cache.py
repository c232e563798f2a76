"""What each format of the KV cache costs, in nats: of keys and values as attention caches them.

The statistics hold the cached numbers and their gradient, so a format's rounding error is
known exactly, and the second order of docs/sensitivity.md for activations applies with the
gradient itself in the place of ``v = W^T g``: tokens are rounded one by one, within a token
nothing is assumed. Keys and values are rounded apart, and their squares added.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mofq.evidence.calibration.stats import Stats
from mofq.evidence.measure.gain_correction import corrected
from mofq.evidence.measure.rows import kept_errors
from mofq.evidence.measure.samples import ChunkedSamples, SampleReader
from mofq.evidence.spaces import CacheOffer
from mofq.evidence.standard_error import standard_error
from mofq.evidence.table import Rejection, Row, TableWriter
from mofq.exceptions import StatsError
from mofq.model.kv_schemes import (
    CachedTensor,
    CacheScheme,
    cache_scale_bytes,
    part_amax,
    static_keys,
)
from mofq.model.layers import PARTS, CacheLayer
from mofq.numbers.quantize import fake_quantize_cache


def check_cache_stats(stats: Stats | None) -> Stats:
    """Refuse statistics that say nothing of the cache.

    Raises:
        StatsError: There are none, or they hold no keys and values.
    """
    if stats is None:
        raise StatsError(
            "formats of the KV cache are measured in nats alone: run `mofq calibrate --kv-cache`, "
            "then `mofq measure --stats`; or drop `kv_cache` from the search space."
        )
    if not stats.plan.kv_cache:
        raise StatsError(
            f"{stats.folder}: holds no keys and values, which the formats of the KV cache are "
            f"measured on. Run `mofq calibrate --kv-cache` into another folder, or drop `kv_cache` "
            f"from the search space."
        )
    return stats


class CacheWork(NamedTuple):
    """Formats of one layer's cache that a table lacks on the same corpora."""

    cache: CacheLayer
    schemes: list[CacheScheme]
    corpora: tuple[str, ...]


def fill_caches(
    table: TableWriter,
    offers: Sequence[CacheOffer],
    missing: Sequence[Sequence[CacheWork]],
    measured: Generator[list[Row], None, None],
) -> None:
    """Write down every offered format of every layer's cache that a table does not have yet.

    Args:
        table: Open for writing.
        offers: What each layer's cache may be kept in.
        missing: Of each offer, from `missing_formats`.
        measured: The rows of each of these; closed at the end.
    """
    table.add_caches(offer.cache for offer in offers)
    with closing(measured):
        for offer, lacking in zip(offers, missing, strict=True):
            rejected = [Rejection(offer.cache.name, s, why) for s, why in offer.rejected.items()]
            table.add_group([row for _ in lacking for row in next(measured)], rejected)


def missing_formats(
    table: TableWriter, offer: CacheOffer, corpora: Sequence[str]
) -> list[CacheWork]:
    """The formats of a layer's cache that a table has no row of on some corpora."""
    schemes_of: dict[tuple[str, ...], list[CacheScheme]] = {}
    for scheme in offer.schemes:
        has = partial(table.has, offer.cache.name, scheme.name, unit="kl_nats_per_token")
        lacking = tuple(corpus for corpus in corpora if not has(corpus=corpus))
        if lacking:
            schemes_of.setdefault(lacking, []).append(scheme)
    return [CacheWork(offer.cache, schemes, lacking) for lacking, schemes in schemes_of.items()]


def measure_caches(
    stats: Stats | None, work: Sequence[CacheWork], *, device: str
) -> Generator[list[Row], None, None]:
    """The rows of caches under some formats; arguments and errors as of `cache_rows`.

    The statistics may be None where there is no work. Close it: they are open until then.
    """
    if stats is not None and work:
        with SampleReader(stats) as reader:
            for cache, schemes, corpora in work:
                yield cache_rows(reader, corpora, cache, schemes, device=device)


def cache_rows(
    reader: SampleReader,
    corpora: Sequence[str],
    cache: CacheLayer,
    schemes: Iterable[CacheScheme],
    *,
    device: str = "cpu",
) -> list[Row]:
    """The rows of one attention layer's cache.

    Args:
        reader: Of statistics that hold the cache.
        corpora: Names in them, in order; of static scales, all.
        cache: The layer.
        schemes: That fit its shape.
        device: Where the arithmetic runs.

    Returns:
        One row in nats for each scheme and corpus; its bytes are those of static scales.

    Raises:
        StatsError: The statistics do not know the layer.
    """
    samples = {corpus: _read(reader, corpus, cache) for corpus in corpora}
    head_amax = _head_amax(samples, cache)
    rows = []
    for scheme in schemes:
        amax = {key: _amax_of(key, head_amax) for key in static_keys(scheme, cache)}
        for corpus, parts in samples.items():
            draws = next(iter(parts.values())).draws
            kept_N = kept_errors(_errors(scheme, cache, parts, amax, device), draws)
            rows.append(
                Row(
                    group=cache.name,
                    scheme=scheme.name,
                    unit="kl_nats_per_token",
                    corpus=corpus,
                    error=float(kept_N.mean()),
                    stderr=standard_error(kept_N),
                    bytes=cache_scale_bytes(scheme, cache),
                    sqnr_db=None,
                    sample_errors=tuple(kept_N.tolist()),
                    static_amax=amax or None,
                )
            )
    return rows


def _read(reader: SampleReader, corpus: str, cache: CacheLayer) -> dict[str, ChunkedSamples]:
    found = {part: reader.read(corpus, cache.part(part)) for part in PARTS}
    return {part: one for part, one in found.items() if one is not None}


def _head_amax(
    samples: Mapping[str, Mapping[str, ChunkedSamples]], cache: CacheLayer
) -> dict[str, Tensor]:
    """Largest magnitude of each head over all corpora, of keys and of values."""
    return {
        part: torch.stack(
            [
                by_part[part].x_MCI.unflatten(2, (-1, cache.head_size)).abs().amax((0, 1, 3))
                for by_part in samples.values()
            ]
        )
        .amax(0)
        .float()
        for part in PARTS
    }


def _amax_of(key: str, head_amax: Mapping[str, Tensor]) -> float:
    part, dot, head = key.partition(".")
    return float(head_amax[part][int(head)] if dot else head_amax[part].max())


def _errors(
    scheme: CacheScheme,
    cache: CacheLayer,
    parts: Mapping[str, ChunkedSamples],
    amax: Mapping[str, float],
    device: str,
) -> Tensor:
    """Nats per token of each sequence, [N], float64: of keys and of values, added."""
    errors = [
        _part_errors(how, cache, parts[part], part_amax(part, amax), device)
        for part, how in scheme.parts.items()
        if how is not None
    ]
    if not errors:
        return torch.zeros(next(iter(parts.values())).sequences, dtype=torch.float64)
    return torch.stack(errors).sum(0)


def _part_errors(
    how: CachedTensor,
    cache: CacheLayer,
    samples: ChunkedSamples,
    amax: Sequence[float],
    device: str,
) -> Tensor:
    x_MCI = samples.x_MCI.to(device=device, dtype=torch.float32)
    x_MCHD = x_MCI.unflatten(2, (-1, cache.head_size))
    rounded_MCHD = fake_quantize_cache(
        x_MCHD,
        how.scheme,
        by_head=how.by_head,
        kernel=how.kernel,
        static_amax=amax,
        name=cache.name,
    )
    change_MCI = rounded_MCHD.flatten(2) - x_MCI
    token_MC = (samples.grad_MCO.to(device).float() * change_MCI).sum(2, dtype=torch.float64)
    chunks = len(token_MC) // samples.sequences
    error_N1 = token_MC.square().unflatten(0, (samples.sequences, chunks)).sum((1, 2))[:, None]
    gains = samples.gains.input if samples.gains else None
    return (corrected(error_N1, gains)[:, 0] / (2 * samples.tokens)).cpu()
