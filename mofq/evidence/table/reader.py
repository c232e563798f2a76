"""Reads a table and checks that its lines belong together."""

from __future__ import annotations

from dataclasses import asdict, replace
from hashlib import sha256
from math import isclose
from pathlib import Path
from typing import TypeVar

from mofq.evidence.table.lines import (
    AddedCorpora,
    Flips,
    Line,
    Profile,
    Rejection,
    Row,
    RowKey,
    Table,
    TableCache,
    TableHeader,
    TableLayer,
    TableSpace,
    TableStats,
    Visits,
    bin_width,
    decode_line,
    describe,
)
from mofq.exceptions import SchemeError, TableError, nearest_name
from mofq.files.documents import check_kind
from mofq.model.kv_schemes import parse_cache_scheme, static_keys
from mofq.model.layers import CacheLayer, layers_of
from mofq.numbers.schemes import parse_scheme

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

#: ``sample_errors`` are kept in float32.
_TOLERANCE = 1e-5


class TableLines:
    """The lines of a table as they come, each checked against the header and those before it."""

    def __init__(self, header: TableHeader, where: str) -> None:
        """Begin with the header.

        Raises:
            TableError: A fusion group or a layer stands twice in it.
        """
        self.header = header
        self.rows: dict[RowKey, Row] = {}
        self.profiles: dict[tuple[str, str], Profile] = {}
        self.visits: dict[tuple[str, str], Visits] = {}
        self.flips: dict[str, Flips] = {}
        self._spaces: dict[TableSpace, None] = {}
        self._rejections: dict[Rejection, None] = {}
        self._caches: dict[str, CacheLayer] = {}
        self._samples: dict[str | None, int] = {}  # corpus -> samples of each row
        self._answers: dict[str | None, tuple[int, ...]] = {}  # corpus -> answers of each sample
        self._layers = {
            group.name: {layer.name: layer for layer in group.layers} for group in header.groups
        }
        layers = [layer.name for layer in layers_of(header.groups)]
        for kind, names in (
            ("fusion group", [group.name for group in header.groups]),
            ("layer", [*layers, *header.unquantized]),
        ):
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise TableError(f"{where}: the {kind} {twice!r} stands twice in the header.")

    @property
    def spaces(self) -> tuple[TableSpace, ...]:
        """What was asked for."""
        return tuple(self._spaces)

    def table(self, sha256: str) -> Table:
        """All lines, as decisions take them."""
        return Table(
            self.header,
            self.spaces,
            tuple(self._rejections),
            rows=tuple(self.rows.values()),
            sha256=sha256,
            profiles=tuple(self.profiles.values()),
            caches=tuple(self._caches.values()),
            visits=tuple(self.visits.values()),
            flips=tuple(self.flips.values()),
        )

    def add(self, line: Line, where: str) -> bool:
        """Add a line.

        Args:
            line: Anything but a header.
            where: File and line, for messages.

        Returns:
            Whether it says something that no line before it says.

        Raises:
            TableError: It names what the header does not have, or contradicts another line.
        """
        if isinstance(line, TableHeader):
            raise TableError(
                f"{where}: a second header. Tables are not joined by concatenation; `mofq measure` "
                f"adds to the table that it is given."
            )
        where = f"{where}: {describe(line)}"
        match line:
            case AddedCorpora():
                return self._add_corpora(line.stats, where)
            case TableSpace():
                return _add(self._spaces, line, None, where)
            case Rejection():
                self._check_names(line, where)
                return _add(self._rejections, line, None, where)
            case TableCache():
                if line.name in self._layers:
                    raise TableError(f"{where}: a fusion group has the same name.")
                return _add(self._caches, line.name, CacheLayer(**asdict(line)), where)
            case Profile():
                self._check_profile(line, where)
                return self._add_profile(line, where)
            case Visits():
                self._check_visits(line, where)
                return _add(self.visits, line.key, line, where)
            case Flips():
                self._check_corpus(line.corpus, where)
                if missing := self._layers.keys() - line.rates.keys():
                    raise TableError(f"{where}: has no rate of {min(missing)}.")
                return _add(self.flips, line.corpus, line, where)
            case Row():
                self._check_row(line, where)
                return _add(self.rows, line.key, line, where)

    def _add_corpora(self, stats: TableStats, where: str) -> bool:
        before = self.header.stats
        if before is None or not _is_extension(stats, before):
            raise TableError(
                f"{where}: needed the statistics of the lines before with corpora behind theirs."
            )
        self.header = replace(self.header, stats=stats)
        self.rows = {key: row for key, row in self.rows.items() if not self._rests_on_all(row)}
        return True

    def _rests_on_all(self, row: Row) -> bool:
        """Whether the codes or scales of a row follow from all corpora together."""
        is_cache = row.group in self._caches
        return row.static_amax is not None or (not is_cache and parse_scheme(row.scheme).is_fitted)

    def _add_profile(self, profile: Profile, where: str) -> bool:
        """Add a profile, or to one that is there the inputs of corpora that were added."""
        known = self.profiles.get(profile.key)
        if known is None or not profile.inputs or profile.inputs.keys() & known.inputs.keys():
            return _add(self.profiles, profile.key, profile, where)
        self.profiles[profile.key] = replace(known, inputs={**known.inputs, **profile.inputs})
        return True

    def _check_names(self, line: Row | Rejection, where: str) -> None:
        """Refuse a fusion group or scheme that does not exist."""
        is_cache = line.group in self._caches
        if not is_cache:
            self._layers_of(line.group, where)
        try:
            name = (parse_cache_scheme if is_cache else parse_scheme)(line.scheme).name
        except SchemeError as problem:
            raise TableError(f"{where}: {problem}") from problem
        if name != line.scheme:
            raise TableError(f"{where}: the scheme {line.scheme!r} is written {name!r}.")

    def _layers_of(self, group: str, where: str) -> dict[str, TableLayer]:
        if group not in self._layers:
            raise TableError(
                f"{where}: the header has no fusion group {group!r}."
                + nearest_name(group, self._layers)
            )
        return self._layers[group]

    def _check_profile(self, profile: Profile, where: str) -> None:
        """Refuse a profile of a layer that does not exist, or of another size or corpus."""
        layers = self._layers_of(profile.group, where).values()
        modules = {layer.module: layer.in_features for layer in layers}
        if profile.channels != modules.get(profile.module):
            raise TableError(
                f"{where}: the header has no {profile.module!r} of {profile.channels} input "
                f"channels in {profile.group}; it has {modules}."
            )
        bins = -(-profile.channels // bin_width(profile.channels))
        for corpus, one in [(None, profile.weight), *profile.inputs.items()]:
            self._check_corpus(corpus, where)
            if not len(one.amax) == len(one.rms) == bins:
                raise TableError(
                    f"{where}: {profile.channels} input channels need {bins} numbers in amax and "
                    f"rms, found {len(one.amax)} and {len(one.rms)}."
                )

    def _check_visits(self, visits: Visits, where: str) -> None:
        """Refuse visits to layers that do not exist, or of more tokens than there are."""
        self._check_corpus(visits.corpus, where)
        layers = self._layers_of(visits.group, where)
        if visits.layers.keys() != layers.keys():
            name = min(visits.layers.keys() ^ layers.keys())
            raise TableError(f"{where}: needed each layer of {visits.group} once, see {name!r}.")
        if max(visits.layers.values()) > visits.tokens:
            raise TableError(f"{where}: a layer saw more than the {visits.tokens} tokens.")

    def _check_row(self, row: Row, where: str) -> None:
        """Refuse a row whose corpus, layers or samples are not those of the header."""
        self._check_names(row, where)
        cache = self._caches.get(row.group)
        if cache is not None and row.unit != "kl_nats_per_token":
            raise TableError(f"{where}: formats of the KV cache have rows in nats, not {row.unit}.")
        if row.unit != "relative_weight_error" and self.header.stats is None:
            raise TableError(f"{where}: {row.unit} needs statistics, and the header has none.")
        if row.static_amax is not None:
            known = (
                static_keys(parse_cache_scheme(row.scheme), cache)
                if cache is not None
                else self._layers[row.group]
            )
            unknown = sorted(set(row.static_amax) - set(known))
            if unknown:
                raise TableError(
                    f"{where}: static_amax names {unknown[0]!r}, which is not in {row.group}."
                    + nearest_name(unknown[0], known)
                )
        self._check_corpus(row.corpus, where)
        if row.sample_errors is not None:
            self._check_samples(row, row.sample_errors, where)
        if row.answers is not None:
            self._check_answers(row, row.answers, where)

    def _check_corpus(self, corpus: str | None, where: str) -> None:
        corpora = {} if self.header.stats is None else self.header.stats.corpora
        if corpus is not None and corpus not in corpora:
            raise TableError(
                f"{where}: the header has no corpus {corpus!r}." + nearest_name(corpus, corpora)
            )

    def _check_samples(self, row: Row, samples: tuple[float, ...], where: str) -> None:
        if row.unit != "kl_nats_per_token":
            raise TableError(f"{where}: sample_errors are in nats, and the row in {row.unit}.")
        known = self._samples.setdefault(row.corpus, len(samples))
        if len(samples) != known:
            raise TableError(
                f"{where}: has {len(samples)} samples where earlier lines of corpus {row.corpus!r} "
                f"have {known}; rows are compared sample by sample."
            )
        mean = sum(samples) / len(samples)
        if not isclose(mean, row.error, rel_tol=_TOLERANCE):
            raise TableError(
                f"{where}: error is {row.error}, but its sample_errors have the mean {mean}."
            )

    def _check_answers(self, row: Row, answers: tuple[tuple[float, ...], ...], where: str) -> None:
        """Refuse answers of other sequences than those of earlier rows."""
        lengths = tuple(map(len, answers))
        known = self._answers.setdefault(row.corpus, lengths)
        if lengths != known or len(lengths) != len(row.sample_errors or ()):
            raise TableError(
                f"{where}: has answers of {lengths} sequences where earlier rows of corpus "
                f"{row.corpus!r} have {known}, for each sample."
            )


def _is_extension(stats: TableStats, before: TableStats) -> bool:
    """Whether statistics are those of before, with more corpora behind."""
    corpora = dict(list(stats.corpora.items())[: len(before.corpora)])
    is_same = replace(stats, sha256=before.sha256, corpora=corpora) == before
    return is_same and list(corpora) == list(before.corpora) and stats.sha256 != before.sha256


def _add(known: dict[_Key, _Value], key: _Key, value: _Value, where: str) -> bool:
    if key not in known:
        known[key] = value
        return True
    if known[key] != value:
        raise TableError(
            f"{where} stands twice with different numbers. The checkpoint or the statistics have "
            f"changed under the same hashes: measure into another table."
        )
    return False


def read_lines(data: bytes, path: Path) -> TableLines:
    """The lines of a table from the bytes of its file, without a half last one.

    Raises:
        TableError: As `read_table`.
    """
    check_kind(data, "table", str(path), TableError)
    lines: TableLines | None = None
    for number, raw in enumerate(data.split(b"\n")[:-1], start=1):
        where = f"{path}, line {number}"
        try:
            line = decode_line(raw.decode(), where)
        except UnicodeDecodeError as problem:
            raise TableError(f"{where}: is not UTF-8 text.") from problem
        if lines is not None:
            lines.add(line, where)
        elif isinstance(line, TableHeader):
            lines = TableLines(line, where)
        else:
            break
    if lines is None:
        raise TableError(
            f"{path}: has no complete header line. Is it a table? Run `mofq measure` again."
        )
    return lines


def parse_table(data: bytes, path: Path) -> Table:
    """A table from the bytes of its file; see `read_table`."""
    complete = data[: data.rfind(b"\n") + 1]
    return read_lines(complete, path).table(sha256(complete).hexdigest())


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
