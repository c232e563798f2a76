"""Exported checkpoints, read back by compressed-tensors and by transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from exported import (
    STORABLE,
    Exported,
    export,
    make_recipe,
    mixed_recipe,
    quantize_layer,
    uniform_recipe,
)
from families import copy_with_tensors
from safetensors.torch import load_file, save_file
from tiny_types import write_type
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from mofq.decision.recipe import Recipe, RecipeGroup, load_recipe
from mofq.delivery.backends import apply_recipe, find_exporter
from mofq.delivery.export.compressed_tensors import (
    check_compressed_tensors,
    export_compressed_tensors,
)
from mofq.delivery.export.compressed_tensors import plan as plan_module
from mofq.engines.exports.compressed_tensors import storage_of
from mofq.exceptions import BackendError, MofqError, RecipeError, SchemeError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import dequantize_weight
from mofq.numbers.schemes import parse_scheme


def test_a_mixed_checkpoint_has_one_config_group_per_scheme(
    tiny_llama: Path, tmp_path: Path
) -> None:
    exported = export(tiny_llama, mixed_recipe(tiny_llama), tmp_path / "out")
    config = exported.config["quantization_config"]
    assert config["format"] == "mixed-precision"
    formats = [group["format"] for group in config["config_groups"].values()]
    assert formats == [
        "int-quantized",
        "float-quantized",
        "pack-quantized",
        "pack-quantized",
        "pack-quantized",
    ]


@pytest.mark.parametrize(
    ("scheme", "kind", "strategy", "dynamic"),
    [
        ("int8.channel+int8.token", "int", "token", True),
        ("int8.tensor+int8.tensor", "int", "tensor", False),
        ("fp8_e4m3.channel+fp8_e4m3.token", "float", "token", True),
        ("fp8_e4m3.tensor+fp8_e4m3.tensor", "float", "tensor", False),
        ("fp8_e4m3.block128+fp8_e4m3.g128", "float", "group", True),
        ("nvfp4+nvfp4", "float", "tensor_group", "local"),
        ("mxfp8+mxfp8", "float", "group", True),
    ],
)
def test_the_config_says_which_scales_of_inputs_are_stored(
    scheme: str, kind: str, strategy: str, dynamic: bool | str
) -> None:
    storage = storage_of(parse_scheme(scheme), where="layer")
    inputs = storage.input_activations
    assert inputs is not None
    assert (inputs["type"], inputs["strategy"], inputs["dynamic"]) == (kind, strategy, dynamic)
    assert storage.weights["dynamic"] is False


def test_every_linear_layer_and_what_engines_join_are_named_once_in_full(
    tiny_llama: Path, tmp_path: Path
) -> None:
    exported = export(tiny_llama, mixed_recipe(tiny_llama), tmp_path / "out")
    config = exported.config["quantization_config"]
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    layers = find_layers(open_checkpoint(str(tiny_llama)))
    every = [layer.name for layer in layers.grouped_layers]
    every += [layer.name for layer in layers.unquantized]
    joined = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    every += [f"model.layers.{index}.{module}" for index in range(2) for module in joined]
    assert sorted(targets + config["ignore"]) == sorted(every)
    assert not any(name.startswith("re:") or "." not in name for name in targets)
    assert "lm_head" in config["ignore"]


def test_a_tied_lm_head_is_ignored_by_name(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny("llama", tie_word_embeddings=True)
    recipe = uniform_recipe(open_checkpoint(str(folder)), "int4.g64")
    exported = export(folder, recipe, tmp_path / "out")
    assert exported.config["quantization_config"]["ignore"] == ["lm_head"]


def test_a_recipe_that_quantizes_nothing_is_a_copy(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = uniform_recipe(open_checkpoint(str(tiny_llama)), "bf16")
    exported = export(tiny_llama, recipe, tmp_path / "out")
    assert "quantization_config" not in exported.config
    original = load_file(tiny_llama / "model.safetensors")
    assert exported.tensors.keys() == original.keys()
    assert all(torch.equal(tensor, original[key]) for key, tensor in exported.tensors.items())


WEIGHTS = ("int8.channel", "int4.g32@fullrange", "bf16", "int4.g64", "fp8_e4m3.channel")


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(
    ("schemes", "dequantize"),
    [
        (WEIGHTS, False),
        # Of a mixture transformers 5.23 takes one scheme for all layers, and stops.
        (WEIGHTS[1:2], True),
        (("int8.channel", "bf16"), True),
        (("fp8_e4m3.channel",), True),
    ],
)
def test_transformers_computes_what_was_emulated(
    tiny_llama: Path, tmp_path: Path, schemes: tuple[str, ...], dequantize: bool
) -> None:
    # Without activations, which transformers rounds in the model's own dtype.
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = make_recipe(checkpoint, lambda number, group: schemes[number % len(schemes)])
    export(tiny_llama, recipe, tmp_path / "out")
    tokens = torch.arange(40).reshape(2, 20) * 5 % 256
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=dequantize),
    )
    # Kept as it is on disk until the first forward pass, or not at all.
    kept = any(name.endswith("weight_scale") for name, _ in model.named_parameters())
    assert kept is not dequantize
    emulated = apply_recipe(load_model(tiny_llama), recipe)
    with torch.inference_mode():
        found, expected = model(tokens).logits, emulated(tokens).logits
        original = load_model(tiny_llama)(tokens).logits
    # Decompressed weights are rounded to the scales' dtype, bfloat16: 8 bits.
    assert (found - expected).norm() < 2**-7 * expected.norm()
    assert (found - expected).norm() < 0.5 * (original - expected).norm()


def test_shards_hold_the_same_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = mixed_recipe(tiny_llama)
    whole = export(tiny_llama, recipe, tmp_path / "whole").tensors
    shards = export(tiny_llama, recipe, tmp_path / "shards", shard_bytes=100_000)
    assert len(list(shards.folder.glob("model-*.safetensors"))) > 1
    found = shards.tensors
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_blocks_of_rows_change_no_byte(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    choices = ("nvfp4", "int4.g64.asym", "fp8_e4m3.block64x32", "int8.tensor+int8.token")
    recipe = make_recipe(checkpoint, lambda number, group: choices[number % len(choices)])
    whole = export(tiny_llama, recipe, tmp_path / "whole").tensors
    monkeypatch.setattr(plan_module, "_BLOCK_ELEMENTS", 1)
    blocks = export(tiny_llama, recipe, tmp_path / "blocks").tensors
    assert all(torch.equal(blocks[key], whole[key]) for key in whole)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_get_tensors_of_their_own(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, fused: bool
) -> None:
    folder = tiny(family, fused=fused)
    checkpoint = open_checkpoint(str(folder))
    recipe = make_recipe(
        checkpoint,
        lambda number, group: "int4.g64" if group.name.endswith("experts") else "bf16",
    )
    exported = export(folder, recipe, tmp_path / "out")
    experts = [g for g in find_layers(checkpoint).groups if g.name.endswith("experts")]
    names = {f"{layer.name}.weight_packed" for group in experts for layer in group.layers}
    packed = {key for key in exported.tensors if key.endswith("weight_packed")}
    assert packed == names
    assert all(".experts." in name for name in names)
    assert not any("gate_up_proj" in key for key in exported.tensors)
    ignored = exported.config["quantization_config"]["ignore"]
    assert any(name.endswith(".gate") for name in ignored)
    check_compressed_tensors(checkpoint, recipe, tmp_path / "out")


def test_both_names_of_a_layer_are_targets(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    # Gemma 3 is "language_model.model." on disk and "model.language_model." in transformers.
    folder = tiny("gemma3")
    recipe = uniform_recipe(open_checkpoint(str(folder)), "int8.channel+int8.token")
    exported = export(folder, recipe, tmp_path / "out")
    targets = exported.config["quantization_config"]["config_groups"]["group_0"]["targets"]
    assert "language_model.model.layers.0.self_attn.q_proj" in targets
    assert "model.language_model.layers.0.self_attn.q_proj" in targets


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("fp4_e2m1.g32", "nvfp4, mxfp4 or int4.gN"),
        ("int8.g64+int8.token", "int8.channel"),
        ("nf4.g64", "no element nf4"),
        ("int4.g128.s-e4m3", "no e4m3 scales"),
        ("fp8_e4m3.g64+fp8_e4m3.token", "group weights"),
        ("fp8_e4m3.unscaled+fp8_e4m3.unscaled", "has a scale"),
        ("fp8_e5m2.channel+fp8_e5m2.token", "no element fp8_e5m2"),
        ("mxfp6_e2m3", "no e8m0 scales"),
        ("bf16+int8.token", "weights must be quantized"),
        ("int4.g64+int4.token", "int4 activations"),
        ("mxfp4+fp8_e4m3.token", "same format"),
        ("int8.channel+int8.token.s-bf16", "f32"),
        ("int4.tensor", "per channel or group"),
        ("int8.channel+int8.token.out6", "plain rule alone"),
        ("int8.tensor+int8.peg8", "plain rule alone"),
        ("nvfp4+nvfp4@fouroversix", "plain rule alone"),
        ("mx9", "no micro16 scales"),
        ("mxint8", "no e8m0 scales"),
    ],
)
def test_what_cannot_be_expressed_is_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, scheme: str, words: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = make_recipe(
        checkpoint, lambda number, group: scheme if number == 3 else "int8.channel"
    )
    with pytest.raises(BackendError) as caught:
        export_compressed_tensors(checkpoint, recipe, tmp_path / "out")
    message = str(caught.value)
    assert "model.layers.0.mlp.down_proj" in message
    assert recipe.schemes["model.layers.0.mlp.down_proj"] in message
    assert words in message
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_does_not_divide_a_layer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    with pytest.raises(MofqError, match=r"layers\.0.*divisible by 96"):
        export_compressed_tensors(
            checkpoint, uniform_recipe(checkpoint, "int4.g96"), tmp_path / "out"
        )


@pytest.mark.parametrize("scheme", STORABLE)
def test_of_a_conv1d_the_codes_called_weight_are_stored_transposed_and_all_else_is_upright(
    scheme: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny("gpt2")
    checkpoint = open_checkpoint(str(folder))
    exported = export(folder, uniform_recipe(checkpoint, scheme), tmp_path / "out")
    as_loaded = {  # what the class of GPT-2 in vLLM and SGLang makes of a folder
        name: tensor.t() if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else tensor
        for name, tensor in exported.tensors.items()
    }
    weight = parse_scheme(scheme).quantized_weight
    for group in find_layers(checkpoint).groups:
        for layer in group.layers:
            codes = quantize_layer(checkpoint, group, layer, parse_scheme(scheme))
            theirs = exported.decode(layer.name, as_loaded)
            rtol = 2**-7 if weight.scale.global_scale_bits else 0
            ours = dequantize_weight(codes, weight).to(theirs.dtype)
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
            for word in ("weight", "weight_packed"):
                stored = exported.tensors.get(f"{layer.name}.{word}")
                if stored is not None:
                    side = stored.shape[1 if word == "weight" else 0]
                    assert side == layer.out_features


def test_transposed_layers_that_no_class_of_an_engine_turns_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_type("openai-gpt", tmp_path / "model")))
    with pytest.raises(BackendError, match=r"h\.0\.attn\.c_attn.*no engine.*openai-gpt.*bf16"):
        export_compressed_tensors(
            checkpoint, uniform_recipe(checkpoint, "int8.channel"), tmp_path / "out"
        )


def test_a_conv1d_is_exported_for_the_engines_whose_class_turns_it(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny("gpt2")))
    recipe = uniform_recipe(checkpoint, "int8.channel+int8.token")
    for engine in ("vllm-cpu", "vllm-hopper", "sglang-hopper"):
        export_compressed_tensors(checkpoint, recipe, tmp_path / engine, engine=engine)
    with pytest.raises(BackendError, match=r"c_attn is stored transposed.*torch\.nn\.Linear"):
        export_compressed_tensors(checkpoint, recipe, tmp_path / "out", engine="transformers")


def test_a_missing_static_scale_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, "nvfp4+nvfp4")
    groups = tuple(RecipeGroup(g.name, g.scheme, g.layers) for g in recipe.groups)
    without = Recipe(recipe.model_name, recipe.index_sha256, groups, recipe.unquantized)
    with pytest.raises(RecipeError, match="static_amax"):
        export_compressed_tensors(checkpoint, without, tmp_path / "out")


def test_an_engine_that_cannot_serve_it_refuses_it(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, "int8.g64")
    with pytest.raises(BackendError, match=r"layers\.0\.attn\.qkv in int8\.g64: vllm-cpu"):
        export_compressed_tensors(checkpoint, recipe, tmp_path / "out", engine="vllm-cpu")
    with pytest.raises(BackendError, match="to=torchao"):
        export_compressed_tensors(checkpoint, recipe, tmp_path / "out", engine="torchao-cpu")
    assert not (tmp_path / "out").exists()


def test_the_serve_command_holds_what_makes_it_exact(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, "int4.g32")
    out = tmp_path / "out"
    written = export_compressed_tensors(checkpoint, recipe, out, engine="vllm-cpu")
    start = "VLLM_CPU_INT4_W4A8=0 python -m vllm.entrypoints.openai.api_server --model"
    assert written.serve_command == f"{start} {out} --dtype bfloat16"
    assert written.serve_command in (out / "README.md").read_text("utf-8")
    assert written.checkpoint_bytes == sum(
        tensor.numel() * tensor.element_size() for tensor in Exported(out).tensors.values()
    )


def test_a_failure_leaves_nothing_behind(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(SchemeError, match=r"layers\.1\.mlp\.down_proj.*nan at \[3, 5\]"):
        export_compressed_tensors(
            checkpoint, uniform_recipe(checkpoint, "int8.channel"), tmp_path / "out"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_files_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, "int8.channel")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(BackendError, match="found files in it"):
        export_compressed_tensors(checkpoint, recipe, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    export_compressed_tensors(checkpoint, recipe, out)
    assert (out / "model.safetensors").is_file()


def test_other_files_are_copied_and_the_card_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "README.md").write_text("the original card")
    (model / "vocabulary.txt").write_text("words")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    (model / ".cache").mkdir()
    recipe = mixed_recipe(model)
    exported = export(model, recipe, tmp_path / "out")
    names = {path.name for path in exported.folder.iterdir()}
    assert names == {path.name for path in tiny_llama.iterdir()} | {
        "README.md",
        "README.original.md",
        "vocabulary.txt",
        "recipe.yaml",
    }
    assert (exported.folder / "README.original.md").read_text() == "the original card"
    for name in ("tokenizer.json", "vocabulary.txt"):
        assert (exported.folder / name).read_bytes() == (model / name).read_bytes()
    assert load_recipe(exported.folder / "recipe.yaml") == recipe
    card = (exported.folder / "README.md").read_text("utf-8")
    assert "`int4.g32@fullrange`" in card
    assert str(recipe.index_sha256) in card


def test_a_link_out_of_the_folder_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (tmp_path / "secret").write_text("private")
    os.symlink(tmp_path / "secret", model / "vocabulary.bpe")
    with pytest.raises(BackendError, match="outside of the model's folder"):
        export(model, mixed_recipe(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_into_the_hubs_cache_are_followed(tiny_llama: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in tiny_llama.iterdir():
        shutil.copyfile(path, blobs / path.name)
        os.symlink(os.path.join("..", "..", "blobs", path.name), snapshot / path.name)
    exported = export(snapshot, mixed_recipe(snapshot), tmp_path / "out")
    copied = exported.folder / "tokenizer.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()


def test_unknown_backends_are_refused_with_the_nearest_name(tiny_llama: Path) -> None:
    with pytest.raises(BackendError, match="Did you mean 'compressed-tensors'"):
        find_exporter("compressed-tensor")
    for name, to in (("vllm-hopper", "compressed-tensors"), ("gguf", "llama.cpp")):
        with pytest.raises(BackendError, match=f"to={to}"):
            find_exporter(name)
    assert find_exporter("compressed-tensors") is export_compressed_tensors
    recipe = uniform_recipe(open_checkpoint(str(tiny_llama)), "bf16")
    with pytest.raises(BackendError, match="Did you mean 'emulate'"):
        apply_recipe(load_model(tiny_llama), recipe, "emulat")


@pytest.mark.parametrize("scheme", ["int4.g32", "bf16"])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3"]
)
def test_the_layout_of_the_source_changes_no_byte_of_an_export(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, scheme: str
) -> None:
    folders = {fused: tiny(family, fused=fused) for fused in (False, True)}
    plain, fused = (
        export(folder, uniform_recipe(open_checkpoint(str(folder)), scheme), tmp_path / str(name))
        for name, folder in folders.items()
    )
    assert fused.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(fused.tensors[key], plain.tensors[key]) for key in plain.tensors)
    configs = [one.config.get("quantization_config") for one in (plain, fused)]
    assert configs[0] == configs[1]
    checkpoint = open_checkpoint(str(folders[True]))
    check_compressed_tensors(checkpoint, load_recipe(fused.folder / "recipe.yaml"), fused.folder)


def test_a_class_without_a_head_is_exported_whole_with_the_folders_of_its_modules(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    whole = tiny("qwen3", tie_word_embeddings=True)
    source = copy_with_tensors(
        whole,
        tmp_path / "m",
        lambda tensors: [
            tensors.update({name.removeprefix("model."): tensors.pop(name)})
            for name in list(tensors)
        ],
    )
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}]
    (source / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "additional_chat_templates", "onnx"):
        (source / name).mkdir()
        (source / name / "config.json").write_text("{}")
    recipe = uniform_recipe(open_checkpoint(str(source)), "int4.g32")
    found = export(source, recipe, tmp_path / "out")
    expected = export(
        whole, uniform_recipe(open_checkpoint(str(whole)), "int4.g32"), tmp_path / "whole"
    )
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[key], expected.tensors[key]) for key in expected.tensors)
    folders = sorted(path.name for path in found.folder.iterdir() if path.is_dir())
    assert folders == ["1_Pooling", "additional_chat_templates"]
    assert (found.folder / "1_Pooling" / "config.json").read_text() == "{}"
