"""What people see: progress, tables and messages on stderr; one JSON object on stdout."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from mofq.numbers.schemes import parse_scheme

if TYPE_CHECKING:
    from rich.console import Console

    from mofq.decision.recipe import Recipe

#: A number, whatever follows it, or nothing.
_FIGURE = re.compile(r"[+-]?\d|[–\s]*$")


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
    json.dump(content, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; columns of figures are aligned on the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        is_figures = any(columns) and all(_FIGURE.match(row[number]) for row in rows)
        table.add_column(column, justify="right" if is_figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else 120
    terminal = Console(width=width)
    # Not the table's own title, which is folded to the width of the table.
    terminal.print(Text(title, style="bold"))
    terminal.print(table)


def note(message: str) -> None:
    """Tell the user something, on stderr."""
    console().print(message, markup=False, highlight=False, soft_wrap=True)


def next_step(*words: str | Path) -> None:
    """Tell the user which command comes next, on stderr; capitals stand for what they choose."""
    note("Next: mofq " + " ".join(quote(str(word)) for word in words))


def stats_for(recipe: Recipe, stats: str | Path = "STATS") -> tuple[str | Path, ...]:
    """What a command needs too where codes or scales of a recipe are fitted."""
    schemes = [parse_scheme(name) for name in set(recipe.schemes.values())]
    fitted = any(one.weight is not None and one.weight.is_fitted for one in schemes)
    return ("--stats", stats) if fitted else ()


def say(message: str) -> None:
    """Print a line of the result, on stdout."""
    sys.stdout.write(message + "\n")


class Bars:
    """Progress bars, one for each stage; callable as the stages' progress functions."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def stage(self, name: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are finished."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)


@contextmanager
def progress_bars() -> Iterator[Bars]:
    """Bars on a terminal; silence elsewhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        disable=not console().is_terminal,
        transient=True,
    ) as progress:
        yield Bars(progress)


def short_bytes(count: int) -> str:
    """``269.1 MB``: decimal units, four digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def with_error(value: float | None, stderr: float | None) -> str:
    """``0.0412 ± 0.0031``, two digits of the error; or a dash."""
    if value is None:
        return "–"
    if not stderr:
        return f"{value:.3g}"
    if abs(value) < 1e-4:
        return f"{value:.2g} ± {stderr:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"
