"""Runs `mofq` as a user types it, in this process: arguments in, exit code and streams out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mofq.cli import main
from mofq.demo import demo_model_folder

DEMO = str(demo_model_folder())


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout, which must be one JSON object and nothing else, of a command that went well."""
        assert self.code == 0, self.err
        content = json.loads(self.out)
        assert isinstance(content, dict)
        return content


def mofq(*arguments: str | Path) -> Ran:
    """Run one command. An exception that is no exit is the test's failure: no traceback is fine."""
    out, err = StringIO(), StringIO()
    argv = ["mofq", *map(str, arguments)]
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ran(code, out.getvalue(), err.getvalue())


def ok(*arguments: str | Path) -> Ran:
    """Run a command that must go well."""
    ran = mofq(*arguments)
    assert ran.code == 0, ran.err
    return ran


def refused(*arguments: str | Path, code: int = 1) -> str:
    """Run a command that must be refused: its one message, which is all that it prints."""
    ran = mofq(*arguments)
    assert ran.code == code, ran.out + ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    if code == 1:
        assert ran.err.startswith("Error: ")
        assert ran.err.count("\n") == 1, ran.err
    return ran.err


def tree(folder: Path) -> Mapping[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True, slots=True)
class Measured:
    """The demo model calibrated and measured, and a text to validate on."""

    folder: Path
    stats: Path
    table: Path  #: of `SPACE`, in nats
    recipe: Path  #: searched in the table
