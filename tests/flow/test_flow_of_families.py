"""The whole flow on a tiny checkpoint of every family, as the real transformers class writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import mofq, ok
from conftest import TinyCheckpoint
from families import TINY_FAMILIES, copy_with_tensors, long_but

from mofq.decision.recipe import load_recipe
from mofq.model.checkpoint.headers import open_checkpoint, open_stored
from mofq.model.layers import FUSION_RULES
from mofq.model.loading import load_model, load_tokenizer

SPACE = """version: 1
schemes: [int4.g32, int8.channel, fp8_e4m3.channel+fp8_e4m3.token]
base: [int4.g32]
"""
SHORT = ("--corpus", "a=demo-en-calibration", "--sequences", "4", "--sequence-length", "32")
TEXT = ("--text", "demo-en", "--tokens", "96", "--sequence-length", "32")

#: Family and how its checkpoint differs from a plain one in bf16 and one file.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY_FAMILIES},
    "llama, tied, fp16, sharded": (
        "llama",
        {"tie_word_embeddings": True, "dtype": torch.float16, "shard_size": "100KB"},
    ),
    "llama, fp32, biases": (
        "llama",
        {"dtype": torch.float32, "attention_bias": True, "mlp_bias": True},
    ),
    "gemma2, untied": ("gemma2", {"tie_word_embeddings": False}),
    "qwen2, sharded": ("qwen2", {"shard_size": "100KB"}),
    "mixtral, fused, fp32": ("mixtral", {"fused": True, "dtype": torch.float32}),
    "qwen3_moe, fused, sharded": ("qwen3_moe", {"fused": True, "shard_size": "200KB"}),
    "opt, fp16": ("opt", {"dtype": torch.float16}),
}


def test_every_family_that_is_known_is_among_them() -> None:
    assert {name for name, _ in VARIANTS.values()} == set(FUSION_RULES)


@pytest.mark.parametrize(
    "variant", long_but(VARIANTS, "llama, tied, fp16, sharded", "gpt2", "qwen3_moe, fused, sharded")
)
def test_a_family_goes_through_the_whole_flow(
    variant: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    family, options = VARIANTS[variant]
    model = tiny(family, **options)
    space, stats, table = (tmp_path / n for n in ("space.yaml", "stats", "table.jsonl"))
    recipe, exported = tmp_path / "recipe.yaml", tmp_path / "exported"
    space.write_text(SPACE)
    ok("calibrate", model, *SHORT, "-o", stats)
    ok("measure", model, "--space", space, "--stats", stats, "-o", table)
    ok("search", table, "--max-bits", "7", "-o", recipe)
    schemes = load_recipe(recipe).schemes
    assert len(set(schemes.values()) - {"bf16"}) > 1  # a mixture
    emulated = ok("validate", model, recipe, *TEXT, "--json").json
    assert emulated["enforced"] is True
    assert emulated["kl_nats_per_token"] > 0
    export = ("export", model, recipe, "--to", "compressed-tensors", "-o", exported)
    ok(*export)
    reloaded = ok("validate", model, exported, *TEXT, "--json").json
    assert reloaded["enforced"] is True
    assert reloaded["kl_nats_per_token"] == emulated["kl_nats_per_token"]
    opened = open_stored(str(exported))
    original = open_checkpoint(str(model))
    quantized = {name for name, scheme in schemes.items() if scheme != "bf16"}
    biases = {name for name in original.tensors if name.endswith(".bias")}
    assert biases <= opened.tensors.keys()
    scales = {name for name in opened.tensors if name.endswith(".weight_scale")}
    assert scales == {f"{name}.weight_scale" for name in quantized}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "opt"])
def test_an_export_of_nothing_quantized_predicts_what_the_original_does(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model, recipe, exported = tiny(family), tmp_path / "recipe.yaml", tmp_path / "exported"
    ok("recipe", "uniform", model, "bf16", "-o", recipe)
    ok("export", model, recipe, "--to", "compressed-tensors", "-o", exported)
    token_NT = torch.tensor([load_tokenizer(model)("A few words.")["input_ids"]])
    with torch.inference_mode():
        ours, theirs = (load_model(folder)(token_NT).logits for folder in (exported, model))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_beside_one_of_its_own_is_refused_where_they_differ(
    same: bool, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    # transformers 5 would use the head, vLLM the embedding.
    def add_head(tensors: dict[str, Any]) -> None:
        head = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"] = head if same else head + 1

    folder = copy_with_tensors(tiny("llama", tie_word_embeddings=True), tmp_path / "m", add_head)
    calibrate = ("calibrate", folder, *SHORT, "-o", tmp_path / "stats")
    if same:
        ok(*calibrate)
        return
    ran = mofq(*calibrate)
    assert ran.code == 1
    assert "'tie_word_embeddings' is true" in ran.err
    assert "Set it to false" in ran.err
