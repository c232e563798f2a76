"""Tiny checkpoints of any causal or multimodal type of the installed transformers.

From a shrunken config.

They serve shapes, names and arithmetic only: nothing about quality is to be read from them.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from families import _move_constants, write_byte_tokenizer
from timm_double import stand_in_for_timm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

#: Of every ``model_type`` that has a causal class.
CAUSAL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
#: Of every ``model_type`` that has a class that reads images and writes text.
IMAGE_TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
#: These, and those with sounds alone.
MULTIMODAL_TYPES = tuple(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
_MOST_PARAMETERS = 40_000_000
#: Of the weights that transformers draws: else the logits hardly depend on them.
_GAIN = 4


#: Of images, sounds and their ends: four and up.
_TOKENS = (
    "image_token_id",
    "video_token_id",
    "audio_token_id",
    "image_token_index",
    "boi_token_id",
    "eoi_token_id",
    "boa_token_id",
    "eoa_token_id",
    "boi_token_index",
    "eoi_token_index",
    "eoa_token_index",
    "vision_start_token_id",
    "vision_end_token_id",
)


def _each(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


#: A size under all names that configs have for it. In-features are multiples of 32.
SIZES: dict[str, int] = {
    **_each(
        64,
        "hidden_size d_model n_embd embed_dim embedding_size embedding_dim emb_dim dim_model_base"
        " lru_width hidden_size_global decoder_hidden_size out_hidden_size router_hidden_size"
        " attention_hidden_size projector_output_dim adapter_in_dim moe_intermediate_size"
        " shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size"
        " moe_shared_expert_intermediate_size",
    ),
    **_each(
        128,
        "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"
        " shared_intermediate_size intermediate_size_mlp dff feed_forward_size d_inner dim_ff"
        " dense_intermediate_size mlp_dim mamba_d_ssm",
    ),
    **_each(
        4,
        "num_attention_heads n_head num_heads n_heads decoder_attention_heads attention_heads"
        " encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"
        " swa_num_attention_heads num_hidden_layers n_layer num_layers decoder_layers n_layers"
        " num_decoder_layers num_experts num_local_experts n_routed_experts moe_num_experts"
        " linear_num_value_heads linear_num_heads",
    ),
    **_each(
        2,
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups"
        " num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"
        " mamba_n_groups mamba_ngroups linear_num_key_heads n_groups index_n_heads",
    ),
    **_each(
        1,
        "encoder_layers num_encoder_layers conf_num_hidden_layers n_group topk_group"
        " n_shared_experts num_shared_experts moe_num_shared_experts num_expert_group"
        " first_k_dense_replace num_dense_layers pretraining_tp",
    ),
    **_each(
        16,
        "head_dim d_kv kv_channels attention_head_size swa_head_dim dim_head linear_head_dim d_head"
        " qk_rope_head_dim state_size mamba_d_state ssm_state_size mamba_d_head mamba_head_dim"
        " mamba_headdim linear_key_head_dim linear_value_head_dim d_rel sliding_window window_size"
        " attention_window_size sliding_window_size mamba_chunk_size local_attention",
    ),
    **_each(
        32,
        "q_lora_rank kv_lora_rank o_lora_rank qk_nope_head_dim v_head_dim index_head_dim lora_rank"
        " laurel_rank hidden_size_per_layer_input adapter_rank time_step_rank mamba_dt_rank"
        " hc_lowrank gated_norm_rank ple_embed_dim",
    ),
    **_each(8, "mamba_n_heads mamba_num_heads index_topk index_topk_blocks"),
    **_each(
        256,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"
        " model_max_length n_positions n_ctx max_position_embeddings max_seq_len context_length"
        " max_target_positions",
    ),
    **_each(0, "bos_token_id decoder_start_token_id"),
    **_each(1, "eos_token_id eod_token_id"),
    **_each(2, "pad_token_id"),
    **_each(3, "cls_token_id sep_token_id unk_index mask_index"),
    **{name: 4 + index for index, name in enumerate(_TOKENS)},
}
#: That a config may leave at None, and still has.
_SET_IF_NONE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_key_value_heads",
    "moe_intermediate_size",
)
#: Of what is no language model: sizes of towers.
_TOWER: dict[str, int] = {
    **{name: size for name, size in SIZES.items() if not name.endswith(("_id", "_index"))},
    **_each(
        32,
        "hidden_size intermediate_size embed_dim d_model output_dim projection_dim",
    ),
    **_each(1, "num_hidden_layers depth num_layers num_global_layers"),
    **_each(2, "num_attention_heads num_heads num_key_value_heads"),
    **_each(14, "patch_size"),
    **_each(28, "image_size"),
    **_each(64, "out_hidden_size vision_output_dim"),
}

_LATENT = {"num_key_value_heads": 4}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_DECODER = {"is_decoder": True}
_PROPORTIONS = {"rope_type": "default", "rope_theta": 1e4}
#: What a type needs beside sizes, so that it can be built and every kind of layer occurs.
_OPTIONS: dict[str, Mapping[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bamba": {"attn_layer_indices": [1, 3]},
    "bailing_hybrid": {
        **_LATENT,
        "num_experts": 4,
        "layer_group_size": 2,
        "num_expert_group": 1,
        "num_experts_per_token": 2,
    },
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": _DECODER,
    "camembert": _DECODER,
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _PROPORTIONS)
    },
    "data2vec-text": _DECODER,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 128, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    },
    "dots1": {
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        **_LATENT,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 48,
        "swa_qk_nope_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "electra": _DECODER,
    "ernie": _DECODER,
    "gemma3n_text": {"num_kv_shared_layers": 2, "intermediate_size": 128},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_LATENT, "num_experts": 4, "num_experts_per_token": 2},
    "kolibri1": {**_LATENT, "num_experts": 4, "n_routed_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {
        **_LATENT,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "num_layers": 2,
        "num_hidden_layers": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "megatron-bert": _DECODER,
    "minicpm3": _LATENT,
    "ministral": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "qwen3_moe": {"num_experts": 4, "num_local_experts": 4, "mlp_only_layers": [1]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": {
        **_DECODER,
        "shape_vocab_size": 64,
        "pronunciation_vocab_size": 64,
        "shape_embed_dim": 32,
        "pronunciation_embed_dim": 32,
    },
    "roformer": _DECODER,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "youtu": _LATENT,
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "layers_block_type": _HYBRID,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 8,
        "mamba_d_state": 4,
    },
    "zamba2": {
        "layers_block_type": _HYBRID,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_mem_blocks": 1,
    },
}


#: Of images: how the halves of heads of 16 are shared among time, height and width.
_SECTIONS = {"rope_parameters": {**_PROPORTIONS, "mrope_section": [2, 3, 3]}}
#: The same of text configs, towers, and configs of both.
_OPTIONS_MULTIMODAL: dict[str, Mapping[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cosmos3_edge_text": _SECTIONS,
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 32]},
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 64},
    "emu3_vqgan": {"base_channels": 32},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**_PROPORTIONS, "mrope_section": [3, 3, 2]},
    },
    "florence_vision": {"embed_dim": [32] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "gemma3n_vision": {"model_args": {"channel_multiplier": 0.1}},
    "glm4v_text": _SECTIONS,
    "glm46v_text": _SECTIONS,
    "glm_ocr_text": _SECTIONS,
    "glm4v_moe_text": {
        "rope_parameters": {
            **_PROPORTIONS,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next_text": {**_LATENT, "index_topk": 32},
    "hunyuan_vl_text": {
        "rope_parameters": {**_PROPORTIONS, "alpha": 1.0, "mrope_section": [2, 2, 2, 2]},
        "head_dim": 16,
    },
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
        "vision_config": {  # its projector has a head for each 64 of the tower's hidden size
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "inkling2_vision": {"text_hidden_size": 64},
    "inkling_vision": {"text_hidden_size": 64},
    "inkling_audio": {"text_hidden_size": 64},
    "janus_vqgan": {"base_channels": 32},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "mistral4": _LATENT,
    "mistral_large4_text": _LATENT,
    "molmo2_adapter": {"vision_feature_layer": [0, -1], "text_hidden_size": 64},
    "muse_spark_audio": {"patch_sizes": [2], "hidden_sizes": [32], "depths": [1]},
    "paddleocr_vl_text": _SECTIONS,
    "qwen2_5_omni_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 16},
    "t5gemma2_text": {"hidden_size": 64},
    "timm_wrapper": {
        "architecture": "vit_tiny_patch16_224",
        "hidden_size": 32,
        "model_args": {"embed_dim": 32, "num_heads": 2},
    },
}


def tiny_config(
    model_type: str, sizes: Mapping[str, int] | None = None, **changes: Any
) -> PretrainedConfig:
    """A config of a type with small sizes, in which every kind of decoder layer occurs.

    Args:
        model_type: One of ``CAUSAL_TYPES`` or ``MULTIMODAL_TYPES``.
        sizes: Under all names that configs have for them, others than `SIZES`.
        changes: Fields of this config alone.
    """
    return _shrink(CONFIG_MAPPING[model_type], {**SIZES, **(sizes or {})}, changes)


def _shrink(
    kind: type[PretrainedConfig], sizes: Mapping[str, int], changes: Mapping[str, Any] | None = None
) -> Any:
    try:
        defaults = kind().to_dict()
    except Exception:  # some need arguments
        defaults = {}
    known, renamed = _arguments(kind), getattr(kind, "attribute_map", {})
    options: dict[str, Any] = {}
    for name, size in sizes.items():
        key = renamed.get(name, name)
        old = defaults.get(key)
        is_absent = old is None and (name not in _SET_IF_NONE or name.endswith("_id"))
        is_off = old == 0 and not name.endswith("_id")
        if key not in known or key in options or is_absent or is_off:
            continue
        if old is None or (isinstance(old, int) and not isinstance(old, bool)):
            options[key] = size
    _spread_kinds(options, defaults, known)
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        stated = defaults.get(name)
        if part.__name__ == "AutoConfig":
            if not isinstance(stated, dict) or "model_type" not in stated:
                continue
            part = CONFIG_MAPPING[stated["model_type"]]
        if isinstance(stated, dict) or name in known:
            is_text = any(word in name for word in ("text", "decoder", "llm", "language"))
            options[name] = _shrink(part, sizes if is_text else _TOWER).to_dict()
    own = {**_OPTIONS, **_OPTIONS_MULTIMODAL}.get(kind.model_type, {})
    return kind(**{**options, **own, **(changes or {})})


def _spread_kinds(
    options: dict[str, Any], defaults: Mapping[str, Any], known: Iterable[str]
) -> None:
    """Give the few layers all the kinds that the default config's many layers have."""
    for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = list(dict.fromkeys(defaults.get(key) or []))
        if key in known and len(kinds) > 1:
            count = max(options.get("num_hidden_layers", 4), len(kinds))
            options[key] = [kinds[index % len(kinds)] for index in range(count)]
            if "num_hidden_layers" in options:
                options["num_hidden_layers"] = count


def _arguments(kind: type) -> set[str]:
    names: set[str] = set()
    for one in kind.__mro__:
        names |= set(getattr(one, "__annotations__", {}))
        if "__init__" in vars(one):
            names |= set(inspect.signature(one.__init__).parameters)
    return names


def build_type(
    model_type: str,
    *,
    multimodal: bool | None = None,
    seed: int = 0,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """A tiny model of a type with seeded random weights, biases and norms, in bf16.

    Args:
        model_type: One of ``CAUSAL_TYPES`` or ``MULTIMODAL_TYPES``.
        multimodal: Of the class with towers, where a type has two; by default the causal one.
        seed: Of the weights.
        config: From `tiny_config`, by default without changes.

    Raises:
        Exception: transformers cannot build it from a shrunken config.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = config or tiny_config(model_type)
    with_towers = model_type not in CAUSAL_TYPES if multimodal is None else multimodal
    auto = AutoModelForMultimodalLM if with_towers else AutoModelForCausalLM
    stand_in_for_timm()
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"{count} parameters: a size that has another name")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config)
        _move_constants(model)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and name.endswith(("weight", "_proj")):
                parameter.detach().mul_(_GAIN)
    return model.to(torch.bfloat16).eval()


def write_type(
    model_type: str,
    folder: Path,
    *,
    fused: bool = False,
    multimodal: bool | None = None,
    config: PretrainedConfig | None = None,
) -> Path:
    """Write a tiny checkpoint of a type, with a tokenizer, as the real transformers class does.

    Args:
        model_type: As for `build_type`.
        folder: Is written anew.
        multimodal: As for `build_type`.
        fused: As for `write_family`.
        config: As for `build_type`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    model = build_type(model_type, multimodal=multimodal, config=config)
    model.save_pretrained(folder, save_original_format=not fused)
    write_byte_tokenizer(folder)
    return folder
