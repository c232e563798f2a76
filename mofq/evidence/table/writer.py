"""Appends to a table: one writer, one flush per fusion group, nothing half-written kept."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType

from mofq.evidence.table.codec import decode_line, encode_line
from mofq.evidence.table.lines import (
    Profile,
    Rejection,
    Row,
    RowKey,
    Table,
    TableHeader,
    TableSpace,
)
from mofq.evidence.table.reader import RowCheck, parse_table
from mofq.exceptions import TableError
from mofq.model.layers import CacheLayer

#: Lines that stand once, whatever is measured with them.
_Other = TableSpace | Rejection | CacheLayer
_BEGINNING = b'{"kind":"header",'


class TableWriter:
    """An open, locked table. Use `open_table`, in a ``with`` statement.

    Lines that the file has already are not written again, so a resumed run
    that walks in the same order ends with the same bytes as an undisturbed one.
    """

    def __init__(self, path: Path, file: int, table: Table) -> None:
        self.path = path
        self.header = table.header
        self._file = file
        self._check = RowCheck(table.header)
        for cache in table.caches:
            self._check.add_cache(cache, str(path))
        self._rows: dict[RowKey, str] = {}
        for row in table.rows:
            self._check.check_row(row, str(path))
            self._rows[row.key] = encode_line(row)
        self._profiled = {profile.key for profile in table.profiles}
        others: list[_Other] = [*table.spaces, *table.rejections, *table.caches]
        self._others = {encode_line(line) for line in others}

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)  # releases the lock too

    def has(self, group: str, scheme: str, *, unit: str, corpus: str | None = None) -> bool:
        """Whether this choice is measured already."""
        return (group, scheme, unit, corpus) in self._rows

    def add_space(self, space: TableSpace) -> None:
        """Note what this run was asked for."""
        self._append(self._new_others([space]))

    def add_caches(self, caches: Iterable[CacheLayer]) -> None:
        """Note the caches whose rows will follow."""
        caches = list(caches)
        for cache in caches:
            self._check.add_cache(cache, str(self.path))
        self._append(self._new_others(caches))

    def add_group(
        self,
        rows: Iterable[Row],
        rejections: Iterable[Rejection] = (),
        *,
        profiles: Iterable[Profile] = (),
    ) -> None:
        """Append what is known of a fusion group, and wait until it is on the disk.

        The first profile of a layer stays: which schemes were measured with it may change the
        last digit of its root mean squares.

        Raises:
            TableError: A line is not valid, or a row contradicts one that is there; then
                none is written. Or the disk is full; then earlier lines are kept.
        """
        rejections = list(rejections)
        for rejection in rejections:
            self._check.check_names(rejection, str(self.path))
        fresh = [one for one in profiles if one.key not in self._profiled]
        for one in fresh:
            self._check.check_profile(one, str(self.path))
        new: dict[RowKey, str] = {}
        for row in rows:
            where = f"{self.path}: row of {row.group} under {row.scheme}"
            self._check.check_row(row, where)
            text = encode_line(row)
            decode_line(text, where)
            known = self._rows.get(row.key) or new.get(row.key)
            if known is None:
                new[row.key] = text
            elif known != text:
                raise TableError(
                    f"{where}: {row.unit} was measured before with another result. Checkpoint or "
                    f"statistics have changed under the same hashes; write to another table."
                )
        lines = [*self._new_others(rejections), *map(encode_line, fresh), *new.values()]
        self._append(lines)
        self._profiled.update(one.key for one in fresh)
        self._rows.update(new)

    def _new_others(self, lines: Sequence[_Other]) -> list[str]:
        texts = dict.fromkeys(encode_line(line) for line in lines)
        return [text for text in texts if text not in self._others]

    def _append(self, texts: list[str]) -> None:
        if texts:
            _write(self._file, "".join(texts).encode(), self.path)
            self._others.update(texts)


def open_table(path: str | Path, header: TableHeader) -> TableWriter:
    """Open a table for appending; make it if there is none.

    A last line that a killed run left half-written is cut off.

    Args:
        path: The ``table.jsonl``.
        header: What this run would write. A table that is there must agree in all
            but the model's name and the version of mofq.

    Raises:
        TableError: Another process writes to the table, the table is damaged, or
            it belongs to another model, other statistics or other numerics (both sides are
            named).
    """
    path = Path(path)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as problem:
        raise TableError(
            f"{path}: cannot be opened: {problem.strerror}. Check the folder."
        ) from problem
    try:
        _lock(file, path)
        table = _resume(file, path) or _begin(file, path, header)
        _check_same(header, table.header, path)
        return TableWriter(path, file, table)
    except BaseException:
        os.close(file)
        raise


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        raise TableError(
            f"{path}: another process writes to this table. Wait for it, or write to another one."
        ) from problem


def _resume(file: int, path: Path) -> Table | None:
    """The table that is there, its half last line cut off; None if there is not even a header."""
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    # Whatever else the path may name by mistake is not ours to cut.
    if not complete and not data.startswith(_BEGINNING[: len(data)]):
        raise TableError(f"{path}: exists and is not a table. Name another file.")
    if len(complete) < len(data):
        complete = _whole_groups(complete)
    table = parse_table(complete, path) if complete else None
    if len(complete) < len(data):
        os.ftruncate(file, len(complete))
    return table


def _whole_groups(complete: bytes) -> bytes:
    """The lines before those of the last fusion group, which a killed run did not finish.

    Its schemes are scored together again: fewer of them at once have other last bits.
    """
    lines = complete.splitlines(keepends=True)
    last = _group_of(lines[-1]) if lines else None
    while last is not None and _group_of(lines[-1]) == last:
        lines.pop()
    return b"".join(lines)


def _group_of(line: bytes) -> object:
    """The fusion group that a line is of; None: of none, or it is damaged."""
    try:
        return json.loads(line).get("group")
    except (ValueError, AttributeError):
        return None


def _begin(file: int, path: Path, header: TableHeader) -> Table:
    text = encode_line(header).encode()
    table = parse_table(text, path)
    _write(file, text, path)
    return table


def _write(file: int, data: bytes, path: Path) -> None:
    before = os.fstat(file).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError as problem:
        os.ftruncate(file, before)
        raise TableError(
            f"{path}: cannot be written: {problem.strerror}. What was measured before is kept; "
            f"free some space and run the same command again."
        ) from problem


def _check_same(asked: TableHeader, found: TableHeader, path: Path) -> None:
    if asked.numerics != found.numerics:
        raise TableError(
            f"{path}: the table differs in numerics: {found.numerics or 'not noted'} in the table, "
            f"{asked.numerics} of this mofq, whose errors cannot be compared. It can be searched "
            f"and explored as it is; to measure, write to another table."
        )
    free = ("mofq", "model_name", "numerics")
    for name in (field.name for field in fields(TableHeader) if field.name not in free):
        here, there = getattr(asked, name), getattr(found, name)
        if here == there or (name == "weights_sha256" and there is None):
            continue  # a table of a version that did not note it
        if name == "stats":
            here, there = (None if stats is None else stats.sha256 for stats in (here, there))
        detail = (
            "" if name in ("groups", "unquantized") else f": {there} in the table, {here} asked for"
        )
        raise TableError(
            f"{path}: the table differs in {name}{detail}. It belongs to "
            f"{found.model_name}; write to another table."
        )
