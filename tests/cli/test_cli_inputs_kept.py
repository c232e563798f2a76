"""No command writes into a folder that it reads, nor a file into a model's or a stats folder."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import DEMO, Measured, ok, refused, tree

from mofq import api

SHORT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Copies of what commands read, in one folder."""

    folder: Path
    model: Path
    stats: Path
    table: Path
    recipe: Path


@pytest.fixture
def inputs(measured: Measured, tmp_path: Path) -> Inputs:
    copies = Inputs(tmp_path, *(tmp_path / name for name in ("model", "stats", "table", "recipe")))
    shutil.copytree(DEMO, copies.model)
    shutil.copytree(measured.stats, copies.stats)
    shutil.copyfile(measured.table, copies.table)
    shutil.copyfile(measured.recipe, copies.recipe)
    return copies


def commands(given: Inputs) -> dict[str, tuple[Sequence[str | Path], Sequence[Path]]]:
    """Function of `mofq.api` -> its command, and outputs that must be refused."""
    model, stats = given.model, given.stats
    files = (model / "config.json", model / "new.json", stats / "stats.json")
    inside = (model, model / "new", model / "new" / "deeper")
    read = (*inside, stats, stats / "new")
    on_model = ("--model", model, "--text", "demo-en", "--solver", "optuna", "--trials", "1")
    return {
        "uniform": (("recipe", "uniform", model, "int4.g32", "--stats", stats), files),
        "recipe_from": (("recipe", "from", model), files),
        "validate": (("validate", model, given.recipe, *SHORT, "--stats", stats), files),
        "tune": (("tune", model, given.recipe, "--corpus", "demo-en", "--stats", stats), files),
        "measure": (("measure", model, "--space", "w8a8", "--stats", stats), files),
        "search": (("search", given.table, "--max-bits", "5", *on_model), (*files, given.table)),
        "plot": (("plot", given.table, "--kind", "map"), (model / "map.png", stats / "map.png")),
        "explore": (("explore", given.table, given.recipe), (*files, given.recipe)),
        "export": (("export", model, given.recipe, "--stats", stats), read),
        "rewrite": (("rewrite", model, "--stats", stats, "--method", "awq"), read),
        "calibrate": (("calibrate", model, "--corpus", "demo-en"), inside),
        "run": (("run", model, "--space", "w8a8", "--max-bits", "9"), inside),
        "demo": (("demo",), (Path(DEMO), Path(DEMO) / "new")),
    }


def writing_functions() -> list[str]:
    functions = {name: getattr(api, name) for name in api.__all__}
    return [
        name
        for name, one in functions.items()
        if inspect.isfunction(one) and "output" in inspect.signature(one).parameters
    ]


@pytest.mark.parametrize("name", writing_functions())
def test_no_command_writes_into_what_it_reads(name: str, inputs: Inputs) -> None:
    before = tree(inputs.folder)
    command, outputs = commands(inputs)[name]
    for output in outputs:
        message = refused(*command, "-o", output)
        assert f"-o {output}" in message
        assert "Name a" in message
    assert tree(inputs.folder) == before


def test_a_file_for_another_tool_goes_into_no_model(inputs: Inputs) -> None:
    before = tree(inputs.folder)
    for output in (inputs.model / "config.json", inputs.stats / "new.json", inputs.recipe):
        export = ("export", inputs.model, inputs.recipe, "--to", "llm-compressor")
        assert "Name a" in refused(*export, "-o", output)
    assert tree(inputs.folder) == before


def test_a_folder_that_is_validated_is_not_written_into(inputs: Inputs) -> None:
    folder = inputs.folder / "exported"
    ok("export", inputs.model, inputs.recipe, "--to", "compressed-tensors", "-o", folder)
    before = tree(inputs.folder)
    for output in (folder / "tokenizer_config.json", folder / "validation.json"):
        assert "lies in" in refused("validate", inputs.model, folder, *SHORT, "-o", output)
    assert tree(inputs.folder) == before


def test_the_trials_of_a_study_take_the_place_of_no_input(inputs: Inputs) -> None:
    before = tree(inputs.folder)
    search = ("search", inputs.table, "--max-bits", "5", "--solver", "optuna", "--trials", "1")
    on_model = ("--model", inputs.model, "--text", "demo-en", "-o", inputs.folder / "new.yaml")
    for storage in (inputs.model / "trials.db", inputs.table, f"sqlite:///{inputs.stats}/a.db"):
        assert "--storage" in refused(*search, *on_model, "--storage", storage)
    assert tree(inputs.folder) == before


def test_an_input_is_known_by_every_name_that_it_has(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inputs.folder / "link").symlink_to(inputs.model)
    (inputs.folder / "out.yaml").symlink_to(inputs.model / "config.json")
    before = tree(inputs.folder)
    monkeypatch.chdir(inputs.model)
    for model, output in (
        (inputs.model, inputs.folder / "link" / "new.yaml"),
        (inputs.folder / "link", inputs.model / "new.yaml"),
        (inputs.model, inputs.folder / "out.yaml"),
        (".", "new.yaml"),
        ("../model", Path("../stats/../model/new.yaml")),
    ):
        assert "lies in" in refused("recipe", "uniform", model, "int4.g32", "-o", output)
    # Its default is a folder where the command is run.
    assert "lies in" in refused("run", ".", "--space", "w8a8", "--max-bits", "9")
    assert tree(inputs.folder) == before


def test_a_folder_that_is_called_as_a_search_space_or_a_text_is_no_input(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs.folder)
    for name in ("w8a8", "demo-en"):
        Path(name).mkdir()
    ok("measure", inputs.model, "--space", "w8a8", "-o", "w8a8/table.jsonl")
    ok("validate", inputs.model, inputs.recipe, *SHORT, "-o", "demo-en/validation.json")
