"""By what vLLM's classes look layers up that are loaded under another name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exported import make_recipe
from tiny_types import write_type

from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.engines.vllm_names import vllm_prefixes
from mofq.model.checkpoint.headers import open_checkpoint


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("falcon_h1", "model.layers.1.mamba.in_proj", "model.5.mixer.in_proj"),
        ("falcon_h1", "model.layers.1.self_attn.q_proj", "model.layers.1.q_proj"),
        ("falcon_h1", "model.layers.1.feed_forward.up_proj", None),
        ("granitemoehybrid", "model.layers.0.mamba.in_proj", "model.layers.0.mixer.in_proj"),
        ("granitemoehybrid", "model.layers.1.self_attn.o_proj", None),
        ("jamba", "model.layers.0.mamba.x_proj", "model.layers.0.mixer.x_proj"),
        ("jamba", "model.layers.1.self_attn.o_proj", "model.layers.1.o_proj"),
        ("zamba2", "model.layers.0.mamba.in_proj", "2.mixer.in_proj"),
        ("zamba2", "model.layers.3.mamba_decoder.mamba.out_proj", "5.mixer.out_proj"),
        ("zamba2", "model.layers.3.linear", "5.linear"),
        ("llama", "model.layers.1.self_attn.o_proj", None),
        ("llama", "lm_head", None),
        ("qwen2_5_vl", "lm_head", "language_model.lm_head"),
        ("qwen2_5_vl", "model.layers.1.self_attn.o_proj", None),
    ],
)
def test_a_layer_has_the_prefix_that_its_class_gives_it(
    architecture: str, name: str, expected: str | None
) -> None:
    every = [name, "model.layers.1.mamba_decoder.mamba.in_proj"]
    every += ["model.layers.3.mamba_decoder.mamba.in_proj", "model.layers.2.mamba.in_proj"]
    found = vllm_prefixes([name], architecture, every=every)
    assert found == ([] if expected is None else [expected])


def test_an_export_names_layers_by_prefixes_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_type("falcon_h1", tmp_path / "model")))

    def choose(_: int, group: object) -> str:
        return "int8.channel" if "attn.qkv" in str(group) else "bf16"

    export_compressed_tensors(checkpoint, make_recipe(checkpoint, choose), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    quantization = config["quantization_config"]
    targets = quantization["config_groups"]["group_0"]["targets"]
    assert {"model.layers.2.self_attn.q_proj", "model.layers.2.q_proj"} <= set(targets)
    assert "model.layers.2.qkv_proj" in targets
    assert {"model.layers.0.mamba.in_proj", "model.4.mixer.in_proj"} <= set(quantization["ignore"])
