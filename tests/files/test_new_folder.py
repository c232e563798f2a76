"""Folders that show their content when it is complete: beside their name, or in place."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import pytest
from command_line import DEMO, Measured, ok, refused, tree

from mofq.exceptions import MofqError
from mofq.files.locks import new_folder


def fill(target: Path, files: Mapping[str, str]) -> None:
    with new_folder(target, MofqError, last="config.json") as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that can be neither renamed nor removed, as a mount point; ext4 on it is empty."""
    point = tmp_path / "mounted"
    (point / "lost+found").mkdir(parents=True)
    rename, remove = Path.rename, Path.rmdir

    def busy(path: Path, target: Path | str) -> Path:
        if point in (path, Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rename(path, target)

    def busy_too(path: Path) -> None:
        if path == point:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        remove(path)

    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr(Path, "rmdir", busy_too)
    return point


@pytest.mark.long
def test_an_export_and_a_rewritten_model_are_written_onto_a_mount_point(
    measured: Measured, mounted: Path, tmp_path: Path
) -> None:
    for name, command in (
        ("exported", ("export", DEMO, measured.recipe, "--to", "compressed-tensors")),
        ("rewritten", ("rewrite", DEMO, "--stats", measured.stats, "--method", "awq")),
    ):
        ok(*command, "-o", tmp_path / name)
        ok(*command, "-o", mounted)
        written, needed = tree(mounted), tree(tmp_path / name)
        assert written.keys() == needed.keys()
        same = {file for file in needed if written[file] == needed[file]}
        assert needed.keys() - same <= {"README.md"}  # which names its folder
        for file in written:
            (mounted / file).unlink()


def test_an_export_is_written_into_the_folder_where_the_command_is_run(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "smaller"
    here.mkdir()
    number = here.stat().st_ino
    monkeypatch.chdir(here)
    ok("export", DEMO, measured.recipe, "--to", "compressed-tensors", "-o", ".")
    assert here.stat().st_ino == number  # the shell is still in it
    assert "# smaller" in (here / "README.md").read_text("utf-8")
    assert {"config.json", "model.safetensors", "recipe.yaml"} <= tree(here).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]
    assert "the folder of a model" in refused("export", DEMO, measured.recipe, "-o", ".")


def test_a_folder_whose_parent_may_not_be_written_to_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume of a container is; root may write everywhere, so that this is a stand-in."""
    target = tmp_path / "volume"
    target.mkdir()
    make = Path.mkdir

    def only_inside(path: Path, *arguments: object, **options: object) -> None:
        if not path.is_relative_to(target):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", only_inside)
    fill(target, {"a": "1"})
    assert tree(target) == {"a": b"1"}


def test_what_a_killed_process_left_in_a_folder_is_no_content(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (target / ".mofq.partial" / "folder").mkdir(parents=True)
    (target / ".mofq.partial" / "file").write_text("half")
    with new_folder(target, MofqError, last="config.json") as folder:
        assert tree(folder) == {}
        (folder / "whole").write_text("whole")
        (folder / "parts").mkdir()
        (folder / "parts" / "one").write_text("1")
        with pytest.raises(MofqError, match=r"another process \(pid .* writes"):
            fill(target, {})
    assert tree(target) == {"whole": b"whole", "parts/one": b"1"}
    assert {path.name for path in target.iterdir()} == {"whole", "parts"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_the_folder_as_it_was(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "model"
    if exists:
        target.mkdir()
    with pytest.raises(ValueError, match="null byte"):
        fill(target, {"a": "1", "no\0name": "2"})
    assert list(tmp_path.iterdir()) == ([target] if exists else [])
    assert tree(tmp_path) == {}


def test_a_failure_between_two_files_leaves_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    rename = Path.rename

    def fail_at_the_last(path: Path, target: Path) -> Path:
        order.append(path.name)
        if path.name == "config.json":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_last)
    with pytest.raises(MofqError, match="Nothing is left of it"):
        fill(tmp_path, {"config.json": "1", "weights": "2", "a": "3"})
    assert order == ["a", "weights", "config.json"]
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_folder_is_filled_where_it_leads(tmp_path: Path) -> None:
    place, link = tmp_path / "disk", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    fill(link, {"config.json": "{}"})
    assert link.is_symlink()
    assert tree(place) == {"config.json": b"{}"}
    with pytest.raises(MofqError, match="new or an empty folder"):
        fill(link, {"config.json": "{}"})
    dangling = tmp_path / "dangling"
    dangling.symlink_to("nowhere")
    with pytest.raises(MofqError, match="found a link to nowhere"):
        fill(dangling, {"config.json": "{}"})


def test_a_copy_that_finds_no_space_names_what_was_written(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "tokenizer.json", None, "copy.json")
    with (
        pytest.raises(MofqError, match=r"cannot be written \(copy.json: No space left on device"),
        new_folder(tmp_path / "new", MofqError, last="config.json"),
    ):
        raise full
