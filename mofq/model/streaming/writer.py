"""Writes what units return to its files while a GPU goes on.

The files are what a run that was stopped goes on from, so all is written. A copy to the host and
a file take longer than a decoder layer takes for a sequence; so a GPU gets the copy as one more
task, and a thread writes the file when that is done. Files are written in the order in which they
were given, and none behind one that cannot be written: those of a run that is killed or whose disk
is full are the first of them. On a CPU, which would have to share its cores, a file is there when
`Writer.write` returns.

What is read again comes from the system's cache of files, in memory as long as there is room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.model.streaming.records import write_tensors

#: Files on their way: their tensors are in pinned memory.
_BEHIND = 4


class Writer:
    """Writes files of tensors, in order; close it after use, or use it in a ``with`` statement.

    After a file that cannot be written it writes none: a later one may say that this one is there.
    """

    def __init__(self, device: torch.device) -> None:
        """Of what is computed on a device."""
        self._device = device
        self._thread = ThreadPoolExecutor(1, "mofq-write") if device.type == "cuda" else None
        self._left: deque[Future[None]] = deque()
        self._problem: BaseException | None = None  #: of the first file that was not written

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def write(self, path: Path, content: Any, tensors: Sequence[Tensor]) -> None:
        """As `write_tensors`; on a GPU the file is there after `wait`.

        Raises:
            MofqError: This or an earlier file cannot be written, which is said every time.
        """
        if self._thread is None:
            self._write(None, path, content, tensors)
            return
        while len(self._left) >= _BEHIND:
            self._left.popleft().result()
        if self._problem is not None:
            raise self._problem
        on_host = [one.detach().to("cpu", non_blocking=True) for one in tensors]
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._left.append(self._thread.submit(self._write, copied, path, content, on_host))

    def wait(self) -> None:
        """Have all files there.

        Raises:
            MofqError: One cannot be written; those given after it are not there either.
        """
        while self._left:
            self._left.popleft().result()
        if self._problem is not None:
            raise self._problem

    def _write(
        self, copied: torch.cuda.Event | None, path: Path, content: Any, tensors: Sequence[Tensor]
    ) -> None:
        """One file, if all before it are there."""
        if self._problem is not None:
            raise self._problem
        try:
            if copied is not None:
                copied.synchronize()
            write_tensors(path, content, tensors)
        except BaseException as problem:
            self._problem = problem
            raise
