"""A hash of samples of a checkpoint's weights: tells a fine-tune from its base without reading it.

It is a fingerprint and no checksum: a few kilobytes of every tensor are read, so that it
costs a second on a model of any size. Training moves every matrix, if only in the last
bits, and is seen; one changed weight elsewhere in a tensor is not.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mofq.exceptions import CheckpointError, ClusterError
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo, open_checkpoint

#: Read from the middle of each tensor [bytes].
_SAMPLE_BYTES = 4096


def hash_weights(checkpoint: Checkpoint) -> str:
    """SHA-256 of every tensor's name and of the bytes in its middle.

    Args:
        checkpoint: Any. How its tensors are spread over shards makes no difference.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: A file cannot be read, or got shorter.
    """
    samples: dict[str, bytes] = {}
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in (*checkpoint.tensors.values(), *checkpoint.consumed.values()):
        by_file.setdefault(info.file, []).append(info)
    for path, infos in by_file.items():
        try:
            with path.open("rb") as file:
                for info in sorted(infos, key=lambda info: info.start):
                    samples[info.name] = _middle(file.fileno(), info)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    total = hashlib.sha256()
    for name in sorted(samples):
        total.update(hashlib.sha256(name.encode()).digest())
        total.update(hashlib.sha256(samples[name]).digest())
    return total.hexdigest()


def open_shared(folder: str, *, index_sha256: str, weights_sha256: str | None) -> Checkpoint:
    """Open the checkpoint that a unit of work is of, on a worker.

    Args:
        folder: As the machine that sent the unit has it.
        index_sha256: That it has there.
        weights_sha256: That its weights have there; None where it is not known.

    Raises:
        ClusterError: The worker finds another one.
        CheckpointError: It finds none.
    """
    checkpoint = open_checkpoint(folder)
    found, needed = checkpoint.index_sha256, index_sha256
    if found == needed and weights_sha256 is not None:
        found, needed = hash_weights(checkpoint), weights_sha256
    if found != needed:
        raise ClusterError(
            f"{folder}: a worker finds another model there ({found[:8]}) than the one that this "
            f"run is of ({needed[:8]}). Put it on a shared file system."
        )
    return checkpoint


def _middle(file: int, info: TensorInfo) -> bytes:
    size = min(info.nbytes, _SAMPLE_BYTES)
    data = os.pread(file, size, info.start + (info.nbytes - size) // 2)
    if len(data) != size:
        raise CheckpointError(
            f"{info.file}: ends inside tensor {info.name!r}: needed {info.nbytes:,} bytes. It "
            f"changed while it was read. Fetch the file again and start over."
        )
    return data
