"""Opens the table that a command decides from or draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mofq.cli.terminal import note
from mofq.numbers.numerics import NUMERICS

if TYPE_CHECKING:
    from mofq.evidence.table import Table


def open_for_reading(path: Path) -> Table:
    """Read a table; say so where its errors are not what this mofq would measure.

    Raises:
        TableError: It is missing or damaged.
    """
    from mofq.evidence.table import read_table

    table = read_table(path)
    if table.header.numerics != NUMERICS:
        found = table.header.numerics
        when = f"by numerics {found}" if found else "before numerics were noted"
        note(
            f"{path}: measured {when}, and this mofq has numerics {NUMERICS}: do not compare its "
            f"errors with those of newer tables."
        )
    return table
