"""Checkpoints whose layers cannot be listed in full: refused, each with one clear message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from families import copy_with_config, copy_with_tensors

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        ("llama", {"model_type": "mamba"}, r"'backbone\.layers' of a 'mamba', found model\.layers"),
        ("llama", {"model_type": None}, r"needed a 'model_type', .* found None"),
        ("llama", {"model_type": "new", "num_hidden_layers": 3}, r"needed 3 decoder .* found 2"),
        ("llama", {"model_type": "new", "num_hidden_layers": 1}, r"needed 1 decoder .*index 1"),
        (
            "llama",
            {"model_type": "new", "num_hidden_layers": 10**9},
            r"needed 1000000000 .*found 2",
        ),
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
        (
            "llama",
            {"num_attention_heads": None},
            r"_heads' or 'n_head', found neither",
        ),
        ("deepseek_v3", {"q_lora_rank": None}, r"'model.layers.0.self_attn.q_proj.weight'.*none"),
        (
            "deepseek_v3",
            {"kv_lora_rank": None},
            r"'kv_lora_rank', found none\. Add the",
        ),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, edit: dict[str, Any], message: str
) -> None:
    folder = copy_with_config(tiny(family), tmp_path / "model", lambda config: config.update(edit))
    with pytest.raises(CheckpointError, match=message) as caught:
        find_layers(open_checkpoint(str(folder)))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("Qwen3ForSequenceClassification", "Qwen3ForTokenClassification"),
        *("Qwen2ForRewardModel", "GPT2DoubleHeadsModel", "LlamaForCausalLMEagle"),
    ],
)
def test_a_class_that_predicts_no_tokens_is_refused_by_its_name(
    tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_with_config(
        tiny_llama, tmp_path / "m", lambda config: config.update(architectures=[name])
    )
    with pytest.raises(CheckpointError, match=rf"'architectures' names '{name}', which is no caus"):
        find_layers(open_checkpoint(str(folder)))


@pytest.mark.parametrize("stated", [None, [], ["OtherForCausalLM"], "LlamaForCausalLM"])
def test_a_config_without_a_class_is_of_a_language_model(
    tiny_llama: Path, tmp_path: Path, stated: Any
) -> None:
    folder = copy_with_config(
        tiny_llama, tmp_path / "m", lambda config: config.update(architectures=stated)
    )
    assert find_layers(open_checkpoint(str(folder))).groups


def test_a_tied_head_that_differs_from_the_embedding_is_refused(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    tied = tiny("qwen3", tie_word_embeddings=True)

    def with_head(scale: float) -> Callable[[dict[str, Any]], object]:
        return lambda tensors: tensors.update(
            {"lm_head.weight": scale * tensors["model.embed_tokens.weight"]}
        )

    same = copy_with_tensors(tied, tmp_path / "same", with_head(1.0))
    assert find_layers(open_checkpoint(str(same))).tied_lm_head
    differs = copy_with_tensors(tied, tmp_path / "differs", with_head(1.5))
    with pytest.raises(CheckpointError, match=r"'tie_word_embeddings'.*'lm_head.weight'.*differs"):
        find_layers(open_checkpoint(str(differs)))


@pytest.mark.parametrize("shape", [(4, 128), (2, 4, 128)])
def test_an_unknown_matrix_in_a_decoder_layer_is_not_dropped(
    tiny_llama: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    name = "model.layers.1.self_attn.q_a_proj.weight"
    folder = copy_with_tensors(
        tiny_llama, tmp_path / "m", lambda tensors: tensors.update({name: torch.zeros(shape)})
    )
    with pytest.raises(CheckpointError, match=rf"{name}.*no rule of family 'llama'"):
        find_layers(open_checkpoint(str(folder)))


def test_a_gap_between_decoder_layers_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def renumber(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if ".layers.1." in key]:
            tensors[key.replace(".layers.1.", ".layers.5.")] = tensors.pop(key)

    folder = copy_with_tensors(tiny_llama, tmp_path / "m", renumber)
    with pytest.raises(CheckpointError, match=r"needed 2 decoder layers .*highest index 5"):
        find_layers(open_checkpoint(str(folder)))


def test_a_missing_matrix_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = copy_with_tensors(tiny_llama, tmp_path / "m", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{name}.* shape \[128, 256\].*found none"):
        find_layers(open_checkpoint(str(folder)))


def test_an_fp8_source_whose_config_does_not_say_so_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def to_fp8(tensors: dict[str, Any]) -> None:
        key = "model.layers.0.self_attn.q_proj.weight"
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.ones(1, 1)

    folder = copy_with_tensors(tiny_llama, tmp_path / "m", to_fp8)
    with pytest.raises(CheckpointError, match=r"q_proj.weight_scale_inv.*Give the original"):
        find_layers(open_checkpoint(str(folder)))


def test_a_weight_in_a_dtype_that_is_no_source_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    folder = copy_with_tensors(
        tiny_llama,
        tmp_path / "m",
        lambda tensors: tensors.update({key: tensors[key].to(torch.float64)}),
    )
    with pytest.raises(CheckpointError, match=r"needs dtype BF16, F16, F32, found F64"):
        find_layers(open_checkpoint(str(folder)))
