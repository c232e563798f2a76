"""Options from Python are held to the types and limits that the command line holds them to."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import DEMO, refused

from mofq import api
from mofq.api import Budget, Choices, LmEval, Method, Running, Samples, Study, Where
from mofq.api.options import parameters_of
from mofq.cli.parsing import flag_of
from mofq.exceptions import MofqError, TableError, option

TABLE = "table.jsonl"

#: What is refused before a file is opened, and what the message says of it.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a text for a number": (
        lambda: api.search(TABLE, budget=Budget(max_bits="5")),
        "max_bits: needed float | None",
    ),  # type: ignore[arg-type]
    "a truth for a number": (
        lambda: api.search(TABLE, budget=Budget(max_kl=True)),
        "max_kl: needed float | None",
    ),
    "a fraction for a count": (
        lambda: api.search(TABLE, choices=Choices(kv_tokens=1.5)),
        "kv_tokens: needed int",
    ),  # type: ignore[arg-type]
    "a number below the smallest": (
        lambda: api.search(TABLE, choices=Choices(kv_tokens=-1)),
        "kv_tokens: needed at least 0, found -1.",
    ),
    "no worker": (
        lambda: api.search(TABLE, study=Study(workers=0)),
        "workers: needed at least 1, found 0.",
    ),
    "no sequence": (
        lambda: api.calibrate("model", ["text.txt"], "stats", samples=Samples(sequences=0)),
        "sequences: needed at least 1, found 0.",
    ),
    "a text for a list in a group": (
        lambda: api.validate("model", "recipe.yaml", "text.txt", lm_eval=LmEval(tasks="mmlu")),
        "tasks: needed Sequence[str], found 'mmlu'. Put it into a list.",
    ),
    "a word that there is not": (
        lambda: api.search(TABLE, method=Method(solver="exat")),  # type: ignore[arg-type]
        "solver=exat: unknown. Did you mean 'exact'?",
    ),
    "nothing for a word": (
        lambda: api.search(TABLE, method=Method(solver=None)),
        "solver: needed Literal[",
    ),  # type: ignore[arg-type]
    "a number for a word": (
        lambda: api.measure("model", "w8a8", TABLE, where=Where(device=0)),
        "device: needed str, found 0.",
    ),  # type: ignore[arg-type]
    "a mapping for a group": (
        lambda: api.search(TABLE, budget={"max_bits": 5}),  # type: ignore[arg-type]
        "budget: needed Budget(…), found {'max_bits': 5}.",
    ),
    "a larger group": (
        lambda: api.validate("model", "recipe.yaml", "text.txt", running=Where(cluster="ray")),
        "running: needed Running(…), found Where(",
    ),
    "a text for a list": (
        lambda: api.search(TABLE, explain="layers.0.mlp.down"),
        "explain: needed Sequence[str], found 'layers.0.mlp.down'. Put it into a list.",
    ),
    "a text for several corpora": (
        lambda: api.calibrate("model", "text.txt", "stats"),
        "corpora: needed Mapping[str, str] | Sequence[str], found 'text.txt'.",
    ),
    "no table": (lambda: api.search(None), "table: needed Table | str | Path, found None."),  # type: ignore[arg-type]
    "a list of other things": (
        lambda: api.explore(TABLE, [5]),  # type: ignore[list-item]
        "recipes: needed Sequence[str | Path], found [5].",
    ),
    "sizes below none": (
        lambda: api.frontier(TABLE, polish=-2),
        "polish: needed at least 0, found -2.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_does_not_fit_is_refused_at_once(name: str) -> None:
    asked, says = REFUSED[name]
    with pytest.raises(MofqError) as caught:
        asked()
    assert says in str(caught.value)


def test_a_group_has_the_options_of_the_one_that_it_extends() -> None:
    of_search = {one.name: one.group for one in parameters_of(api.search)}
    assert of_search["fixed"] == of_search["engine"] == "choices"
    of_run = {one.name: one.group for one in parameters_of(api.run)}
    assert (of_run["fixed"], of_run["engine"]) == ("constraints", None)
    with pytest.raises(
        TypeError, match=r"measure\(\) takes dtype in a group: where=Where\(dtype=…"
    ):
        api.measure("model", "w8a8", TABLE, dtype="bfloat16")  # type: ignore[call-arg]


def test_arguments_that_do_not_fit_are_told_with_the_function() -> None:
    with pytest.raises(TypeError, match=r"^calibrate\(\) got an unexpected keyword .* 'running'"):
        api.calibrate("model", ["text.txt"], "stats", running=Running())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^calibrate\(\) missing a required argument: 'output'"):
        api.calibrate("model", ["text.txt"])  # type: ignore[call-arg]


def test_numbers_of_numpy_are_numbers() -> None:
    with pytest.raises(TableError):  # of the table that is missing
        api.search(TABLE, budget=Budget(max_bits=np.float64(4.5), max_kl=np.float32(1)))  # type: ignore[arg-type]


def test_an_option_outside_its_group_is_told_where_it_goes() -> None:
    with pytest.raises(
        TypeError, match=r"search\(\) takes max_bits in a group: budget=Budget\(max_bits=…\)"
    ):
        api.search(Path(TABLE), max_bits=5)  # type: ignore[call-arg]


def test_an_error_names_options_as_whoever_reads_it_gives_them(tmp_path: Path) -> None:
    error = MofqError(f"{option('max_size')}: give {option('kv_formats', 'kv:int8.head')}.")
    assert str(error) == "max_size: give kv_formats=kv:int8.head."
    assert error.spelled(flag_of) == "--max-size: give --kv-cache kv:int8.head."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    space = tmp_path / "space.yaml"
    space.write_text("version: 1\nschemes: [int4.g32]\noffer_unquantized: false\n")
    folder = tmp_path / "run"
    with pytest.raises(MofqError, match=r"^No recipe meets the budget. max_size: asked"):
        api.run(DEMO, folder, space=space, budget=Budget(max_size="10kB"))
    said = refused("run", DEMO, "--space", space, "--max-size", "10kB", "-o", folder)
    assert said.startswith("Error: No recipe meets the budget. --max-size: asked for 10,000 bytes")
    file = folder / "nowhere" / "recipe.yaml"
    with pytest.raises(MofqError, match=f"^output={file}: there is no folder"):
        api.uniform(DEMO, "int4.g32", file)
    assert f"-o {file}: there is no folder" in refused(
        "recipe", "uniform", DEMO, "int4.g32", "-o", file
    )


def test_every_option_that_a_message_names_exists() -> None:
    known = {
        one.name
        for name in api.__all__
        if isfunction(stage := getattr(api, name))
        for one in parameters_of(stage)
    }
    sources = Path(api.__file__).parent.parent.rglob("*.py")
    named = {
        name
        for source in sources
        for name in re.findall(r"\boption\(['\"](\w+)['\"]", source.read_text("utf-8"))
    }
    assert "max_size" in named
    assert named <= known
