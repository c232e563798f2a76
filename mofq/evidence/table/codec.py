"""Between a line of text and its dataclass. The text of a line is canonical."""

from __future__ import annotations

import json
import struct
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from dataclasses import asdict
from typing import Any

from mofq.evidence.table.lines import (
    Extent,
    Profile,
    Rejection,
    Row,
    TableGroup,
    TableHeader,
    TableLayer,
    TableSpace,
    TableStats,
)
from mofq.evidence.table.schema import LINE_SCHEMAS, TABLE_VERSION
from mofq.exceptions import TableError, nearest_name
from mofq.files.documents import check_document, parse_json
from mofq.model.layers import CacheLayer

#: Keys of a row that hold many numbers.
_PACKED = ("sample_errors", "projections")

Line = TableHeader | TableSpace | Rejection | Profile | CacheLayer | Row


def encode_line(line: Line) -> str:
    """One line of JSON with its newline; equal data gives equal text."""
    if isinstance(line, TableHeader):
        value = _header_value(line)
    elif isinstance(line, TableSpace):
        value = {"kind": "space", **asdict(line)}
    elif isinstance(line, Rejection):
        value = {"kind": "rejection", **asdict(line)}
    elif isinstance(line, CacheLayer):
        value = {"kind": "cache", **asdict(line)}
    elif isinstance(line, Profile):
        value = _profile_value(line)
    else:
        value = _row_value(line)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except ValueError as problem:
        raise TableError(f"{_where(line)}: cannot be written: {problem}.") from problem
    return text + "\n"


def _where(line: Line) -> str:
    if isinstance(line, Row):
        return f"row of {line.group} under {line.scheme} in {line.unit}"
    if isinstance(line, Profile):
        return f"profile of {line.module} in {line.group}"
    return type(line).__name__


def _header_value(header: TableHeader) -> dict[str, Any]:
    value = asdict(header)
    model = {"name": header.model_name, "index_sha256": header.index_sha256}
    if header.weights_sha256 is not None:
        model["weights_sha256"] = header.weights_sha256
    return {
        "kind": "header",
        "version": TABLE_VERSION,
        "mofq": header.mofq,
        **({} if header.numerics is None else {"numerics": header.numerics}),
        "model": model,
        "stats": value["stats"],
        "groups": value["groups"],
        "unquantized": value["unquantized"],
        "other_bytes": header.other_bytes,
    }


def _row_value(row: Row) -> dict[str, Any]:
    value: dict[str, Any] = {
        "kind": "row",
        "group": row.group,
        "scheme": row.scheme,
        "unit": row.unit,
        "corpus": row.corpus,
        "error": row.error,
        "stderr": row.stderr,
        "bytes": row.bytes,
        "sqnr_db": row.sqnr_db,
    }
    for name in _PACKED:
        numbers: tuple[float, ...] | None = getattr(row, name)
        if numbers is not None:
            value[name] = _packed(numbers, f"{_where(row)}: {name}")
    if row.static_amax is not None:
        value["static_amax"] = row.static_amax
    return value


def _profile_value(profile: Profile) -> dict[str, Any]:
    where = _where(profile)
    return {
        "kind": "profile",
        "group": profile.group,
        "module": profile.module,
        "channels": profile.channels,
        "weight": _extent_value(profile.weight, where),
        "inputs": {name: _extent_value(one, where) for name, one in profile.inputs.items()},
    }


def _extent_value(extent: Extent, where: str) -> dict[str, Any]:
    return {
        "amax": _packed(extent.amax, f"{where}: amax"),
        "rms": _packed(extent.rms, f"{where}: rms"),
        "crest": extent.crest,
    }


def _packed(numbers: tuple[float, ...], where: str) -> str:
    try:
        return b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    except OverflowError as problem:
        raise TableError(f"{where} do not fit float32.") from problem


def decode_line(text: str, where: str) -> Line:
    """The dataclass of one line.

    Args:
        text: The line.
        where: File and line number, for messages.

    Raises:
        TableError: The line is not JSON, of an unknown kind or version, or has
            an unknown key, a missing key or a value out of its range.
    """
    value = parse_json(text, where, TableError)
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in LINE_SCHEMAS:
        raise TableError(
            f"{where}: unknown kind of line {kind!r}." + nearest_name(str(kind), LINE_SCHEMAS)
        )
    if kind == "header" and value.get("version") != TABLE_VERSION:
        raise TableError(
            f"{where}: the table has version {value.get('version')!r}, "
            f"and this mofq reads version {TABLE_VERSION}. "
            f"Use the mofq that wrote it, or measure again."
        )
    check_document(value, LINE_SCHEMAS[kind], where, TableError)
    del value["kind"]
    if kind == "row":
        return _row(value, where)
    if kind == "rejection":
        return Rejection(**value)
    if kind == "cache":
        return CacheLayer(**value)
    if kind == "profile":
        return _profile(value, where)
    if kind == "space":
        return TableSpace(
            **{**value, "schemes": tuple(value["schemes"]), "base": tuple(value["base"])}
        )
    return _header(value)


def _row(value: dict[str, Any], where: str) -> Row:
    for name in _PACKED:
        if name in value:
            value[name] = _unpacked(value[name], f"{where}: {name}")
    return Row(**value)


def _profile(value: dict[str, Any], where: str) -> Profile:
    inputs = {name: _extent(one, where) for name, one in value.pop("inputs").items()}
    return Profile(**{**value, "weight": _extent(value["weight"], where)}, inputs=inputs)


def _extent(value: dict[str, Any], where: str) -> Extent:
    return Extent(
        amax=_unpacked(value["amax"], f"{where}: amax"),
        rms=_unpacked(value["rms"], f"{where}: rms"),
        crest=value["crest"],
    )


def _unpacked(text: str, where: str) -> tuple[float, ...]:
    try:
        data = b64decode(text, validate=True)
        return struct.unpack(f"<{len(data) // 4}f", data)
    except (Base64Error, ValueError, struct.error) as problem:
        raise TableError(f"{where}: not base64 of float32 numbers: {problem}.") from problem


def _header(value: dict[str, Any]) -> TableHeader:
    return TableHeader(
        mofq=value["mofq"],
        numerics=value.get("numerics"),
        model_name=value["model"]["name"],
        index_sha256=value["model"]["index_sha256"],
        weights_sha256=value["model"].get("weights_sha256"),
        stats=None if value["stats"] is None else TableStats(**value["stats"]),
        groups=tuple(
            TableGroup(
                group["name"],
                layers=tuple(TableLayer(**layer) for layer in group["layers"]),
                source_bytes=group["source_bytes"],
            )
            for group in value["groups"]
        ),
        unquantized=tuple(value["unquantized"]),
        other_bytes=value["other_bytes"],
    )
