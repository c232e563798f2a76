"""The ``stats/`` folder: what `calibrate` writes and `measure` reads.

``plan.json``
    Written first: model, seed, corpora with their hashes, sequence length. A second
    run continues a folder only where its own plan is the same.
``CORPUS/sequence-00000.safetensors``
    One sequence each, complete when it has this name: ``x/LAYER`` [T, in_features] and
    ``grad/LAYER`` [draws, T, out_features], bfloat16. Layers that read the very same
    input share one ``x``; the file's metadata says whose. A layer of experts has only the
    tokens that were routed to it, and ``tokens/LAYER`` [t] says which.
``stats.json``
    Written last: the plan and the hash of every sequence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mofq.exceptions import StatsError

VERSION = 1


@dataclass(frozen=True, slots=True)
class CorpusPlan:
    """One corpus of a calibration run."""

    name: str
    source: str
    text_sha256: str
    sequences: int  #: how many sequences are run


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides what a calibration run computes."""

    model_name: str
    index_sha256: str
    seed: int
    sequence_length: int  #: tokens in each sequence
    draws: int  #: label draws for each sequence
    dtype: str  #: of the model's arithmetic
    corpora: tuple[CorpusPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as it stands in ``plan.json``."""
        return {"version": VERSION, **asdict(self), "corpora": [asdict(c) for c in self.corpora]}


@dataclass(frozen=True, slots=True)
class Stats:
    """A complete stats folder."""

    folder: Path
    plan: Plan
    sha256: str

    def sequence_files(self, corpus: str) -> tuple[Path, ...]:
        """The sequences of a corpus, in order."""
        count = next(c.sequences for c in self.plan.corpora if c.name == corpus)
        return tuple(sequence_path(self.folder, corpus, index) for index in range(count))


@dataclass(frozen=True, slots=True)
class LayerSamples:
    """What one layer saw in one sequence."""

    x_TI: Tensor  #: inputs, [tokens, in_features], bfloat16
    grad_DTO: Tensor  #: output gradients, [draws, tokens, out_features], bfloat16
    token_T: Tensor | None  #: position of each token where not all are here (experts), int64


def sequence_path(folder: Path, corpus: str, index: int) -> Path:
    """Where a sequence's samples are kept."""
    return folder / corpus / f"sequence-{index:05d}.safetensors"


def read_plan(path: Path) -> dict[str, Any]:
    """Read ``plan.json`` or ``stats.json``.

    Raises:
        StatsError: The file is missing, is not JSON, or is of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StatsError(
            f"{path}: not found. {path.parent} is not a finished stats folder: "
            f"run `mofq calibrate` with -o {path.parent} (it continues where it stopped)."
        ) from None
    except (ValueError, OSError) as error:
        raise StatsError(f"{path}: cannot be read as JSON ({error}). Calibrate again.") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise StatsError(f"{path}: version {found!r}; this mofq reads version {VERSION}.")
    return content


def plan_from_json(content: dict[str, Any], path: Path) -> Plan:
    """Parse a plan.

    Raises:
        StatsError: A key is missing or unknown.
    """
    fields = {key: value for key, value in content.items() if key not in ("version", "files")}
    try:
        corpora = tuple(CorpusPlan(**corpus) for corpus in fields.pop("corpora"))
        return Plan(**fields, corpora=corpora)
    except (KeyError, TypeError) as error:
        raise StatsError(f"{path}: not a calibration plan ({error}). Calibrate again.") from None


def read_stats(folder: str | Path) -> Stats:
    """Open a finished stats folder; no samples are read yet.

    Args:
        folder: What `mofq calibrate` was given as ``-o``.

    Raises:
        StatsError: The folder is not finished, or a sequence is missing or was cut short.
    """
    path = Path(folder) / "stats.json"
    content = read_plan(path)
    plan = plan_from_json(content, path)
    stats = Stats(Path(folder), plan, hashlib.sha256(path.read_bytes()).hexdigest())
    sizes = {name: entry["bytes"] for name, entry in content["files"].items()}
    for corpus in plan.corpora:
        for file in stats.sequence_files(corpus.name):
            found = file.stat().st_size if file.exists() else None
            needed = sizes.get(f"{corpus.name}/{file.name}")
            if found is None or found != needed:
                raise StatsError(
                    f"{file}: {'missing' if found is None else f'{found} bytes'}, needed "
                    f"{needed} bytes. Delete {path} and calibrate again into the same folder."
                )
    return stats


def read_layer(file: Path, layer: str) -> LayerSamples | None:
    """Read one layer's samples of one sequence.

    Args:
        file: From `Stats.sequence_files`.
        layer: Module name.

    Returns:
        The samples; None where no token reached the layer (an expert).

    Raises:
        StatsError: The file does not know the layer.
    """
    with safe_open(file, framework="pt") as samples:
        inputs = json.loads((samples.metadata() or {}).get("inputs", "{}"))
        if layer not in inputs:
            raise StatsError(f"{file}: no layer {layer!r}. The stats are of another model.")
        if inputs[layer] is None:
            return None
        keys = set(samples.keys())
        token_key = f"tokens/{layer}"
        return LayerSamples(
            x_TI=samples.get_tensor(f"x/{inputs[layer]}"),
            grad_DTO=samples.get_tensor(f"grad/{layer}"),
            token_T=samples.get_tensor(token_key) if token_key in keys else None,
        )


def start_plan(folder: Path, plan: Plan) -> None:
    """Write ``plan.json``, or check that the folder was begun with the same plan.

    Raises:
        StatsError: The folder belongs to another run.
    """
    path = folder / "plan.json"
    if path.exists():
        begun = plan_from_json(read_plan(path), path)
        if begun != plan:
            different = [k for k, v in asdict(plan).items() if asdict(begun)[k] != v]
            raise StatsError(
                f"{folder}: was begun with another {', '.join(different)}. "
                f"Calibrate into another folder, or delete this one."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, plan.to_json())


def finish_stats(folder: Path, plan: Plan, files: Sequence[Path]) -> Stats:
    """Write ``stats.json`` over complete sequences and open the folder."""
    entries = {
        f"{file.parent.name}/{file.name}": {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
        for file in files
    }
    write_json(folder / "stats.json", {**plan.to_json(), "files": entries})
    return read_stats(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON beside the final name and rename it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def input_amax(stats: Stats, corpus: str, layer: str) -> Tensor | None:
    """Largest magnitude of each input channel over all tokens of a corpus.

    Args:
        stats: An open stats folder.
        corpus: Its name in the plan.
        layer: Module name.

    Returns:
        [in_features], float32; None where no token reached the layer.
    """
    amax_I: Tensor | None = None
    for file in stats.sequence_files(corpus):
        samples = read_layer(file, layer)
        if samples is None or samples.x_TI.shape[0] == 0:
            continue
        here_I = samples.x_TI.float().abs().amax(0)
        amax_I = here_I if amax_I is None else torch.maximum(amax_I, here_I)
    return amax_I
