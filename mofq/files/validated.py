"""Plain values, as a file holds them, into the dataclass that declares what the file may hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic.json_schema import GenerateJsonSchema

from mofq.exceptions import MofqError, nearest_name
from mofq.files.documents import shown, text_problem

_Value = TypeVar("_Value")

#: Of a dataclass of a file: a key that it does not declare is refused.
only_these_keys = with_config(ConfigDict(extra="forbid"))


def _check_text(text: str) -> str:
    if problem := text_problem(text):
        raise ValueError(problem)
    return text


def _check_unique(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"{twice!r} stands twice; keep one")
    return values


#: Types of the keys of a file. All are strict: ``"1"`` is no number, and ``true`` is no 1.
Text = Annotated[str, Strict(), AfterValidator(_check_text)]
Name = Annotated[str, Strict(), Field(min_length=1), AfterValidator(_check_text)]
_EachOnce = AfterValidator(_check_unique), Field(json_schema_extra={"uniqueItems": True})
Names = Annotated[tuple[Name, ...], *_EachOnce]
SomeNames = Annotated[tuple[Name, ...], Field(min_length=1), *_EachOnce]
Sha256 = Annotated[str, Strict(), Field(pattern="^[0-9a-f]{64}$")]
Integer = Annotated[int, Strict()]
Index = Annotated[Integer, Field(ge=0)]
Count = Annotated[Integer, Field(ge=1)]
#: Sums of them stay far below 2**63.
Bytes = Annotated[Integer, Field(ge=0, le=2**50)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]


#: What pydantic says, and what our messages say, which speak of files and not of Python.
_WORDS = {
    "Input should": "must",
    "String should": "must",
    "Value should": "must",
    "Tuple should": "must",
    " after validation, not 0": "",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid tuple": "a list",
    "a valid dictionary": "a mapping",
    "a valid string": "text",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "true or false",
}


def check_version(value: object, version: int, where: str, error: type[MofqError]) -> None:
    """Refuse a file of another version, before its keys are looked at.

    Args:
        value: What a parser of YAML returned. Whether it has a version, `validate` checks.
        version: That this mofq reads.
        where: The file, for messages.
        error: The exception to raise.

    Raises:
        error: The file has another version.
    """
    found = value.get("version", version) if isinstance(value, dict) else version
    if found != version or isinstance(found, bool):
        raise error(f"{where}: has version {found!r}, and this mofq reads version {version}.")


def validate(
    adapter: TypeAdapter[_Value], value: object, where: str, error: type[MofqError]
) -> _Value:
    """A dataclass from the plain values of a file.

    Args:
        adapter: Of the dataclass.
        value: What a parser of JSON or YAML returned.
        where: The file and the place in it, for messages.
        error: The exception to raise.

    Raises:
        error: The value does not fit; the message names the key, what it needs and what it has.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as problem:
        known = _keys_of(adapter.json_schema())
        raise error(_message(problem, where, known)) from None


def _message(problem: ValidationError, where: str, known_keys: Iterable[str]) -> str:
    errors = problem.errors(include_url=False)
    # An unknown key first: it may be the missing one, misspelt.
    first = next((one for one in errors if one["type"] == "unexpected_keyword_argument"), errors[0])
    *parents, key = [step for step in first["loc"] if step != "[key]"] or ("",)
    at = where + "".join(_step(step) for step in parents)
    match first["type"]:
        case "unexpected_keyword_argument":
            return f"{at}: unknown key {key!r}." + nearest_name(str(key), known_keys)
        case "missing":
            return f"{at}: the key {key!r} is missing."
        case "dataclass_type":
            return f"{at}{_step(key)}: must be a mapping, found {shown(first['input'])}."
        case "value_error":
            return f"{at}{_step(key)}: {first['ctx']['error']}."
    found = first["input"]
    hint = ""
    if first["type"] == "literal_error":
        words = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        hint = nearest_name(str(found), words) if words else ""
    needed = first["msg"]
    for theirs, ours in _WORDS.items():
        needed = needed.replace(theirs, ours)
    return f"{at}{_step(key)}: {needed}, found {shown(found)}.{hint}"


def _keys_of(schema: Any) -> Iterator[str]:
    """Every key that a file may have, at any depth."""
    if isinstance(schema, dict):
        yield from schema.get("properties", ())
        for part in schema.values():
            yield from _keys_of(part)


def _step(key: int | str) -> str:
    return f"[{key}]" if isinstance(key, int) else f": {key}" if key else ""


def published_schema(adapter: TypeAdapter[Any], title: str) -> dict[str, Any]:
    """The JSON Schema of a kind of file, as editors get it."""
    schema = adapter.json_schema(schema_generator=UntitledSchema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


class UntitledSchema(GenerateJsonSchema):
    """A JSON Schema without the titles that pydantic makes from names of keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False
