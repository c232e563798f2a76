"""Reads a table and checks that its lines belong together."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from math import isclose, isfinite
from pathlib import Path

from mofq.evidence.table.codec import decode_line
from mofq.evidence.table.lines import (
    Extent,
    Profile,
    Rejection,
    Row,
    RowKey,
    Table,
    TableHeader,
    TableSpace,
    bin_width,
)
from mofq.exceptions import SchemeError, TableError, nearest_name
from mofq.model.kv_schemes import parse_cache_scheme, static_keys
from mofq.model.layers import CacheLayer
from mofq.numbers.schemes import parse_scheme

#: ``sample_errors`` are kept in float32.
_TOLERANCE = 1e-5


class RowCheck:
    """Whether rows fit a header and each other; fed line by line."""

    def __init__(self, header: TableHeader) -> None:
        self._header = header
        self._layers = {
            group.name: {layer.name for layer in group.layers} for group in header.groups
        }
        self._modules = {
            group.name: {layer.module: layer.in_features for layer in group.layers}
            for group in header.groups
        }
        self._caches: dict[str, CacheLayer] = {}
        self._counts: dict[tuple[str, str | None], int] = {}

    def check_names(self, line: Row | Rejection, where: str) -> None:
        """Refuse a fusion group or scheme that does not exist."""
        if line.group not in self._caches:
            self._check_group(line.group, where)
        is_cache = line.group in self._caches
        try:
            parsed = parse_cache_scheme if is_cache else parse_scheme
            name = parsed(line.scheme).name
        except SchemeError as problem:
            raise TableError(f"{where}: {problem}") from problem
        if name != line.scheme:
            raise TableError(f"{where}: the scheme {line.scheme!r} is written {name!r}.")

    def _check_group(self, group: str, where: str) -> None:
        if group not in self._layers:
            raise TableError(
                f"{where}: the header has no fusion group {group!r}."
                + nearest_name(group, self._layers)
            )

    @property
    def caches(self) -> tuple[CacheLayer, ...]:
        """All that `add_cache` was given."""
        return tuple(self._caches.values())

    def add_cache(self, cache: CacheLayer, where: str) -> None:
        """Know a cache, whose rows may follow."""
        if cache.name in self._layers or self._caches.setdefault(cache.name, cache) != cache:
            raise TableError(
                f"{where}: the cache {cache.name!r} is named twice, or as a fusion group is. "
                f"Measure into another table."
            )

    def check_profile(self, profile: Profile, where: str) -> None:
        """Refuse a profile of a layer that does not exist, or of another size or corpus."""
        self._check_group(profile.group, where)
        modules = self._modules[profile.group]
        if profile.channels != modules.get(profile.module):
            raise TableError(
                f"{where}: the header has no {profile.module!r} of {profile.channels} input "
                f"channels in {profile.group}; it has {modules}."
            )
        for corpus, one in [(None, profile.weight), *profile.inputs.items()]:
            self._check_corpus(corpus, where)
            _check_extent(one, profile.channels, where)

    def check_row(self, row: Row, where: str) -> None:
        """Refuse a row whose numbers or corpus cannot be."""
        self.check_names(row, where)
        numbers = [
            row.error,
            row.stderr or 0.0,
            row.sqnr_db or 0.0,
            *(row.static_amax or {}).values(),
        ]
        if not all(map(isfinite, numbers)):
            raise TableError(f"{where}: an error, stderr, sqnr_db or static_amax is not finite.")
        if min(row.error, row.stderr or 0.0, row.bytes, *(row.static_amax or {}).values()) < 0:
            raise TableError(f"{where}: an error, stderr, static_amax or byte count is negative.")
        known = self._amax_names(row)
        unknown = sorted(set(row.static_amax or ()) - known)
        if unknown:
            raise TableError(
                f"{where}: static_amax names {unknown[0]!r}, which is not in {row.group}."
                + nearest_name(unknown[0], known)
            )
        if row.group in self._caches and row.unit != "kl_nats_per_token":
            raise TableError(f"{where}: formats of the KV cache have rows in nats, not {row.unit}.")
        if row.unit != "relative_weight_error" and self._header.stats is None:
            raise TableError(f"{where}: {row.unit} needs statistics, and the header has none.")
        self._check_corpus(row.corpus, where)
        self._check_samples(row, where)

    def _amax_names(self, row: Row) -> set[str]:
        if row.group in self._caches:
            scheme = parse_cache_scheme(row.scheme)
            return set(static_keys(scheme, self._caches[row.group]))
        return self._layers[row.group]

    def _check_corpus(self, corpus: str | None, where: str) -> None:
        corpora = {} if self._header.stats is None else self._header.stats.corpora
        if corpus is not None and corpus not in corpora:
            raise TableError(
                f"{where}: the header has no corpus {corpus!r}." + nearest_name(corpus, corpora)
            )

    def _check_samples(self, row: Row, where: str) -> None:
        for name in ("sample_errors", "projections"):
            numbers: tuple[float, ...] | None = getattr(row, name)
            if numbers is None:
                continue
            if row.unit != "kl_nats_per_token" or not numbers or not all(map(isfinite, numbers)):
                raise TableError(f"{where}: {name} must be finite numbers, in nats only.")
            known = self._counts.setdefault((name, row.corpus), len(numbers))
            if len(numbers) != known:
                raise TableError(
                    f"{where}: has {len(numbers)} {name} where earlier rows of corpus "
                    f"{row.corpus!r} have {known}; rows are compared sample by sample."
                )
        if row.sample_errors is not None:
            mean = sum(row.sample_errors) / len(row.sample_errors)
            if min(row.sample_errors) < 0 or not isclose(mean, row.error, rel_tol=_TOLERANCE):
                raise TableError(
                    f"{where}: error is {row.error}, but its sample_errors, none of which "
                    f"may be negative, have the mean {mean}."
                )


def _check_extent(extent: Extent, channels: int, where: str) -> None:
    bins = -(-channels // bin_width(channels))
    if not len(extent.amax) == len(extent.rms) == bins:
        raise TableError(
            f"{where}: {channels} input channels need {bins} numbers in amax and rms, found "
            f"{len(extent.amax)} and {len(extent.rms)}."
        )
    numbers = [*extent.amax, *extent.rms, *extent.crest.values()]
    if not all(isfinite(number) and number >= 0 for number in numbers):
        raise TableError(
            f"{where}: an amax, rms or crest factor is negative or not finite. Its weight or its"
            " inputs are damaged, or too large for their squares in float32."
        )


def complete_lines(data: bytes, path: Path) -> Iterator[tuple[str, str]]:
    """Each line that ends in a newline, with what messages call it; not a half last line."""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        where = f"{path}, line {number}"
        try:
            yield line.decode(), where
        except UnicodeDecodeError as problem:
            raise TableError(f"{where}: is not UTF-8 text.") from problem


def parse_table(data: bytes, path: Path) -> Table:
    """A table from the bytes of its file; see `read_table`."""
    lines = complete_lines(data, path)
    header = _first_line(lines, path)
    check = RowCheck(header)
    spaces: list[TableSpace] = []
    rejections: list[Rejection] = []
    profiles: dict[tuple[str, str], Profile] = {}
    rows: dict[RowKey, Row] = {}
    for text, where in lines:
        line = decode_line(text, where)
        if isinstance(line, TableSpace):
            spaces.append(line)
        elif isinstance(line, Rejection):
            check.check_names(line, where)
            rejections.append(line)
        elif isinstance(line, CacheLayer):
            check.add_cache(line, where)
        elif isinstance(line, Profile):
            check.check_profile(line, where)
            if profiles.setdefault(line.key, line) != line:
                raise TableError(f"{where}: {_twice(line)}")
        elif isinstance(line, Row):
            check.check_row(line, where)
            if rows.setdefault(line.key, line) != line:
                raise TableError(f"{where}: {_twice(line)}")
        else:
            raise TableError(f"{where}: a second header. Tables are not joined by concatenation.")
    digest = sha256(data[: data.rfind(b"\n") + 1]).hexdigest()
    return Table(
        header,
        tuple(spaces),
        tuple(rejections),
        rows=tuple(rows.values()),
        sha256=digest,
        profiles=tuple(profiles.values()),
        caches=check.caches,
    )


def _first_line(lines: Iterator[tuple[str, str]], path: Path) -> TableHeader:
    text, where = next(lines, ("", ""))
    header = decode_line(text, where) if where else None
    if not isinstance(header, TableHeader):
        raise TableError(
            f"{path}: has no complete header line. Is it a table? Run `mofq measure` again."
        )
    _check_header(header, where)
    return header


def _twice(line: Row | Profile) -> str:
    what = f"the profile of {line.key[1]} in {line.group}"
    if isinstance(line, Row):
        what = f"{line.group} under {line.scheme} in {line.unit}"
    return (
        f"{what} stands twice with different numbers. "
        f"Which one is right cannot be known; measure again."
    )


def _check_header(header: TableHeader, where: str) -> None:
    groups = [group.name for group in header.groups]
    layers = [layer.name for group in header.groups for layer in group.layers]
    for kind, names in (("fusion group", groups), ("layer", [*layers, *header.unquantized])):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise TableError(f"{where}: the {kind} {twice!r} stands twice in the header.")


def read_table(path: str | Path) -> Table:
    """Read and check a table.

    A last line without its newline (a run was killed, or still writes) is
    left out; any other damage is refused.

    Args:
        path: The ``table.jsonl``.

    Returns:
        The table, lines in the order of the file, identical repeats left out.

    Raises:
        TableError: The file is missing, damaged or of an unknown version, or its
            lines contradict each other; the message names the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as problem:
        inside = path / "table.jsonl"
        raise TableError(
            f"{path}: cannot be read: {problem.strerror}. "
            + (f"Give {inside}." if inside.is_file() else "`mofq measure` writes a table.")
        ) from problem
    return parse_table(data, path)
