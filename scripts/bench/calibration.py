"""Calibrates and measures for the bench scripts, and times both. A part of them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, process_time

import torch
from torch import Tensor

from mofq.evidence.calibration.calibrate import calibrate, run_sequence
from mofq.evidence.calibration.stats import CorpusPlan, Plan, Stats, read_stats, write_json
from mofq.evidence.corpora import Corpus, leading_tokens
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.spaces import SearchSpace
from mofq.evidence.table import Table, read_table
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import ModelLayers
from mofq.model.loading import load_model, load_tokenizer
from scripts.shared.windows import model_windows

#: Sequences of which one is kept.
_CLUSTER = 4

SPACE = Path(__file__).parent / "space.yaml"


@dataclass(frozen=True, slots=True)
class CalibrationTime:
    """`calibrate` beside plain passes over the same tokens, turn by turn in one process."""

    sequences: int
    calibrate_seconds: float  #: of CPU time
    plain_seconds: float  #: forward, and backward to the embeddings; nothing is kept
    threads: int
    load: float  #: of the machine, at the end


@dataclass(frozen=True, slots=True)
class MeasureTime:
    """`measure` of a whole table."""

    seconds: float
    cpu_seconds: float  #: of all threads
    schemes: int
    linear_layers: int
    threads: int
    load: float


def note(label: str, done: int, total: int) -> None:
    """Progress, on stderr."""
    print(f"{done}/{total} {label}", file=sys.stderr, flush=True)


def run_calibration(
    checkpoint: Checkpoint,
    layers: ModelLayers,
    corpus: Corpus,
    *,
    folder: Path,
    sequences: int = 32,
    keep: int = 8,
    sequence_length: int = 512,
    draws: int = 1,
) -> Stats:
    """What `mofq calibrate` does, unless the folder is finished."""
    if (folder / "stats.json").exists():
        return read_stats(folder)
    windows_NT = model_windows(
        checkpoint, corpus, windows=sequences, sequence_length=sequence_length
    )
    return calibrate(
        load_model(checkpoint.folder),
        layers,
        plan=_plan(checkpoint, corpus, windows_NT, draws, keep),
        windows={corpus.name: windows_NT},
        folder=folder,
        progress=note,
    )


def _plan(
    checkpoint: Checkpoint, corpus: Corpus, windows_NT: Tensor, draws: int, keep: int
) -> Plan:
    kept = keep if keep < len(windows_NT) else None
    return Plan(
        model_name=checkpoint.name,
        index_sha256=checkpoint.index_sha256,
        seed=0,
        sequence_length=windows_NT.shape[1],
        draws=draws,
        dtype="float32",
        bos=bool(leading_tokens(load_tokenizer(checkpoint.folder), "auto")) or None,
        corpora=(
            CorpusPlan(corpus.name, corpus.source, corpus.sha256, len(windows_NT), kept=kept),
        ),
    )


def fill_table(
    checkpoint: Checkpoint, layers: ModelLayers, space: SearchSpace, *, stats: Stats, path: Path
) -> Table:
    """What `mofq measure` does. The time is kept beside a table that is made in one go."""
    is_new = not path.exists()
    wall, cpu = monotonic(), process_time()
    measure(
        checkpoint,
        layers,
        space,
        table_path=path,
        stats=stats,
        progress=lambda stage, done, total: note(f"{stage} {path.name}", done, total),
    )
    if is_new:
        time = MeasureTime(
            seconds=monotonic() - wall,
            cpu_seconds=process_time() - cpu,
            schemes=sum(not scheme.is_unquantized for scheme in space.schemes),
            linear_layers=len(layers.grouped_layers),
            threads=torch.get_num_threads(),
            load=os.getloadavg()[0],
        )
        write_json(_time_path(path), asdict(time))
    return read_table(path)


def measure_time(path: Path) -> MeasureTime | None:
    """How long the table took; None where it was made in several goes."""
    time = _time_path(path)
    return MeasureTime(**json.loads(time.read_text("utf-8"))) if time.exists() else None


def _time_path(table: Path) -> Path:
    return table.with_name(table.stem + "-time.json")


def calibration_time(
    checkpoint: Checkpoint,
    layers: ModelLayers,
    corpus: Corpus,
    *,
    sequences: int,
    sequence_length: int,
) -> CalibrationTime:
    """Time `calibrate` against plain passes: four sequences each, in turn.

    Both run the same frozen model forward and back to its embeddings, so the difference is
    what gains, and keeping inputs and gradients of one sequence of the four, cost: writing
    and hashing included.
    """
    windows_NT = model_windows(
        checkpoint, corpus, windows=sequences, sequence_length=sequence_length
    )
    model = load_model(checkpoint.folder)
    embeddings = model.get_input_embeddings()
    plain = calibrated = 0.0
    clusters = [windows_NT[n : n + _CLUSTER] for n in range(0, sequences, _CLUSTER)]
    for n, cluster_NT in enumerate([windows_NT[:2], *clusters]):
        handle = embeddings.register_forward_hook(lambda _m, _i, y: y.requires_grad_(True))
        start = process_time()
        for window_T in cluster_NT:
            run_sequence(model, window_T, [n])
        middle = process_time()
        handle.remove()
        with tempfile.TemporaryDirectory() as folder:
            plan = _plan(checkpoint, corpus, cluster_NT, draws=1, keep=1)
            windows = {corpus.name: cluster_NT}
            calibrate(model, layers, plan=plan, windows=windows, folder=Path(folder))
            end = process_time()
        if n > 0:  # the first is a warm-up
            plain += middle - start
            calibrated += end - middle
    return CalibrationTime(
        sequences, calibrated, plain, threads=torch.get_num_threads(), load=os.getloadavg()[0]
    )
