"""``mofq calibrate``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from mofq.cli.checks import check_device, check_dtype, check_folder
from mofq.cli.terminal import note, print_json, progress_bars, short_bytes
from mofq.exceptions import ClusterError, CorpusError, StatsError

if TYPE_CHECKING:
    from torch import Tensor

    from mofq.evidence.calibration.stats import Plan, Stats
    from mofq.evidence.corpora import Corpus
    from mofq.model.checkpoint.headers import Checkpoint
    from mofq.model.layers import ModelLayers


#: Sequences of a corpus, where nothing else is asked for; chosen by scripts/bench/sample_plan.py.
SEQUENCES = 32


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """What `mofq calibrate` was asked for."""

    model: str
    corpora: tuple[str, ...]  #: ``NAME=SOURCE``, or a source that names itself
    output: Path
    sequences: int | None = None  #: of each corpus; None: 32, or as many as a text holds
    keep: int = 8  #: of how many of them inputs and gradients are kept
    sequence_length: int = 512  #: tokens of each
    draws: int = 1  #: of the output's gradient, for each sequence
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    device_map: str | None = None
    activation_checkpointing: bool = False
    kv_cache: bool = False  #: whether keys and values, as they are cached, are kept too
    cluster: str | None = None  #: as `mofq.evidence.cluster.cluster` takes it; None: this process
    cluster_cpus: int = 1  #: of one worker


def run_calibrate(options: CalibrateOptions, *, as_json: bool = False) -> Stats:
    """Calibrate and say what was written."""
    start = monotonic()
    texts = load_corpora(options.corpora)
    if options.dtype == "float16":
        raise StatsError("gradients underflow in float16. Use --dtype bfloat16 or float32.")
    check_dtype(options.dtype)
    if options.cluster is None:
        check_device(options.device)
    elif options.device_map is not None:
        raise ClusterError("--device-map spreads a model over one machine. Drop it or --cluster.")
    check_folder(options.output)
    was_there = (options.output / "stats.json").exists()
    stats = _calibrate(options, texts)
    size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
    seconds = monotonic() - start
    if as_json:
        print_json(
            {
                "stats": str(options.output),
                "sha256": stats.sha256,
                "bytes": size,
                "corpora": {c.name: c.sequences for c in stats.plan.corpora},
                "kept": {c.name: len(c.kept_indices) for c in stats.plan.corpora},
                "sequence_length": options.sequence_length,
                "unseen": {corpus: list(names) for corpus, names in stats.unseen.items()},
                "seconds": round(seconds, 2),
            }
        )
    else:
        count = sum(corpus.sequences for corpus in stats.plan.corpora)
        kept = sum(len(corpus.kept_indices) for corpus in stats.plan.corpora)
        note(
            f"{options.output}: {count} sequences of {options.sequence_length} tokens, "
            f"{kept} of them kept, {short_bytes(size)}, {seconds:.1f} s"
            + ("; they were there already." if was_there else ".")
        )
        note_unseen(stats)
    return stats


def note_unseen(stats: Stats) -> None:
    """Name the experts that no token of a corpus reached."""
    for corpus, names in stats.unseen.items():
        note(
            f"  corpus {corpus}: no token reached {len(names)} layers of experts, e.g. {names[0]}. "
            f"They are scored like the experts of their kind; longer text reaches more."
        )


def load_named(source: str) -> Corpus:
    """A corpus from ``NAME=SOURCE``, or from a source that names itself."""
    from mofq.evidence.corpora import load_text

    name, equals, rest = source.partition("=")
    is_named = bool(equals) and not Path(source).exists()
    return load_text(rest, name=name) if is_named else load_text(source)


def load_corpora(sources: Sequence[str]) -> list[Corpus]:
    """Corpora of different names, each fit to be a folder's.

    Raises:
        CorpusError: One cannot be read, or its name is no folder's, or two have one name.
    """
    from mofq.evidence.calibration.stats import CORPUS_NAME

    texts = [load_named(one) for one in sources]
    for text in texts:
        if not re.match(CORPUS_NAME, text.name):
            raise CorpusError(
                f"corpus {text.name!r}: the name is that of a folder in the stats, so it has no "
                f"slash and does not begin with a dot. Write NAME={text.source}."
            )
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise CorpusError(f"two corpora have the name {name!r}. Write NAME=FILE for each.")
    return texts


def _calibrate(options: CalibrateOptions, texts: Sequence[Corpus]) -> Stats:
    from mofq.evidence.calibration.stats import open_plan, read_stats
    from mofq.evidence.corpora import spread_windows
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.layers import find_layers
    from mofq.model.loading import load_tokenizer

    checkpoint = open_checkpoint(options.model)
    _check_caches(options, find_layers(checkpoint))  # refuses what it does not know
    tokenizer = load_tokenizer(checkpoint.folder)
    windows = {
        text.name: spread_windows(
            text,
            tokenizer,
            sequences=options.sequences or SEQUENCES,
            sequence_length=options.sequence_length,
            or_fewer=options.sequences is None,
        )
        for text in texts
    }
    plan = _plan(options, checkpoint, texts, windows)
    if (options.output / "stats.json").exists():
        # Refuses the stats of another plan; a sequence that was lost is made again below.
        with open_plan(options.output, plan), suppress(StatsError):
            return read_stats(options.output)
    run = _run_here if options.cluster is None else _run_on_cluster
    with progress_bars() as bars:
        return run(
            options,
            checkpoint,
            plan=plan,
            windows=windows,
            folder=options.output,
            activation_checkpointing=options.activation_checkpointing,
            progress=lambda corpus, done, total: bars.stage(f"calibrate {corpus}", done, total),
        )


def _check_caches(options: CalibrateOptions, layers: ModelLayers) -> None:
    if options.kv_cache and not layers.caches:
        raise StatsError(
            f"{options.model}: --kv-cache watches keys and values by head, and attention in a "
            f"{layers.architecture!r} caches latent vectors in engines. Leave the option out."
        )


def _run_here(options: CalibrateOptions, checkpoint: Checkpoint, **what: Any) -> Stats:
    from mofq.evidence.calibration.calibrate import calibrate
    from mofq.model.layers import find_layers
    from mofq.model.loading import load_model

    model = load_model(
        checkpoint.folder, dtype=options.dtype, device=options.device, device_map=options.device_map
    )
    return calibrate(model, find_layers(checkpoint), **what)


def _run_on_cluster(options: CalibrateOptions, checkpoint: Checkpoint, **what: Any) -> Stats:
    from mofq.evidence.calibration.on_workers import calibrate_remotely
    from mofq.evidence.cluster import cluster

    assert options.cluster is not None
    with cluster(options.cluster, tell=note):
        return calibrate_remotely(
            checkpoint, device=options.device, cpus=options.cluster_cpus, **what
        )


def _plan(
    options: CalibrateOptions,
    checkpoint: Checkpoint,
    texts: Sequence[Corpus],
    windows: Mapping[str, Tensor],
) -> Plan:
    from mofq.evidence.calibration.stats import CorpusPlan, Plan
    from mofq.model.checkpoint.weights_hash import hash_weights

    return Plan(
        model_name=checkpoint.name,
        index_sha256=checkpoint.index_sha256,
        weights_sha256=hash_weights(checkpoint),
        seed=options.seed,
        sequence_length=options.sequence_length,
        draws=options.draws,
        dtype=options.dtype,
        kv_cache=options.kv_cache or None,
        corpora=tuple(
            CorpusPlan(
                t.name,
                t.source,
                t.sha256,
                sequences=len(windows[t.name]),
                kept=options.keep if options.keep < len(windows[t.name]) else None,
            )
            for t in texts
        ),
    )
