"""Keeps every core busy with blocks of rows, without a say in any number.

torch would split each operation over its threads: most are too small for that, and a sum
that is split is rounded differently. Here every operation runs on one thread, whole blocks
run side by side, and their sums are added in the order of the rows. One more thread reads
the blocks, in order, no further ahead of their use than a fixed number of bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition

import torch
from torch import Tensor

from mofq.measure.block import BlockSums, score_rows
from mofq.measure.prepared import PreparedLayer
from mofq.measure.score import LayerScore, add_blocks
from mofq.quantize.pages import keep_freed_memory

#: No further layer is prepared while the inputs of those in work take this much [bytes].
_WAITING_BYTES = 200_000_000

#: Blocks that are read and not yet scored [bytes].
_AHEAD_BYTES = 32_000_000

_Work = tuple[PreparedLayer, list[Future[BlockSums]]]


def score_layers(
    layers: Iterable[PreparedLayer], *, device: str = "cpu"
) -> Generator[LayerScore, None, None]:
    """Score layers on as many threads as torch may use.

    Args:
        layers: Each is taken, prepared by whoever yields it, when there is room for it.
        device: That they were prepared for; one that is not the CPU gets a block at a time.

    Yields:
        The score of each, in order; the same bytes on any number of threads.

    Raises:
        SchemeError: A weight is not finite, or a scheme does not fit.
    """
    keep_freed_memory()
    with _one_thread_per_operation() as available:
        threads = available if device == "cpu" else 1
        reader = _ReadAhead(_AHEAD_BYTES)
        pool = ThreadPoolExecutor(threads)
        waiting: deque[_Work] = deque()
        try:
            for layer in layers:
                rows = [reader.read(layer, *block) for block in layer.blocks]
                starts = [start for start, _ in layer.blocks]
                blocks = [
                    pool.submit(_score, layer, *at, reader) for at in zip(starts, rows, strict=True)
                ]
                waiting.append((layer, blocks))
                while len(waiting) > 2 * threads or _waiting_bytes(waiting) > _WAITING_BYTES:
                    yield _finish(*waiting.popleft())
            while waiting:
                yield _finish(*waiting.popleft())
        finally:
            reader.close()
            pool.shutdown(cancel_futures=True)


class _ReadAhead:
    """A thread that reads blocks in the order in which they are asked for."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._is_closed = False
        self._changed = Condition()
        self._thread = ThreadPoolExecutor(1, "mofq-read")

    def read(self, layer: PreparedLayer, start: int, stop: int) -> Future[Tensor]:
        """The rows, when there is room for them; whoever took them says so to `release`."""
        return self._thread.submit(self._read, layer, start, stop)

    def _read(self, layer: PreparedLayer, start: int, stop: int) -> Tensor:
        with self._changed:
            self._changed.wait_for(lambda: self._held_bytes < self._limit_bytes or self._is_closed)
            if self._is_closed:
                raise CancelledError
        rows_RI = layer.read_rows(start, stop)
        with self._changed:
            self._held_bytes += rows_RI.nbytes
        return rows_RI

    def release(self, rows_RI: Tensor) -> None:
        """Make room for others."""
        with self._changed:
            self._held_bytes -= rows_RI.nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Read nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.shutdown(cancel_futures=True)


def _score(
    layer: PreparedLayer, start: int, reading: Future[Tensor], reader: _ReadAhead
) -> BlockSums:
    rows_RI = reading.result()
    try:
        return score_rows(layer, rows_RI, start=start)
    finally:
        reader.release(rows_RI)


def _finish(layer: PreparedLayer, blocks: list[Future[BlockSums]]) -> LayerScore:
    return add_blocks(layer, [block.result() for block in blocks])


def _waiting_bytes(waiting: Iterable[_Work]) -> int:
    return sum(layer.nbytes for layer, _ in waiting)


@contextmanager
def _one_thread_per_operation() -> Iterator[int]:
    """Yield how many threads torch had; it has them again afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
