"""Writes a checkpoint of a known model's true shapes and names, with random weights.

    python scripts/make/synthetic_checkpoint.py llama3-8b -o /data/llama3-8b
    python scripts/make/synthetic_checkpoint.py llama3-70b --decoder-layers 2 -o /data/slice
    python scripts/make/synthetic_checkpoint.py qwen3-235b-a22b --decoder-layers 1 -o /data/moe

For speed and memory, not for quality: weights are normal numbers cut from one stretch of 32
million, so no two neighbours repeat and nothing about accuracy can be read from them. A slice
is a whole model of fewer decoder layers; times of decoder layers add up.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mofq.model.checkpoint.writer import PlannedTensor, ShardWriter

_STRETCH = 2**25
_WRITE_ELEMENTS = 2**24

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0}
#: Source: the config.json of each model on the Hugging Face hub.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "llama3-70b": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "qwen3-235b-a22b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "rope_theta": 1000000.0,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
    },
}
#: For Llama's configs, where code is tried and no size.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}
COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def shapes_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, in the order of a forward pass."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for number in range(config["num_hidden_layers"]):
        for name, shape in _decoder_layer(config):
            yield f"model.layers.{number}.{name}", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _decoder_layer(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "input_layernorm.weight", (hidden,)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{name}.weight", (rows, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if config["model_type"] == "qwen3_moe":
        yield "self_attn.q_norm.weight", (head,)
        yield "self_attn.k_norm.weight", (head,)
    yield "post_attention_layernorm.weight", (hidden,)
    if "num_experts" not in config:
        yield from _mlp("mlp", hidden, config["intermediate_size"])
        return
    yield "mlp.gate.weight", (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from _mlp(f"mlp.experts.{expert}", hidden, config["moe_intermediate_size"])


def _mlp(name: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.gate_proj.weight", (inner, hidden)
    yield f"{name}.up_proj.weight", (inner, hidden)
    yield f"{name}.down_proj.weight", (hidden, inner)


def write_checkpoint(config: dict[str, Any], folder: Path, *, shard_bytes: int, seed: int) -> None:
    """Write config, shards and index.

    Args:
        config: The ``config.json``.
        folder: A new or empty folder.
        shard_bytes: Largest amount of data in a file [bytes].
        seed: Of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    stretch = (torch.randn(_STRETCH, generator=generator) * 0.02).bfloat16()
    places = random.Random(seed)
    plan = {name: PlannedTensor("BF16", shape) for name, shape in shapes_of(config)}
    with ShardWriter(folder, plan, shard_bytes=shard_bytes) as writer:
        for name, planned in plan.items():
            if len(planned.shape) == 1:
                writer.add(name, torch.ones(planned.shape, dtype=torch.bfloat16))
                continue
            rows, columns = planned.shape
            step = max(1, min(rows, _WRITE_ELEMENTS // columns))
            for start in range(0, rows, step):
                count = min(step, rows - start) * columns
                at = places.randrange(_STRETCH - count)
                writer.add_rows(name, stretch[at : at + count].view(-1, columns))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--decoder-layers", type=int, help="a slice of so many; all by default")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = {**COMMON, **CONFIGS[options.model]}
    if options.decoder_layers is not None:
        config["num_hidden_layers"] = options.decoder_layers
    write_checkpoint(
        config, options.output, shard_bytes=int(options.shard_gb * 1e9), seed=options.seed
    )
    total = sum(file.stat().st_size for file in options.output.glob("*.safetensors"))
    print(f"{options.output}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
