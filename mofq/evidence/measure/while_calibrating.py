"""Measures schemes while the model is calibrated, and stores no samples.

The backward pass of `mofq.evidence.calibration.streamed` gives what the layers of one unit saw in
all sequences, the last unit first. They are a stats folder of this unit alone, which is measured
by the code that measures any, and deleted. What is measured of a unit is kept in ``.measured`` in
the folder of the run, so that one that was stopped goes on; the table is written at the end, in its
own order. The rows are those through a stats folder, in every bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mofq import __version__
from mofq.evidence.calibration.disk_needs import experts_per_token, fits_bytes
from mofq.evidence.calibration.stats import Plan, Stats, never_seen, passing_stats, write_json
from mofq.evidence.calibration.streamed import calibrate_streamed
from mofq.evidence.fits import Fits
from mofq.evidence.kept_fits import begin_fits, finish_fits, write_fits
from mofq.evidence.measure.expert_visits import visits_of
from mofq.evidence.measure.fill_table import Measured, Scored, Work, measure_groups
from mofq.evidence.measure.kv_cache import CacheWork, cache_rows
from mofq.evidence.measure.samples import SampleReader
from mofq.evidence.table import Profile, Row, Visits
from mofq.evidence.table.lines import decode_line, encode_line
from mofq.exceptions import StatsError, StreamingError, option
from mofq.files.documents import load_json, write_beside_and_rename
from mofq.files.progress import Progress, Tell, silent
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import ModelLayers
from mofq.model.layers.module_layers import layers_within
from mofq.model.streaming.streamed import StreamedModel, open_streamed

_ASKED = ".asked.json"
_MEASURED = ".measured"
_MAX_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration whose samples are measured as they come."""

    plan: Plan
    windows: Mapping[str, Tensor]  #: corpus name -> token ids, [sequences, sequence_length]
    folder: Path  #: of the run; may be deleted when the table is written
    fits: Path  #: the folder for what fitted schemes need afterwards

    @property
    def stats(self) -> Stats:
        """What a table notes of it."""
        return passing_stats(self.folder, self.plan)


def measure_while_calibrating(
    checkpoint: Checkpoint,
    layers: ModelLayers,
    calibration: Calibration,
    work: Sequence[Work],
    caches: Sequence[CacheWork],
    *,
    device: str = "cpu",
    tell: Tell = silent,
    progress: Progress | None = None,
) -> Scored:
    """Calibrate a model layer by layer, and measure each layer when its samples are there.

    Args:
        checkpoint: The model.
        layers: Of it.
        calibration: What is run.
        work: Its fusion groups, each with schemes and corpora.
        caches: Formats of caches.
        device: Where the arithmetic runs.
        tell: Gets a line about a compilation.
        progress: Called with ``"measure"``, decoder layers passed and to be passed.

    Returns:
        What `measure_groups` and `cache_rows` find, in the order of the work.

    Raises:
        StatsError: As `calibrate_streamed` and `measure_groups`.
        StreamingError: The model cannot be run so, or a fusion group lies in several parts.
    """
    plan, folder = calibration.plan, calibration.folder
    _begin(calibration, work, caches)
    begin_fits(calibration.fits, plan)
    with open_streamed(checkpoint.folder, dtype=plan.dtype, device=device) as streamed:
        _check_groups(streamed, layers)
        scorer = _Scorer(checkpoint, calibration, work, caches, device, tell)
        stats = calibrate_streamed(
            streamed,
            layers,
            plan=plan,
            windows=calibration.windows,
            folder=folder,
            take=scorer.take,
            beside_bytes=_fits_bytes(checkpoint, layers, calibration, work),
            progress=progress,
        )
    return _read(calibration, stats, work, caches)


def _begin(calibration: Calibration, work: Sequence[Work], caches: Sequence[CacheWork]) -> None:
    """Go on with a run that was asked for the same; delete another."""
    asked = {
        "mofq": __version__,
        "plan": calibration.stats.sha256,
        "kv_cache": bool(calibration.plan.kv_cache),
        "work": [[one.group.name, [s.name for s in one.schemes], one.corpora] for one in work],
        "caches": [[one.cache.name, [s.name for s in one.schemes], one.corpora] for one in caches],
    }
    folder, text = calibration.folder, json.dumps(asked, indent=1) + "\n"
    path = folder / _ASKED
    if not path.is_file() or path.read_text("utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / _MEASURED).mkdir(parents=True)
        write_beside_and_rename(path, text)


def _fits_bytes(
    checkpoint: Checkpoint, layers: ModelLayers, calibration: Calibration, work: Sequence[Work]
) -> int:
    """What is kept for fitted schemes, where the layers have any and it is not there already."""
    groups = tuple(one.group for one in work if any(s.is_fitted for s in one.schemes))
    needed = fits_bytes(
        replace(layers, groups=groups),
        calibration.plan,
        experts_per_token=experts_per_token(checkpoint.config),
    )
    there = (path.stat().st_size for path in calibration.fits.glob("unit-*"))
    return max(0, needed - sum(there))


def _check_groups(streamed: StreamedModel, layers: ModelLayers) -> None:
    """Refuse a model whose fusion groups do not lie in one unit each."""
    counts = {group.name: len(group.layers) for group in layers.groups}
    for unit in streamed.weights.units:
        for group in layers_within(layers, unit).groups:
            if len(group.layers) < counts[group.name]:
                raise StreamingError(
                    f"the layers of {group.name} are in several parts of the model: calibrate it, "
                    f"and measure with {option('stats')}"
                )


@dataclass(frozen=True, slots=True)
class _Scorer:
    """Measures the layers of one unit after the other."""

    checkpoint: Checkpoint
    calibration: Calibration
    work: Sequence[Work]
    caches: Sequence[CacheWork]
    device: str
    tell: Tell

    def take(self, step: int, stats: Stats, inside: ModelLayers) -> None:
        """Measure a unit, and keep what was found."""
        groups = {group.name for group in inside.groups}
        names = {cache.name for cache in inside.caches}
        work = [one for one in self.work if one.group.name in groups]
        caches = [one for one in self.caches if one.cache.name in names]
        with SampleReader(stats) as reader:
            measured = measure_groups(
                self.checkpoint,
                work,
                stats=stats,
                device=self.device,
                tell=self.tell,
                elements=sum(layer.weights for one in self.work for layer in one.group.layers),
                reader=reader,
            )
            found = [(one.group.name, each) for one, each in zip(work, measured, strict=True)]
            rows = [
                (
                    one.cache.name,
                    cache_rows(reader, one.corpora, one.cache, one.schemes, device=self.device),
                )
                for one in caches
            ]
            unseen = {
                corpus: never_seen([file.inputs for file in files])
                for corpus, files in reader.files.items()
            }
            self._keep_fits(step, stats, reader, work)
        content = {
            "groups": [[name, _lines(each.rows), _lines(each.profiles)] for name, each in found],
            "caches": [[name, _lines(each)] for name, each in rows],
            "visits": {
                name: _lines(each) for name, each in visits_of(stats, inside.groups).items()
            },
            "unseen": {corpus: some for corpus, some in unseen.items() if some},
        }
        write_json(self.calibration.folder / _MEASURED / f"{step:05d}.json", content)

    def _keep_fits(
        self, step: int, stats: Stats, reader: SampleReader, work: Sequence[Work]
    ) -> None:
        layers = {
            layer.name: layer
            for one in work
            if any(scheme.is_fitted for scheme in one.schemes)
            for layer in one.group.layers
        }
        if layers:
            with Fits(stats, files=reader.files) as fits:
                write_fits(self.calibration.fits, step, fits, list(layers.values()))


def _lines(lines: Sequence[Row] | Sequence[Profile] | Sequence[Visits]) -> list[str]:
    return [encode_line(one) for one in lines]


def _decoded(texts: Sequence[str], path: Path) -> list[Any]:
    return [decode_line(text, str(path)) for text in texts]


def _read(
    calibration: Calibration, stats: Stats, work: Sequence[Work], caches: Sequence[CacheWork]
) -> Scored:
    """What was found of all units, in the order of the work."""
    groups: dict[str, list[Measured]] = {}
    rows: dict[str, list[list[Row]]] = {}
    visits: dict[str, list[Visits]] = {}
    unseen: dict[str, set[str]] = {}
    for path in sorted((calibration.folder / _MEASURED).iterdir()):
        content = load_json(path, StatsError, _MAX_BYTES)
        for name, of_rows, profiles in content["groups"]:
            measured = Measured(_decoded(of_rows, path), _decoded(profiles, path))
            groups.setdefault(name, []).append(measured)
        for name, of_rows in content["caches"]:
            rows.setdefault(name, []).append(_decoded(of_rows, path))
        visits |= {name: _decoded(some, path) for name, some in content["visits"].items()}
        for corpus, some in content["unseen"].items():
            unseen.setdefault(corpus, set()).update(some)
    finish_fits(calibration.fits, calibration.plan)
    return Scored(
        [groups[one.group.name].pop(0) for one in work],
        [rows[one.cache.name].pop(0) for one in caches],
        visits,
        replace(stats, unseen={name: tuple(sorted(some)) for name, some in unseen.items()}),
    )
