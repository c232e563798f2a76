"""The table: what every choice costs, measured once.

``table.jsonl`` is JSON Lines and only ever grows. The first line is a header
that names the model, the statistics and the fusion groups; every later line is
a ``space`` (what was asked), a ``rejection`` (why a scheme was not measured) or
a ``row`` (a measured choice). ``TABLE_LINE_SCHEMA`` specifies each of them.
"""

from __future__ import annotations

from mofq.table.lines import (
    UNITS,
    Rejection,
    Row,
    RowKey,
    Table,
    TableGroup,
    TableHeader,
    TableLayer,
    TableSpace,
    TableStats,
    header_of,
)
from mofq.table.reader import read_table
from mofq.table.schema import TABLE_LINE_SCHEMA
from mofq.table.writer import TableWriter, open_table

__all__ = [
    "TABLE_LINE_SCHEMA",
    "UNITS",
    "Rejection",
    "Row",
    "RowKey",
    "Table",
    "TableGroup",
    "TableHeader",
    "TableLayer",
    "TableSpace",
    "TableStats",
    "TableWriter",
    "header_of",
    "open_table",
    "read_table",
]
