"""The table: what every choice costs, measured once.

``table.jsonl`` is JSON Lines and only ever grows. The first line is a header
that names the model, the statistics and the fusion groups; every later line is
a ``space`` (what was asked), ``corpora`` (which were added to the statistics), a
``rejection`` (why a scheme was not measured), a
``profile`` (how large the weights and inputs of a layer are), ``visits`` (how many tokens
came to each expert), ``flips`` (what their changes of experts cost), a ``cache`` (an attention
layer whose cache's format was asked for) or a ``row`` (a measured choice).
``TABLE_LINE_SCHEMA`` specifies each of them.
"""

from __future__ import annotations

from mofq.evidence.table.lines import (
    FEW_SAMPLES,
    TABLE_LINE_SCHEMA,
    UNITS,
    Extent,
    Flips,
    Profile,
    Rejection,
    Row,
    Table,
    TableGroup,
    TableHeader,
    TableLayer,
    TableModel,
    TableSpace,
    TableStats,
    Visits,
    bin_width,
    header_of,
)
from mofq.evidence.table.reader import read_table
from mofq.evidence.table.writer import TableWriter, open_table

__all__ = [
    "FEW_SAMPLES",
    "TABLE_LINE_SCHEMA",
    "UNITS",
    "Extent",
    "Flips",
    "Profile",
    "Rejection",
    "Row",
    "Table",
    "TableGroup",
    "TableHeader",
    "TableLayer",
    "TableModel",
    "TableSpace",
    "TableStats",
    "TableWriter",
    "Visits",
    "bin_width",
    "header_of",
    "open_table",
    "read_table",
]
