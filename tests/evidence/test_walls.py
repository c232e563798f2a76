"""The walls experiment, and the published selection that it is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from safetensors.torch import load_file

import scripts.make.llama3_70b_example as llama3_70b_example
import scripts.reproduce.walls as walls_experiment
from mofq.decision.recipe import load_recipe
from mofq.demo import demo_model_folder
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.numbers.schemes import parse_scheme


def test_the_70b_example_is_what_its_script_writes_and_marks_what_is_recalled() -> None:
    text = llama3_70b_example.PATH.read_text("utf-8")
    assert text == llama3_70b_example.example_text()
    recipe = load_recipe(llama3_70b_example.PATH)
    layers = [layer for group in recipe.groups for layer in group.layers]
    assert len(layers) == len(set(layers)) == 560
    finer = [g for g in recipe.groups if g.scheme == "int8.g1024+int8.token"]
    assert sum(len(group.layers) for group in finer) == 15
    assert 15 / 560 < 0.03
    assert {group.name.split(".")[1] for group in finer} == {"0", "1", "3"}
    scheme_lines = [line for line in text.splitlines() if line.startswith("    scheme:")]
    assert len(scheme_lines) == len(recipe.groups) == 320
    for line in scheme_lines:
        assert "# " in line
        assert ("recalled, not seen" in line) or ("int8.channel" in line and "seen:" in line)
    assert all(parse_scheme(group.scheme).name == group.scheme for group in recipe.groups)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_walled_copy_computes_the_same_bit_by_bit(
    tiny: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    model = Path(tiny(family))
    groups = find_layers(open_checkpoint(str(model))).groups
    walls = walls_experiment.plan_walls(groups, seed=3, share=0.4)
    assert walls
    assert all((wall.log2, len(wall.channels)) == (9, 2) for wall in walls)
    assert sum(len(wall.group.layers) for wall in walls) <= 0.4 * sum(len(g.layers) for g in groups)
    walls_experiment.write_walled(model, tmp_path / "walled", walls)
    before, after = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (model, tmp_path / "walled")
    )
    wall = walls[0]
    for layer in wall.group.layers:
        ratio = after[layer.tensor] / before[layer.tensor]
        assert (ratio[:, list(wall.channels)] == 2.0**9).all()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {w.norm for w in walls} | {y.tensor for w in walls for y in w.group.layers}
    ids = torch.arange(32)
    for dtype in (torch.float32, torch.bfloat16):
        difference = walls_experiment.largest_difference(model, tmp_path / "walled", ids, dtype)
        assert difference == 0.0


def test_a_wall_that_leaves_the_range_of_bf16_is_refused() -> None:
    with pytest.raises(AssertionError, match="left the range"):
        walls_experiment.scaled(torch.full((2, 4), 3e38, dtype=torch.bfloat16), [1], 6)


@pytest.mark.long
def test_the_experiment_finds_its_walls_in_the_bundled_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", "demo-en", "--tokens", "512", "--seeds", "1", "--max-finer", "0.13"]
    folder = str(demo_model_folder())
    walls_experiment.main([folder, *arguments, "--work", str(tmp_path)])
    (one,) = json.loads((tmp_path / "results.json").read_text())["seeds"]
    assert one["missed"] == []
    assert one["others"] == []
    assert one["logits_differ_by"] == {"float32": 0.0, "bfloat16": 0.0}
    kl = one["kl"]
    assert kl["weights, found"] < 0.3 * kl["weights, uniform"]
    assert kl["W8A8, walls in bf16"] < kl["W8A8, uniform"]
    assert "| 0 | 2^6 | 1 |" in capsys.readouterr().out
    assert not (tmp_path / "seed-0" / "model").exists()
