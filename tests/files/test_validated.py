"""Values of a file become a dataclass, or an error that names the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import ConfigDict, Field, TypeAdapter, with_config

from mofq.exceptions import TableError
from mofq.files.validated import Bytes, Count, Names, NotNegative, Sha256, Text, validate


@dataclass(frozen=True)
class Part:
    size: Count


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Whole:
    name: Text
    parts: tuple[Part, ...] = ()
    names: Names = ()
    errors: dict[Text, NotNegative] | None = None
    sha256: Sha256 | None = None
    bytes: Annotated[Bytes | None, Field(description="of all parts")] = None


ADAPTER = TypeAdapter(Whole)


def test_lists_become_tuples_and_whole_numbers_become_floats() -> None:
    value = {"name": "a", "parts": [{"size": 1}], "names": ["b"], "errors": {"c": 2}}
    found = validate(ADAPTER, value, "file", TableError)
    assert found == Whole("a", (Part(1),), ("b",), {"c": 2.0})
    assert isinstance((found.errors or {})["c"], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": 1}, "file: unknown key 'nmae'. Did you mean 'name'?"),
        ({"parts": [{}]}, "file: parts[0]: the key 'size' is missing."),
        (
            {"parts": [{"size": 1}, {"size": True}]},
            "[1]: size: must be an integer, found True",
        ),
        ({"parts": [{"size": 0}]}, "file: parts[0]: size: must be at least 1, found 0."),
        ({"parts": {}}, "file: parts: must be a list, found {}."),
        ({"parts": [3]}, "file: parts[0]: must be a mapping, found 3."),
        ({"names": ["b", "c", "b"]}, "file: names: 'b' stands twice; keep one."),
        ({"names": [""]}, "file: names[0]: must have at least 1 character, found ''."),
        ({"errors": {"c": "1"}}, "file: errors: c: must be a number, found '1'."),
        ({"errors": {"c": -1.0}}, "file: errors: c: must be at least 0, found -1.0."),
        ({"errors": {"c": float("inf")}}, "errors: c: must be a finite number, found inf."),
        ({"bytes": 2**60}, "file: bytes: must be at most 1125899906842624, found 11529"),
        ({"sha256": "ab"}, "file: sha256: must match pattern '^[0-9a-f]{64}$', found 'ab'."),
        ({"name": None}, "file: name: must be text, found None."),
        ({"name": "\x1b[2J"}, "holds the control character '\\x1b', which could change what"),
        ({"name": "a\ud800"}, "file: name: holds half of a surrogate pair, which is not text."),
        ({"name": "x" * 100 + "\x1b"}, "name: '" + "x" * 56 + "... holds the control character"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_needed_and_found(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TableError) as caught:
        validate(ADAPTER, {"name": "a", **change}, "file", TableError)
    assert message in str(caught.value)
