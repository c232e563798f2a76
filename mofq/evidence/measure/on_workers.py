"""Measures fusion groups on the machines of a cluster, which read the files themselves."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from mofq.evidence.calibration.stats import Stats, read_stats
from mofq.evidence.cluster import run_units
from mofq.evidence.measure.fill_table import Measured, Work, measure_groups
from mofq.evidence.measure.samples import SampleReader
from mofq.exceptions import ClusterError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights, open_shared
from mofq.model.layers import FusionGroup
from mofq.numbers.schemes import parse_scheme


@dataclass(frozen=True, slots=True)
class Unit:
    """One fusion group, and the schemes and corpora that it is measured under."""

    model: str  #: folder
    index_sha256: str
    weights_sha256: str
    stats: str | None  #: folder
    stats_sha256: str | None
    group: FusionGroup
    schemes: tuple[str, ...]
    corpora: tuple[str, ...]
    elements: int  #: of all groups in the work
    device: str


def measure_remotely(
    checkpoint: Checkpoint,
    work: Sequence[Work],
    *,
    stats: Stats | None = None,
    device: str = "cpu",
    cpus: float = 1,
) -> Generator[Measured, None, None]:
    """As `measure_groups`, on the cluster that is connected: the same rows in the same order.

    Args:
        checkpoint: The model; every machine sees its folder under the same path.
        work: Its fusion groups, each with schemes that fit it, and the corpora to measure on.
        stats: Calibration, in a folder that every machine sees, or None.
        device: Where the arithmetic runs; other than the CPU, a unit has a GPU of its own.
        cpus: Of one unit.

    Yields:
        The rows and profiles of each fusion group.

    Raises:
        MofqError: As `measure_groups`, or the cluster fails.
    """
    elements = sum(layer.weights for group, _, _ in work for layer in group.layers)
    weights = hash_weights(checkpoint)
    units = [
        Unit(
            model=str(checkpoint.folder.resolve()),
            index_sha256=checkpoint.index_sha256,
            weights_sha256=weights,
            stats=None if stats is None else str(stats.folder.resolve()),
            stats_sha256=None if stats is None else stats.sha256,
            group=group,
            schemes=tuple(scheme.name for scheme in schemes),
            corpora=corpora,
            elements=elements,
            device=device,
        )
        for group, schemes, corpora in work
    ]
    return run_units(measure_unit, units, device=device, cpus=cpus)


def measure_unit(unit: Unit) -> Measured:
    """Measure one unit, on a worker."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    checkpoint = _open_model(unit.model, unit.index_sha256, unit.weights_sha256)
    stats = None if unit.stats is None else _open_stats(unit.stats, unit.stats_sha256)
    work = [Work(unit.group, [parse_scheme(name) for name in unit.schemes], unit.corpora)]
    [measured] = measure_groups(
        checkpoint,
        work,
        stats=stats,
        device=unit.device,
        elements=unit.elements,
        reader=None if stats is None else _open_samples(stats.folder, stats.sha256),
    )
    return measured


@lru_cache(maxsize=2)
def _open_model(folder: str, index_sha256: str, weights_sha256: str) -> Checkpoint:
    return open_shared(folder, index_sha256=index_sha256, weights_sha256=weights_sha256)


@lru_cache(maxsize=1)
def _open_samples(folder: Path, sha256: str) -> SampleReader:
    """The samples, whose headers a worker reads once; they stay open until it ends."""
    return SampleReader(_open_stats(str(folder), sha256))


@lru_cache(maxsize=2)
def _open_stats(folder: str, sha256: str | None) -> Stats:
    stats = read_stats(folder)
    if stats.sha256 != sha256:
        raise ClusterError(
            f"{folder}: a worker finds other stats there ({stats.sha256[:8]}) than those of this "
            f"run ({str(sha256)[:8]}). Put them on a shared file system."
        )
    return stats
