"""Keeps every core busy with blocks of rows, without a say in any number.

torch would split each operation over its threads: most are too small for that, and a sum
that is split is rounded differently. Here every operation runs on one thread, whole blocks
run side by side, and their sums are added in the order of the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from mofq.measure.block import BlockSums, score_block
from mofq.measure.prepared import PreparedLayer
from mofq.measure.score import LayerScore, add_blocks

#: No further layer is prepared while the inputs of those in work take this much [bytes].
_WAITING_BYTES = 200_000_000

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
    with _one_thread_per_operation() as available:
        threads = available if device == "cpu" else 1
        pool = ThreadPoolExecutor(threads)
        waiting: deque[_Work] = deque()
        try:
            for layer in layers:
                blocks = [pool.submit(score_block, layer, *block) for block in layer.blocks]
                waiting.append((layer, blocks))
                while len(waiting) > 2 * threads or _waiting_bytes(waiting) > _WAITING_BYTES:
                    yield _finish(*waiting.popleft())
            while waiting:
                yield _finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


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
