"""Exports of mixtures of experts and of GPT-2, compared with what engines' loaders read."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exported import Exported, export, make_recipe
from families import write_family

from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FusionGroup

#: Variant -> family, and what a tiny model needs beside its sizes to be built by an engine: heads
#: of latent attention that have a kernel, and a key that configs of the hub have.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": []}),
    "qwen2_moe with a dense layer": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "qwen3_moe with a dense layer": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}),
    "glm4_moe": ("glm4_moe", {}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_layer_freq": 1,
        },
    ),
    "gpt2": ("gpt2", {}),
}
#: Name -> scheme of the experts, and of everything else.
CHOICES = {
    "bf16": ("bf16", "bf16"),
    "int4.g32": ("int4.g32", "int4.g32"),
    "int4.g32 experts": ("int4.g32", "bf16"),
    "int4.g32 beside experts": ("bf16", "int4.g32"),
    "fp8": ("fp8_e4m3.channel+fp8_e4m3.token", "fp8_e4m3.channel+fp8_e4m3.token"),
    "static fp8": ("fp8_e4m3.tensor+fp8_e4m3.tensor", "fp8_e4m3.tensor+fp8_e4m3.tensor"),
    "nvfp4": ("nvfp4+nvfp4", "nvfp4+nvfp4"),
}


def write_variant(variant: str, folder: Path, *, fused: bool = False) -> Path:
    """A tiny checkpoint of a variant."""
    family, options = VARIANTS[variant]
    return write_family(family, folder, fused=fused, tokenizer=False, **options)


def export_choice(model: Path, choice: str, out: Path) -> Exported:
    """The export of a checkpoint under one of ``CHOICES``."""
    recipe = make_recipe(open_checkpoint(str(model)), lambda _, group: scheme_of(choice, group))
    return export(model, recipe, out)


def scheme_of(choice: str, group: FusionGroup) -> str:
    """The scheme of a fusion group under one of ``CHOICES``."""
    experts, others = CHOICES[choice]
    return experts if group.name.endswith("experts") else others


def digest(exported: Exported) -> str:
    """SHA-256 of what a loader sees: names, dtypes and shapes, and the ``quantization_config``."""
    tensors = {
        name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in exported.tensors.items()
    }
    seen = [tensors, exported.config.get("quantization_config")]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def merged(names: Iterable[str], before: str) -> list[str]:
    """Names that differ in the number after a word alone, as one: ``experts.{0,1}.w1``."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        head, number, tail = re.fullmatch(rf"(.*?\b{before}\.|)(\d*)(.*)", name).groups()  # type: ignore[union-attr]
        found[head, tail].append(number)
    return sorted(
        f"{head}{{{','.join(sorted(numbers))}}}{tail}" if head else tail
        for (head, tail), numbers in found.items()
    )


def each(merged_name: str) -> list[str]:
    """The names that ``merged`` made one of."""
    head, braces, rest = merged_name.partition("{")
    if not braces:
        return [merged_name]
    numbers, _, tail = rest.partition("}")
    return [f"{head}{number}{end}" for number in numbers.split(",") for end in each(tail)]
