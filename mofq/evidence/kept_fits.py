"""What fitted schemes need of a calibration whose samples were not stored: ``table.fits``.

``unit-00012-1b2c3d4e``
    Of the layers of one unit that a fitted scheme was offered to: the importance of the columns;
    and of each sequence whose inputs are kept and that reached a layer, these inputs
    [T, in_features] in bfloat16, once for layers that read the same, and the norm of the gradient
    at each token [T] in float64. The format is that of `mofq.model.streaming.records`.
``fits.json``
    Written last: the plan of the calibration, and which file has which layer.

The codes that follow are those of a stats folder, in every bit, without its gradients of outputs,
which are not needed once the rows of the table are there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from mofq.evidence.calibration.stats import Plan, passing_stats, read_plan, write_json
from mofq.evidence.fits import Fits, Part, SeenSequence
from mofq.exceptions import StatsError
from mofq.files.documents import hash_file, load_json
from mofq.files.validated import Sha256, Text, only_these_keys, validate
from mofq.model.layers import LinearLayer
from mofq.model.streaming.records import read_content, write_tensors

INDEX_FILE = "fits.json"
_MAX_BYTES = 64_000_000


@only_these_keys
@dataclass(frozen=True, slots=True)
class _File:
    """A file of some layers."""

    sha256: Sha256
    layers: tuple[Text, ...]


_FILES = TypeAdapter(dict[Text, _File])


def has_kept_fits(folder: str | Path) -> bool:
    """Whether a folder is one of kept fits."""
    return (Path(folder) / INDEX_FILE).is_file()


class KeptFits(Fits):
    """Kept fits, read layer by layer; use it in a ``with`` statement."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder; its files are compared with their hashes.

        Raises:
            StatsError: It is damaged, of another version, or changed since it was written.
        """
        folder = Path(folder)
        plan, files = _read_index(folder)
        super().__init__(passing_stats(folder, plan), files={})
        for name, file in files.items():
            path = folder / name
            if not path.is_file() or hash_file(path) != file.sha256:
                raise StatsError(
                    f"{path}: is missing, or changed since it was written. Measure again into "
                    f"another table."
                )
        self._paths = {
            layer: folder / name for name, file in files.items() for layer in file.layers
        }

    def _importance(self, layer: LinearLayer, part: Part) -> Tensor:
        content, tensors = self._read(layer, part)
        importance_I: Tensor = tensors[content["importance"]]
        return importance_I

    def seen(self, layer: LinearLayer, part: Part = "all") -> Iterator[SeenSequence]:
        """As `Fits.seen`; the keys tell inputs apart and say no more."""
        content, tensors = self._read(layer, part)
        for x, norm, share in content["sequences"]:
            yield SeenSequence(tensors[x], tensors[norm], share, ("", x, ""))

    def _read(self, layer: LinearLayer, part: Part) -> tuple[dict[str, Any], list[Tensor]]:
        if part != "all":
            raise ValueError("kept fits are those to all sequences")
        path = self._paths.get(layer.name)
        if path is None:
            raise StatsError(
                f"{self.stats.folder}: knows nothing of {layer.name}: no fitted scheme was "
                f"measured of it. Measure with a search space that has some."
            )
        content, tensors = read_content(path)
        return content[layer.name], tensors


def write_fits(folder: Path, step: int, fits: Fits, layers: Sequence[LinearLayer]) -> None:
    """Keep what is fitted of some layers of a unit.

    Args:
        folder: Is made.
        step: Of the unit.
        fits: Of its samples.
        layers: That a fitted scheme is offered to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: list[Tensor] = []
    places: dict[tuple[str, int, str], int] = {}

    def put(tensor: Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    content = {}
    for layer in layers:
        sequences = []
        for one in fits.seen(layer):
            if one.key not in places:
                places[one.key] = put(one.x_TI)
            sequences.append([places[one.key], put(one.norm_T), one.share])
        importance = put(fits.importance(layer))
        content[layer.name] = {"importance": importance, "sequences": sequences}
    # Other layers of the unit may have been kept by another run.
    names = hashlib.sha256("\n".join(content).encode()).hexdigest()[:8]
    write_tensors(folder / f"unit-{step:05d}-{names}", content, tensors)


def begin_fits(folder: Path, plan: Plan) -> None:
    """Delete fits to another calibration."""
    if has_kept_fits(folder):
        found, _ = _read_index(folder)
        if passing_stats(folder, found).sha256 != passing_stats(folder, plan).sha256:
            shutil.rmtree(folder)


def finish_fits(folder: Path, plan: Plan) -> None:
    """Write the index over all units that are there, if there are any."""
    files = {}
    for path in sorted(folder.glob("unit-*")):
        content, _ = read_content(path)
        files[path.name] = {"sha256": hash_file(path), "layers": list(content)}
    if files:
        write_json(folder / INDEX_FILE, {"plan": plan.to_json(), "files": files})


def _read_index(folder: Path) -> tuple[Plan, Mapping[str, _File]]:
    path = folder / INDEX_FILE
    content = load_json(path, StatsError, _MAX_BYTES)
    if not isinstance(content, dict) or content.keys() != {"plan", "files"}:
        raise StatsError(f"{path}: is no index of kept fits. Measure again into another table.")
    files = validate(_FILES, content["files"], f"{path}: files", StatsError)
    return read_plan(content["plan"], path), files
