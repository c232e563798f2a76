"""How a long stage tells how far it is, and what a user should read meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")

#: Called with the stage's name, the number of steps done and the number of steps in all.
Progress = Callable[[str, int, int], None]
#: Called with remarks of one line, which a user should read.
Tell = Callable[[str], None]


def silent(message: str) -> None:
    """Tell nobody: where the caller of a stage wants no remarks."""


class Steps:
    """Counts the steps of a stage, whose beginning is told; called after each."""

    def __init__(self, progress: Progress | None, stage: str, total: int) -> None:
        """Begin with none done.

        Args:
            progress: Called with the stage, the steps done, and all of them; None: nobody asked.
            stage: Its name.
            total: Of more steps than these none is told.
        """
        self._progress, self._stage, self._total = progress, stage, total
        self._done = 0
        self._tell()

    def __call__(self) -> None:
        """One more is done."""
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._stage, min(self._done, self._total), self._total)


def told(
    items: Iterable[_Item], progress: Progress | None, stage: str, *, total: int
) -> Iterator[_Item]:
    """Some items, each of which is a step that is done when the next one is asked for."""
    step = Steps(progress, stage, total)
    for item in items:
        yield item
        step()
