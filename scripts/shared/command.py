"""What the scripts share that is no measurement: their arguments, commands of mofq, Markdown.

Imports nothing of mofq, so that ``--help`` of a script is quick where the script itself is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

#: The descriptor, which a process inherits whatever `sys.stderr` is.
_STDERR = 2
#: Name and help of an argument.
Argument = tuple[str, str]


def script_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser that a script is described in by the first line of its documentation."""
    return argparse.ArgumentParser(description=(documentation or "").partition("\n")[0])


def model_parser(
    documentation: str | None, *required: Argument, tokens: int = 4096
) -> argparse.ArgumentParser:
    """A parser of the arguments of a script that works on a model and keeps what it makes.

    Args:
        documentation: Of the script.
        required: Further options that must be given.
        tokens: By default, of a text.
    """
    parser = script_parser(documentation)
    parser.add_argument("model", help="folder")
    for name, explanation in required:
        parser.add_argument(name, required=True, help=explanation)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--tokens", type=int, default=tokens, help="of a text, to measure KL on")
    return parser


def parse_into_work(
    parser: argparse.ArgumentParser, given: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the arguments, None for the command line's own, and make the folder of ``--work``."""
    options = parser.parse_args(given)
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def mofq(*words: object, folder: Path | None = None) -> None:
    """Run a command of mofq as a user would, in a folder, and print it; stdout is the script's."""
    command = ["mofq", *map(str, words)]
    print("$", *command, file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=_STDERR, cwd=folder)


def calibrate(model: str | Path, corpora: Iterable[str], folder: Path, *options: object) -> Path:
    """Run `mofq calibrate`, unless that was done; corpora as ``NAME=FILE``. Returns the folder."""
    if not (folder / "stats.json").exists():
        named = [word for corpus in corpora for word in ("--corpus", corpus)]
        mofq("calibrate", model, *named, *options, "-o", folder)
    return folder


def measured_table(
    options: argparse.Namespace, space: str | Path, corpus: str, *more: object
) -> Path:
    """Calibrate and measure a space in the folder of ``--work``, as far as that is not done.

    Args:
        options: Of the script, ``--calibration`` among them.
        space: To measure.
        corpus: The name of the text.
        more: Options of `mofq calibrate`.

    Returns:
        The table.
    """
    named = [f"{corpus}={options.calibration}"]
    work: Path = options.work
    stats, table = work / "stats", work / "table.jsonl"
    calibrate(options.model, named, stats, *more)
    mofq("measure", options.model, "--space", space, "--stats", stats, "-o", table)
    return table


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table whose source is aligned too; numbers to the right."""
    lines = [heads, *rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heads))]

    def text(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return [text(heads), text(rule), *(text(line) for line in lines[1:])]


def print_markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table and an empty line, on stdout."""
    print(*markdown_table(heads, rows), "", sep="\n", flush=True)


def with_error(value: float, stderr: float | None, *, digits: int = 4) -> str:
    """A number and its standard error."""
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def optional(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash."""
    return "–" if value is None else format(value, form)
