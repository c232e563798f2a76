"""Linear layers and fusion groups, against the modules of the real transformers models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TinyCheckpoint
from families import TINY_FAMILIES, build_family
from safetensors.torch import load_file, save_file

from mofq.checkpoint.headers import open_checkpoint
from mofq.checkpoint.tensors import read_layer_rows
from mofq.exceptions import CheckpointError
from mofq.layers import FUSION_RULES, LinearLayer, ModelLayers, find_layers, find_loaded_weight

LLAMA_GROUPS = {
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.o": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}

#: family -> prefix of decoder layer 0 -> its fusion groups.
GROUPS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "llama": ("model.layers.0", LLAMA_GROUPS),
    "mistral": ("model.layers.0", LLAMA_GROUPS),
    "qwen2": ("model.layers.0", LLAMA_GROUPS),
    "qwen3": ("model.layers.0", LLAMA_GROUPS),
    "gemma2": ("model.layers.0", LLAMA_GROUPS),
    "gemma3_text": ("model.layers.0", LLAMA_GROUPS),
    "gemma3": ("language_model.model.layers.0", LLAMA_GROUPS),
    "phi3": (
        "model.layers.0",
        {
            "attn.qkv": ["self_attn.qkv_proj"],
            "attn.o": ["self_attn.o_proj"],
            "mlp.gate_up": ["mlp.gate_up_proj"],
            "mlp.down": ["mlp.down_proj"],
        },
    ),
    "opt": (
        "model.decoder.layers.0",
        {
            "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attn.o": ["self_attn.out_proj"],
            "mlp.up": ["fc1"],
            "mlp.down": ["fc2"],
        },
    ),
    "gpt2": (
        "transformer.h.0",
        {
            "attn.qkv": ["attn.c_attn"],
            "attn.o": ["attn.c_proj"],
            "mlp.up": ["mlp.c_fc"],
            "mlp.down": ["mlp.c_proj"],
        },
    ),
    "mixtral": (
        "model.layers.0",
        {
            "attn.qkv": LLAMA_GROUPS["attn.qkv"],
            "attn.o": LLAMA_GROUPS["attn.o"],
            "moe.experts": [
                f"block_sparse_moe.experts.{e}.{w}" for e in range(4) for w in ("w1", "w3", "w2")
            ],
        },
    ),
    "qwen3_moe": (
        "model.layers.0",
        {
            "attn.qkv": LLAMA_GROUPS["attn.qkv"],
            "attn.o": LLAMA_GROUPS["attn.o"],
            "moe.experts": [
                f"mlp.experts.{e}.{half}_proj" for e in range(4) for half in ("gate", "up", "down")
            ],
        },
    ),
}

EVERY_FAMILY = pytest.mark.parametrize("family", list(TINY_FAMILIES))
HUB_OR_FUSED = pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])


def every_layer(layers: ModelLayers) -> list[LinearLayer]:
    grouped = [layer for group in layers.groups for layer in group.layers]
    return [*grouped, *layers.unquantized]


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint whose config went through ``edit``."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def retensored(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a one-file checkpoint whose tensors went through ``edit``."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_every_family_with_rules_has_a_tiny_checkpoint_and_a_table_of_groups() -> None:
    assert set(FUSION_RULES) == set(TINY_FAMILIES) == set(GROUPS)


@EVERY_FAMILY
@HUB_OR_FUSED
def test_fusion_groups_are_those_of_the_table(
    tiny: TinyCheckpoint, family: str, fused: bool
) -> None:
    prefix, table = GROUPS[family]
    layers = find_layers(open_checkpoint(str(tiny(family, fused=fused))))
    found = {
        group.name.removeprefix("layers.0."): [layer.name for layer in group.layers]
        for group in layers.groups
        if group.name.startswith("layers.0.")
    }
    assert found == {name: [f"{prefix}.{path}" for path in table[name]] for name in table}
    assert layers.architecture == family


@EVERY_FAMILY
@HUB_OR_FUSED
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_weight_of_the_loaded_model_is_a_layer_once_and_reads_back_the_same(
    tiny: TinyCheckpoint, family: str, fused: bool, tied: bool
) -> None:
    folder = tiny(family, fused=fused, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }
    # Whatever the model multiplies with: no norm or bias, no lookup, no vision. A tied
    # lm_head is listed under the name of the embedding alone.
    left = {
        name: torch.ones_like(parameter, dtype=torch.bool)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and name not in embeddings
        and "vision" not in name
        and "multi_modal" not in name
    }
    parameters = dict(model.named_parameters())
    for layer in every_layer(find_layers(checkpoint)):
        loaded = find_loaded_weight(layer, family)
        expert = ... if loaded.expert is None else loaded.expert
        weight, unseen = parameters[loaded.name][expert], left[loaded.name][expert]
        if loaded.transposed:
            weight, unseen = weight.T, unseen.T
        rows = slice(loaded.row_start, loaded.row_start + layer.out_features)
        assert torch.equal(
            read_layer_rows(checkpoint, layer, 0, layer.out_features), weight[rows]
        ), layer.name
        assert unseen[rows].all(), layer.name
        unseen[rows] = False
    assert [name for name, mask in left.items() if mask.any()] == []


@EVERY_FAMILY
def test_grouped_layers_are_the_linear_modules_of_the_decoder(
    tiny: TinyCheckpoint, family: str
) -> None:
    model = build_family(family)
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    modules = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, linear) and "vision" not in name
        if ".layers." in name or ".h." in name
    }
    layers = find_layers(open_checkpoint(str(tiny(family))))
    loaded = {
        find_loaded_weight(layer, family).name for group in layers.groups for layer in group.layers
    }
    assert {name for name in loaded if ".experts." not in name} == modules


@EVERY_FAMILY
def test_bytes_of_groups_and_of_the_rest_are_the_bytes_of_all_tensors(
    tiny: TinyCheckpoint, family: str
) -> None:
    folder = tiny(family)
    layers = find_layers(open_checkpoint(str(folder)))
    grouped = sum(2 * layer.weights for group in layers.groups for layer in group.layers)
    tensors = load_file(folder / "model.safetensors").values()
    assert grouped + layers.other_bytes == sum(t.numel() * t.element_size() for t in tensors)


@EVERY_FAMILY
def test_what_rules_assume_of_a_silent_config_is_what_transformers_assumes(family: str) -> None:
    config = getattr(transformers, TINY_FAMILIES[family].config)()
    text = config.get_text_config()
    rules = FUSION_RULES[family]
    for key, value in rules.defaults.items():
        assert getattr(text, key, value) == value, key
    assert config.tie_word_embeddings is rules.tied


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_have_the_same_names_and_weights_in_both_layouts(
    tiny: TinyCheckpoint, family: str
) -> None:
    one_by_one = open_checkpoint(str(tiny(family)))
    fused = open_checkpoint(str(tiny(family, fused=True)))
    left, right = every_layer(find_layers(one_by_one)), every_layer(find_layers(fused))
    assert [(x.name, x.module, x.shares_scale) for x in left] == [
        (x.name, x.module, x.shares_scale) for x in right
    ]
    assert {x.expert for x in left} == {None}
    assert {x.expert for x in right} == {None, 0, 1, 2, 3}
    for x, y in zip(left, right, strict=True):
        read = read_layer_rows(fused, y, 3, 4)
        assert torch.equal(read_layer_rows(one_by_one, x, 3, 4), read), x.name


def test_members_of_a_group_share_a_scale_as_engines_concatenate_them(tiny: TinyCheckpoint) -> None:
    layers = find_layers(open_checkpoint(str(tiny("qwen3_moe"))))
    words = {layer.name: (layer.module, layer.shares_scale) for layer in every_layer(layers)}
    assert words["model.layers.0.self_attn.k_proj"] == ("k_proj", "qkv")
    assert words["model.layers.0.self_attn.o_proj"] == ("o_proj", "o")
    assert words["model.layers.1.mlp.up_proj"] == ("up_proj", "gate_up")
    assert words["model.layers.0.mlp.experts.3.gate_proj"] == (
        "experts.gate_proj",
        "experts.3.gate_up",
    )
    assert words["model.layers.0.mlp.experts.3.down_proj"] == (
        "experts.down_proj",
        "experts.3.down",
    )


def test_routers_and_projections_around_the_decoder_stay_unquantized(tiny: TinyCheckpoint) -> None:
    def unquantized(family: str) -> list[str]:
        layers = find_layers(open_checkpoint(str(tiny(family))))
        return [layer.name for layer in layers.unquantized]

    assert unquantized("qwen3_moe") == ["model.layers.0.mlp.gate", "lm_head"]
    assert unquantized("mixtral") == [
        "model.layers.0.block_sparse_moe.gate",
        "model.layers.1.block_sparse_moe.gate",
        "lm_head",
    ]
    assert unquantized("opt") == ["model.decoder.project_in", "model.decoder.project_out"]
    assert unquantized("gpt2") == []


def test_the_two_c_proj_of_gpt2_have_different_module_words(tiny: TinyCheckpoint) -> None:
    layers = find_layers(open_checkpoint(str(tiny("gpt2"))))
    words = [layer.module for group in layers.groups[:4] for layer in group.layers]
    assert words == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_an_untied_lm_head_is_a_group_when_asked_for(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    without, with_head = find_layers(checkpoint), find_layers(checkpoint, include_lm_head=True)
    assert [layer.name for layer in without.unquantized] == ["lm_head"]
    assert with_head.unquantized == ()
    assert with_head.groups[:-1] == without.groups
    assert with_head.groups[-1].name == "lm_head"
    assert without.other_bytes - with_head.other_bytes == 2 * 256 * 128
    assert not without.tied_lm_head


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_tied_lm_head_is_no_layer_and_cannot_be_asked_for(
    tiny: TinyCheckpoint, family: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family, tie_word_embeddings=True)))
    layers = find_layers(checkpoint)
    assert layers.tied_lm_head
    assert "lm_head" not in [layer.module for layer in every_layer(layers)]
    with pytest.raises(CheckpointError, match=r"tied to the embedding .*embed_tokens"):
        find_layers(checkpoint, include_lm_head=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layers_carry_the_dtype_of_the_header(tiny: TinyCheckpoint, dtype: torch.dtype) -> None:
    layers = find_layers(open_checkpoint(str(tiny("llama", dtype=dtype))))
    name = {torch.float16: "F16", torch.float32: "F32"}[dtype]
    assert {layer.dtype for layer in every_layer(layers)} == {name}


def test_shards_make_no_difference_to_the_layers(tiny: TinyCheckpoint) -> None:
    folder = tiny("llama", shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert find_layers(open_checkpoint(str(folder))) == find_layers(
        open_checkpoint(str(tiny("llama")))
    )


def test_names_are_whole_where_a_checkpoint_leaves_the_prefix_out(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    def drop_prefix(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        # GPT-2 on the hub also stores its causal mask.
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    layers = find_layers(
        open_checkpoint(str(retensored(tiny("gpt2"), tmp_path / "gpt2", drop_prefix)))
    )
    assert layers.groups[0].layers[0].name == "transformer.h.0.attn.c_attn"
    assert layers.groups[0].layers[0].tensor == "h.0.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        ("llama", {"model_type": "mamba"}, r"'mamba'; known are llama, mistral, .*qwen3_moe"),
        ("llama", {"model_type": None}, r"model_type None; known are"),
        ("llama", {"model_type": "gpt2"}, r"needs tensors named transformer\.h\.0"),
        ("llama", {"num_hidden_layers": 3}, r"needed 3 decoder layers .* found 2"),
        ("llama", {"num_hidden_layers": 1}, r"needed 1 decoder layers .* found 2 .*index 1"),
        ("llama", {"num_hidden_layers": 10**9}, r"needed 1000000000 decoder .* found 2"),
        ("llama", {"hidden_size": 256}, r"q_proj\.weight' of shape \[128, 256\] .*\[128, 128\]"),
        ("llama", {"intermediate_size": 512}, r"gate_proj.* \[512, 128\] .*found \[256, 128\]"),
        ("llama", {"num_key_value_heads": 4}, r"k_proj.* \[128, 128\] .*found \[64, 128\]"),
        ("llama", {"hidden_size": "128"}, r"'hidden_size' needs a positive integer .*found '128'"),
        ("llama", {"hidden_size": 0}, r"'hidden_size' needs a positive integer .*found 0"),
        ("llama", {"hidden_size": 10**4000}, r"'hidden_size' needs .* below 2\*\*31"),
        ("llama", {"hidden_size": None}, r"needed 'hidden_size' or 'n_embd', found neither"),
        ("llama", {"vocab_size": 300}, r"embed_tokens.* \[300, 128\] .*found \[256, 128\]"),
        ("gemma2", {"tie_word_embeddings": False}, r"'lm_head.weight' .*found none"),
        ("gemma3", {"text_config": 3}, r"'text_config' needs an object, found 3"),
        ("qwen3_moe", {"mlp_only_layers": []}, r"layers.1.mlp.experts.0.gate_proj.*found none"),
        ("qwen3_moe", {"mlp_only_layers": 1}, r"'mlp_only_layers' as a list"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, r"'decoder_sparse_step' as a positive"),
        ("qwen3_moe", {"num_local_experts": 3}, r"mlp.gate.weight' of shape \[3, 128\]"),
        ("mixtral", {"num_local_experts": 5}, r"experts.4.w1.weight'.*found none"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, r"'fp8'.*quantized already"),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, edit: dict[str, Any], message: str
) -> None:
    folder = edited(tiny(family), tmp_path / "model", lambda config: config.update(edit))
    with pytest.raises(CheckpointError, match=message) as caught:
        find_layers(open_checkpoint(str(folder)))
    assert str(folder) in str(caught.value)


def test_an_unknown_matrix_in_a_decoder_layer_is_not_dropped(
    tiny_llama: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_a_proj.weight"
    folder = retensored(
        tiny_llama, tmp_path / "m", lambda tensors: tensors.update({name: torch.zeros(4, 128)})
    )
    with pytest.raises(CheckpointError, match=rf"{name}.*no rule of family 'llama'"):
        find_layers(open_checkpoint(str(folder)))


def test_a_missing_matrix_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = retensored(tiny_llama, tmp_path / "m", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{name}.* shape \[128, 256\].*found none"):
        find_layers(open_checkpoint(str(folder)))


def test_an_fp8_source_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def to_fp8(tensors: dict[str, Any]) -> None:
        key = "model.layers.0.self_attn.q_proj.weight"
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.ones(1, 1)

    folder = retensored(tiny_llama, tmp_path / "m", to_fp8)
    with pytest.raises(CheckpointError, match=r"q_proj.weight_scale_inv.*Give the original"):
        find_layers(open_checkpoint(str(folder)))


def test_a_weight_in_a_dtype_that_is_no_source_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    folder = retensored(
        tiny_llama,
        tmp_path / "m",
        lambda tensors: tensors.update({key: tensors[key].to(torch.float64)}),
    )
    with pytest.raises(CheckpointError, match=r"needs dtype BF16, F16, F32, found F64"):
        find_layers(open_checkpoint(str(folder)))
