"""Recipes written for other tools, read back as those tools read them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from compressed_tensors.quantization import QuantizationScheme
from conftest import TinyCheckpoint
from exported import make_recipe, mixed_recipe, uniform_recipe

from mofq.decision import uniform_recipe as uniform_of_layers
from mofq.delivery.backends import RECIPE_EXPORTERS, find_exporter
from mofq.delivery.export.auto_round import auto_round_config
from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.delivery.export.llama_cpp import llama_cpp_arguments
from mofq.delivery.export.llm_compressor import llm_compressor_recipe
from mofq.delivery.export.modelopt import modelopt_config
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers


def test_every_exporter_is_found_and_writes(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, "nvfp4")
    for name in RECIPE_EXPORTERS:
        path = find_exporter(name)(checkpoint, recipe, tmp_path / name)
        assert path == tmp_path / name
        assert path.is_file()


def test_llm_compressor_gets_the_config_groups(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    text = llm_compressor_recipe(checkpoint, mixed_recipe(tiny_llama))
    document = yaml.safe_load(text)
    modifier = document["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    for group in modifier["config_groups"].values():
        QuantizationScheme.model_validate(group)
    targets = [name for group in modifier["config_groups"].values() for name in group["targets"]]
    layers = find_layers(checkpoint)
    every = {layer.name for layer in layers.grouped_layers}
    assert set(targets) | set(modifier["ignore"]) == every | {"lm_head"}
    assert len(targets) == len(set(targets))


def test_llm_compressor_is_not_asked_to_do_nothing(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    with pytest.raises(BackendError, match="quantizes nothing"):
        llm_compressor_recipe(checkpoint, uniform_recipe(checkpoint, "bf16"))


def test_modelopt_gets_one_algorithm_a_layer(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    choices = ("fp8_e4m3.channel@mse+fp8_e4m3.token", "nvfp4+nvfp4", "bf16", "int4.g128@fullrange")
    recipe = make_recipe(checkpoint, lambda number, group: choices[number % 4])
    text = modelopt_config(checkpoint, recipe)
    quantization = json.loads(text)["quantization"]
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    algorithms = {
        name: each["quant_algo"] for name, each in quantization["quantized_layers"].items()
    }
    assert algorithms["model.layers.0.self_attn.q_proj"] == "FP8_PER_CHANNEL_PER_TOKEN"
    assert algorithms["model.layers.0.self_attn.o_proj"] == "NVFP4"
    assert algorithms["model.layers.0.mlp.down_proj"] == "W4A16_AWQ"
    assert set(quantization["exclude_modules"]) == {
        "lm_head",
        *(f"model.layers.{index}.mlp.{name}_proj" for index in (0, 1) for name in ("gate", "up")),
    }


def test_modelopt_names_a_mixture_that_stays_as_it_is(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    fp8 = "fp8_e4m3.tensor+fp8_e4m3.tensor"
    recipe = make_recipe(checkpoint, lambda number, group: ("bf16", fp8)[".1." in group.name])
    quantization = json.loads(modelopt_config(checkpoint, recipe))["quantization"]
    assert "model.layers.0.block_sparse_moe.experts" in quantization["exclude_modules"]
    assert "model.layers.1.block_sparse_moe.experts" not in quantization["exclude_modules"]
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in quantization["quantized_layers"]


def test_an_export_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mofq.delivery.backends.find_spec", lambda name: None)
    with pytest.raises(
        BackendError, match=r"needs the package torchao.*pip install '\.\[torchao\]'"
    ):
        find_exporter("torchao")
    assert find_exporter("modelopt") is not None


def test_modelopt_has_no_integers(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, "int8.channel+int8.token")
    with pytest.raises(BackendError, match=r"layers\.0\.self_attn\.q_proj: ModelOpt has no"):
        modelopt_config(checkpoint, recipe)
    assert not (tmp_path / "config.json").exists()


def test_auto_round_gets_bits_and_groups(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    choices = ("int8.channel+int8.token", "int4.g64.asym", "mxfp4", "nvfp4+nvfp4")
    recipe = make_recipe(checkpoint, lambda number, group: choices[number % 4])
    text = auto_round_config(checkpoint, recipe)
    config = json.loads(text)
    assert config["model.layers.0.self_attn.q_proj"] == {
        "bits": 8,
        "group_size": -1,
        "sym": True,
        "data_type": "int",
        "act_bits": 8,
        "act_group_size": -1,
        "act_sym": True,
        "act_data_type": "int",
        "act_dynamic": True,
    }
    o_proj = config["model.layers.0.self_attn.o_proj"]
    assert (o_proj["bits"], o_proj["group_size"], o_proj["sym"]) == (4, 64, False)
    assert config["model.layers.0.mlp.up_proj"]["data_type"] == "mx_fp"
    assert config["model.layers.0.mlp.down_proj"]["act_data_type"] == "nv_fp4_with_static_gs"
    assert config["lm_head"]["bits"] == 16
    with pytest.raises(BackendError, match="no words for nf4"):
        auto_round_config(checkpoint, uniform_recipe(checkpoint, "nf4.g64"))


def test_llama_cpp_does_not_take_the_lm_head_for_the_output_of_attention(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    layers = find_layers(checkpoint, include_lm_head=True, include_embeddings=True)
    recipe = uniform_of_layers(checkpoint, layers, "int8.channel")
    patterns = re.findall(r"--tensor-type (\S+)=", llama_cpp_arguments(checkpoint, recipe))
    names = ["token_embd.weight", "output.weight", "blk.0.attn_output.weight"]
    found = {name: [one for one in patterns if re.search(one, name)] for name in names}
    assert {name: len(some) for name, some in found.items()} == dict.fromkeys(names, 1)


def test_a_tied_embedding_is_for_llama_cpp_alone(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny("llama", tie_word_embeddings=True)))
    layers = find_layers(checkpoint, include_embeddings=True)
    recipe = uniform_of_layers(checkpoint, layers, "int8.channel")
    arguments = llama_cpp_arguments(checkpoint, recipe)
    assert r"--tensor-type ^token_embd\.weight=q8_0" in arguments
    assert " output" not in arguments
    with pytest.raises(BackendError, match=r"embed_tokens: compressed-tensors .* tie an lm_head"):
        export_compressed_tensors(checkpoint, recipe, tmp_path / "out")
    with pytest.raises(BackendError, match=r"embed_tokens: AutoRound quantizes linear layers"):
        auto_round_config(checkpoint, recipe)
    left = uniform_of_layers(checkpoint, layers, "bf16")
    assert "model.embed_tokens" not in auto_round_config(checkpoint, left)


@pytest.mark.parametrize(
    ("scheme", "kind", "words"),
    [
        ("int8.channel+int8.token", "q8_0", "activations as llama.cpp quantizes them"),
        ("int4.g32@fullrange", "q4_0", "f16 scale"),
        ("int4.g32.asym", "q4_1", "f16 scale"),
        ("int6.g64", "q8_0", "in_features % 256 != 0, so q8_0 in place of q6_k"),
        ("fp4_e2m1.g32", "iq4_nl", "fp4_e2m1.g32 with bf16 scales becomes iq4_nl"),
        ("bf16", "bf16", "nothing"),
    ],
)
def test_llama_cpp_gets_the_nearest_type_and_the_loss(
    tiny_llama: Path, scheme: str, kind: str, words: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    text = llama_cpp_arguments(checkpoint, uniform_recipe(checkpoint, scheme))
    lines = text.splitlines()
    assert rf"--tensor-type blk\.0\.attn_q\.weight={kind}" in lines
    assert any("blk.0.attn_q.weight" in line and words in line for line in lines)
    arguments = [line for line in lines if not line.startswith("#")]
    assert len(arguments) == 14
    assert all(re.fullmatch(r"--tensor-type [\w\\.]+=\w+", line) for line in arguments)


def test_llama_cpp_names_the_experts_together(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    recipe = uniform_recipe(checkpoint, "int4.g32")
    text = llama_cpp_arguments(checkpoint, recipe)
    arguments = [line for line in text.splitlines() if line[0] == "-"]
    assert r"--tensor-type blk\.1\.ffn_down_exps\.weight=q4_0" in arguments
    assert len(arguments) == 2 * 7


def test_llama_cpp_refuses_a_layer_that_it_cannot_name(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("gpt2")))
    with pytest.raises(BackendError, match="no name in GGUF"):
        llama_cpp_arguments(checkpoint, uniform_recipe(checkpoint, "int4.g32"))
