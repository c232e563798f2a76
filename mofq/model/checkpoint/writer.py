"""Writes a checkpoint: its shards, block of rows by block of rows, and what lies beside them.

The safetensors library writes a file from tensors that are all in memory. Here
the sizes are planned first, so every header is known before the first byte of
data, and no more is held than the block that the caller hands over.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, uint8

from mofq.exceptions import BackendError, CheckpointError
from mofq.model.checkpoint.headers import (
    DTYPE_BITS,
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    find_model_folders,
)
from mofq.model.checkpoint.safetensors_header import encode_header
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.checkpoint.tensors import read_kept_rows

_COPY_BYTES = 16 * 2**20
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}
#: Weights in any format, and their indices.
WEIGHT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.partial"),
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx"),
    *("*.gguf", "*.npz", "*.tflite"),
)
#: The original's weights, and what the export writes itself.
_LEFT_OUT = (
    *WEIGHT_FILES,
    *(
        "config.json",
        "recipe.yaml",
        "tuned-*.tensors",
        "tuned-*.norms",
        "hf_quant_config.json",
        "quantize_config.json",
    ),
)
_CARD = "README.md"
_ORIGINAL_CARD = "README.original.md"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """Dtype, as safetensors calls it, and shape of a tensor that will be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk [bytes]."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class ShardWriter:
    """Writes ``model.safetensors``, or shards with their index, into a folder.

    A context manager. The tensors may come in any order, each whole or in
    consecutive blocks of rows. The files get their final names, the index last,
    when the block ends and everything planned has been written; after an
    exception nothing is left behind. With a journal, what was settled need not be
    written again after the process was killed.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, PlannedTensor],
        *,
        shard_bytes: int = 5_000_000_000,
        journal: Path | None = None,
    ) -> None:
        """Lay the shards out and create them.

        Args:
            folder: An existing folder that holds no weights yet.
            plan: Every tensor that will be written. Shards are filled in this order.
            shard_bytes: Largest amount of data in a shard [bytes]; a single larger
                tensor gets a shard of its own.
            journal: A file in which `settle` notes what is on the disk. One that is there is of
                a killed process that wrote the same, and is gone on with.

        Raises:
            CheckpointError: The folder already holds weights, or the disk has no room.
        """
        self._folder = folder
        self._plan = dict(plan)
        self._shard_of = _assign_shards(self._plan, shard_bytes)
        self._offsets: dict[str, int] = {}
        self._written = dict.fromkeys(self._plan, 0)
        self._journal = journal
        self._fresh: list[str] = []  #: tensors that are complete and not settled
        self._settled: set[str] = set()
        shards = list(dict.fromkeys(self._shard_of.values()))
        if journal is not None:
            self._unfinish(shards)
        taken = sum(_taken(self._partial(shard)) for shard in shards)
        _check_folder(folder, sum(tensor.nbytes for tensor in self._plan.values()) - taken)
        try:
            beginnings = {shard: self._lay_out(shard) for shard in shards}
            if journal is None or not self._go_on(journal, beginnings):
                for shard, beginning in beginnings.items():
                    self._create(shard, beginning)
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> ShardWriter:
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the files their final names, or remove them all after an exception."""
        try:
            if kind is None:
                self._finish()
                return
        except BaseException:
            self._remove()
            raise
        self._remove()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor.

        Args:
            name: As planned.
            tensor: Of the planned dtype and shape, on any device.

        Raises:
            CheckpointError: The disk is full.
            ValueError: It was not planned so, or is there already.
        """
        planned = self._plan.get(name)
        if planned is None or tuple(tensor.shape) != planned.shape:
            raise ValueError(f"{name}: planned {planned}, got shape {list(tensor.shape)}")
        self._append(name, tensor)

    def add_rows(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor.

        Args:
            name: As planned.
            rows: [any number, …] of the planned dtype; the rows after those that were
                written before.

        Raises:
            CheckpointError: The disk is full.
            ValueError: It was not planned so, or there are more rows than planned.
        """
        planned = self._plan.get(name)
        if planned is None or not planned.shape or tuple(rows.shape[1:]) != planned.shape[1:]:
            raise ValueError(f"{name}: planned {planned}, got rows of shape {list(rows.shape)}")
        self._append(name, rows)

    def copy(self, name: str, source: TensorInfo) -> None:
        """Copy a stored tensor byte for byte, without decoding it.

        Args:
            name: As planned.
            source: A tensor of the planned dtype and shape.

        Raises:
            CheckpointError: The disk is full, or the source got shorter.
            ValueError: It was not planned so, or is there already.
        """
        if self._plan.get(name) != PlannedTensor(source.dtype, source.shape):
            raise ValueError(
                f"{name}: planned {self._plan.get(name)}, got {source.dtype} {source.shape}"
            )
        try:
            with source.file.open("rb") as file:
                file.seek(source.start)
                left = source.nbytes
                while left:
                    data = file.read(min(left, _COPY_BYTES))
                    if not data:
                        raise CheckpointError(
                            f"{source.file}: ends inside tensor {source.name!r}. It changed while"
                            " it was read. Fetch the file again and start over."
                        )
                    self._write(name, data)
                    left -= len(data)
        except OSError as error:
            raise CheckpointError(f"{source.file}: cannot be read: {error.strerror}.") from error

    def keep(self, source: TensorInfo) -> None:
        """Write a tensor that nothing changes: byte for byte, but FP8 of a source as its values.

        Args:
            source: A tensor that is planned under its name, in its ``kept_dtype``.

        Raises:
            CheckpointError: As `copy` and `read_kept_rows`.
        """
        if not source.decoded:
            self.copy(source.name, source)
            return
        for _, rows in read_kept_rows(source):
            self.add_rows(source.name, rows)

    def settle(self, part: str) -> None:
        """Have all that was written since the last call on the disk, and note it.

        Does nothing without a journal.

        Args:
            part: A name for it, which `is_settled` knows, in another process too.

        Raises:
            CheckpointError: The disk is full.
        """
        if self._journal is None:
            return
        try:
            for shard in {self._shard_of[name] for name in self._fresh}:
                _flush_to_disk(self._partial(shard))
            with self._journal.open("ab") as file:
                file.write(json.dumps([part, self._fresh]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self._journal, error) from error
        self._settled.add(part)
        self._fresh = []

    def is_settled(self, part: str) -> bool:
        """Whether a part is on the disk, and need not be written again."""
        return part in self._settled

    def _unfinish(self, shards: list[str]) -> None:
        """Take the final names from what a killed process had finished."""
        (self._folder / INDEX_FILE).unlink(missing_ok=True)
        for shard in shards:
            if (self._folder / shard).exists():
                os.replace(self._folder / shard, self._partial(shard))

    def _go_on(self, journal: Path, beginnings: Mapping[str, bytes]) -> bool:
        """Take over what a killed process had settled; False where there is nothing of it."""
        data = journal.read_bytes() if journal.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        settled = [json.loads(line) for line in whole.splitlines()]
        if not settled or not all(
            _begins_with(self._partial(shard), beginning) for shard, beginning in beginnings.items()
        ):
            journal.unlink(missing_ok=True)
            return False
        if whole != data:  # killed while it was noted
            os.truncate(journal, len(whole))
        for part, names in settled:
            self._settled.add(part)
            for name in names:
                self._written[name] = self._plan[name].nbytes
        return True

    def _append(self, name: str, tensor: Tensor) -> None:
        dtype = TORCH_DTYPES[self._plan[name].dtype]
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: planned {dtype}, got {tensor.dtype}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._write(name, flat.view(uint8).numpy().data)

    def _write(self, name: str, data: bytes | memoryview) -> None:
        done, planned = self._written[name], self._plan[name].nbytes
        if done + len(data) > planned:
            raise ValueError(f"{name}: {planned} bytes planned, got {done + len(data)}")
        path = self._partial(self._shard_of[name])
        try:
            with path.open("r+b") as file:
                file.seek(self._offsets[name] + done)
                file.write(data)
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._written[name] = done + len(data)
        if self._written[name] == planned:
            self._fresh.append(name)

    def _partial(self, shard: str) -> Path:
        return self._folder / f"{shard}.partial"

    def _lay_out(self, shard: str) -> bytes:
        """The beginning of a shard, its header; where each of its tensors goes is noted."""
        names = [name for name, where in self._shard_of.items() if where == shard]
        # Widest first keeps every tensor aligned to its own element.
        names.sort(key=lambda name: (-_RANK[self._plan[name].dtype], name))
        planned = {name: (self._plan[name].dtype, self._plan[name].shape) for name in names}
        beginning, offsets = encode_header(planned, {"format": "pt"})
        self._offsets |= offsets
        return beginning

    def _create(self, shard: str, beginning: bytes) -> None:
        path = self._partial(shard)
        try:
            path.write_bytes(beginning)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _finish(self) -> None:
        for name, planned in self._plan.items():
            if self._written[name] != planned.nbytes:
                raise ValueError(
                    f"{name}: {planned.nbytes} bytes planned, {self._written[name]} written"
                )
        shards = list(dict.fromkeys(self._shard_of.values()))
        if shards != [SINGLE_FILE]:
            self._write_index()
            shards.append(INDEX_FILE)  # last: before it, the shards are not a checkpoint
        for shard in shards:
            path = self._partial(shard)
            try:
                _flush_to_disk(path)
                os.replace(path, self._folder / shard)
            except OSError as error:
                raise _cannot_write(path, error) from error

    def _write_index(self) -> None:
        total = sum(tensor.nbytes for tensor in self._plan.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(self._shard_of.items())),
        }
        path = self._partial(INDEX_FILE)
        try:
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _remove(self) -> None:
        # The folder held no weights before, so what has a final name by now is ours too.
        for shard in [INDEX_FILE, *dict.fromkeys(self._shard_of.values())]:
            self._partial(shard).unlink(missing_ok=True)
            (self._folder / shard).unlink(missing_ok=True)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and every other file beside the weights.

    Links are followed as far as the folder itself, or the blobs of the hub's cache
    that it is a snapshot of; what is copied is always a file. Of folders, those are
    copied that belong to the model: chat templates, and what ``modules.json`` of a
    sentence-transformers model names (``1_Pooling``). In others hub repositories keep
    other formats of the same weights.

    Args:
        source: The original model folder.
        target: An existing folder.

    Raises:
        BackendError: A link leads elsewhere; a checkpoint from a stranger could
            publish a private file that way.
    """
    allowed = [source.resolve()]
    if source.parent.name == "snapshots":
        allowed.append((source.parent.parent / "blobs").resolve())
    for name, path in find_other_files(source).items():
        _copy_file(path, target / name, allowed)


def find_other_files(source: Path) -> dict[str, Path]:
    """What `copy_other_files` copies.

    Args:
        source: A model folder.

    Returns:
        Name in the copy, with ``/`` between folders -> path.
    """
    found = {}
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or any(path.match(pattern) for pattern in _LEFT_OUT):
            continue
        if not path.is_dir():
            found[_ORIGINAL_CARD if path.name == _CARD else path.name] = path
    for name in find_model_folders(source):
        for path in sorted((source / name).rglob("*")):
            if not path.is_dir():
                found[path.relative_to(source).as_posix()] = path
    return found


def _copy_file(path: Path, target: Path, allowed: list[Path]) -> None:
    """Copy what a path leads to, if it is a file, and lies where it may."""
    real = path.resolve()
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise BackendError(
            f"{path}: is a link to {real}, outside of the model's folder, and would be copied "
            f"into the export. Replace it by a file, or remove it."
        )
    if real.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real, target)


def _assign_shards(plan: Mapping[str, PlannedTensor], shard_bytes: int) -> dict[str, str]:
    """Tensor name to file name, filling one shard after the other."""
    number, filled = 0, 0
    numbers: dict[str, int] = {}
    for name, tensor in plan.items():
        if filled and filled + tensor.nbytes > shard_bytes:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += tensor.nbytes
    if number == 0:
        return dict.fromkeys(plan, SINGLE_FILE)
    count = f"{number + 1:05}"
    return {name: f"model-{shard + 1:05}-of-{count}.safetensors" for name, shard in numbers.items()}


def _check_folder(folder: Path, needed_bytes: int) -> None:
    present = sorted(
        path.name for path in folder.glob("*.safetensors*") if path.suffix != ".partial"
    )
    if present:
        raise CheckpointError(
            f"{folder}: needed a folder without weights, found {present[0]}. Give another folder,"
            " or remove it."
        )
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise CheckpointError(
            f"{folder}: needed {needed_bytes:,} bytes of disk space, found {free:,} free."
            " Make room, or give a folder on another disk."
        )


def _begins_with(path: Path, beginning: bytes) -> bool:
    """Whether a file is there that begins so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning


def _taken(path: Path) -> int:
    """What a file takes of the disk [bytes]; it may have holes."""
    return 512 * path.stat().st_blocks if path.exists() else 0


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}. Make room or give another folder, and run"
        " again."
    )


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
