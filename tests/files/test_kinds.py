"""A file of another kind than is needed is refused by what it is, not by where its syntax fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import DEMO, Measured, ok, refused

from mofq.exceptions import MofqError
from mofq.files.documents import check_kind

TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")


def test_a_file_in_the_place_of_another_is_called_what_it_is(
    measured: Measured, tmp_path: Path
) -> None:
    table, recipe, space = measured.table, measured.recipe, measured.folder / "space.yaml"
    out = tmp_path / "out"
    found = "needed a recipe, from `mofq search`; found a table, from `mofq measure`"
    assert f"{table}: {found}" in refused("export", DEMO, table, "-o", out)
    assert f"{table}: {found}" in refused("validate", DEMO, table, *TEXT)
    assert "needed a table" in refused("search", recipe, "--max-bits", "5", "-o", out)
    assert "found a search space" in refused("frontier", space)
    assert "found a recipe" in refused("measure", DEMO, "--space", recipe, "-o", out)
    assert "found a recipe" in refused("measure", DEMO, "--space", space, "-o", recipe)
    validated = tmp_path / "validation.json"
    ok("validate", DEMO, recipe, *TEXT, "-o", validated)
    explored = ("explore", table, recipe, "-o", out)
    assert "found a recipe" in refused(*explored, "--validation", recipe)
    assert "found a validation" in refused("explore", table, validated, "-o", out)


def test_a_file_of_no_known_kind_is_left_to_its_reader() -> None:
    check_kind(b"version: 2\n\xff", "recipe", "x", MofqError)
    check_kind(b"x: 1\ngroups: {}\n", "recipe", "x", MofqError)
    with pytest.raises(MofqError, match="x: needed a table"):
        check_kind(b"x: 1\ngroups: {}\n", "table", "x", MofqError)


def test_a_file_of_a_model_is_told_and_a_table_that_names_a_model_type_is_not_one() -> None:
    folder = Path(DEMO)
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(MofqError, match=r"found a file of a model.*give its folder"):
            check_kind((folder / name).read_bytes(), "recipe", name, MofqError)
    check_kind(b'{"kind":"header","model":{"model_type":"llama"}}', "table", "x", MofqError)
