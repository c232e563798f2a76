"""What people see: progress, tables and messages on stderr; one JSON object on stdout."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from shlex import quote
from threading import Event, Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from mofq.cli.flags import with_flags

if TYPE_CHECKING:
    from rich.console import Console

    from mofq.decision.recipe import Recipe

#: A number, whatever follows it, or nothing.
_FIGURE = re.compile(r"[+-]?\d|[–\s]*$")


#: Of a long stage, where there is no terminal.
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_LOOKS = 1.0

#: Logger -> beginning of a message that says nothing to a user of mofq: transformers imports
#: torchao where it is installed, whatever the model.
_NOISE = {
    "torch.utils._pytree": ("<enum 'KernelPreference'>", "<enum 'ScaleCalculationMode'>"),
    "torchao": ("Failed to load",),  # its CUDA extensions; kept where there is a GPU
}


def quiet_noise() -> None:
    """Leave out log lines of libraries that are known to be of no use here, and no others."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    if not record.getMessage().startswith(_NOISE[record.name]):
        return True
    torch = sys.modules.get("torch")
    return record.name == "torchao" and torch is not None and bool(torch.cuda.is_available())


@lru_cache(maxsize=1)
def console() -> Console:
    """The terminal's stderr."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(content: dict[str, Any]) -> None:
    """Write one JSON object to stdout."""
    json.dump(with_flags(content), sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; columns of figures are aligned on the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    widths = _widths([columns, *rows], terminal.width)
    for number, column in enumerate(columns):
        is_figures = any(columns) and all(_FIGURE.match(row[number]) for row in rows)
        justify: Literal["left", "right"] = "right" if is_figures else "left"
        width = None if widths is None else widths[number]
        table.add_column(Text(column), justify=justify, overflow="fold", width=width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # Not the table's own title, which is folded to the width of the table.
    terminal.print(Text(title, style="bold"))
    terminal.print(table)


def _widths(rows: Sequence[Sequence[str]], total: int) -> list[int] | None:
    """Of the columns, so that no word, as the name of a scheme, is folded; None: it must be."""
    columns = list(zip(*rows, strict=True))
    widths = [max(len(word) for cell in some for word in [*cell.split(), ""]) for some in columns]
    left = total - sum(widths) - 2 * (len(widths) - 1)
    if left < 0:
        return None
    wanted = [max(map(len, some)) - width for some, width in zip(columns, widths, strict=True)]
    for number in sorted(range(len(widths)), key=lambda number: wanted[number]):
        more = min(wanted[number], left)
        widths[number] += more
        left -= more
    return widths


def note(message: str) -> None:
    """Tell the user something, on stderr."""
    console().print(with_flags(message), markup=False, highlight=False, soft_wrap=True)


def next_step(*words: str | Path) -> None:
    """Tell the user which command comes next, on stderr; capitals stand for what they choose."""
    note("Next: mofq " + " ".join(quote(str(word)) for word in words))


def stats_option(recipe: Recipe, folder: str | Path | None = None) -> tuple[str | Path, ...]:
    """The words of a next step that name statistics, where a recipe is fitted to them.

    Args:
        recipe: Of the step.
        folder: Of the statistics; None: the user knows it.
    """
    from mofq.numbers.schemes import parse_scheme

    is_fitted = any(parse_scheme(name).is_fitted for name in recipe.schemes.values())
    return ("--stats", folder or "STATS") if is_fitted else ()


def say(message: str) -> None:
    """Print a line of the result, on stdout."""
    sys.stdout.write(message + "\n")


class Bars:
    """How far a stage is: one bar on a terminal; elsewhere a line every 30 seconds.

    The line is printed by a thread: one step of a stage may take an hour.
    """

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._name = ""  #: of the stage that is drawn
        self._began = self._told = monotonic()
        self._step = ("", 0, 0)  #: the last
        self._lock, self._ended = Lock(), Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._progress is not None:
            self._progress.stop()

    def stage(self, name: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are finished."""
        if console().is_terminal:
            self._draw(name, done, total)
            return
        self._step = (name, done, total)
        self._tell()
        if self._thread is None:
            self._thread = Thread(target=self._watch, name="mofq-progress", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            _, done, total = self._step
            if done < total:
                self._tell()

    def _tell(self) -> None:
        """Print how far it is, unless it was printed a moment ago."""
        with self._lock:
            now, (name, done, total) = monotonic(), self._step
            if now - self._told >= _SECONDS_BETWEEN_LINES:
                self._told = now
                note(f"{name}: {done} of {total}, {now - self._began:.0f} s since the start")

    def _draw(self, name: str, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = _start_progress()
            self._task = self._progress.add_task(name)
        elif name != self._name:
            self._progress.reset(self._task)
        self._name = name
        self._progress.update(self._task, description=name, completed=done, total=total)


def _start_progress() -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        transient=True,
    )
    progress.start()
    return progress
