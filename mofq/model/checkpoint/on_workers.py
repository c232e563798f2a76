"""Opens a checkpoint that several machines read."""

from __future__ import annotations

from mofq.exceptions import ClusterError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights


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
