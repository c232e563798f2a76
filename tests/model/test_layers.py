"""Linear layers and fusion groups, against the modules of the real transformers models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TinyCheckpoint
from families import (
    TINY_FAMILIES,
    build_family,
    copy_with_config,
    copy_with_tensors,
    long_but,
)
from safetensors.torch import load_file

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.checkpoint_notes import notes_on
from mofq.model.layers import (
    FUSION_RULES,
    FusionGroup,
    StatedLayers,
    find_layers,
    find_loaded_weight,
)
from mofq.model.layers.joining import joined_apart
from mofq.model.loading import load_model
from mofq.model.sizes import source_bytes

LLAMA_GROUPS = {
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.o": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}

EXPERTS = [f"mlp.experts.{e}.{half}_proj" for e in range(4) for half in ("gate", "up", "down")]

#: family -> prefix of a decoder layer, of experts where it has them -> its fusion groups.
GROUPS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "llama": ("model.layers.0", LLAMA_GROUPS),
    "mistral": ("model.layers.0", LLAMA_GROUPS),
    "qwen2": ("model.layers.0", LLAMA_GROUPS),
    "qwen3": ("model.layers.0", LLAMA_GROUPS),
    "granite": ("model.layers.0", LLAMA_GROUPS),
    "olmo2": ("model.layers.0", LLAMA_GROUPS),
    "olmo3": ("model.layers.0", LLAMA_GROUPS),
    "smollm3": ("model.layers.0", LLAMA_GROUPS),
    "ernie4_5": ("model.layers.0", LLAMA_GROUPS),
    "exaone4": ("model.layers.0", LLAMA_GROUPS),
    "seed_oss": ("model.layers.0", LLAMA_GROUPS),
    "cohere2": ("model.layers.0", LLAMA_GROUPS),
    "glm4": ("model.layers.0", LLAMA_GROUPS | {"mlp.gate_up": ["mlp.gate_up_proj"]}),
    "starcoder2": (
        "model.layers.0",
        {
            "attn.qkv": LLAMA_GROUPS["attn.qkv"],
            "attn.o": LLAMA_GROUPS["attn.o"],
            "mlp.up": ["mlp.c_fc"],
            "mlp.down": ["mlp.c_proj"],
        },
    ),
    "gemma": ("model.layers.0", LLAMA_GROUPS),
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
            "moe.experts": EXPERTS,
        },
    ),
    "qwen2_moe": (
        "model.layers.0",
        {
            "attn.qkv": LLAMA_GROUPS["attn.qkv"],
            "attn.o": LLAMA_GROUPS["attn.o"],
            "mlp.shared_gate_up": ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
            "mlp.shared_down": ["mlp.shared_expert.down_proj"],
            "moe.experts": EXPERTS,
        },
    ),
    "olmoe": (
        "model.layers.0",
        {
            "attn.qkv": LLAMA_GROUPS["attn.qkv"],
            "attn.o": LLAMA_GROUPS["attn.o"],
            "moe.experts": EXPERTS,
        },
    ),
    "glm4_moe": (
        "model.layers.1",
        {
            "attn.qkv": LLAMA_GROUPS["attn.qkv"],
            "attn.o": LLAMA_GROUPS["attn.o"],
            "mlp.shared_gate_up": ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
            "mlp.shared_down": ["mlp.shared_experts.down_proj"],
            "moe.experts": EXPERTS,
        },
    ),
    "deepseek_v3": (
        "model.layers.1",
        {
            "attn.latent": ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"],
            "attn.q": ["self_attn.q_b_proj"],
            "attn.kv": ["self_attn.kv_b_proj"],
            "attn.o": ["self_attn.o_proj"],
            "mlp.shared_gate_up": ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
            "mlp.shared_down": ["mlp.shared_experts.down_proj"],
            "moe.experts": EXPERTS,
        },
    ),
}

EVERY_FAMILY = pytest.mark.parametrize("family", list(TINY_FAMILIES))
HUB_OR_FUSED = pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])


def test_every_family_with_rules_has_a_tiny_checkpoint_and_a_table_of_groups() -> None:
    assert set(FUSION_RULES) == set(TINY_FAMILIES) == set(GROUPS)


@EVERY_FAMILY
@HUB_OR_FUSED
def test_fusion_groups_are_those_of_the_table(
    tiny: TinyCheckpoint, family: str, fused: bool
) -> None:
    prefix, table = GROUPS[family]
    number = prefix.rpartition(".")[2]
    layers = find_layers(open_checkpoint(str(tiny(family, fused=fused))))
    found = {
        group.name.removeprefix(f"layers.{number}."): [layer.name for layer in group.layers]
        for group in layers.groups
        if group.name.startswith(f"layers.{number}.")
    }
    assert found == {name: [f"{prefix}.{path}" for path in table[name]] for name in table}
    assert layers.architecture == family
    assert joined_apart(_words(layers.groups), family) == ()


def _words(groups: Iterable[FusionGroup]) -> dict[str, list[tuple[str, int]]]:
    return {one.name: [(layer.name, layer.in_features) for layer in one.layers] for one in groups}


def test_layers_that_an_earlier_version_left_apart_are_named() -> None:
    attention = "model.layers.3.self_attn"
    apart = {
        "attn.qk": [(f"{attention}.q_proj", 64), (f"{attention}.k_proj", 64)],
        "attn.v": [(f"{attention}.v_proj", 64)],
    }
    names = ("q_proj", "k_proj", "v_proj")
    assert joined_apart(apart, None) == tuple(f"{attention}.{name}" for name in names)
    whole = {"attn.qkv": [*apart["attn.qk"], *apart["attn.v"]]}
    assert joined_apart(whole, None) == ()
    gate = {"attn.gate": [(f"{attention}.gate_proj", 64)]}
    assert joined_apart(whole | gate, None) == ()
    assert joined_apart(whole | gate, "beam")[-1] == f"{attention}.gate_proj"
    of_other_inputs = {**apart, "attn.v": [(f"{attention}.v_proj", 32)]}
    assert joined_apart(of_other_inputs, None) == ()


@pytest.mark.parametrize(
    "family", long_but(TINY_FAMILIES, "llama", "gemma3", "gpt2", "mixtral", "deepseek_v3")
)
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
    for layer in find_layers(checkpoint).linear_layers:
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
    loaded = {find_loaded_weight(layer, family).name for layer in layers.grouped_layers}
    gates = {f"{layer.name}.weight" for layer in layers.unquantized}
    assert {name for name in loaded if ".experts." not in name} == modules - gates


@EVERY_FAMILY
def test_bytes_of_groups_and_of_the_rest_are_the_bytes_of_all_tensors(
    tiny: TinyCheckpoint, family: str
) -> None:
    folder = tiny(family)
    layers = find_layers(open_checkpoint(str(folder)))
    grouped = sum(2 * layer.weights for layer in layers.grouped_layers)
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
    left, right = find_layers(one_by_one).linear_layers, find_layers(fused).linear_layers
    assert [(x.name, x.module, x.shares_scale) for x in left] == [
        (x.name, x.module, x.shares_scale) for x in right
    ]
    assert {x.expert for x in left} == {None}
    assert {x.expert for x in right} == {None, 0, 1, 2, 3}
    for x, y in zip(left, right, strict=True):
        read = read_layer_rows(fused, y, 3, 4)
        assert torch.equal(read_layer_rows(one_by_one, x, 3, 4), read), x.name


def test_layers_that_predict_further_tokens_stay_as_they_are(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    """DeepSeek-V3 and GLM-4.5 keep them after the last decoder layer; transformers leaves them."""
    plain = tiny("deepseek_v3")
    folder = copy_with_tensors(plain, tmp_path / "m", _add_layer_ahead)
    config = json.loads((folder / "config.json").read_text())
    for ahead in (0, 1):
        told = {**config, "num_nextn_predict_layers": ahead}
        (folder / "config.json").write_text(json.dumps(told))
        if not ahead:
            with pytest.raises(CheckpointError, match=r"2 decoder layers .*highest index 2"):
                find_layers(open_checkpoint(str(folder)))
    layers, without = (find_layers(open_checkpoint(str(path))) for path in (folder, plain))
    assert (layers.groups, layers.unquantized) == (without.groups, without.unquantized)
    assert layers.other_bytes == without.other_bytes + 128 * 256 * 2
    assert dict(layers.left_out) == without.left_out | {
        "model.layers.2.eh_proj.weight": "of a layer that predicts further tokens"
    }


def _add_layer_ahead(tensors: dict[str, Any]) -> None:
    tensors["model.layers.2.eh_proj.weight"] = torch.zeros(128, 256, dtype=torch.bfloat16)


def test_every_second_decoder_layer_can_be_a_mixture(tiny: TinyCheckpoint) -> None:
    folder = tiny("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[], num_hidden_layers=3)
    names = [group.name for group in find_layers(open_checkpoint(str(folder))).groups]
    assert [name for name in names if "attn" not in name] == [
        "layers.0.mlp.gate_up",
        "layers.0.mlp.down",
        "layers.1.moe.experts",
        "layers.2.mlp.gate_up",
        "layers.2.mlp.down",
    ]


def test_members_of_a_group_share_a_scale_as_engines_concatenate_them(tiny: TinyCheckpoint) -> None:
    layers = find_layers(open_checkpoint(str(tiny("qwen3_moe"))))
    words = {layer.name: (layer.module, layer.shares_scale) for layer in layers.linear_layers}
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


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2"])
@pytest.mark.parametrize("asked", ["include_lm_head", "include_embeddings"])
def test_a_tied_lm_head_is_one_matrix_with_the_embedding(
    tiny: TinyCheckpoint, family: str, asked: str
) -> None:
    folder = tiny(family, tie_word_embeddings=True)
    layers = find_layers(open_checkpoint(str(folder)))
    assert layers.tied_lm_head
    assert {layer.role for layer in layers.linear_layers} == {"linear"}
    found = find_layers(open_checkpoint(str(folder)), **{asked: True})
    assert found.groups[:-1] == layers.groups
    assert found.groups[-1].name == "embeddings"
    (layer,) = found.groups[-1].layers
    model = load_model(folder)
    weight = model.get_parameter(find_loaded_weight(layer, found.architecture).name)
    assert layer.role == "tied"
    assert weight is model.get_input_embeddings().weight
    assert weight is model.get_output_embeddings().weight
    assert layers.other_bytes - found.other_bytes == source_bytes(found.groups[-1])


def test_an_embedding_of_its_own_is_a_group_that_is_looked_up(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    found = find_layers(checkpoint, include_embeddings=True)
    assert [layer.name for layer in found.unquantized] == ["lm_head"]
    assert [(la.name, la.role) for la in found.groups[-1].layers] == [
        ("model.embed_tokens", "lookup")
    ]


def test_the_embedding_of_an_inferred_type_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    ruled = find_layers(open_checkpoint(str(tiny_llama)), include_embeddings=True)
    inferred = find_layers(
        open_checkpoint(str(tiny_llama)), include_embeddings=True, stated=StatedLayers()
    )
    (one,), (other,) = ruled.groups[-1].layers, inferred.groups[-1].layers
    assert (one.name, one.tensor, one.role) == (other.name, other.tensor, other.role)
    assert other.tensor not in inferred.left_out
    assert (
        "model.embed_tokens.weight"
        in find_layers(open_checkpoint(str(tiny_llama)), stated=StatedLayers()).left_out
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layers_carry_the_dtype_of_the_header(tiny: TinyCheckpoint, dtype: torch.dtype) -> None:
    layers = find_layers(open_checkpoint(str(tiny("llama", dtype=dtype))))
    name = {torch.float16: "F16", torch.float32: "F32"}[dtype]
    assert {layer.dtype for layer in layers.linear_layers} == {name}


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
        open_checkpoint(str(copy_with_tensors(tiny("gpt2"), tmp_path / "gpt2", drop_prefix)))
    )
    assert layers.groups[0].layers[0].name == "transformer.h.0.attn.c_attn"
    assert layers.groups[0].layers[0].tensor == "h.0.attn.c_attn.weight"


def test_without_a_rank_of_queries_deepseek_has_one_matrix_for_them(tiny: TinyCheckpoint) -> None:
    layers = find_layers(open_checkpoint(str(tiny("deepseek_v3", q_lora_rank=None))))
    attention = {
        group.name: [layer.module for layer in group.layers]
        for group in layers.groups
        if group.name.startswith("layers.0.attn.")
    }
    assert attention == {
        "layers.0.attn.q": ["q_proj"],
        "layers.0.attn.latent": ["kv_a_proj_with_mqa"],
        "layers.0.attn.kv": ["kv_b_proj"],
        "layers.0.attn.o": ["o_proj"],
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "gemma3_text", "mixtral"])
def test_a_class_without_a_head_is_read_under_the_names_of_the_whole_model(
    tiny: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    model = transformers.AutoModel.from_pretrained(tiny(family))
    model.save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(str(tmp_path / "base"))
    found = find_layers(checkpoint)
    whole = find_layers(open_checkpoint(str(tiny(family))))
    assert [group.name for group in found.groups] == [group.name for group in whole.groups]
    assert [layer.name for layer in found.grouped_layers] == [
        layer.name for layer in whole.grouped_layers
    ]
    assert not any(layer.module == "lm_head" for layer in found.unquantized)
    assert any("stored as an embedding model" in note for note in notes_on(checkpoint, found))


@pytest.mark.parametrize(
    "left", [{}, {"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}]
)
def test_a_quantization_that_no_tensor_has_is_left_over(
    tiny_llama: Path, tmp_path: Path, left: dict[str, Any]
) -> None:
    for key in ("quantization_config", "quantization"):
        folder = copy_with_config(
            tiny_llama, tmp_path / key, lambda config, key=key: config.update({key: left})
        )
        checkpoint = open_checkpoint(str(folder))
        found = find_layers(checkpoint)
        assert found == find_layers(open_checkpoint(str(tiny_llama)))
        assert key not in checkpoint.config
        (note,) = notes_on(checkpoint, found)
        assert repr(key) in note
        assert "Delete the key" in note


def test_float32_under_a_config_of_bf16_is_said(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    folder = copy_with_config(
        tiny("llama", dtype=torch.float32),
        tmp_path / "m",
        lambda config: config.update(dtype="bfloat16"),
    )
    checkpoint = open_checkpoint(str(folder))
    matrices = [info for info in checkpoint.tensors.values() if len(info.shape) == 2]
    stored = sum(info.nbytes for info in matrices)
    (note,) = notes_on(checkpoint, find_layers(checkpoint))
    assert f"{stored:,} bytes" in note
    plain = open_checkpoint(str(tiny("llama")))
    assert notes_on(plain, find_layers(plain)) == ()
