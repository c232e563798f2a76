"""A table of a known model's true size, of made-up errors: how long decisions take on it.

    python scripts/bench/large_table.py qwen3-235b-a22b -o large   # large/model, large/table.jsonl
    mofq search large/table.jsonl --max-bits 4.5 -o large/recipe.yaml

The checkpoint has the model's names and shapes, and no data: its files are sparse. Errors fall by
four for each bit, of sixteen samples.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from pathlib import Path
from typing import Any

from mofq.evidence.measure.fill_table import table_space
from mofq.evidence.spaces import load_search_space, offer_schemes
from mofq.evidence.table import Row, TableStats, header_of, open_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.safetensors_header import encode_header
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import FusionGroup, find_layers
from mofq.model.sizes import group_bytes
from mofq.numbers.schemes import Scheme
from scripts.make.synthetic_checkpoint import COMMON, CONFIGS, shapes_of

SAMPLES = 16


def write_sparse(config: dict[str, Any], folder: Path) -> None:
    """Config, and one shard of holes for each decoder layer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes_of(config):
        words = name.split(".")
        shard = words[2] if words[1] == "layers" else "other"
        shards.setdefault(f"model-{shard}.safetensors", {})[name] = shape
    for file, tensors in shards.items():
        described = {name: ("BF16", shape) for name, shape in tensors.items()}
        beginning, _ = encode_header(described, {"format": "pt"})
        size = sum(2 * math.prod(shape) for shape in tensors.values())
        with (folder / file).open("wb") as opened:
            opened.write(beginning)
            os.ftruncate(opened.fileno(), len(beginning) + size)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def made_up_row(group: FusionGroup, scheme: Scheme, unit: Any, places: random.Random) -> Row:
    """A row of a group under a scheme."""
    size = group_bytes(group, scheme)
    bits = 8 * size / sum(layer.weights for layer in group.layers)
    error = 0.0 if bits >= 16 else 1e-3 * 4.0 ** (4 - bits) * places.uniform(0.5, 2.0)
    samples = tuple(error * places.uniform(0.5, 1.5) for _ in range(SAMPLES))
    in_nats = unit == "kl_nats_per_token"
    amax = {layer.name: 10.0 for layer in group.layers} if scheme.has_static_inputs else None
    return Row(
        group=group.name,
        scheme=scheme.name,
        unit=unit,
        corpus=None if unit == "relative_weight_error" else "text",
        error=sum(samples) / SAMPLES if in_nats else error,
        stderr=error / 8 if in_nats else None,
        bytes=size,
        sqnr_db=6 * bits,
        sample_errors=samples if in_nats else None,
        static_amax=amax,
    )


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--space", default="serving")
    options = parser.parse_args()
    model = options.output / "model"
    write_sparse({**COMMON, **CONFIGS[options.model]}, model)
    checkpoint = open_checkpoint(str(model))
    layers, space = find_layers(checkpoint), load_search_space(options.space)
    header = header_of(
        layers,
        model_name=checkpoint.name,
        index_sha256=checkpoint.index_sha256,
        weights_sha256=hash_weights(checkpoint),
        stats=TableStats("0" * 64, 0, {"text": "0" * 64}, SAMPLES, 512),
    )
    places = random.Random(0)
    with open_table(options.output / "table.jsonl", header) as table:
        table.add_space(table_space(space, None))
        for offer in offer_schemes(space, layers.groups, has_stats=True):
            units = ("relative_weight_error", "output_mse", "kl_nats_per_token")
            table.add_group(
                made_up_row(offer.group, scheme, unit, places)
                for scheme in offer.schemes
                for unit in units
            )


if __name__ == "__main__":
    main()
