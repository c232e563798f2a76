"""Appends to a table: one writer, one flush per fusion group, nothing half-written kept."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mofq.evidence.table.lines import (
    AddedCorpora,
    Flips,
    Line,
    Profile,
    Rejection,
    Row,
    TableCache,
    TableHeader,
    TableSpace,
    TableStats,
    Visits,
    decode_line,
    describe,
    encode_line,
)
from mofq.evidence.table.reader import TableLines, read_lines
from mofq.exceptions import TableError
from mofq.files.locks import holder, try_lock
from mofq.model.layers import CacheLayer

_BEGINNING = b'{"kind":"header",'


class TableWriter:
    """An open, locked table. Use `open_table`, in a ``with`` statement.

    Lines that the file has already are not written again, so a resumed run
    that walks in the same order ends with the same bytes as an undisturbed one.
    """

    def __init__(self, path: Path, file: int, lines: TableLines) -> None:
        self.path = path
        self._file = file
        self._lines = lines

    @property
    def header(self) -> TableHeader:
        """Of the table that was there, else the one that was asked for."""
        return self._lines.header

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)  # releases the lock too

    def has(self, group: str, scheme: str, *, unit: str, corpus: str | None = None) -> bool:
        """Whether this choice is measured already."""
        return (group, scheme, unit, corpus) in self._lines.rows

    def add_corpora(self, stats: TableStats) -> None:
        """Note the statistics with corpora behind those of before.

        Raises:
            TableError: They are others.
        """
        self._append([AddedCorpora(stats)])

    def add_space(self, space: TableSpace) -> None:
        """Note what this run was asked for.

        Raises:
            TableError: The table has another search space of this name, and not the same with
                fewer schemes.
        """
        for known in self._lines.spaces:
            if known.name == space.name and not space.extends(known):
                raise TableError(
                    f"{self.path}: has another definition of the search space {space.name!r} "
                    f"(sha256 {known.sha256[:8]}; asked for is {space.sha256[:8]}), and a search "
                    f"could not tell them apart. Give the file of the new one another name, or "
                    f"write to another table."
                )
        self._append([space])

    def add_caches(self, caches: Iterable[CacheLayer]) -> None:
        """Note the caches whose rows will follow."""
        self._append([TableCache(**asdict(cache)) for cache in caches])

    def add_flips(self, flips: Iterable[Flips]) -> None:
        """Note what changes of experts cost on corpora of which that is not noted yet."""
        self._append([one for one in flips if one.corpus not in self._lines.flips])

    def add_group(
        self,
        rows: Iterable[Row],
        rejections: Iterable[Rejection] = (),
        *,
        profiles: Iterable[Profile] = (),
        visits: Iterable[Visits] = (),
    ) -> None:
        """Append what is known of a fusion group, and wait until it is on the disk.

        The first profile of a layer stays: which schemes were measured with it may change the
        last digit of its root mean squares.

        Raises:
            TableError: A line is not valid, or a row contradicts one that is there; then
                none is written. Or the disk is full; then earlier lines are kept.
        """
        fresh = [new for one in profiles if (new := self._fresh(one)) is not None]
        self._append([*rejections, *fresh, *visits, *rows])

    def _fresh(self, profile: Profile) -> Profile | None:
        """What a profile adds: itself, or the inputs of corpora that are not there yet."""
        known = self._lines.profiles.get(profile.key)
        if known is None:
            return profile
        inputs = {name: one for name, one in profile.inputs.items() if name not in known.inputs}
        return replace(profile, inputs=inputs) if inputs else None

    def _append(self, lines: Sequence[Line]) -> None:
        new = []
        for line in lines:
            text = encode_line(line)
            if self._lines.add(self._read_back(line, text), str(self.path)):
                new.append(text)
        if new:
            _write(self._file, "".join(new).encode(), self.path)

    def _read_back(self, line: Line, text: str) -> Line:
        """A line as a reader will find it, so that nothing is written that cannot be read."""
        try:
            return decode_line(text, f"{self.path}: {describe(line)}")
        except TableError as problem:
            if not isinstance(line, Profile):
                raise
            raise TableError(
                f"{problem} Its weight or its inputs are damaged, or too large for their squares "
                f"in float32."
            ) from None


def open_table(
    path: str | Path, header: TableHeader, *, earlier: Collection[str] = ()
) -> TableWriter:
    """Open a table for appending; make it if there is none.

    A last line that a killed run left half-written is cut off.

    Args:
        path: The ``table.jsonl``.
        header: What this run would write. A table that is there must agree in all
            but the model's name and the version of mofq.
        earlier: SHA-256 of the header's statistics as they were before corpora were added: a
            table of these is told of the corpora.

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
        lines = _resume(file, path) or _begin(file, path, header)
        _check_same(header, lines.header, path, earlier)
        table = TableWriter(path, file, lines)
        if header.stats is not None and header.stats != lines.header.stats:
            table.add_corpora(header.stats)
        return table
    except BaseException:
        os.close(file)
        raise


def _lock(file: int, path: Path) -> None:
    if not try_lock(file):
        raise TableError(
            f"{path}: {holder(file)} writes to this table. Wait for it, or write to another one."
        )


def _resume(file: int, path: Path) -> TableLines | None:
    """The table that is there, its half last line cut off; None if there is not even a header."""
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    # Whatever else the path may name by mistake is not ours to cut.
    if not complete and not data.startswith(_BEGINNING[: len(data)]):
        raise TableError(f"{path}: exists and is not a table. Name another file.")
    if len(complete) < len(data):
        complete = _whole_groups(complete)
    lines = read_lines(complete, path) if complete else None
    if len(complete) < len(data):
        os.ftruncate(file, len(complete))
    return lines


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


def _begin(file: int, path: Path, header: TableHeader) -> TableLines:
    text = encode_line(header).encode()
    lines = read_lines(text, path)
    _write(file, text, path)
    return lines


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


def _check_same(
    asked: TableHeader, found: TableHeader, path: Path, earlier: Collection[str]
) -> None:
    if asked.numerics != found.numerics:
        raise TableError(
            f"{path}: the table differs in numerics: {found.numerics or 'not noted'} in the table, "
            f"{asked.numerics} of this mofq, whose errors cannot be compared. It can be searched "
            f"and explored as it is; to measure, write to another table."
        )
    for name in ("index_sha256", "weights_sha256", "stats", "groups", "unquantized", "other_bytes"):
        here, there = getattr(asked, name), getattr(found, name)
        if here == there or (name == "weights_sha256" and there is None):
            continue  # a table of a version that did not note it
        if name == "stats" and found.stats is not None and found.stats.sha256 in earlier:
            continue
        if name == "stats":
            here, there = (None if stats is None else stats.sha256 for stats in (here, there))
        detail = f": {there} in the table, {here} asked for"
        if name in ("groups", "unquantized"):  # of the same model
            detail = f", by other options or by a mofq ({found.mofq}) that finds others"
        raise TableError(
            f"{path}: the table differs in {name}{detail}. It belongs to "
            f"{found.model_name}; write to another table."
        )
