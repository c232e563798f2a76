"""Tiny checkpoints of random weights, one of each family, written by the real transformers class.

They serve shapes and names only: nothing about quality is to be read from them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel
from transformers.utils import logging

#: Every in_features below is a multiple of 128, so that groups of 128 divide it.
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

#: Of biases and norms, as large as what a tiny linear layer makes of a normed input.
_NOISE = 0.1


def _without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in _SIZES.items() if key not in keys}


#: A mixture whose first decoder layer is dense, and whose others have a shared expert as well.
_SHARED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "topk_method": "noaux_tc",  # read by vLLM
    "scoring_func": "sigmoid",
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True, slots=True)
class TinyFamily:
    """The transformers classes of a family, and the options that make a model tiny."""

    config: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)


#: ``model_type`` -> classes and sizes.
TINY_FAMILIES: dict[str, TinyFamily] = {
    "llama": TinyFamily("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "mistral": TinyFamily("MistralConfig", "MistralForCausalLM", _SIZES),
    "qwen2": TinyFamily("Qwen2Config", "Qwen2ForCausalLM", _without("head_dim")),
    "qwen3": TinyFamily("Qwen3Config", "Qwen3ForCausalLM", _SIZES),
    "granite": TinyFamily("GraniteConfig", "GraniteForCausalLM", _without("head_dim")),
    "olmo2": TinyFamily("Olmo2Config", "Olmo2ForCausalLM", _without("head_dim")),
    "olmo3": TinyFamily("Olmo3Config", "Olmo3ForCausalLM", _without("head_dim")),
    "smollm3": TinyFamily("SmolLM3Config", "SmolLM3ForCausalLM", _without("head_dim")),
    "ernie4_5": TinyFamily("Ernie4_5Config", "Ernie4_5ForCausalLM", _SIZES),
    "exaone4": TinyFamily("Exaone4Config", "Exaone4ForCausalLM", _without("head_dim")),
    "seed_oss": TinyFamily("SeedOssConfig", "SeedOssForCausalLM", _SIZES),
    "cohere2": TinyFamily("Cohere2Config", "Cohere2ForCausalLM", _SIZES),
    "glm4": TinyFamily("Glm4Config", "Glm4ForCausalLM", _SIZES),
    "starcoder2": TinyFamily("Starcoder2Config", "Starcoder2ForCausalLM", _without("head_dim")),
    "gemma": TinyFamily("GemmaConfig", "GemmaForCausalLM", _SIZES),
    "gemma2": TinyFamily("Gemma2Config", "Gemma2ForCausalLM", _SIZES),
    "gemma3_text": TinyFamily("Gemma3TextConfig", "Gemma3ForCausalLM", _SIZES),
    "gemma3": TinyFamily(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _SIZES,
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "boi_token_index": 3,
            "eoi_token_index": 4,
            "image_token_index": 5,
        },
    ),
    "phi3": TinyFamily("Phi3Config", "Phi3ForCausalLM", _without("head_dim")),
    "opt": TinyFamily(
        "OPTConfig",
        "OPTForCausalLM",
        {
            **_without("head_dim", "num_key_value_heads", "intermediate_size"),
            "ffn_dim": 256,
            "word_embed_proj_dim": 64,
        },
    ),
    "gpt2": TinyFamily(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 256,
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "mixtral": TinyFamily(
        "MixtralConfig", "MixtralForCausalLM", {**_SIZES, "num_local_experts": 4}
    ),
    "qwen3_moe": TinyFamily(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_SIZES,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "mlp_only_layers": [1],  # one dense decoder layer beside one of experts
        },
    ),
    "qwen2_moe": TinyFamily(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **_without("head_dim"),
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": TinyFamily(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {**_without("head_dim"), "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "glm4_moe": TinyFamily("Glm4MoeConfig", "Glm4MoeForCausalLM", {**_SIZES, **_SHARED}),
    "deepseek_v3": TinyFamily(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_without("head_dim", "num_key_value_heads"),
            **_SHARED,
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
}


def build_family(
    name: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """A tiny model with seeded random weights, biases and norms.

    Args:
        name: A key of ``TINY_FAMILIES``.
        dtype: Of the weights.
        seed: Of the weights.
        options: Added to the config, for example ``tie_word_embeddings=True``.
    """
    family = TINY_FAMILIES[name]
    config = getattr(transformers, family.config)(**{**family.options, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, family.model)(config)
        _move_constants(model)
    return model.to(dtype).eval()


def _move_constants(model: PreTrainedModel) -> None:
    """Add noise to what a new model has at one value: biases at zero, norms at one.

    Outputs would not show where such a bias is forgotten, moved or scaled, or such a norm.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
            with torch.no_grad():
                tensor += _NOISE * torch.randn(tensor.shape)


def write_family(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard_size: str = "5GB",
    fused: bool = False,
    tokenizer: bool = True,
    **options: Any,
) -> Path:
    """Write a tiny checkpoint as the real transformers class does.

    Args:
        name: A key of ``TINY_FAMILIES``.
        folder: Is created.
        dtype: Of the weights.
        seed: Of the weights.
        shard_size: Largest shard, for example ``"200KB"``.
        fused: Write what transformers 5 holds in memory (three-dimensional expert
            tensors, its own prefixes) and not the layout of the hub's checkpoints.
        tokenizer: Also write a tokenizer, whose tokens are the 256 bytes.
        options: Added to the config, for example ``tie_word_embeddings=True``.

    Returns:
        The folder.
    """
    logging.disable_progress_bar()
    model = build_family(name, dtype=dtype, seed=seed, **options)
    model.save_pretrained(folder, max_shard_size=shard_size, save_original_format=not fused)
    if tokenizer:
        write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(
    folder: Path, *, bos: bool = False, chat_template: str | None = None
) -> None:
    """Write a tokenizer whose 256 tokens are the bytes.

    Args:
        folder: Of the model.
        bos: Also give it token 256, ``<bos>``, which it puts before every text by default.
        chat_template: In Jinja.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"chat_template": chat_template}
    if bos:
        tokenizer.add_special_tokens(["<bos>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 256)]
        )
        options["bos_token"] = "<bos>"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(
        folder
    )


def copy_with_config(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint whose config went through ``edit``."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def copy_with_tensors(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a one-file checkpoint whose tensors went through ``edit``."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def long_but(names: Iterable[str], *short: str) -> list[Any]:
    """Parameters of a test that goes through many families: all but some are marked long.

    Args:
        names: Of the families, or of variants of them.
        short: Those that the fast tests have too; each must be one of the names.
    """
    every = list(names)
    assert set(short) <= set(every)
    return [pytest.param(n, marks=() if n in short else pytest.mark.long) for n in every]
