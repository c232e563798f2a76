"""What was measured of each entry, in a file of its own that a rerun takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mofq.files.documents import hash_file, write_beside_and_rename
from mofq.numbers.numerics import NUMERICS
from scripts.reproduce.peers.entries import MOFQ, Entry
from scripts.reproduce.peers.environments import pins


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table."""

    bits_per_weight: float  #: true bits of the decoder's linear layers
    kl_nats_per_token: float
    kl_stderr: float | None  #: over windows
    perplexity: float
    perplexity_original: float
    top1_agreement: float
    processor_seconds: float | None  #: to make it; None: it was made elsewhere
    versions: Mapping[str, str]  #: of packages that made it
    windows: tuple[float, ...]  #: KL of each


@dataclass(frozen=True, slots=True)
class Setting:
    """What all entries of one model have in common."""

    model: str  #: folder
    index_sha256: str  #: of its weights
    calibration: str  #: file of text
    text: str  #: file that is judged on
    windows: int  #: to judge on
    calibration_windows: int
    sequence_length: int  #: of both


def made_name(entry: Entry, setting: Setting) -> str:
    """Name of the folder that holds what a peer made: it says all that this depends on."""
    by = {"numerics": NUMERICS} if entry.peer == MOFQ else {"packages": pins(entry.peer)}
    sizes = [setting.calibration_windows, setting.sequence_length]
    content = [
        entry.settings,
        by,
        setting.index_sha256,
        hash_file(Path(setting.calibration)),
        sizes,
    ]
    return f"{entry.name}-{_digest(content)}"


def result_name(entry: Entry, setting: Setting) -> str:
    """Name of the file that holds the result of an entry: it says all that this depends on."""
    sizes = [setting.windows, setting.sequence_length]
    content = [made_name(entry, setting), hash_file(Path(setting.text)), sizes]
    return f"{entry.name}-{_digest(content)}.json"


def write_result(result: Result, path: Path) -> None:
    """Write a result beside its final name, and rename it."""
    write_beside_and_rename(path, json.dumps(asdict(result), indent=1) + "\n")


def read_result(path: Path) -> Result | None:
    """A result; None where there is none yet."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return Result(**{**content, "windows": tuple(content["windows"])})


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
