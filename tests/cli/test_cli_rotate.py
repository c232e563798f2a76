"""`mofq rewrite --method rotate`: what it says, what it refuses, and a run that rotates."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import DEMO, ok, refused, tree

import mofq as package

TEXT = ("--text", "demo-en", "--tokens", "256", "--sequence-length", "64")


def test_a_rotated_model_is_written_and_measured_to_be_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = ok("rewrite", DEMO, "--method", "rotate", "-o", out)
    assert "128 channels of the residual stream rotated, and 32 of each head's values" in ran.err
    assert "a tensor of its own now: 393.2 kB more" in ran.err
    assert ok("validate", DEMO, out, *TEXT, "--json").json["kl_nats_per_token"] < 2e-5
    options = ("--method", "rotate", "--seed", "1", "--json")
    content = ok("rewrite", DEMO, *options, "-o", tmp_path / "other").json
    assert content["rotation"] == {"seed": 1, "hidden": 128, "head": 32}
    assert content["untied_bytes"] == 393216
    others = tree(tmp_path / "other")
    assert others["model.safetensors"] != tree(out)["model.safetensors"]


def test_options_of_other_methods_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, words in (
        (("--method", "rotate", "--stats", "stats"), "--stats: a rotation follows from its seed"),
        (("--method", "rotate", "--powers-of-two"), "--powers-of-two: a rotation follows"),
        (("--method", "awq", "--stats", "stats", "--seed", "1"), "--seed: is for --method rotate"),
        (("--method", "awq"), "give --stats"),
        (("--method", "rotat"), "--method rotat: unknown. Did you mean 'rotate'?"),
        (("--method", "rotate", "--seed", "-1"), "--seed -1: needed an integer of 0 or more"),
        (("--method", "rotate", "--seed", str(2**64)), "needed an integer of 0 or more"),
    ):
        assert words in refused("rewrite", DEMO, *options, "-o", out)
    assert not out.exists()


@pytest.mark.long
def test_a_run_of_best_effort_rotates_and_one_recipe_makes_its_folder_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = ("run", DEMO, "--space", "w8a8", "--max-bits", "8.2", "--engine", "vllm-cpu", *TEXT)
    size = ("--sequences", "4", "--rivals", "0", "--effort", "best")
    content = ok(*run, *size, "-o", folder, "--json").json
    names = [one["name"] for one in content["tried"]]
    assert "rotated" in names
    recipe = package.load_recipe(folder / "recipe.yaml")
    assert (recipe.rewriting is not None) == any(one["taken"] for one in content["tried"][1:-1])
    stats, again = ("--stats", folder / "stats"), tmp_path / "again"
    ok("export", DEMO, folder / "recipe.yaml", *stats, "-o", again)
    exported = tree(folder / "model")
    exported.pop("README.md")
    assert {name: data for name, data in tree(again).items() if name != "README.md"} == exported
