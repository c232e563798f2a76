"""The model families: which linear layers a decoder layer has, and which of them engines fuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mofq.exceptions import CheckpointError

#: Fusion group -> path of a linear layer inside a decoder layer -> (out, in) as named sizes.
Rules = Mapping[str, Mapping[str, tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Experts:
    """How a mixture of experts is stored.

    Per expert: ``{module}.experts.{e}.{gate|up|down}.weight``. Fused, which
    transformers 5 holds in memory and writes on request:
    ``{fused_module}.experts.gate_up_proj`` [E, 2 * out, hidden], gate first, and
    ``{fused_module}.experts.down_proj`` [E, hidden, out].
    """

    module: str
    gate: str
    up: str
    down: str
    out: str  #: named size: output features of gate and up
    fused_module: str = "mlp"


@dataclass(frozen=True, slots=True)
class Family:
    """Where a family keeps its linear layers.

    ``body`` is the prefix under which layers are named and which engines' loaders read;
    ``loaded_body`` is the prefix in the model that transformers 5 builds.
    """

    rules: Rules
    shared: Rules = field(default_factory=dict)  #: beside the experts, in layers that have them
    gates: Mapping[str, tuple[str, str]] = field(default_factory=dict)  #: there; unquantized
    body: str = "model."
    loaded_body: str = "model."
    decoder: str = "layers"
    embedding: str = "embed_tokens"
    lm_heads: tuple[str, ...] = ("lm_head",)
    outside: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    experts: Experts | None = None
    transposed: bool = False  #: decoder layers store [in_features, out_features]
    tied: bool = False  #: what transformers assumes where the config does not say
    defaults: Mapping[str, int] = field(default_factory=dict)  #: likewise

    @property
    def headless_body(self) -> str:
        """The prefix on disk of a class without a head, such as ``Qwen3Model``."""
        return self.loaded_body.partition(".")[2]

    @property
    def bodies(self) -> tuple[str, ...]:
        """Every prefix on disk that transformers loads."""
        return tuple(dict.fromkeys((self.body, self.loaded_body, self.headless_body)))


_ATTENTION: Rules = {
    "attn.qkv": {
        "self_attn.q_proj": ("q", "hidden"),
        "self_attn.k_proj": ("kv", "hidden"),
        "self_attn.v_proj": ("kv", "hidden"),
    },
    "attn.o": {"self_attn.o_proj": ("hidden", "q")},
}
_GATED_MLP: Rules = {
    "mlp.gate_up": {"mlp.gate_proj": ("ffn", "hidden"), "mlp.up_proj": ("ffn", "hidden")},
    "mlp.down": {"mlp.down_proj": ("hidden", "ffn")},
}
_LLAMA: Rules = {**_ATTENTION, **_GATED_MLP}
_PHI3: Rules = {
    "attn.qkv": {"self_attn.qkv_proj": ("qkv", "hidden")},
    "attn.o": {"self_attn.o_proj": ("hidden", "q")},
    "mlp.gate_up": {"mlp.gate_up_proj": ("2ffn", "hidden")},
    "mlp.down": {"mlp.down_proj": ("hidden", "ffn")},
}
_GLM4: Rules = {**_ATTENTION, "mlp.gate_up": _PHI3["mlp.gate_up"], "mlp.down": _PHI3["mlp.down"]}
_STARCODER2: Rules = {
    **_ATTENTION,
    "mlp.up": {"mlp.c_fc": ("ffn", "hidden")},
    "mlp.down": {"mlp.c_proj": ("hidden", "ffn")},
}
#: Queries, keys and values through latent vectors; engines join the two that read the input.
_LATENT_ATTENTION: Rules = {
    "attn.latent": {
        "self_attn.q_a_proj": ("q_latent", "hidden"),
        "self_attn.kv_a_proj_with_mqa": ("kv_latent_rope", "hidden"),
    },
    "attn.q": {"self_attn.q_b_proj": ("latent_q", "q_latent")},
    "attn.kv": {"self_attn.kv_b_proj": ("latent_kv", "kv_latent")},
    "attn.o": {"self_attn.o_proj": ("hidden", "latent_o")},
}
#: The same where ``q_lora_rank`` is null (Moonlight): queries are read from the input itself, and
#: engines join them with nothing (vLLM 0.33 ``deepseek_v2.py``: ``fused_qkv_a_proj`` needs a rank).
_PLAIN_QUERIES: Rules = {
    "attn.q": {"self_attn.q_proj": ("latent_q", "hidden")},
    "attn.latent": {"self_attn.kv_a_proj_with_mqa": ("kv_latent_rope", "hidden")},
}
_OPT: Rules = {
    "attn.qkv": _ATTENTION["attn.qkv"],
    "attn.o": {"self_attn.out_proj": ("hidden", "q")},
    "mlp.up": {"fc1": ("ffn", "hidden")},
    "mlp.down": {"fc2": ("hidden", "ffn")},
}
_GPT2: Rules = {
    "attn.qkv": {"attn.c_attn": ("qkv", "hidden")},
    "attn.o": {"attn.c_proj": ("hidden", "q")},
    "mlp.up": {"mlp.c_fc": ("ffn", "hidden")},
    "mlp.down": {"mlp.c_proj": ("hidden", "ffn")},
}
_EXPERTS = Experts("mlp", gate="gate_proj", up="up_proj", down="down_proj", out="expert_ffn")
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}


def _shared(module: str) -> Rules:
    """A gated MLP for all tokens, beside the experts."""
    return {
        "mlp.shared_gate_up": {
            f"mlp.{module}.gate_proj": ("shared_ffn", "hidden"),
            f"mlp.{module}.up_proj": ("shared_ffn", "hidden"),
        },
        "mlp.shared_down": {f"mlp.{module}.down_proj": ("hidden", "shared_ffn")},
    }


#: ``model_type`` of config.json -> family. To add one, see ``docs/architecture.md``. Which layers
#: engines fuse is the ``packed_modules_mapping`` of vLLM's model classes (0.32), or what its
#: Transformers backend joins (``fusers``: q, k, v of an attention; gate and up of a gated MLP);
#: names and defaults are those of transformers (5.23).
FUSION_RULES: dict[str, Family] = {
    "llama": Family(_LLAMA),
    "mistral": Family(_LLAMA, defaults={"num_key_value_heads": 8}),
    "qwen2": Family(_LLAMA, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(_LLAMA, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "granite": Family(_LLAMA),
    "olmo2": Family(_LLAMA),
    "olmo3": Family(_LLAMA),
    "smollm3": Family(_LLAMA, tied=True, defaults={"num_key_value_heads": 4}),
    "ernie4_5": Family(_LLAMA, tied=True, defaults={"num_key_value_heads": 2, "head_dim": 128}),
    "exaone4": Family(_LLAMA, defaults={"num_key_value_heads": 32}),
    "seed_oss": Family(_LLAMA, defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "cohere2": Family(_LLAMA, tied=True),
    "glm4": Family(_GLM4, defaults={"num_key_value_heads": 2, "head_dim": 128}),
    "starcoder2": Family(_STARCODER2, tied=True, defaults={"num_key_value_heads": 2}),
    "gemma": Family(
        _LLAMA, tied=True, defaults={**_GEMMA, "num_attention_heads": 16, "num_key_value_heads": 16}
    ),
    "gemma2": Family(_LLAMA, tied=True, defaults=_GEMMA),
    "gemma3_text": Family(_LLAMA, tied=True, defaults=_GEMMA),
    "gemma3": Family(
        _LLAMA,
        body="language_model.model.",
        loaded_body="model.language_model.",
        lm_heads=("language_model.lm_head", "lm_head"),
        tied=True,
        defaults=_GEMMA,
    ),
    "phi3": Family(_PHI3),
    "opt": Family(
        _OPT,
        body="model.decoder.",
        loaded_body="model.decoder.",
        outside={"project_in": ("hidden", "embedding"), "project_out": ("embedding", "hidden")},
        tied=True,
    ),
    "gpt2": Family(
        _GPT2,
        body="transformer.",
        loaded_body="transformer.",
        decoder="h",
        embedding="wte",
        transposed=True,
        tied=True,
    ),
    "mixtral": Family(
        _ATTENTION,
        experts=Experts("block_sparse_moe", gate="w1", up="w3", down="w2", out="ffn"),
        defaults={"num_key_value_heads": 8},
    ),
    "qwen3_moe": Family(_LLAMA, experts=_EXPERTS, defaults={"num_key_value_heads": 4}),
    "qwen2_moe": Family(
        _LLAMA,
        shared=_shared("shared_expert"),
        gates={"mlp.shared_expert_gate": ("one", "hidden")},
        experts=_EXPERTS,
        defaults={
            "num_key_value_heads": 16,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "olmoe": Family(_ATTENTION, experts=replace(_EXPERTS, out="ffn"), defaults={"num_experts": 64}),
    "glm4_moe": Family(
        _LLAMA,
        shared=_shared("shared_experts"),
        experts=_EXPERTS,
        defaults={
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "first_k_dense_replace": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1408,
        },
    ),
    "deepseek_v3": Family(
        {**_LATENT_ATTENTION, **_GATED_MLP},
        shared=_shared("shared_experts"),
        experts=_EXPERTS,
        defaults={
            "num_attention_heads": 128,
            "first_k_dense_replace": 3,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
}

#: Where the lm_head is in a checkpoint of a type without a row.
ANY_HEADS = ("lm_head", "language_model.lm_head", "embed_out", "head", "output", "proj_out")

_KEYS = {
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "decoder_layers": ("num_hidden_layers", "n_layer"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size",),
    "shared_experts": ("n_shared_experts",),
    "dense_first": ("first_k_dense_replace",),
    "ahead": ("num_nextn_predict_layers",),
    "q_latent": ("q_lora_rank",),
    "kv_latent": ("kv_lora_rank",),
    "nope": ("qk_nope_head_dim",),
    "rope": ("qk_rope_head_dim",),
    "v_head": ("v_head_dim",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "embedding": ("word_embed_proj_dim",),
    "vocabulary": ("vocab_size",),
}


#: How many tokens a model takes.
_CONTEXT = ("max_position_embeddings", "n_positions")
_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")


def lm_heads_of(architecture: str) -> tuple[str, ...]:
    """Under which names a checkpoint may hold the lm_head.

    Args:
        architecture: ``ModelLayers.architecture``.
    """
    family = FUSION_RULES.get(architecture)
    return ANY_HEADS if family is None else family.lm_heads


def family_of(architecture: str, config: Mapping[str, Any]) -> Family:
    """The row of ``FUSION_RULES``, with the layers that a config chooses among the family's.

    Args:
        architecture: A key of ``FUSION_RULES``.
        config: Of the language model.
    """
    family = FUSION_RULES[architecture]
    if "attn.latent" in family.rules and config.get("q_lora_rank", 0) is None:
        others = {name: rule for name, rule in family.rules.items() if name not in _PLAIN_QUERIES}
        return replace(family, rules={**_PLAIN_QUERIES, **others})
    return family


def read_sizes(config: Mapping[str, Any], family: Family, *, where: str) -> dict[str, int]:
    """The sizes that a config states or implies, under one name for all families.

    Args:
        config: Of the language model.
        family: From `family_of`; gives the defaults that transformers has.
        where: The config's path, for messages.

    Returns:
        ``hidden, heads, head, decoder_layers, ffn, 2ffn, q, kv, qkv, embedding, one``; in a
        mixture ``experts, expert_ffn, shared_ffn``; with latent attention ``kv_latent,
        kv_latent_rope, latent_q, latent_kv, latent_o``; where stated ``q_latent``, ``vocabulary``,
        ``dense_first`` (decoder layers without experts), ``ahead`` (layers that predict further
        tokens).

    Raises:
        CheckpointError: A size is missing, or no positive integer.
    """
    stated = {
        size: value
        for size, keys in _KEYS.items()
        if (value := _state(config, family, keys, where=where)) is not None
    }
    _state(config, family, _CONTEXT, where=where)  # read elsewhere, and no size of a layer
    if "hidden" in stated and "n_embd" in config:
        stated.setdefault("ffn", 4 * stated["hidden"])  # GPT-2's n_inner: null
    needed = ["hidden", "heads", "decoder_layers", "ffn"]
    if family.experts is not None:
        needed += ["experts", family.experts.out]
    if "attn.latent" in family.rules:
        needed += ["kv_latent", "nope", "rope", "v_head"]
    for size in needed:
        if size not in stated:
            keys = _KEYS[size]
            raise CheckpointError(
                f"{where}: needed {' or '.join(map(repr, keys))}, found"
                f" {'none' if len(keys) == 1 else 'neither' if len(keys) == 2 else 'none of them'}."
                " Add the size, or fetch the file again from where it came."
            )
    return stated | _derive_sizes(stated, family)


def _derive_sizes(stated: Mapping[str, int], family: Family) -> dict[str, int]:
    heads, hidden = stated["heads"], stated["hidden"]
    head = stated.get("head_dim", hidden // heads)
    q, kv = heads * head, stated.get("kv_heads", heads) * head
    sizes = {"head": head, "q": q, "kv": kv, "qkv": q + 2 * kv, "2ffn": 2 * stated["ffn"], "one": 1}
    sizes["embedding"] = stated.get("embedding", hidden)
    if family.shared:
        together = stated.get("shared_experts", 1) * stated["expert_ffn"]
        sizes["shared_ffn"] = stated.get("shared_ffn", together)
    if "attn.latent" in family.rules:
        sizes |= _latent_sizes(stated)
    return sizes


def _latent_sizes(stated: Mapping[str, int]) -> dict[str, int]:
    heads, rope, nope, v_head = (stated[size] for size in ("heads", "rope", "nope", "v_head"))
    return {
        "kv_latent_rope": stated["kv_latent"] + rope,
        "latent_q": heads * (nope + rope),
        "latent_kv": heads * (nope + v_head),
        "latent_o": heads * v_head,
    }


def _state(
    config: Mapping[str, Any], family: Family, keys: tuple[str, ...], *, where: str
) -> int | None:
    for key in keys:
        value = config.get(key, family.defaults.get(key))
        if value is None:
            continue
        least = 0 if key in _MAY_BE_ZERO else 1
        if type(value) is not int or not least <= value < 2**31:
            needed = "an integer of 0 or more" if least == 0 else "a positive integer"
            raise CheckpointError(
                f"{where}: {key!r} needs {needed} below 2**31, found {value!r}."
                " Fetch the file again from where it came."
            )
        return value
    return None
