"""``mofq calibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from mofq.cli.terminal import note, print_json, progress_bars, short_bytes
from mofq.exceptions import CorpusError, StatsError

if TYPE_CHECKING:
    from mofq.calibration.stats import Stats
    from mofq.corpora import Corpus


def run_calibrate(
    model: str,
    *,
    corpora: Sequence[str],
    output: Path,
    sequences: int = 8,
    sequence_length: int = 512,
    draws: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    activation_checkpointing: bool = False,
    as_json: bool = False,
) -> Stats:
    """Calibrate and say what was written."""
    start = monotonic()
    texts = [load_named(one) for one in corpora]
    if len({text.name for text in texts}) < len(texts):
        raise CorpusError("two corpora have the same name. Write --corpus NAME=FILE.")
    if min(sequences, sequence_length - 1, draws) < 1:
        raise CorpusError("sequences and draws must be at least 1, the sequence length 2.")
    if dtype == "float16":
        raise StatsError("gradients underflow in float16. Use --dtype bfloat16 or float32.")
    stats = _calibrate(
        model,
        texts,
        output=output,
        sequences=sequences,
        sequence_length=sequence_length,
        draws=draws,
        seed=seed,
        dtype=dtype,
        device=device,
        device_map=device_map,
        activation_checkpointing=activation_checkpointing,
    )
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    if as_json:
        print_json(
            {
                "stats": str(output),
                "sha256": stats.sha256,
                "bytes": size,
                "corpora": {c.name: c.sequences for c in stats.plan.corpora},
                "sequence_length": sequence_length,
                "seconds": round(monotonic() - start, 2),
            }
        )
    else:
        note(f"{output}: {short_bytes(size)}, {monotonic() - start:.0f} s.")
    return stats


def load_named(source: str) -> Corpus:
    """A corpus from ``NAME=SOURCE``, or from a source that names itself."""
    from mofq.corpora import load_text

    name, equals, rest = source.partition("=")
    return load_text(rest, name=name) if equals else load_text(source)


def _calibrate(
    model: str,
    texts: Sequence[Corpus],
    *,
    output: Path,
    sequences: int,
    sequence_length: int,
    draws: int,
    seed: int,
    dtype: str,
    device: str,
    device_map: str | None,
    activation_checkpointing: bool,
) -> Stats:
    from mofq.calibration.run import calibrate
    from mofq.calibration.stats import CorpusPlan, Plan
    from mofq.checkpoint.headers import open_checkpoint
    from mofq.checkpoint.model import load_model, load_tokenizer
    from mofq.corpora import spread_windows
    from mofq.layers import find_layers

    checkpoint = open_checkpoint(model)
    layers = find_layers(checkpoint)
    tokenizer = load_tokenizer(checkpoint.folder)
    windows = {
        text.name: spread_windows(
            text, tokenizer, sequences=sequences, sequence_length=sequence_length
        )
        for text in texts
    }
    plan = Plan(
        model_name=checkpoint.name,
        index_sha256=checkpoint.index_sha256,
        seed=seed,
        sequence_length=sequence_length,
        draws=draws,
        dtype=dtype,
        corpora=tuple(
            CorpusPlan(t.name, t.source, t.sha256, sequences=len(windows[t.name])) for t in texts
        ),
    )
    loaded = load_model(checkpoint.folder, dtype=dtype, device=device, device_map=device_map)
    with progress_bars() as bars:
        return calibrate(
            loaded,
            layers,
            plan=plan,
            windows=windows,
            folder=output,
            activation_checkpointing=activation_checkpointing,
            progress=lambda corpus, done, total: bars.stage(f"calibrate {corpus}", done, total),
        )
