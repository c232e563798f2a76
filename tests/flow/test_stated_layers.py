"""What the user says of a model's layers (``--layers FILE``), through the whole flow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import mofq
from tiny_types import write_type
from type_flow import run_flow

from mofq.decision.recipe import load_recipe

_FILE = """\
version: 1
left:
  mlp.input_linear: experts in one tensor
  mlp.output_linear: experts in one tensor
  self_attention.experts.input_linear: experts in one tensor
  self_attention.experts.output_linear: experts in one tensor
joined:
  attn.everything: [self_attention.kv_proj]
"""


@pytest.fixture
def jetmoe(tmp_path: Path) -> Path:
    return write_type("jetmoe", tmp_path / "jetmoe")


@pytest.fixture
def said(tmp_path: Path) -> Path:
    path = tmp_path / "layers.yaml"
    path.write_text(_FILE)
    return path


def test_what_names_do_not_say_is_refused_with_what_to_write(jetmoe: Path) -> None:
    ran = mofq("inspect", jetmoe)
    assert ran.code == 1
    assert "`left: {mlp.input_linear: why it stays as it is}`" in ran.err
    assert "--layers" in ran.err


@pytest.mark.long
def test_a_type_is_settled_by_a_file_and_later_stages_need_no_file(
    jetmoe: Path, said: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    assert run_flow(jetmoe, work, layers=said) > 0
    recipe = load_recipe(work / "recipe.yaml")
    assert recipe.layers is not None
    assert recipe.layers.to_json() == yaml.safe_load(_FILE)
    assert "layers.0.attn.everything" in {group.name for group in recipe.groups}
    config = json.loads((work / "exported" / "config.json").read_text())
    assert config["mofq_layers"] == recipe.layers.to_json()
    ran = mofq("recipe", "from", work / "exported", "--model", jetmoe, "-o", work / "read.yaml")
    assert ran.code == 0, ran.err
    assert load_recipe(work / "read.yaml").schemes == recipe.schemes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 2\n", "version 1"),
        ("version: 1\nlinears: [a]\n", "linears"),
        ("version: 1\nleft: {mlp.unknown: a router}\n", "has 'mlp.unknown'"),
        ("version: 1\nstack: model.blocks\n", "the list of decoder layers 'model.blocks'"),
    ],
)
def test_a_file_that_is_not_valid_or_names_nothing_is_refused(
    jetmoe: Path, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "layers.yaml"
    path.write_text(
        text if "left" not in text else _FILE.replace("left:\n", "left:\n  mlp.unknown: x\n")
    )
    ran = mofq("inspect", jetmoe, "--layers", path)
    assert ran.code == 1
    assert message in ran.err
