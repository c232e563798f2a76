"""The threads that prepare and score layers.

torch would split each operation over its threads: most are too small for that, and a sum
that is split is rounded differently. Here every operation runs on one thread, and whole
operations run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch

from mofq.model.checkpoint.tensors import keep_freed_memory


class Workers(NamedTuple):
    """Threads that take work in the order in which it is given."""

    executor: Executor
    threads: int


@contextmanager
def worker_threads(device: str = "cpu") -> Iterator[Workers]:
    """As many threads as torch may use, each of whose operations stays on it.

    Args:
        device: Where the arithmetic runs; other than the CPU, one thread feeds it.

    Yields:
        The threads. When this ends, what has not begun is cancelled, and torch has its threads
        again.
    """
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    workers = threads if device == "cpu" else 1
    executor = ThreadPoolExecutor(workers, "mofq-score")
    try:
        yield Workers(executor, workers)
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def run_all(workers: Workers | None, work: Iterable[Callable[[], None]]) -> None:
    """Run all of some work, side by side if there are workers; not from one of them.

    Raises:
        Exception: The first that any of the work raises.
    """
    for _ in map(_call, work) if workers is None else workers.executor.map(_call, work):
        pass


def _call(work: Callable[[], None]) -> None:
    work()
