"""Scores blocks of rows on all cores; the results are the same on any number of them.

Whole blocks run side by side, and their sums are added in the order of the rows. One more
thread reads the blocks, in order, no further ahead of their use than a fixed number of bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Condition, Lock

from torch import Tensor

from mofq.evidence.measure.layer_inputs import PreparedLayer
from mofq.evidence.measure.score import BlockSums, LayerScore, layer_score, score_rows
from mofq.evidence.measure.worker_threads import Workers, worker_threads

#: No further layer is prepared while the inputs of those in work take this much [bytes].
_WAITING_BYTES = 200_000_000

#: Blocks that are read and not yet scored [bytes].
_AHEAD_BYTES = 32_000_000
#: The same for a GPU, whose blocks are as large as all of that: one is read while one is scored.
_GPU_AHEAD_BYTES = 256_000_000

#: Weights of small layers that are scored in one task, where nothing but sums is wanted.
_BATCH_ELEMENTS = 2**21

#: A layer and some of its rows: the first, and one past the last.
_Block = tuple[PreparedLayer, int, int]
_Work = tuple[Sequence[PreparedLayer], list[Future[None]], "_InOrder"]


def score_layers(
    layers: Iterable[PreparedLayer], *, device: str = "cpu", workers: Workers | None = None
) -> Generator[LayerScore, None, None]:
    """Score layers, as many blocks of rows at once as there are workers.

    Args:
        layers: Each is taken, prepared by whoever yields it, when there is room for it.
        device: That they were prepared for; one that is not the CPU gets a block at a time.
        workers: May prepare the layers too; by default there are as many as torch has threads.

    Yields:
        The score of each, in order; the same bytes on any number of threads.

    Raises:
        SchemeError: A weight is not finite, or a scheme does not fit.
    """
    with ExitStack() as stack:
        if workers is None:
            workers = stack.enter_context(worker_threads(device))
        reader = _ReadAhead(_AHEAD_BYTES if device == "cpu" else _GPU_AHEAD_BYTES)
        waiting: deque[_Work] = deque()
        try:
            for batch in _batches(layers):
                blocks = [(layer, *rows) for layer in batch for rows in layer.blocks]
                jobs = [blocks] if len(batch) > 1 else [[block] for block in blocks]
                reading = [reader.read(job) for job in jobs]  # ahead of what takes the processors
                sums = _InOrder(blocks)
                jobs_done = [
                    workers.executor.submit(_score, *each, reader, sums)
                    for each in zip(jobs, reading, strict=True)
                ]
                waiting.append((batch, jobs_done, sums))
                while (
                    len(waiting) > 2 * workers.threads or _waiting_bytes(waiting) > _WAITING_BYTES
                ):
                    yield from _finish(*waiting.popleft())
            while waiting:
                yield from _finish(*waiting.popleft())
        finally:
            reader.close()
            for _, jobs_left, _ in waiting:
                for job in jobs_left:
                    job.cancel()


class _ReadAhead:
    """A thread that reads blocks in the order in which they are asked for."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._is_closed = False
        self._changed = Condition()
        self._thread = ThreadPoolExecutor(1, "mofq-read")

    def read(self, blocks: Sequence[_Block]) -> Future[list[Tensor]]:
        """Their rows, when there is room for them; whoever took them says so to `release`."""
        return self._thread.submit(self._read, blocks)

    def _read(self, blocks: Sequence[_Block]) -> list[Tensor]:
        with self._changed:
            self._changed.wait_for(lambda: self._held_bytes < self._limit_bytes or self._is_closed)
            if self._is_closed:
                raise CancelledError
        found = [layer.read_rows(start, stop) for layer, start, stop in blocks]
        with self._changed:
            self._held_bytes += sum(rows_RI.nbytes for rows_RI in found)
        return found

    def release(self, found: Sequence[Tensor]) -> None:
        """Make room for others."""
        with self._changed:
            self._held_bytes -= sum(rows_RI.nbytes for rows_RI in found)
            self._changed.notify_all()

    def close(self) -> None:
        """Read nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.shutdown(cancel_futures=True)


def _batches(layers: Iterable[PreparedLayer]) -> Iterator[list[PreparedLayer]]:
    """One layer each, or several that are small: starting a task takes as long as scoring one."""
    batch: list[PreparedLayer] = []
    elements = 0
    for layer in layers:
        is_small = len(layer.blocks) == 1 and not layer.needs_deltas
        if batch and not (is_small and elements + _elements(layer) <= _BATCH_ELEMENTS):
            yield batch
            batch, elements = [], 0
        batch.append(layer)
        elements += _elements(layer)
        if not is_small:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def _elements(layer: PreparedLayer) -> int:
    return layer.blocks[-1][1] * layer.in_features


class _InOrder:
    """Adds up the sums of the blocks of each layer in the order of the rows, as they come in.

    They take as much memory as some of a layer's columns; a wide layer has hundreds of blocks.
    """

    def __init__(self, blocks: Sequence[_Block]) -> None:
        self._left = deque((id(layer), start) for layer, start, _ in blocks)
        self._early: dict[tuple[int, int], BlockSums] = {}
        self._totals: dict[int, BlockSums] = {}
        self._lock = Lock()

    def add(self, layer: PreparedLayer, start: int, sums: BlockSums) -> None:
        """Add those of one block, and of all that waited for it."""
        with self._lock:
            self._early[id(layer), start] = sums
            while self._left and self._left[0] in self._early:
                block = self._left.popleft()
                one, total = self._early.pop(block), self._totals.get(block[0])
                self._totals[block[0]] = one if total is None else total + one

    def is_whole(self, layer: PreparedLayer) -> bool:
        """Whether all blocks of a layer came in; those before one that raised may have."""
        return all(block[0] != id(layer) for block in self._left)

    def total(self, layer: PreparedLayer) -> BlockSums:
        """Of all blocks of a layer."""
        return self._totals.pop(id(layer))


def _score(
    blocks: Sequence[_Block],
    reading: Future[list[Tensor]],
    reader: _ReadAhead,
    sums: _InOrder,
) -> None:
    found = reading.result()
    try:
        for (layer, start, _), rows_RI in zip(blocks, found, strict=True):
            sums.add(layer, start, score_rows(layer, rows_RI, start=start))
    finally:
        reader.release(found)


def _finish(
    batch: Sequence[PreparedLayer], jobs: Sequence[Future[None]], sums: _InOrder
) -> Iterator[LayerScore]:
    error = next((error for job in jobs if (error := job.exception()) is not None), None)
    for layer in batch:
        if error is not None and not sums.is_whole(layer):
            raise error
        yield layer_score(layer, sums.total(layer))


def _waiting_bytes(waiting: Iterable[_Work]) -> int:
    memory: dict[int, int] = {}  # layers share inputs
    for batch, *_ in waiting:
        for layer in batch:
            memory |= layer.memory
    return sum(memory.values())
