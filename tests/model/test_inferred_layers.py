"""The inferred structure, against the rules of the families that have some, and against models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from families import TINY_FAMILIES, copy_with_config, copy_with_tensors, long_but
from safetensors.torch import load_file
from tiny_types import CAUSAL_TYPES, build_type, tiny_config, write_type
from torch import nn
from transformers.pytorch_utils import Conv1D
from type_facts import find_facts

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.checkpoint_notes import notes_on
from mofq.model.layers import ModelLayers, find_exported_name, find_layers, find_loaded_weight
from mofq.model.layers.infer_layers import infer_layers
from mofq.model.layers.joining import JOINED
from mofq.model.layers.names_in_memory import as_pattern, find_in_memory, known_types
from mofq.model.loading import load_model

REPOSITORY = Path(__file__).parents[2]

#: A type of each structure that has no rules, and groups of its decoder layers, written by hand.
GROUPS: dict[str, dict[str, list[str]]] = {
    "falcon": {
        "layers.0.attn.qkv": ["transformer.h.0.self_attention.query_key_value"],
        "layers.0.attn.o": ["transformer.h.0.self_attention.dense"],
        "layers.0.mlp.up": ["transformer.h.0.mlp.dense_h_to_4h"],
        "layers.0.mlp.down": ["transformer.h.0.mlp.dense_4h_to_h"],
    },
    "qwen3_5": {
        "layers.0.linear_attn.in_proj_ba": [
            "model.layers.0.linear_attn.in_proj_b",
            "model.layers.0.linear_attn.in_proj_a",
        ],
        "layers.0.linear_attn.in_proj_qkvz": [
            "model.layers.0.linear_attn.in_proj_qkv",
            "model.layers.0.linear_attn.in_proj_z",
        ],
        "layers.0.linear_attn.out": ["model.layers.0.linear_attn.out_proj"],
        "layers.0.mlp.gate_up": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
        "layers.0.mlp.down": ["model.layers.0.mlp.down_proj"],
    },
    "mamba2": {
        "layers.0.mixer.in": ["backbone.layers.0.mixer.in_proj"],
        "layers.0.mixer.out": ["backbone.layers.0.mixer.out_proj"],
    },
    "lfm2": {
        "layers.0.conv.in": ["model.layers.0.conv.in_proj"],
        "layers.0.conv.out": ["model.layers.0.conv.out_proj"],
        "layers.0.mlp.gate_up": [
            "model.layers.0.feed_forward.w1",
            "model.layers.0.feed_forward.w3",
        ],
        "layers.0.mlp.down": ["model.layers.0.feed_forward.w2"],
    },
    "deepseek_v32": {
        "layers.0.attn.latent": [
            "model.layers.0.self_attn.q_a_proj",
            "model.layers.0.self_attn.kv_a_proj_with_mqa",
        ],
        "layers.0.attn.q": ["model.layers.0.self_attn.q_b_proj"],
        "layers.0.attn.kv": ["model.layers.0.self_attn.kv_b_proj"],
        "layers.0.attn.o": ["model.layers.0.self_attn.o_proj"],
        "layers.0.mlp.gate_up": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
        "layers.0.mlp.down": ["model.layers.0.mlp.down_proj"],
    },
    "granitemoe": {
        "layers.0.attn.qkv": [f"model.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v")],
        "layers.0.attn.o": ["model.layers.0.self_attn.o_proj"],
        "layers.0.moe.experts": [
            f"model.layers.0.block_sparse_moe.experts.{expert}.{word}_proj"
            for expert in range(4)
            for word in ("gate", "up", "down")
        ],
    },
    "gpt_oss": {
        "layers.0.attn.qkv": [f"model.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v")],
        "layers.0.attn.o": ["model.layers.0.self_attn.o_proj"],
        "layers.0.moe.experts": [  # gates and ups in turn: one matrix
            f"model.layers.0.mlp.experts.{expert}.{word}_proj"
            for expert in range(4)
            for word in ("gate_up", "down")
        ],
    },
    "lfm2_moe": {
        "layers.0.conv.in": ["model.layers.0.conv.in_proj"],
        "layers.0.conv.out": ["model.layers.0.conv.out_proj"],
        "layers.0.mlp.gate_up": [
            "model.layers.0.feed_forward.w1",
            "model.layers.0.feed_forward.w3",
        ],
        "layers.0.mlp.down": ["model.layers.0.feed_forward.w2"],
    },
}


@pytest.mark.parametrize(
    "family", long_but(TINY_FAMILIES, "llama", "gemma3", "gpt2", "mixtral", "deepseek_v3")
)
@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
def test_what_is_inferred_of_a_family_with_rules_is_what_the_rules_say(
    tiny: TinyCheckpoint, family: str, fused: bool
) -> None:
    checkpoint = open_checkpoint(str(tiny(family, fused=fused)))
    ruled, inferred = find_layers(checkpoint), infer_layers(checkpoint)
    assert [group.name for group in inferred.groups] == [group.name for group in ruled.groups]
    for one, other in zip(inferred.grouped_layers, ruled.grouped_layers, strict=True):
        assert one.loaded == find_loaded_weight(other, family), one.name
        fields = [field for field in one.__dataclass_fields__ if field != "loaded"]
        assert [getattr(one, f) for f in fields] == [getattr(other, f) for f in fields]
    if family != "gpt2":  # whose attention is not called self_attn
        assert inferred.caches == ruled.caches
    assert inferred.tied_lm_head == ruled.tied_lm_head
    assert inferred.other_bytes == ruled.other_bytes
    assert inferred.left_out == ruled.left_out


@pytest.fixture
def tiny_type(tmp_path: Path) -> Any:
    """Writes a tiny checkpoint of a type without rules, and returns it and its model."""

    def write(name: str, *, fused: bool = False) -> tuple[Path, nn.Module]:
        model = build_type(name)
        folder = tmp_path / f"{name}-{fused}"
        model.save_pretrained(folder, save_original_format=not fused)
        return folder, model

    return write


@pytest.mark.parametrize("name", long_but(GROUPS, "falcon", "granitemoe"))
@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
def test_groups_of_a_type_without_rules_are_those_of_the_table(
    tiny_type: Any, name: str, fused: bool
) -> None:
    folder, _ = tiny_type(name, fused=fused)
    layers = find_layers(open_checkpoint(str(folder)))
    first = [group for group in layers.groups if group.name.startswith("layers.0.")]
    assert {group.name: [layer.name for layer in group.layers] for group in first} == GROUPS[name]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama4_text", 4),  # asks its cache how long it is
        ("kosmos-2.5", 4),  # whose config calls the hidden size embed_dim
        ("zamba", 0),  # two layers share one attention, and each of them caches
        ("gemma4_text", 0),  # heads of two sizes
    ],
)
def test_caches_are_of_attention_that_caches_by_head(tmp_path: Path, name: str, count: int) -> None:
    caches = find_layers(open_checkpoint(str(write_type(name, tmp_path / name)))).caches
    assert [cache.name for cache in caches] == [f"layers.{i}.attn.kv_cache" for i in range(count)]
    assert {cache.head_size for cache in caches} <= {16}


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h"])
def test_the_embedding_of_a_backbone_is_found(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(str(write_type(name, tmp_path / name)))
    (embedding,) = find_layers(checkpoint, include_embeddings=True).groups[-1].layers
    assert embedding.tensor == "backbone.embeddings.weight"


#: That cannot be built, or whose structure is refused; docs/reference/families.md says why.
def _with_structure() -> Iterator[str]:
    page = (REPOSITORY / "docs" / "reference" / "families.md").read_text("utf-8")
    page = page.partition("## Types that read images")[0]
    row = r"^\| \**`([\w-]+)`\** \| ([^|]*) \| (?:passes|refused: )"
    for name, groups in re.findall(row, page, re.MULTILINE):
        if groups.strip():
            yield name


@pytest.mark.parametrize("name", long_but(_with_structure(), "jamba"))
def test_every_linear_module_that_runs_is_listed_once_and_reads_back_the_same(
    tiny_type: Any, name: str
) -> None:
    folder, model = tiny_type(name)
    checkpoint = open_checkpoint(str(folder))
    layers = find_layers(checkpoint)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[str, torch.Tensor] = {}
    for layer in layers.linear_layers:
        at = find_loaded_weight(layer, layers.architecture)
        whole = parameters[at.name]
        mask = seen.setdefault(at.name, torch.zeros_like(whole, dtype=torch.bool))
        index = ... if at.expert is None else at.expert
        weight, part = whole[index], mask[index]
        if at.transposed:
            weight, part = weight.T, part.T
        rows = slice(at.row_start, at.row_start + layer.out_features)
        read = read_layer_rows(checkpoint, layer, 0, layer.out_features)
        assert torch.equal(read, weight[rows]), layer.name
        assert not part[rows].any(), layer.name
        part[rows] = True
    assert [key for key, mask in seen.items() if not mask.all()] == []
    _check_joined(layers)
    stacks = known_types()[name].stacks
    listed = {id(parameters[key]) for key in seen}  # also where another module has it too
    missing = [
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(key.startswith(f"{stack}.") for stack in stacks)
        and id(module.weight) not in listed
        and "norm" not in key
        and "embed" not in key
    ]
    assert missing == []


def _check_joined(layers: ModelLayers) -> None:
    """See that layers which engines join under transformers' names are together under any."""
    group_of = {layer.name: group.name for group in layers.groups for layer in group.layers}
    beside: dict[str, dict[str, str]] = {}
    for layer in layers.grouped_layers:
        at = find_loaded_weight(layer, layers.architecture)
        if at.expert is None:
            above, _, word = at.name.removesuffix(".weight").rpartition(".")
            beside.setdefault(above, {})[word] = group_of[layer.name]
    for words in beside.values():
        for joined, _ in JOINED:
            if all(word in words for word in joined):
                assert len({words[word] for word in joined}) == 1, words


def test_names_of_the_hub_that_transformers_would_write_otherwise_stay(tmp_path: Path) -> None:
    source = write_type("kimi_linear", tmp_path / "saved")
    saved = "model.layers.0.block_sparse_moe."

    def as_published(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(saved)]:
            tensors[name.replace(saved, "model.layers.0.mlp.")] = tensors.pop(name)

    folder = copy_with_tensors(source, tmp_path / "published", as_published)
    layers = find_layers(open_checkpoint(str(folder)))
    names = [layer.name for layer in layers.grouped_layers if layer.decoder_layer == 0]
    dense = [f"model.layers.0.mlp.{word}_proj" for word in ("gate", "up", "down")]
    assert [name for name in names if "self_attn" not in name] == dense
    assert {find_exported_name(f"{name}.weight", layers) for name in dense} == {
        f"{name}.weight" for name in dense
    }
    loaded = [find_loaded_weight(layer, "kimi_linear").name for layer in layers.grouped_layers]
    assert {f"{name}.weight" for name in dense} <= {*loaded}


#: Words of a reason -> what is true then of the module of transformers that has the tensor.
IS_SO: dict[str, Callable[[nn.Module], bool]] = {
    "convolution": lambda module: isinstance(module, nn.Conv1d | nn.Conv2d),
    "the embedding": lambda module: isinstance(module, nn.Embedding),
    "second table of words": lambda module: isinstance(module, nn.Embedding),
    "looked up": lambda module: isinstance(module, nn.Embedding),
    "parameter of its own": lambda module: not isinstance(module, nn.Linear),
    "more with it than a product": lambda module: type(module).forward is not nn.Linear.forward,
    "one number": lambda module: len(module.get_parameter("weight")) == 1,
}
OUTSIDE = ("the lm_head", "the embedding", "a second table", "positions", "outside", "of another")
#: Words of a reason, and words of which a class on the way to the tensor has one in its name.
IS_IN = {
    "part of a norm": ("norm",),
    "router": ("router", "gate", "gating", "moe", "mixture", "sparse", "expert"),
    "indexer": ("indexer",),
}


@pytest.mark.parametrize(
    "name", long_but(_with_structure(), "jamba", "qwen2_moe", "gpt2", "bart", "gemma3n_text")
)
def test_every_matrix_is_grouped_or_is_left_out_for_a_reason_that_is_true(
    tiny_type: Any, name: str
) -> None:
    folder, model = tiny_type(name)
    checkpoint = open_checkpoint(str(folder))
    layers = find_layers(checkpoint)
    grouped = {layer.tensor for layer in layers.grouped_layers}
    matrices = {key for key, info in checkpoint.tensors.items() if len(info.shape) > 1}
    assert matrices == grouped | layers.left_out.keys()
    assert not grouped & layers.left_out.keys()
    modules, stacks = dict(model.named_modules()), known_types()[name].stacks
    ran = _modules_that_run(model)
    for tensor, why in layers.left_out.items():
        own = find_in_memory(tensor, layers.architecture).name
        above = own.rpartition(".")[0]
        if not own or above not in modules:
            continue  # transformers makes something else of it
        is_outside = not own.startswith(tuple(f"{stack}." for stack in stacks))
        assert is_outside == why.startswith(OUTSIDE), (tensor, why)
        for words, is_so in IS_SO.items():
            assert words not in why or is_so(modules[above]), (tensor, why)
        parts = above.split(".")
        kinds = [type(modules[".".join(parts[:n])]).__name__ for n in range(1, len(parts) + 1)]
        for word, some in IS_IN.items():
            is_so = any(one in kind.lower() for kind in kinds for one in some)
            assert word not in why or is_so, (tensor, why, kinds)
        assert "does not run" not in why or above not in ran, tensor


def _modules_that_run(model: nn.Module) -> set[str]:
    ran: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    with torch.inference_mode():
        model(input_ids=torch.arange(24)[None] + 65, use_cache=False)
    return ran


def test_routers_gates_and_scans_are_left_out_by_name(tmp_path: Path) -> None:
    def left_out(name: str) -> dict[str, str]:
        checkpoint = open_checkpoint(str(write_type(name, tmp_path / name)))
        return dict(find_layers(checkpoint).left_out)

    jamba, moe = left_out("jamba"), left_out("qwen2_moe")
    assert jamba["model.layers.0.mamba.conv1d.weight"] == "a convolution"
    assert "time steps" in jamba["model.layers.0.mamba.dt_proj.weight"]
    assert "a router" in jamba["model.layers.1.feed_forward.router.weight"]
    for index in range(4):
        assert "a router" in moe[f"model.layers.{index}.mlp.gate.weight"]
        assert "a gate" in moe[f"model.layers.{index}.mlp.shared_expert_gate.weight"]
    per_layer = left_out("gemma3n_text")["model.embed_tokens_per_layer.weight"]
    assert "no stage measures its lookups" in per_layer


@pytest.mark.parametrize("with_towers", [False, True])
def test_decoder_layers_that_attend_to_images_are_left_out_whole(
    with_towers: bool, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(write_type("mllama", tmp_path / "m", multimodal=with_towers)))
    layers = find_layers(checkpoint)
    text = checkpoint.config["text_config"] if with_towers else checkpoint.config
    crossing = min(text["cross_attention_layers"])
    assert {layer.decoder_layer for layer in layers.grouped_layers} == {0, 1, 2, 3} - {crossing}
    assert len({cache.decoder_layer for cache in layers.caches}) == 3
    of_layer = {
        name.partition(f".layers.{crossing}.")[2]: why
        for name, why in layers.left_out.items()
        if f"{layers.body}layers.{crossing}." in name
    }
    for word in ("q", "k", "v", "o"):
        assert of_layer[f"cross_attn.{word}_proj.weight"] == "transformers does not run it on text"
    for word in ("gate", "up", "down"):
        assert "does not run its decoder layer" in of_layer[f"mlp.{word}_proj.weight"]
    # Of the language model alone, whose class is in no table of transformers' automatic ones.
    ran = _modules_that_run(load_model(tmp_path / "m"))
    assert not [name for name in ran if f".layers.{crossing}." in name]
    assert [name for name in ran if f".layers.{(crossing + 1) % 4}." in name]


@pytest.mark.parametrize("widths", [[64, 32], [64, 64]], ids=["narrower", "as wide"])
@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
def test_experts_of_images_that_follow_those_of_text_are_left_out(
    widths: list[int], fused: bool, tmp_path: Path
) -> None:
    config = tiny_config("ernie4_5_vl_moe")
    config.text_config.moe_intermediate_size = widths
    folder = write_type(
        "ernie4_5_vl_moe", tmp_path / "m", multimodal=True, config=config, fused=fused
    )
    checkpoint = open_checkpoint(str(folder))
    layers, parameters = find_layers(checkpoint), dict(load_model(folder).named_parameters())
    (group,) = [one for one in layers.groups if one.name == "layers.1.moe.experts"]
    assert [layer.name for layer in group.layers] == [
        f"model.layers.1.mlp.experts.{expert}.{word}_proj"
        for expert in range(4)
        for word in ("gate", "up", "down")
    ]
    of_text = "model.language_model.layers.1.mlp.text_moe"
    for layer in group.layers:
        at = layer.loaded
        assert at is not None
        assert at.name.startswith(f"{of_text}.experts.")
        rows = slice(at.row_start, at.row_start + layer.out_features)
        read_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
        assert torch.equal(read_OI.float(), parameters[at.name][at.expert][rows])
    images = [name for name, why in layers.left_out.items() if "an expert of images" in why]
    assert len(images) == 2 * (2 if fused else 4 * 3)
    (router,) = [one for one in layers.unquantized if one.name == "model.layers.1.mlp.gate"]
    read_OI = read_layer_rows(checkpoint, router, 0, router.out_features)
    assert torch.equal(read_OI.float(), parameters[f"{of_text}.gate.weight"])
    assert checkpoint.tensors[router.tensor].shape == ((4, 64) if fused else (64, 4))


def test_a_causal_mask_is_no_bias(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    found = find_layers(open_checkpoint(str(copy_with_tensors(tiny("gpt2"), tmp_path / "m", add))))
    assert found.left_out["transformer.h.0.attn.bias"] == "a mask of attention"
    assert found.left_out["transformer.wpe.weight"] == "positions"


def test_an_embedding_of_a_layer_that_predicts_further_tokens_is_not_the_models(
    tiny_type: Any, tmp_path: Path
) -> None:
    folder, _ = tiny_type("falcon")
    ahead = "transformer.h.4.embed_tokens.weight"  # before "transformer.word_embeddings.weight"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[ahead] = torch.ones_like(tensors["transformer.word_embeddings.weight"])

    added = copy_with_tensors(folder, tmp_path / "added", add)
    folder = copy_with_config(
        added, tmp_path / "m", lambda config: config.update(num_nextn_predict_layers=1)
    )
    found = find_layers(open_checkpoint(str(folder)), include_embeddings=True)
    (embedding,) = [group for group in found.groups if group.name == "embeddings"]
    assert [layer.tensor for layer in embedding.layers] == ["transformer.word_embeddings.weight"]
    assert found.left_out[ahead] == "of a layer that predicts further tokens"


def test_experts_in_one_transposed_tensor_are_read_as_they_are_multiplied(tiny_type: Any) -> None:
    folder, _ = tiny_type("llama4_text")
    checkpoint = open_checkpoint(str(folder))
    layers = {layer.name: layer for layer in find_layers(checkpoint).grouped_layers}
    stored = load_file(folder / "model.safetensors")
    place = "model.layers.0.feed_forward.experts"
    gate_up_EIO, down_EIO = (stored[f"{place}.{half}_proj"] for half in ("gate_up", "down"))
    for expert in range(4):
        gate_IO, up_IO = gate_up_EIO[expert].chunk(2, dim=1)
        for word, weight_IO in (("gate", gate_IO), ("up", up_IO), ("down", down_EIO[expert])):
            layer = layers[f"{place}.{expert}.{word}_proj"]
            read_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
            assert torch.equal(read_OI, weight_IO.T)
            assert layer.loaded is not None
            assert layer.loaded.transposed


def test_experts_in_one_tensor_for_each_projection_are_read_as_they_are_multiplied(
    tmp_path: Path,
) -> None:
    folder = write_type("step3p7", tmp_path / "m")
    checkpoint = open_checkpoint(str(folder))
    layers = {layer.name: layer for layer in find_layers(checkpoint).grouped_layers}
    stored, model = load_file(folder / "model.safetensors"), load_model(folder)
    parameters = dict(model.named_parameters())
    place = "model.layers.1.moe"
    for word in ("gate", "up", "down"):
        for expert, weight_OI in enumerate(stored[f"{place}.{word}_proj.weight"]):
            layer = layers[f"{place}.experts.{expert}.{word}_proj"]
            read_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
            assert torch.equal(read_OI, weight_OI)
            at = layer.loaded
            assert at is not None
            assert at.expert == expert
            rows = slice(at.row_start, at.row_start + layer.out_features)
            assert torch.equal(parameters[at.name][expert][rows], weight_OI.float())


def test_a_matrix_that_is_several_in_the_loaded_model_is_refused(tmp_path: Path) -> None:
    folder = write_type("molmo2", tmp_path / "m")
    with pytest.raises(CheckpointError, match="transformers makes other tensors of it") as caught:
        find_layers(open_checkpoint(str(folder)))
    assert "`left: {mlp.ff_proj: why it stays}`" in str(caught.value)


def test_a_checkpoint_with_towers_has_the_layers_of_the_language_model_alone(
    tmp_path: Path,
) -> None:
    folder = write_type("qwen2_5_vl", tmp_path / "m")
    checkpoint = open_checkpoint(str(folder))
    layers = find_layers(checkpoint)
    towers = [name for name in checkpoint.tensors if name.startswith("visual.")]
    matrices = [name for name in towers if len(checkpoint.tensors[name].shape) > 1]
    assert len(matrices) == 8
    assert {layers.left_out[name] for name in matrices} == {
        "of another tower, or of what predicts further tokens"
    }
    assert len(layers.groups) == 16
    assert all(name.startswith("model.layers.") for name in _names(layers))


def _names(layers: ModelLayers) -> list[str]:
    return [layer.name for layer in layers.grouped_layers]


@pytest.mark.parametrize("with_towers", [False, True])
def test_of_a_type_with_two_classes_the_one_that_the_config_names_is_found_and_loaded(
    with_towers: bool, tmp_path: Path
) -> None:
    folder = write_type("qwen3_5", tmp_path / "m", multimodal=with_towers)
    layers = find_layers(open_checkpoint(str(folder)))
    model = load_model(folder)
    parameters = dict(model.named_parameters())
    for layer in layers.grouped_layers:
        assert layer.loaded is not None
        assert layer.loaded.name in parameters
    assert ("model.visual" in dict(model.named_modules())) == with_towers


def test_a_model_that_needs_images_is_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = write_type("blip", tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"does not run a 'blip' on text alone.*pixel_values"):
        find_layers(open_checkpoint(str(folder)))


def test_a_type_that_transformers_did_not_have_is_inferred_from_names(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_with_config(tiny_llama, tmp_path / "m", lambda c: c.update(model_type="newer"))
    found, ruled = (find_layers(open_checkpoint(str(path))) for path in (folder, tiny_llama))
    assert found.architecture == "newer"
    (note,) = notes_on(open_checkpoint(str(folder)), found)
    assert "Nothing is known of model_type 'newer'" in note
    assert notes_on(open_checkpoint(str(tiny_llama)), ruled) == ()
    assert [g.name for g in found.groups] == [g.name for g in ruled.groups]
    assert [x.name for x in found.grouped_layers] == [x.name for x in ruled.grouped_layers]


def test_what_names_do_not_decide_is_refused_with_the_tensor_and_the_question(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def refused(edit: Any, number: int) -> str:
        folder = copy_with_tensors(tiny_llama, tmp_path / f"t{number}", edit)
        folder = copy_with_config(folder, tmp_path / f"c{number}", _newer)
        with pytest.raises(CheckpointError) as caught:
            find_layers(open_checkpoint(str(folder)))
        return str(caught.value)

    def add(name: str, *shape: int) -> Any:
        return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=torch.bfloat16)})

    message = refused(add("model.layers.0.mixing", 128, 256), 0)
    assert "'model.layers.0.mixing' of shape [128, 256]" in message
    assert "whether it is the weight of a linear layer is not certain" in message
    message = refused(add("model.layers.0.mlp.experts.gate_up_proj", 4, 256, 128), 1)
    assert "in which order it has gates, ups, inputs and outputs is not certain" in message
    message = refused(add("model.layers.0.mlp.gate.weight", 128, 128), 2)
    assert "whether it is a router or a gate of an MLP is not certain" in message
    message = refused(add("model.layers.0.mlp.experts.0.wo.weight", 128, 128), 4)
    assert "whether it reads an expert's input or makes its output" in message
    message = refused(add("model.layers.0.mlp.experts.0.inner.up_proj.weight", 128, 128), 5)
    assert "which expert's matrix it is" in message
    twice = [add(f"model.layers.0.mlp.{word}.weight", 128, 128) for word in ("w2", "c_proj")]
    message = refused(lambda tensors: [one(tensors) for one in twice], 6)
    assert "names do not say which of them is layers.0.mlp.down" in message
    two = {
        f"planner.layers.{index}.up.weight": torch.zeros((128, 128), dtype=torch.bfloat16)
        for index in range(2)
    }
    message = refused(lambda tensors: tensors.update(two), 3)
    assert "model.layers.0…1, planner.layers.0…1" in message
    assert "not certain which of them is the language model" in message


def _newer(config: dict[str, Any]) -> None:
    config["model_type"] = "newer"


def test_tensors_of_another_type_than_the_config_says_are_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_with_config(tiny_llama, tmp_path / "m", lambda c: c.update(model_type="mamba"))
    with pytest.raises(
        CheckpointError, match=r"'backbone\.layers' of a 'mamba'.* different models"
    ):
        find_layers(open_checkpoint(str(folder)))


@pytest.mark.parametrize("name", long_but(["mixtral", "deepseek_v4", "mamba"], "mixtral"))
def test_the_facts_of_a_type_are_what_the_installed_transformers_does(
    tiny_type: Any, name: str
) -> None:
    folder, model = tiny_type(name)
    found = find_facts(model, load_file(folder / "model.safetensors"))
    known = known_types()[name]
    assert {key: list(value) for key, value in known.names.items()} == found["names"]
    assert (known.tied, list(known.stacks), known.experts) == (
        found["tied"],
        found["stacks"],
        found.get("experts"),
    )


def test_facts_are_there_of_almost_every_type_of_transformers() -> None:
    missing = set(CAUSAL_TYPES) - known_types().keys()
    assert len(missing) < 15
    assert as_pattern("model.layers.12.mlp.experts.3.w1.weight") == (
        "model.layers.#.mlp.experts.#.w1.weight"
    )
