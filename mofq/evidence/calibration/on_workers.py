"""Calibrates on the machines of a cluster: each worker runs sequences, whole or layer by layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.evidence.calibration.calibrate import (
    check_model,
    check_windows,
    is_done,
    planned_sequences,
    run_and_write,
)
from mofq.evidence.calibration.capture import check_weights_apart
from mofq.evidence.calibration.stats import (
    UNFINISHED,
    CorpusPlan,
    Plan,
    Stats,
    busy_folder,
    finish_stats,
    open_plan,
)
from mofq.evidence.calibration.streamed import run_and_write_streamed
from mofq.evidence.cluster import ask_machines, count_workers, run_units
from mofq.files.locks import hold_file
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import open_shared
from mofq.model.layers import find_layers, included_groups
from mofq.model.loading import load_model
from mofq.model.streaming.execution import free_bytes
from mofq.model.streaming.streamed import open_streamed

#: Corpus, index in it, token ids.
_Sequence = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class SequencesUnit:
    """Sequences that one worker runs."""

    model: str  #: folder
    plan: Plan
    folder: str  #: where the stats go
    sequences: tuple[_Sequence, ...]
    is_streamed: bool
    device: str


def free_of_workers(device: str, *, cpus: float = 1) -> int | None:
    """Memory that is free for each worker, where it is least; None where no machine says it.

    Args:
        device: Where the arithmetic runs; the memory of a machine is shared by its workers.
        cpus: Of one worker.

    Raises:
        ClusterError: The cluster fails.
    """
    found = ask_machines(free_bytes, device, cpus=cpus)
    is_shared = device == "cpu"
    shares = [free // (workers if is_shared else 1) for free, workers in found if free is not None]
    return min(shares, default=None)


def calibrate_remotely(
    checkpoint: Checkpoint,
    *,
    plan: Plan,
    windows: Mapping[str, Tensor],
    folder: Path,
    is_streamed: bool = False,
    device: str = "cpu",
    cpus: float = 1,
    progress: Progress | None = None,
) -> Stats:
    """As `mofq.evidence.calibration.calibrate.calibrate`, on the cluster that is connected.

    Args:
        checkpoint: The model; every machine sees its folder under the same path.
        plan: What is computed; a folder begun with the same plan is continued.
        windows: Corpus name -> token ids, [sequences, sequence_length], int64.
        folder: Where the stats go; every machine sees it under the same path.
        is_streamed: Whether a worker runs the model layer by layer. It then gets as many sequences
            as any, at once, since it reads all weights for them; else one after the other.
        device: Where the arithmetic runs; other than the CPU, a worker has a GPU of its own.
        cpus: Of one worker.
        progress: Called with ``"calibrate"``, sequences done, sequences in all.

    Returns:
        The finished stats.

    Raises:
        MofqError: As `calibrate`, or the cluster fails.
    """
    with open_plan(folder, plan) as begun:
        for corpus in plan.corpora:
            (folder / corpus.name).mkdir(exist_ok=True)
        left = [
            (corpus.name, index, tuple(token_T.tolist()))
            for corpus, index, token_T in planned_sequences(plan, windows)
            if not is_done(folder, plan, corpus, index)
        ]
        count = len(left)
        if is_streamed:
            (folder / UNFINISHED).mkdir(exist_ok=True)
            count = count_workers(device, cpus=cpus)
        units = [
            SequencesUnit(
                model=str(checkpoint.folder.resolve()),
                plan=plan,
                folder=str(folder.resolve()),
                sequences=tuple(some),
                is_streamed=is_streamed,
                device=device,
            )
            for some in split_evenly(left, count)
        ]
        total = sum(corpus.sequences for corpus in plan.corpora)
        done = total - len(left)
        for finished in run_units(run_unit, units, device=device, cpus=cpus):
            done += finished
            if progress is not None:
                progress("calibrate", done, total)
        return finish_stats(folder, begun)


def split_evenly(items: Sequence[_Sequence], count: int) -> list[Sequence[_Sequence]]:
    """At most so many runs of neighbours, whose lengths differ by one at most; none is empty."""
    count = min(count, len(items))
    ends = [len(items) * n // count for n in range(count + 1)] if count else []
    return [items[start:stop] for start, stop in pairwise(ends)]


def run_unit(unit: SequencesUnit) -> int:
    """Run the sequences of a unit on a worker, and write them where the stats go.

    Returns:
        How many they are.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    plan, folder = unit.plan, Path(unit.folder)
    checkpoint = _open_checkpoint(unit.model, plan.index_sha256, plan.weights_sha256)
    asked = included_groups(plan.vocabulary or ())
    layers = find_layers(checkpoint, **asked, stated=plan.layers)
    sequences = [
        (plan.corpus(name), index, torch.tensor(tokens, dtype=torch.int64))
        for name, index, tokens in unit.sequences
    ]
    if not unit.is_streamed:
        model = _load_model(checkpoint.folder, plan.dtype, unit.device)
        _check(model, sequences, plan)
        run_and_write(model, layers, sequences, plan=plan, folder=folder)
        return len(sequences)
    name, index, _ = unit.sequences[0]
    lock = folder / UNFINISHED / f"{name}-{index:05d}.lock"
    with (
        hold_file(lock, partial(busy_folder, folder)),
        open_streamed(checkpoint.folder, dtype=plan.dtype, device=unit.device) as streamed,
    ):
        _check(streamed.model, sequences, plan)
        check_weights_apart(streamed.model, layers)
        run_and_write_streamed(streamed, layers, sequences, plan=plan, folder=folder)
    return len(sequences)


def _check(
    model: PreTrainedModel, sequences: Sequence[tuple[CorpusPlan, int, Tensor]], plan: Plan
) -> None:
    check_model(model, plan)
    for corpus, _, token_T in sequences:
        check_windows(model, token_T[None], replace(corpus, sequences=1, kept=None), plan)


@lru_cache(maxsize=1)
def _open_checkpoint(folder: str, index_sha256: str, weights_sha256: str | None) -> Checkpoint:
    """The model, whose headers a worker reads once."""
    return open_shared(folder, index_sha256=index_sha256, weights_sha256=weights_sha256)


@lru_cache(maxsize=1)
def _load_model(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """The whole model, which a worker keeps."""
    return load_model(folder, dtype=dtype, device=device)
