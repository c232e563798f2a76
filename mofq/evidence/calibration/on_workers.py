"""Calibrates on the machines of a cluster: each worker loads the model and runs sequences."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.evidence.calibration.calibrate import check_model, check_windows, is_done, run_and_write
from mofq.evidence.calibration.stats import CorpusPlan, Plan, Stats, finish_stats, open_plan
from mofq.evidence.cluster import run_units
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import open_shared
from mofq.model.layers import find_layers, included_groups
from mofq.model.loading import load_model


@dataclass(frozen=True, slots=True)
class SequenceUnit:
    """One sequence of a corpus."""

    model: str  #: folder
    plan: Plan
    folder: str  #: where the stats go
    corpus: CorpusPlan
    index: int
    tokens: tuple[int, ...]
    device: str


def calibrate_remotely(
    checkpoint: Checkpoint,
    *,
    plan: Plan,
    windows: Mapping[str, Tensor],
    folder: Path,
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
        device: Where the arithmetic runs; other than the CPU, a worker has a GPU of its own.
        cpus: Of one worker, which holds the whole model.
        progress: Called with corpus, sequences done, sequences in all.

    Returns:
        The finished stats.

    Raises:
        MofqError: As `calibrate`, or the cluster fails.
    """
    with open_plan(folder, plan) as begun:
        for corpus in plan.corpora:
            (folder / corpus.name).mkdir(exist_ok=True)
            units = [
                SequenceUnit(
                    model=str(checkpoint.folder.resolve()),
                    plan=plan,
                    folder=str(folder.resolve()),
                    corpus=corpus,
                    index=index,
                    tokens=tuple(windows[corpus.name][index].tolist()),
                    device=device,
                )
                for index in range(corpus.sequences)
                if not is_done(folder, plan, corpus, index)
            ]
            done = corpus.sequences - len(units)
            finished = run_units(run_unit, units, cpus=cpus, gpus=0 if device == "cpu" else 1)
            for count, _ in enumerate(finished, start=done + 1):
                if progress is not None:
                    progress(corpus.name, count, corpus.sequences)
        return finish_stats(folder, begun)


def run_unit(unit: SequenceUnit) -> int:
    """Run one sequence on a worker, and write it where the stats go."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    plan = unit.plan
    model, checkpoint = _open_model(
        unit.model, plan.index_sha256, plan.weights_sha256, plan.dtype, unit.device
    )
    asked = included_groups(plan.vocabulary or ())
    layers = find_layers(checkpoint, **asked, stated=plan.layers)
    check_model(model, plan)
    token_NT = torch.tensor(unit.tokens, dtype=torch.int64)[None]
    check_windows(model, token_NT, replace(unit.corpus, sequences=1, kept=None), plan)
    run_and_write(
        model,
        layers,
        [(unit.corpus, unit.index, token_NT[0])],
        plan=plan,
        folder=Path(unit.folder),
    )
    return unit.index


@lru_cache(maxsize=1)
def _open_model(
    folder: str, index_sha256: str, weights_sha256: str | None, dtype: str, device: str
) -> tuple[PreTrainedModel, Checkpoint]:
    checkpoint = open_shared(folder, index_sha256=index_sha256, weights_sha256=weights_sha256)
    return load_model(checkpoint.folder, dtype=dtype, device=device), checkpoint
