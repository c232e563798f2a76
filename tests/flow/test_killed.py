"""Killed at any moment, on a full disk, twice at once: nothing is lost and nothing half-written."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import Any
from unittest.mock import patch

import pytest
from command_line import DEMO, Measured, mofq, ok, refused, tree

from mofq.decision.measured.study import StudyDecision, decide_in_study
from mofq.delivery.export.compressed_tensors import export as export_module
from mofq.evidence.calibration.stats import open_plan, read_stats
from mofq.evidence.table import open_table, read_table
from mofq.exceptions import MofqError
from mofq.files.documents import write_beside_and_rename
from mofq.files.locks import hold_folder, hold_new_folder, open_new_file

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
#: Who holds a lock that this process holds.
HERE = f"pid {os.getpid()} on {gethostname()})"
SHORT = ("--corpus", "en=demo-en-calibration", "--sequences", "4", "--sequence-length", "64")
TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "32")


@pytest.mark.long(first=True)
def test_every_command_killed_at_two_moments_resumes_to_the_same_bytes() -> None:
    # `python scripts/quality/kill_test.py` takes forty moments of each.
    command = [sys.executable, SCRIPTS / "quality/kill_test.py", "--moments", "2"]
    only = ["--only", "calibrate", "calibrate-streamed", "validate-streamed", "measure"]
    more = ["export", "search", "search-front", "run"]
    run = subprocess.run([*command, *only, *more], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("0 faults") == 8
    killed = [int(found) for found in re.findall(r"(\d+) of 2 killed", run.stdout)]
    assert len(killed) == 8
    assert sum(killed) >= 13


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that fills: no file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_an_output_never_takes_the_place_of_an_input_or_of_what_is_no_file(
    measured: Measured, tmp_path: Path
) -> None:
    table, recipe, text = (tmp_path / n for n in ("table.jsonl", "recipe.yaml", "text.txt"))
    shutil.copyfile(measured.table, table)
    shutil.copyfile(measured.recipe, recipe)
    text.write_text("a text " * 400)
    short = ("--text", text, "--tokens", "64", "--sequence-length", "32")
    before = tree(tmp_path)
    for path, command in (
        (table, ("search", table, "--max-bits", "5")),
        (table, ("explore", table)),
        (recipe, ("explore", table, recipe)),
        (recipe, ("validate", DEMO, recipe, *short)),
        (text, ("validate", DEMO, recipe, *short)),
        (recipe, ("export", DEMO, recipe, "--to", "llama.cpp")),
    ):
        assert f"-o {path}: this command reads it" in refused(*command, "-o", path)
    assert tree(tmp_path) == before
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for place in (pipe, tmp_path / "link"):
        for command in (
            ("search", table, "--max-bits", "5"),
            ("measure", DEMO, "--space", "w8a8"),
            ("explore", table),
        ):
            assert "found a device or a pipe" in refused(*command, "-o", place)
        with pytest.raises(MofqError, match="found a device or a pipe"):
            write_beside_and_rename(place, "text")
    assert pipe.is_fifo()


def test_calibrate_writes_into_no_folder_of_something_else(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    before = tree(model)
    message = refused("calibrate", model, *SHORT, "-o", model)
    assert f"-o {model}: lies in {model}, which this command reads" in message
    assert {name: data for name, data in tree(model).items() if name != ".lock"} == before


def test_a_full_disk_is_an_error_and_calibrate_and_measure_keep_what_was_done(
    measured: Measured, tmp_path: Path
) -> None:
    stats, table = tmp_path / "stats", tmp_path / "table.jsonl"
    calibrate = ("calibrate", DEMO, *SHORT, "-o", stats)
    with files_of_at_most(100_000):
        assert "sequence-00000.safetensors: cannot be written" in refused(*calibrate)
    assert not list(stats.rglob("*.safetensors*"))
    ok(*calibrate)
    assert tree(stats) == tree(measured.stats)
    space = measured.folder / "space.yaml"
    measure = ("measure", DEMO, "--space", space, "--stats", stats, "-o", table)
    with files_of_at_most(40_000):
        message = refused(*measure)
    assert "What was measured before is kept" in message
    assert "run the same command again" in message
    assert 0 < len(read_table(table).rows) < len(read_table(measured.table).rows)
    ok(*measure)
    assert table.read_bytes() == measured.table.read_bytes()


def test_a_full_disk_leaves_nothing_of_an_export_or_a_recipe(
    measured: Measured, tmp_path: Path
) -> None:
    folder, recipe = tmp_path / "model", tmp_path / "recipe.yaml"
    export = ("export", DEMO, measured.recipe, "--to", "compressed-tensors", "-o", folder)
    for size in (1_000_000, 60_000, 200):
        with files_of_at_most(size):
            assert "cannot be written" in refused(*export)
    with files_of_at_most(100):
        message = refused("search", measured.table, "--max-bits", "5", "-o", recipe)
    assert f"{recipe}: cannot be written" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize(("storage", "size"), [("s.db", 100_000), ("s.journal", 20_000)])
def test_a_study_on_a_full_disk_goes_on_as_if_nothing_had_been(
    storage: str, size: int, measured: Measured, tmp_path: Path
) -> None:
    def search(folder: Path) -> tuple[str | Path, ...]:
        folder.mkdir(exist_ok=True)
        where = ("--storage", folder / storage, "-o", folder / "recipe.yaml")
        model = ("--solver", "optuna", "--trials", "8", "--model", DEMO, *TEXT)
        return ("search", measured.table, "--max-bits", "5", *model, *where)

    def in_little_space(*arguments: Any, **options: Any) -> StudyDecision:
        with files_of_at_most(size):
            return decide_in_study(*arguments, **options)

    # Not before: the original's logits are kept on a disk too.
    with patch("mofq.decision.measured.study.decide_in_study", in_little_space):
        message = refused(*search(tmp_path / "full"))
    assert f"{storage}: cannot be" in message
    assert not (tmp_path / "full" / "recipe.yaml").exists()
    ok(*search(tmp_path / "full"))
    ok(*search(tmp_path / "large"))
    recipes = [(tmp_path / name / "recipe.yaml").read_bytes() for name in ("full", "large")]
    assert recipes[0] == recipes[1]


def test_the_second_of_two_commands_on_one_place_says_so(
    measured: Measured, tmp_path: Path
) -> None:
    stats, table, model = tmp_path / "stats", tmp_path / "table.jsonl", tmp_path / "model"
    space = measured.folder / "space.yaml"
    opened = read_table(measured.table)
    with open_plan(stats, read_stats(measured.stats).plan):
        message = refused("calibrate", DEMO, *SHORT, "-o", stats)
        assert f"another process ({HERE}" in message
        assert "calibrates into this folder" in message
    measure = ("measure", DEMO, "--space", space, "--stats", measured.stats, "-o", table)
    with open_table(table, opened.header):
        message = refused(*measure)
        assert f"another process ({HERE}" in message
        assert "writes to this table" in message
    export = ("export", DEMO, measured.recipe, "--to", "compressed-tensors", "-o", model)
    with hold_new_folder(tmp_path / ".model.partial", MofqError):
        message = refused(*export)
        assert f"another process ({HERE}" in message
        assert "writes to this folder" in message
    run = tmp_path / "run"
    run.mkdir()
    with hold_folder(run, MofqError):
        message = refused("run", DEMO, "--space", space, "--max-bits", "5", *TEXT, "-o", run)
    assert f"another process ({HERE}" in message
    assert "runs into this folder" in message
    assert list(run.iterdir()) == []


def test_what_a_killed_export_left_is_gone_after_the_next(
    measured: Measured, tmp_path: Path
) -> None:
    left = tmp_path / ".model.partial"
    (left / "folder").mkdir(parents=True)
    (left / "model.safetensors.partial").write_bytes(bytes(100))
    (left / "link").symlink_to(measured.folder)
    ok("export", DEMO, measured.recipe, "--to", "compressed-tensors", "-o", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not {"link", "folder"} & {path.name for path in (tmp_path / "model").iterdir()}
    assert measured.table.exists()


def test_an_export_that_was_killed_goes_on_with_the_fusion_group_that_it_was_at(
    measured: Measured, tmp_path: Path
) -> None:
    dies = (
        "import os, sys; from mofq.cli import main; from mofq.model.checkpoint import writer\n"
        "settle, count = writer.ShardWriter.settle, iter(range(1, 99))\n"
        "def settle_and_die(*arguments):\n"
        "    settle(*arguments)\n"
        "    if next(count) == 9: os.kill(os.getpid(), 9)\n"
        "writer.ShardWriter.settle = settle_and_die; main()"
    )
    other = tmp_path / "other.yaml"
    ok("recipe", "uniform", DEMO, "int8.channel", "-o", other)
    encoded: list[str] = []
    encode = export_module.encoded_parts

    def counted(checkpoint: Any, planned: Any, **options: Any) -> Any:
        encoded.append(planned.group.name)
        return encode(checkpoint, planned, **options)

    def export(name: str, recipe: Path) -> tuple[str, ...]:
        return ("export", DEMO, str(recipe), "--to", "compressed-tensors", "-o", str(out / name))

    out = tmp_path / "out"
    with patch.object(export_module, "encoded_parts", counted):
        ok(*export("whole", measured.recipe))
        groups = list(encoded)
        for recipe, needed in ((measured.recipe, groups[9:]), (other, groups)):
            command = [sys.executable, "-c", dies, *export("model", measured.recipe)]
            assert subprocess.run(command).returncode == -signal.SIGKILL
            assert (out / ".model.partial").is_dir()
            encoded.clear()
            ok(*export("model", recipe))
            assert encoded == needed
            assert sorted(path.name for path in out.iterdir()) == ["model", "whole"]
            if recipe == measured.recipe:
                found, whole = tree(out / "model"), tree(out / "whole")
                changed = {name for name in whole if found[name] != whole[name]}
                assert (found.keys(), changed) == (whole.keys(), {"README.md"})  # names its folder
            shutil.rmtree(out / "model")


def test_a_file_that_another_process_is_writing_is_waited_for(tmp_path: Path) -> None:
    waits = (
        "import sys; from pathlib import Path\n"
        "from mofq.files.documents import write_beside_and_rename\n"
        "print('waits', flush=True); write_beside_and_rename(Path(sys.argv[1]), 'second')"
    )
    path = tmp_path / "recipe.yaml"
    file = open_new_file(tmp_path / ".recipe.yaml.tmp")
    process = subprocess.Popen(
        [sys.executable, "-c", waits, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    with open(file, "w") as stream:
        stream.write("first")
        stream.flush()
        (tmp_path / ".recipe.yaml.tmp").rename(path)
        assert path.read_text() == "first"
    assert process.wait(300) == 0
    process.stdout.close()
    assert [one.name for one in tmp_path.iterdir()] == ["recipe.yaml"]
    assert path.read_text() == "second"


def test_a_link_in_the_way_of_a_new_file_is_not_followed(
    measured: Measured, tmp_path: Path
) -> None:
    private = tmp_path / "private.txt"
    private.write_text("mine")
    (tmp_path / ".recipe.yaml.tmp").symlink_to(private)
    ran = mofq("search", measured.table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    assert ran.code == 1
    assert "cannot be written" in ran.err
    assert private.read_text() == "mine"
