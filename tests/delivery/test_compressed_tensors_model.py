"""Checkpoints of other tools: read into a recipe, and validated as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import mofq
from conftest import TinyCheckpoint
from emulated import logits_of, validate
from exported import (
    MIXED,
    STORABLE,
    Stored,
    export,
    make_recipe,
    mixed_recipe,
    quantize_layer,
    uniform_recipe,
)
from safetensors.torch import load_file, save_file

from mofq.decision.recipe import load_recipe
from mofq.delivery.apply import emulate
from mofq.delivery.export.compressed_tensors import recipe_from_compressed_tensors
from mofq.delivery.export.compressed_tensors.decoding import read_quantized
from mofq.delivery.export.compressed_tensors.model_from_folder import load_compressed_tensors
from mofq.evidence.corpora import load_text
from mofq.exceptions import BackendError, CheckpointError
from mofq.model.checkpoint.headers import open_checkpoint, open_stored
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import dequantize_weight
from mofq.numbers.schemes import parse_scheme

UP = "model.layers.1.mlp.up_proj"


#: What llm-compressor 0.14 leaves in the folder of a model.
LLM_COMPRESSOR_RECIPE = """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head]
      scheme: W8A8
"""


def make_foreign(folder: Path) -> Path:
    """Take away what says that mofq wrote a folder."""
    (folder / "recipe.yaml").write_text(LLM_COMPRESSOR_RECIPE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", STORABLE)
def test_codes_and_scales_are_read_back_bit_for_bit(
    name: str, stored: Callable[[str], Stored]
) -> None:
    one, scheme = stored(name), parse_scheme(name)
    checkpoint, opened = one.checkpoint, open_stored(str(one.exported.folder))
    assert scheme.weight is not None
    for group in find_layers(checkpoint).groups:
        for layer in group.layers:
            found = read_quantized(opened, layer.name, scheme.weight)
            needed = quantize_layer(checkpoint, group, layer, scheme)
            assert found.codes_OI.dtype is needed.codes_OI.dtype
            assert torch.equal(found.codes_OI, needed.codes_OI)
            assert found.scale is not None
            assert needed.scale is not None
            assert torch.equal(found.scale, needed.scale)
            assert (found.zero_point is None) == (needed.zero_point is None)
            if found.zero_point is not None and needed.zero_point is not None:
                assert torch.equal(found.zero_point, needed.zero_point)
            if found.global_scale is not None:
                assert needed.global_scale is not None
                torch.testing.assert_close(
                    found.global_scale, needed.global_scale, rtol=2e-7, atol=0
                )


@pytest.mark.parametrize("name", STORABLE)
def test_weights_are_decoded_as_compressed_tensors_decompresses_them(
    name: str, stored: Callable[[str], Stored]
) -> None:
    one, weight = stored(name), parse_scheme(name).quantized_weight
    opened, tensors = open_stored(str(one.exported.folder)), one.exported.tensors
    for layer in (name for group in one.recipe.groups for name in group.layers):
        found = dequantize_weight(read_quantized(opened, layer, weight), weight)
        theirs = one.exported.decode(layer, tensors)
        # Theirs divides by the stored reciprocal of a global scale, and rounds to bf16: what lies
        # between two values may become the other one.
        rtol = 2**-7 if weight.scale.global_scale_bits else 0
        torch.testing.assert_close(found.to(theirs.dtype), theirs, rtol=rtol, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mixtral", "phi3", "gpt2"])
def test_a_foreign_folder_computes_what_the_recipe_does(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny(family)
    checkpoint = open_checkpoint(str(folder))
    recipe = mixed_recipe(folder)
    export(folder, recipe, tmp_path / "out")
    found = recipe_from_compressed_tensors(tmp_path / "out")
    model = load_compressed_tensors(open_stored(str(tmp_path / "out")), found)
    expected = emulate.apply(load_model(folder), recipe, checkpoint=checkpoint)
    assert torch.equal(logits_of(model), logits_of(expected))


def test_what_another_tool_changed_beside_the_codes_is_seen(
    tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = make_recipe(checkpoint, lambda n, group: "bf16" if n == 0 else "int8.channel")
    export(tiny_llama, recipe, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    changed = {
        "model.norm.weight": 2.0,
        "model.layers.0.self_attn.q_proj.weight": 2.0,
        "lm_head.weight": 0.5,
        f"{UP}.weight_scale": 4.0,
    }
    for name, factor in changed.items():
        tensors[name] = (tensors[name] * factor).to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    found = recipe_from_compressed_tensors(tmp_path / "out")
    model = load_compressed_tensors(open_stored(str(tmp_path / "out")), found)
    plain = emulate.apply(load_model(tiny_llama), recipe, checkpoint=checkpoint)
    for name, parameter in model.named_parameters():
        key = name if name in changed else f"{name}_scale"
        expected = plain.get_parameter(name) * changed.get(key, 1.0)
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0, msg=name)


def test_a_recipe_is_read_from_a_folder_and_fits_its_original(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = mixed_recipe(tiny_llama)
    export(tiny_llama, recipe, tmp_path / "out")
    file = tmp_path / "found.yaml"
    answer = mofq(
        *("recipe", "from", make_foreign(tmp_path / "out"), "--model", tiny_llama),
        *("-o", file, "--json"),
    ).json
    assert answer["recipe"] == str(file)
    assert sum(answer["fusion_groups"].values()) == len(recipe.groups)
    found = load_recipe(file)
    assert found.index_sha256 == open_checkpoint(str(tiny_llama)).index_sha256
    assert set(answer["fusion_groups"]) == {scheme.partition("@")[0] for scheme in MIXED}
    other = mofq("recipe", "from", tiny_llama, "-o", tmp_path / "no.yaml")
    assert other.code == 1
    assert "found one that is not quantized" in other.err


def test_a_foreign_folder_is_validated_with_its_own_codes(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, "int8.g32@mse")
    export(tiny_llama, recipe, tmp_path / "out")
    words = tmp_path / "words.txt"
    words.write_text("one two three four five six seven eight nine ten " * 40, encoding="utf-8")
    options: dict[str, Any] = {"tokens": 50, "sequence_length": 16}
    ours = validate(str(tiny_llama), tmp_path / "out", load_text(str(words)), **options)
    make_foreign(tmp_path / "out")
    theirs = validate(str(tiny_llama), tmp_path / "out", load_text(str(words)), **options)
    assert ours.enforced is True
    assert theirs.enforced is None
    assert theirs.windows == ours.windows
    assert theirs.bits_per_weight == ours.bits_per_weight


def test_activation_order_and_wrong_originals_are_refused(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny("llama")
    recipe = uniform_recipe(open_checkpoint(str(folder)), "int4.g32")
    export(folder, recipe, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {**tensors, f"{UP}.weight_g_idx": torch.arange(128) % 4}, path, metadata={"format": "pt"}
    )
    with pytest.raises(BackendError, match=r"up_proj.*weight_g_idx"):
        recipe_from_compressed_tensors(tmp_path / "out")
    wide = {**tensors, "model.norm.weight": torch.ones(64)}
    save_file(wide, path, metadata={"format": "pt"})
    found = recipe_from_compressed_tensors(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"(?s)cannot load.*other shapes"):
        load_compressed_tensors(open_stored(str(tmp_path / "out")), found)
    short = {k: v for k, v in tensors.items() if k != f"{UP}.weight_scale"}
    save_file(
        short | {f"{UP}.weight_scale": torch.ones(256, 2, dtype=torch.bfloat16)},
        path,
        metadata={"format": "pt"},
    )
    found = recipe_from_compressed_tensors(tmp_path / "out")
    with pytest.raises(BackendError, match=r"up_proj.weight_scale: needed \[256, 4\]"):
        load_compressed_tensors(open_stored(str(tmp_path / "out")), found)
