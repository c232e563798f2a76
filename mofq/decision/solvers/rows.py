"""From the rows of a fusion group, or of a cache, to options."""

from __future__ import annotations

from collections.abc import Sequence

from mofq.decision.solvers.problem import Option
from mofq.evidence.table import Row
from mofq.exceptions import TableError


def complete(
    group: str, unit: str, corpora: Sequence[str | None], found: Sequence[Sequence[Row]]
) -> list[list[Row]]:
    """For each scheme its row of every corpus."""
    by_scheme: dict[str, list[Row]] = {}
    for rows in found:
        for row in rows:
            by_scheme.setdefault(row.scheme, []).append(row)
    if not by_scheme:
        raise TableError(f"{group}: has no row in {unit}. Run the same `mofq measure` again.")
    for scheme, rows in by_scheme.items():
        if len(rows) < len(corpora):
            names = sorted({str(name) for name in corpora} - {str(row.corpus) for row in rows})
            raise TableError(
                f"{group}: {scheme} has no row of the corpus {names[0]!r}, and the others have. "
                f"Run the same `mofq measure` again."
            )
    return list(by_scheme.values())


def option_of(rows: Sequence[Row]) -> Option:
    """The option of one scheme, from its row of every corpus."""
    stderrs = [row.stderr for row in rows if row.stderr is not None]
    samples = [row.sample_errors for row in rows if row.sample_errors is not None]
    return Option(
        rows[0].scheme,
        bytes=rows[0].bytes,
        errors=tuple(row.error for row in rows),
        stderrs=tuple(stderrs) if len(stderrs) == len(rows) else None,
        sample_errors=tuple(samples) if len(samples) == len(rows) else None,
    )
