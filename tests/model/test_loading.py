"""A model runs with the weights of its checkpoint and with no others."""

from __future__ import annotations

from pathlib import Path

from command_line import DEMO, ok, refused
from families import copy_with_tensors

SHORT = ("--corpus", "en=demo-en-calibration", "--sequences", "2", "--sequence-length", "32")
TEXT = ("--text", "demo-en", "--tokens", "64", "--sequence-length", "32")


def test_a_weight_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    folder = copy_with_tensors(Path(DEMO), tmp_path / "model", lambda tensors: tensors.pop(name))
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", folder, "int4.g32", "-o", recipe)
    for arguments in (
        ("calibrate", folder, *SHORT, "-o", tmp_path / "stats"),
        ("validate", folder, recipe, *TEXT),
    ):
        message = refused(*arguments)
        assert f"needed {name!r} for a model of class LlamaForCausalLM, found none (1" in message
        assert "A shard is missing" in message
