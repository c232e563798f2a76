"""A model runs with the weights of its checkpoint and with no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DEMO, ok, refused
from families import copy_with_config, copy_with_tensors

from mofq.model.loading import load_model

SHORT = ("--corpus", "en=demo-en-calibration", "--sequences", "4", "--sequence-length", "32")
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


def test_a_language_model_whose_class_is_not_named_is_refused_in_few_words(tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config.update(model_type="emu3_text_model", pad_token_id=0)
        del config["architectures"]

    folder = copy_with_config(Path(DEMO), tmp_path / "model", edit)
    message = refused("calibrate", folder, *SHORT, "-o", tmp_path / "stats")
    assert "has to name its class as 'architectures', as ['Emu3ForCausalLM']" in message
    assert len(message) < 600


def test_an_embedding_model_is_not_run_for_next_tokens(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"

    def edit(config: dict[str, Any]) -> None:
        config.update(architectures=["LlamaModel"])

    folder = copy_with_config(Path(DEMO), tmp_path / "model", edit)
    ok("recipe", "uniform", folder, "int4.g32", "-o", recipe)
    ok("export", folder, recipe, "-o", tmp_path / "out")
    assert "stored as an embedding model" in ok("inspect", folder).err
    for arguments in (
        ("calibrate", folder, *SHORT, "-o", tmp_path / "stats"),
        ("validate", folder, recipe, *TEXT),
        ("run", folder, "--space", "w8a8", "--max-bits", "8", "-o", tmp_path / "run"),
    ):
        assert "'LlamaModel', an embedding model" in refused(*arguments)


@pytest.mark.parametrize("left", [{}, {"quant_method": "fp8"}, {"quant_method": "bitsandbytes"}])
def test_a_quantization_that_is_left_over_changes_no_weight(
    tmp_path: Path, left: dict[str, Any]
) -> None:
    folder = copy_with_config(
        Path(DEMO), tmp_path / "m", lambda config: config.update(quantization_config=left)
    )
    found, expected = load_model(folder).state_dict(), load_model(Path(DEMO)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_infinity_in_a_norm_is_named_before_anything_is_measured(tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"

    def edit(tensors: dict[str, Any]) -> None:
        tensors[name][3] = float("inf")

    folder = copy_with_tensors(Path(DEMO), tmp_path / "model", edit)
    for arguments in (
        ("measure", folder, "--space", "w8a8", "-o", tmp_path / "table.jsonl"),
        ("calibrate", folder, *SHORT, "-o", tmp_path / "stats"),
    ):
        message = refused(*arguments)
        assert f"model.safetensors: {name!r} holds inf at [3]" in message
    assert not (tmp_path / "table.jsonl").exists()
