"""Counts the files of mofq that one command enters on its way to the arithmetic.

    python scripts/quality/walk.py search
    PYTHONPATH=CHECKOUT python scripts/quality/walk.py measure

Runs `search` or `measure` on the bundled model, after what it needs, and looks at the moment at
which the arithmetic begins: for `search`, HiGHS is called for the first time; for `measure`, a
block of weights is quantized for the first time. Prints the files of mofq on the call stack at
that moment with the functions entered in each, the depth of the stack in frames of mofq, and all
files of mofq of which a function ran since the command began: those that a reader may have to
open. Importing a module is no entry. Options after the command replace its own.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

SPACE = "version: 1\nschemes: [int4.g64, int4.g32@mse, int8.channel, int8.channel+int8.token]\n"
CALIBRATE = (
    *("--corpus", "en=demo-en-calibration", "--sequences", "2", "--sequence-length", "64"),
    *("-o", "stats"),
)
MEASURE = ("--space", "space.yaml", "--stats", "stats", "-o", "table.jsonl")
SEARCH = ("table.jsonl", "--max-bits", "5", "-o", "recipe.yaml")

#: Where the arithmetic begins: names of functions, and words in the path of their file.
ARITHMETIC = {
    "search": ({"price"}, "decision/relaxation"),
    "measure": (
        {"quantize", "fake_quantize_weight", "errors_pass", "deltas_pass", "round_to_format"},
        "quantize",
    ),
}


class Walk:
    """Records the files that are entered until the arithmetic begins; see `record`."""

    def __init__(self, root: Path, names: set[str], words: str) -> None:
        """Of the files under a root, until a function of one of the names is called."""
        self.root, self.names, self.words = str(root), names, words
        self.entered: dict[str, None] = {}  # in their order
        self.stack: list[tuple[str, str]] = []  # file and function, outermost first
        self.where = ""

    def record(self, frame: FrameType, event: str, _argument: Any) -> None:
        """What ``sys.setprofile`` takes."""
        code = frame.f_code
        if event != "call" or self.stack or code.co_name == "<module>":
            return
        file = code.co_filename
        if file.startswith(self.root) and not _is_importing(frame):
            self.entered[file[len(self.root) + 1 :]] = None
        if code.co_name in self.names and self.words in file:
            self.where = f"{Path(file).name}: {code.co_name}"
            self.stack = _frames(frame, self.root)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            return not frame.f_code.co_filename.endswith("walk.py")
        frame = frame.f_back
    return False


def _frames(frame: FrameType | None, root: str) -> list[tuple[str, str]]:
    found = []
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(root):
            found.append((file[len(root) + 1 :], frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def run(main: Callable[[], object], arguments: Sequence[str]) -> None:
    """Run a command of mofq in this process, silently."""
    sys.argv = ["mofq", *arguments]
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise SystemExit(f"mofq {' '.join(arguments)}:\n{said.getvalue()}") from None


def walk(command: str, options: Sequence[str]) -> Walk:
    """Run what the command needs, and the command itself under the eyes of a `Walk`."""
    import mofq
    from mofq.cli import main
    from mofq.demo import demo_model_folder

    Path("space.yaml").write_text(SPACE, "utf-8")
    model = str(demo_model_folder())
    run(main, ("calibrate", model, *CALIBRATE))
    arguments: Sequence[str] = ("measure", model, *(options or MEASURE))
    if command == "search":
        run(main, ("measure", model, *MEASURE))
        arguments = ("search", *(options or SEARCH))
    found = Walk(Path(mofq.__file__).parent, *ARITHMETIC[command])
    threading.setprofile(found.record)
    sys.setprofile(found.record)
    try:
        run(main, arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def main() -> None:
    """Print both walks of a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=sorted(ARITHMETIC))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="in place of its own")
    given = parser.parse_args()
    with TemporaryDirectory(prefix="mofq-walk-") as folder, chdir(folder):
        found = walk(given.command, given.options)
    if not found.stack:
        raise SystemExit(f"{given.command} ended before any arithmetic that is known here.")
    functions: dict[str, list[str]] = {}
    for file, function in found.stack:
        functions.setdefault(file, []).append(function)
    print(f"mofq {given.command}, up to {found.where}")
    print(f"{len(functions)} files on the call stack, {len(found.stack)} frames deep:")
    for file, names in functions.items():
        print(f"  {file}: {', '.join(names)}")
    print(f"{len(found.entered)} files entered before:")
    print("  " + "\n  ".join(found.entered))


if __name__ == "__main__":
    main()
