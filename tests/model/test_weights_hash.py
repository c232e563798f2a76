"""Another training of the same shapes is another model: recipe, table and stats say so."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import DEMO, Measured, ok, refused
from conftest import TinyCheckpoint
from safetensors.torch import load_file, save_file

from mofq.delivery.backends import EXPORTERS, RECIPE_EXPORTERS
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights

TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")
SHORT = ("--corpus", "en=demo-en-calibration", "--sequences", "4", "--sequence-length", "64")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model after one step of training: every weight moved by 1 %, nothing else."""
    folder = Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("tuned") / "model"))
    tensors = load_file(folder / "model.safetensors")
    moved = {name: (value.float() * 1.01).to(value.dtype) for name, value in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_hash_is_of_the_weights_and_not_of_how_they_are_stored(
    tiny: TinyCheckpoint, tuned: Path
) -> None:
    one, shards = open_checkpoint(str(tiny("llama"))), tiny("llama", shard_size="100KB")
    assert hash_weights(one) == hash_weights(open_checkpoint(str(shards)))
    assert hash_weights(one) != hash_weights(open_checkpoint(str(tiny("llama", seed=1))))
    demo, other = open_checkpoint(DEMO), open_checkpoint(str(tuned))
    assert demo.index_sha256 == other.index_sha256
    assert hash_weights(demo) != hash_weights(other)


def test_one_matrix_that_was_trained_is_seen(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name] += torch.full_like(tensors[name], 2.0**-10)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before, after = (hash_weights(open_checkpoint(str(f))) for f in (tiny_llama, folder))
    assert before != after


def test_a_terabyte_of_weights_is_sampled_and_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    size = 2**40
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        os.truncate(file.fileno(), 8 + len(header) + size)  # a hole, which takes no room
    assert len(hash_weights(open_checkpoint(str(folder)))) == 64


@pytest.mark.long
def test_a_fine_tune_does_not_pass_as_its_base(
    measured: Measured, tuned: Path, tmp_path: Path
) -> None:
    space, table = measured.folder / "space.yaml", tmp_path / "table.jsonl"
    shutil.copyfile(measured.table, table)
    stats = ("--stats", measured.stats)
    message = refused("measure", tuned, "--space", space, *stats, "-o", tmp_path / "new.jsonl")
    assert "other weights of the same shapes" in message
    own = tmp_path / "stats"
    ok("calibrate", tuned, *SHORT, "-o", own)
    message = refused("measure", tuned, "--space", space, "--stats", own, "-o", table)
    assert "write to another table" in message
    assert "it is of other weights of model" in refused("calibrate", DEMO, *SHORT, "-o", own)
    commands: list[tuple[object, ...]] = [("validate", tuned, measured.recipe, *TEXT)]
    for to in EXPORTERS | RECIPE_EXPORTERS:
        commands.append(("export", tuned, measured.recipe, "--to", to, "-o", tmp_path / "out"))
    for command in commands:
        message = refused(*command)
        assert "a fine-tune or another revision" in message
        assert "remove weights_sha256 from it" in message
    text = measured.recipe.read_text("utf-8")
    (ours,) = re.findall(r"weights_sha256: (\w+)", text)
    theirs = hash_weights(open_checkpoint(str(tuned)))
    other = tmp_path / "other.yaml"
    other.write_text(text.replace(ours, theirs), "utf-8")
    assert f"weights_sha256 {ours[:8]}" in refused("diff", measured.recipe, other)
    validation, page = tmp_path / "validation.json", tmp_path / "page.html"
    ok("validate", tuned, other, *TEXT, "-o", validation)
    assert json.loads(validation.read_text("utf-8"))["weights_sha256"] == theirs
    drawn = ("--validation", validation, "-o", page)
    assert f"weights_sha256 {theirs}" in refused("explore", measured.table, *drawn)
    search = ("search", measured.table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    message = refused(*search, "--refine", "2", "--model", tuned, *TEXT)
    assert "weights_sha256" in message
    assert "Give the model that was measured" in message


def test_the_table_of_a_base_is_not_continued_with_a_fine_tune(tuned: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    ok("measure", DEMO, "--space", "w8a8", "-o", table)
    before = table.read_bytes()
    assert "differs in weights_sha256" in refused("measure", tuned, "--space", "w8a8", "-o", table)
    assert table.read_bytes() == before


def test_a_recipe_without_the_hash_is_for_any_weights_of_its_shapes(
    measured: Measured, tuned: Path, tmp_path: Path
) -> None:
    text = measured.recipe.read_text("utf-8")
    weights = read_table(measured.table).header.weights_sha256
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace(f", weights_sha256: {weights}", ""))
    assert recipe.read_text() != text
    assert ok("validate", tuned, recipe, *TEXT, "--json").json["enforced"] is True


def test_stats_and_tables_that_do_not_note_the_weights_are_still_read(
    measured: Measured, tmp_path: Path
) -> None:
    stats = Path(shutil.copytree(measured.stats, tmp_path / "stats"))
    for name in ("plan.json", "stats.json"):
        content = json.loads((stats / name).read_text())
        del content["weights_sha256"]
        (stats / name).write_text(json.dumps(content))
    ok("calibrate", DEMO, *SHORT, "-o", stats)
    table = tmp_path / "table.jsonl"
    measure = ("measure", DEMO, "--space", measured.folder / "space.yaml", "--stats", stats)
    ok(*measure, "-o", table)
    header, rows = table.read_text().split("\n", 1)
    content = json.loads(header)
    del content["model"]["weights_sha256"]
    table.write_text(json.dumps(content) + "\n" + rows)
    assert ok(*measure, "-o", table, "--json").json["rows"] > 0
    recipe = tmp_path / "recipe.yaml"
    ok("search", table, "--max-bits", "5", "-o", recipe)
    assert "weights_sha256" not in recipe.read_text()
