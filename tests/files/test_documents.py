from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mofq.exceptions import MofqError
from mofq.files.documents import (
    parse_json,
    parse_yaml,
    write_beside_and_rename,
    yaml_scalar,
)
from scripts.make.schemas import schema_texts

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("1e-3", 0.001),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("-7", -7),
        (".5", 0.5),
        ("true", True),
        ("~", None),
        ("'1'", "1"),
        ('"a\\nb"', "a\nb"),
        ("[]", []),
        ("{a: {b: [1, 2.0, x]}}", {"a": {"b": [1, 2.0, "x"]}}),
        ("9" * 40, float("9" * 40)),
    ],
)
def test_yaml_scalars_follow_the_core_schema_of_version_1_2(text: str, value: object) -> None:
    found = parse_yaml(text, "x", MofqError)
    assert found == value
    assert type(found) is type(value)


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"
    with pytest.raises(MofqError, match="x, line 1: anchors and aliases are not accepted"):
        parse_yaml(bomb, "x", MofqError)


def test_a_tag_is_refused_even_an_empty_one() -> None:
    for text in ("! 5", "!!python/name:os.system x", "!!set {a}"):
        with pytest.raises(MofqError, match="is not accepted"):
            parse_yaml(text, "x", MofqError)


def test_yaml_without_its_c_library_is_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "search_spaces").iterdir()]
    texts.append("a: 'x'\nb: \"y\"\nc: |\n  z\nd: [1, {e: ~}]")
    values = [parse_yaml(text, "x", MofqError) for text in texts]
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert [parse_yaml(text, "x", MofqError) for text in texts] == values
    with pytest.raises(MofqError, match="nests deeper than 16"):
        parse_yaml("[" * 5000, "x", MofqError)
    with pytest.raises(MofqError, match="anchors and aliases"):
        parse_yaml("&a x", "x", MofqError)


def test_deep_nesting_is_refused_and_not_a_crash() -> None:
    with pytest.raises(MofqError, match="nests deeper than 16"):
        parse_yaml("[" * 100_000, "x", MofqError)
    with pytest.raises(MofqError, match="is not valid JSON"):
        parse_json("[" * 100_000, "x", MofqError)


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", '{"a": 1, "a": 1.0}', "{", "", "1 2", "9" * 5000]
)
def test_json_is_read_strictly(text: str) -> None:
    with pytest.raises(MofqError, match=r"^x: "):
        parse_json(text, "x", MofqError)


def test_a_key_that_says_the_same_twice_is_read() -> None:
    assert parse_json('{"a": [1, {"b": 2}], "a": [1, {"b": 2}]}', "x", MofqError) == {
        "a": [1, {"b": 2}]
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1.0e-05"),
        (1e300, "1.0e+300"),
        (0.1, "0.1"),
        (5, "5"),
        (None, "null"),
        (True, "true"),
        ("int4.g32@mse~gptq", "int4.g32@mse~gptq"),
        ("3f9ac1d0", "3f9ac1d0"),
        ("12345678", '"12345678"'),
        ("1e5", '"1e5"'),
        ("yes", '"yes"'),
        ("", '""'),
        ("a b", '"a b"'),
        ("<script>", '"<script>"'),
    ],
)
def test_a_scalar_is_plain_only_where_every_reader_agrees(value: object, text: str) -> None:
    assert yaml_scalar(value) == text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    write_beside_and_rename(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_beside_and_rename(path, "\ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.yaml"]


def test_the_published_schemas_are_those_that_the_code_checks_with() -> None:
    folder = ROOT / "docs" / "schemas"
    # To renew them: python scripts/make/schemas.py
    assert {path.name: path.read_text("utf-8") for path in folder.iterdir()} == schema_texts()
