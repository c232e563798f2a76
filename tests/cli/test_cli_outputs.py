"""Outputs that cannot be written, devices that are none, files that are something else."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DEMO, Measured, mofq, ok, refused, tree

SHORT = ("--sequences", "2", "--sequence-length", "64")
TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for what commands write."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_an_export_goes_only_into_a_new_folder(tmp_path: Path, out: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    (out / "mine.txt").write_text("keep")
    message = refused("export", DEMO, recipe, "--to", "compressed-tensors", "-o", out)
    assert "a new or an empty folder" in message
    message = refused("export", DEMO, recipe, "--to", "compressed-tensor", "-o", out / "new")
    assert "Did you mean 'compressed-tensors'?" in message
    assert tree(out) == {"mine.txt": b"keep"}


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_an_output_that_cannot_be_written_is_refused_at_once(
    what: str, measured: Measured, out: Path
) -> None:
    target = out / "no" / "file" if what == "missing" else out
    for command in (
        ("measure", DEMO, "--space", "w8a8"),
        ("search", measured.table, "--max-bits", "5"),
        ("recipe", "uniform", DEMO, "int4.g32"),
        ("validate", DEMO, measured.recipe, *TEXT),
    ):
        assert f"-o {target}" in refused(*command, "-o", target)
    assert tree(out) == {}


def test_a_folder_that_cannot_be_made_is_refused_at_once(measured: Measured, out: Path) -> None:
    (out / "file").write_text("keep")
    corpus = ("--corpus", "demo-en", *SHORT)
    for target in (out / "file" / "run", out / "file"):
        for command in (
            ("calibrate", DEMO, *corpus),
            ("run", DEMO, "--space", "w8a8", "--max-bits", "9"),
            ("export", DEMO, measured.recipe, "--to", "compressed-tensors"),
        ):
            assert str(out / "file") in refused(*command, "-o", target)
    assert tree(out) == {"file": b"keep"}


@pytest.mark.long
def test_a_layer_that_is_not_what_the_recipe_says_ends_validate_with_1(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mofq.delivery.apply import emulate

    def careless(*arguments: Any, **options: Any) -> Any:
        model = apply(*arguments, **options)
        weight_OI = model.get_submodule("model.layers.4.self_attn.v_proj").weight
        with torch.no_grad():
            weight_OI[3] *= 2
        return model

    apply = emulate.apply
    monkeypatch.setattr(emulate, "apply", careless)
    ran = mofq("validate", DEMO, measured.recipe, *TEXT, "--json")
    assert ran.code == 1
    content = json.loads(ran.out)
    assert content["enforced"] is False
    assert [one["layer"] for one in content["deviations"]] == ["model.layers.4.self_attn.v_proj"]
    assert "model.layers.4.self_attn.v_proj" in ran.err
    shown = mofq("validate", DEMO, measured.recipe, *TEXT).out
    assert 0 < shown.index("NO: what follows is not the recipe's") < shown.index("KL, measured")


def test_a_reader_that_stops_reading_is_no_error() -> None:
    program = (
        f"{shlex.quote(sys.executable)} -c 'from mofq.cli import main; main()' engines | head -n 1"
    )
    run = subprocess.run(program, shell=True, capture_output=True, text=True)
    assert run.stdout.startswith("vllm-cpu")
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "gpu"), "no such device"),
        (("--device", "meta"), "cannot be used here"),
        (("--dtype", "float8"), "float32"),
    ],
)
def test_a_device_or_dtype_that_is_none_is_refused(
    options: tuple[str, ...], words: str, measured: Measured, out: Path
) -> None:
    for command in (
        ("validate", DEMO, measured.recipe, *TEXT, "-o", out / "validation.json"),
        ("calibrate", DEMO, "--corpus", "demo-en", *SHORT, "-o", out / "stats"),
    ):
        assert words in refused(*command, *options)
    assert tree(out) == {}


def test_a_file_that_is_no_table_is_left_as_it_is(out: Path) -> None:
    mine = out / "notes.txt"
    mine.write_text("my notes")
    assert "is not a table" in refused("measure", DEMO, "--space", "w8a8", "-o", mine)
    assert mine.read_text() == "my notes"
    refused("search", mine, "--max-bits", "5", "-o", out / "recipe.yaml")
    assert tree(out) == {"notes.txt": b"my notes"}


def test_json_never_shares_stdout_with_anything(measured: Measured) -> None:
    ran = mofq("search", measured.table, "--max-bits", "3", "-o", "recipe.yaml", "--json")
    assert ran.code == 1
    error = json.loads(ran.out)["error"]
    assert error["type"] == "BudgetError"
    assert "--max-bits: asked for 3 bits" in error["message"]


def test_an_export_is_for_what_the_engine_reads_where_nothing_else_is_asked(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int8.channel+int8.token", "-o", recipe)
    assert ok("export", DEMO, recipe, "-o", tmp_path / "a", "--json").json["to"] == (
        "compressed-tensors"
    )
    named = ("--engine", "torchao-cpu", "-o", tmp_path / "b.json")
    assert ok("export", DEMO, recipe, *named, "--json").json["to"] == "torchao"


@pytest.mark.long
def test_an_export_imports_no_transformers(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "nvfp4", "-o", recipe)  # its global scale is a maximum
    program = (
        "import sys; from mofq.api import export; "
        "export(*sys.argv[1:4], engine='vllm-hopper'); print('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", program, DEMO, str(recipe), str(tmp_path / "model")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.long
def test_what_is_missing_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    recipe, text = tmp_path / "recipe.yaml", ("--text", "demo-en")
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    calls = [
        ["validate", DEMO, nowhere, *text],
        ["validate", nowhere, str(recipe), *text],
        ["validate", DEMO, str(recipe), *text, "--dtype", "float"],
        ["validate", DEMO, str(recipe), "--text", f"{nowhere}.txt"],
        ["calibrate", nowhere, "--corpus", "demo-en", "-o", out],
        ["calibrate", DEMO, "--corpus", f"{nowhere}.txt", "-o", out],
        ["export", nowhere, str(recipe), "-o", out],
        ["rewrite", nowhere, "--stats", nowhere, "--method", "awq", "-o", out],
    ]
    script = (
        "import json, sys\n"
        "from mofq.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['mofq', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 1, arguments\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    subprocess.run([sys.executable, "-c", script, json.dumps(calls)], check=True)
