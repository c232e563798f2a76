"""Reading and writing the small text files of the flow, strictly.

A YAML or JSON document becomes plain dictionaries, lists and scalars, which `mofq.files.validated`
checks. Nothing here constructs objects from a document, follows an alias, or guesses a type that
YAML 1.2's core schema does not name.

PyYAML and ``json`` parse; what is added are the checks that they leave out (keys that occur
twice, aliases, NaN, YAML 1.1's ``no`` for false), with the file and line in the message.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from mofq.exceptions import MofqError
from mofq.files.locks import check_replaceable, open_new_file

Kind = Literal["table", "recipe", "search space", "validation"]

#: By what the beginning of a file is known, and what writes such a file.
_KINDS: dict[Kind, tuple[re.Pattern[str], str]] = {
    "table": (re.compile(r'\{"kind":"header"'), "`mofq measure`"),
    "recipe": (re.compile(r"^groups:", re.MULTILINE), "`mofq search`"),
    "search space": (re.compile(r"^schemes:", re.MULTILINE), "`mofq spaces`"),
    "validation": (re.compile(r'\s*\{\s*"version".*"candidate":', re.DOTALL), "`mofq validate`"),
}
#: Bytes of a file that are looked at.
_BEGINNING = 16_384

#: A mixture-of-experts recipe with 20,000 layers is about 2 MB.
MAX_YAML_BYTES = 16_000_000
MAX_DEPTH = 16

#: Ends the name of a file that is being written.
PART = ".part"

_QUOTE = "Quote a text that only begins with '*' or '&'."
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
_INTEGER = re.compile(r"[-+]?[0-9]{1,30}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
#: What moves a terminal's cursor or turns the direction of text; lines and tabs do no harm.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@~+-]*")


def read_text(
    path: Path,
    error: type[MofqError],
    max_bytes: int = MAX_YAML_BYTES,
    *,
    kind: Kind | None = None,
) -> str:
    """The text of a file of bounded size.

    Args:
        path: Of the file.
        error: The exception to raise.
        max_bytes: That it may have.
        kind: That it should be of; None where no other kind is known.

    Raises:
        error: The file is missing, unreadable, too large, not UTF-8, or known to be of another
            kind.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if kind is not None:
            check_kind(data, kind, str(path), error)
        if len(data) > max_bytes:
            raise error(f"{path}: larger than {max_bytes} bytes, which no file of this kind needs.")
        return data.decode()
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}. Check the path.") from problem
    except UnicodeDecodeError as problem:
        raise error(
            f"{path}: is not UTF-8 text (byte {problem.start}). Save it as UTF-8."
        ) from problem


def check_kind(data: bytes, needed: Kind, where: str, error: type[MofqError]) -> None:
    """Refuse a file that is known to be of another kind than is needed.

    Args:
        data: The file, or its beginning.
        needed: The kind.
        where: The file, for messages.
        error: The exception to raise.

    Raises:
        error: As said. A file of no known kind is for the reader of its content to refuse.
    """
    beginning = data[:_BEGINNING].decode(errors="replace")
    for kind, (known_by, _) in _KINDS.items():
        if kind != needed and known_by.search(beginning):
            raise error(
                f"{where}: needed a {needed}, from {_KINDS[needed][1]}; found a {kind}, from "
                f"{_KINDS[kind][1]}."
            )
    if not _KINDS[needed][0].search(beginning) and _is_of_model(data):
        raise error(
            f"{where}: needed a {needed}, from {_KINDS[needed][1]}; found a file of a model. Where "
            f"a model is meant, give its folder."
        )


def _is_of_model(data: bytes) -> bool:
    """Whether a file is a ``config.json``, or of safetensors: a length of 8 bytes, then JSON."""
    beginning = data[:_BEGINNING]
    is_config = b'"model_type"' in beginning and not beginning.startswith(b'{"kind"')  # a table
    return is_config or data[8:10] == b'{"' != data[:2]


def parse_yaml(text: str, where: str, error: type[MofqError]) -> Any:
    """Parse one YAML document of plain values.

    Scalars are typed by YAML 1.2's core schema (so ``no`` and ``2026-01-01``
    are strings and ``1e-3`` is a number).

    Args:
        text: The document.
        where: What messages call it, normally its path.
        error: The exception to raise.

    Raises:
        error: The text is not YAML, has an anchor, alias or tag, a key twice,
            a key that is not a string, more than one document, or nests too deeply.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        events = yaml.parse(text, Loader=loader)
        next(events)
        first = next(events)
        if isinstance(first, yaml.StreamEndEvent):
            raise error(f"{where}: is empty.")
        value = _build(next(events), events, where, error, 0)
        next(events)
        if not isinstance(next(events), yaml.StreamEndEvent):
            raise error(f"{where}: holds more than one YAML document; keep one.")
    except (yaml.YAMLError, RecursionError) as problem:
        raise error(_yaml_problem(problem, where)) from problem
    return value


def _yaml_problem(problem: Exception, where: str) -> str:
    if not isinstance(problem, yaml.MarkedYAMLError) or problem.problem_mark is None:
        return f"{where}: is not valid YAML: {' '.join(str(problem).split())}."
    words = ", ".join(word for word in (problem.context, problem.problem) if word)
    hint = f" {_QUOTE}" if "alias" in words or "anchor" in words else ""
    return f"{where}, line {problem.problem_mark.line + 1}: is not valid YAML: {words}.{hint}"


def _build(
    event: yaml.Event, events: Iterator[yaml.Event], where: str, error: type[MofqError], depth: int
) -> Any:
    line = _line(event, where)
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
        raise error(f"{line}: anchors and aliases are not accepted. Write the value out. {_QUOTE}")
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise error(f"{line}: the tag {tag!r} is not accepted; write a plain value.")
    if depth > MAX_DEPTH:
        raise error(f"{line}: nests deeper than {MAX_DEPTH} levels.")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value) if event.implicit[0] else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_build(item, events, where, error, depth + 1))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(item := next(events), yaml.MappingEndEvent):
        line = _line(item, where)
        if not isinstance(item, yaml.ScalarEvent) or item.anchor or item.tag:
            raise error(f"{line}: a key must be a plain word.")
        if item.value in mapping:
            raise error(f"{line}: the key {item.value!r} stands twice; keep one.")
        mapping[item.value] = _build(next(events), events, where, error, depth + 1)
    return mapping


def _line(event: yaml.Event, where: str) -> str:
    return f"{where}, line {event.start_mark.line + 1}" if event.start_mark else where


def _scalar(text: str) -> Any:
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    return text


def yaml_scalar(value: Any) -> str:
    """A scalar as YAML 1.1 and 1.2 readers both read it back; strings plain where they can be."""
    if not isinstance(value, str):
        text = json.dumps(value, allow_nan=False)
        # YAML 1.1 takes 1e-05 for a string.
        return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text
    # YAML 1.1, which most readers still follow, takes more words for something else.
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers.get(value[:1], [])
    is_plain = _PLAIN.fullmatch(value) and not any(regexp.match(value) for _, regexp in resolvers)
    if is_plain and isinstance(_scalar(value), str) and value.lower() not in ("y", "n"):
        return value
    return str(yaml.safe_dump(value, default_style='"', width=10**9)).rstrip("\n")


def load_json(
    path: Path,
    error: type[MofqError],
    max_bytes: int = MAX_YAML_BYTES,
    *,
    kind: Kind | None = None,
) -> Any:
    """The one value of a JSON file; arguments and errors as of `read_text` and `parse_json`."""
    return parse_json(read_text(path, error, max_bytes, kind=kind), str(path), error)


def parse_json(
    text: str | bytes, where: str, error: type[MofqError], *, finite: bool = True
) -> Any:
    """Parse one JSON value; keys with two values and keys that are not text are refused.

    Args:
        text: The value; of bytes, in UTF-8.
        where: The file and the place in it, for messages.
        error: The exception to raise.
        finite: Refuse NaN and infinities too, which JSON does not have and transformers writes.

    Raises:
        error: The text is not strict JSON.
    """

    def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            # Twice the same says nothing else; of two values, readers take the first or the last.
            for key, value in pairs:
                if json.dumps(value) != json.dumps(mapping[key]):
                    raise error(f"{where}: the key {key!r} stands twice, with two values.")
        for key in mapping:
            key.encode()  # half of a surrogate pair is no name that anything else could write
        return mapping

    def no_constant(word: str) -> Any:
        raise error(f"{where}: {word} is not a number that can be used.")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        return json.loads(
            text, object_pairs_hook=keys_once, parse_constant=no_constant if finite else None
        )
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: is not valid JSON: {problem}") from problem


def text_problem(text: str) -> str | None:
    """Why a string in a file is refused; None where it is not."""
    if text.isprintable():
        return None
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair, which is not text"
    if found := _CONTROL.search(text):
        return (
            f"{shown(text)} holds the control character {found[0]!r}, which could change what a "
            f"terminal shows. Remove it"
        )
    return None


def shown(value: Any) -> str:
    """A value as messages show it: the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_beside_and_rename(path: Path, content: str | bytes) -> None:
    """Write a whole file, text as UTF-8, so that its final name never shows a part of it.

    Raises:
        MofqError: The folder is missing, the name is that of something else than a file, or the
            disk is full; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.tmp")
    check_replaceable(path)
    try:
        file = open_new_file(beside)
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
            os.fsync(file)
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
    except OSError as problem:
        raise MofqError(
            f"{path}: cannot be written: {problem.strerror}. Make room or name another place, and "
            f"run the same command again."
        ) from problem


@contextmanager
def renamed_when_written(path: Path, error: type[MofqError], remedy: str) -> Iterator[Path]:
    """Yield a name beside that of a file, and give it its own when it is whole.

    Args:
        path: Of a file that no other process writes.
        error: What is raised.
        remedy: The end of its message.

    Raises:
        error: The file cannot be written; nothing of it is left.
    """
    temporary = path.with_name(path.name + PART)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise error(f"{path}: cannot be written: {problem.strerror}. {remedy}") from None


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
