"""Walls of large values in a few input channels, put into a real model without changing it.

    python scripts/reproduce/walls.py MODEL --text FILE --work FOLDER

LLaMA3-70B loses its accuracy to INT8 per channel through the weights of a few layers
(arXiv:2408.15301); that these have a few input channels of large values is recalled and was not
read there. This script makes such layers: it multiplies one or two input channels of all
linear layers after a norm by a power of two, and divides the norm's weight by it. In bf16
both are exact, so the model computes what it did, which is checked bit by bit. Then
``mofq search --max-finer 0.03`` looks for them, calibration-free, in the search space
``llama3_70b_w8a8``. For each seed the script prints what was planted and what was found, and
the measured KL of uniform INT8 and of the recipe, with weights alone and with W8A8.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mofq.decision import uniform_recipe
from mofq.decision.recipe import Recipe, load_recipe
from mofq.delivery.validation.measured_kl import MeasuredKl
from mofq.evidence.corpora import load_text
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FusionGroup, find_layers
from scripts.shared.command import model_parser, mofq, parse_into_work, print_markdown

#: Fusion group after a norm -> the norm; of families whose norm multiplies by its weight.
NORMS = {"attn.qkv": "input_layernorm", "mlp.gate_up": "post_attention_layernorm"}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
INT8 = "int8.channel+int8.token"
FP8 = "fp8_e4m3.channel+fp8_e4m3.token"
SMALLEST_LOG2, STRENGTHS = 6, 5


@dataclass(frozen=True, slots=True)
class Wall:
    """A norm and the layers after it, some of whose input channels are moved."""

    group: FusionGroup
    norm: str  #: tensor in the checkpoint
    channels: tuple[int, ...]
    log2: int  #: weights times, and the norm divided by, two to this power


def plan_walls(groups: Sequence[FusionGroup], *, seed: int, share: float) -> list[Wall]:
    """Random norms whose layers are at most a share of all layers; channels and strength by seed.

    Args:
        groups: Of the model.
        seed: Walls of 2^6 (seed 0) to 2^10 (seed 4), in one channel or two.
        share: Of all linear layers.
    """
    rng = np.random.default_rng(seed)
    log2, count = SMALLEST_LOG2 + seed % STRENGTHS, 1 + seed % 2
    room = int(share * sum(len(group.layers) for group in groups) + 1e-9)
    walls = []
    for number in rng.permutation(len(groups)):
        group = groups[number]
        kind = group.name.split(".", 2)[-1]  # layers.0.attn.qkv
        if kind not in NORMS or len(group.layers) > room:
            continue
        room -= len(group.layers)
        decoder_layer = group.layers[0].name.split(".self_attn.")[0].split(".mlp.")[0]
        channels = rng.choice(group.layers[0].in_features, size=count, replace=False)
        norm = f"{decoder_layer}.{NORMS[kind]}.weight"
        walls.append(Wall(group, norm, tuple(sorted(channels.tolist())), log2))
    return walls


def write_walled(model: Path, folder: Path, walls: Sequence[Wall]) -> None:
    """A copy of a checkpoint with walls; every changed value is checked to be exact."""
    folder.mkdir(parents=True, exist_ok=True)
    factors: dict[str, tuple[tuple[int, ...], int]] = {}
    for wall in walls:
        factors[wall.norm] = (wall.channels, -wall.log2)
        factors |= {layer.tensor: (wall.channels, wall.log2) for layer in wall.group.layers}
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
            continue
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        for name in factors.keys() & tensors.keys():
            tensors[name] = scaled(tensors[name], *factors[name])
        save_file(tensors, folder / path.name, metadata=metadata)


def scaled(tensor: Tensor, channels: Sequence[int], log2: int) -> Tensor:
    """Some input channels times a power of two, in the tensor's own dtype and without rounding."""
    changed = tensor.clone()
    changed[..., list(channels)] *= 2.0**log2
    back = changed.clone()
    back[..., list(channels)] *= 2.0**-log2
    assert torch.equal(back, tensor), "a value left the range of its dtype"
    return changed


def largest_difference(model: Path, folder: Path, token_ids: Tensor, dtype: torch.dtype) -> float:
    """Between the logits of two models: 0.0 where they compute the same bit by bit."""
    logits = []
    for one in (model, folder):
        loaded = AutoModelForCausalLM.from_pretrained(one, dtype=dtype).eval()
        with torch.inference_mode():
            logits.append(loaded(token_ids[None]).logits)
    return float((logits[0] - logits[1]).abs().max())


def with_schemes(recipe: Recipe, schemes: Mapping[str, str]) -> Recipe:
    """The recipe with other schemes for some fusion groups."""
    groups = [replace(g, scheme=schemes.get(g.name, g.scheme)) for g in recipe.groups]
    return replace(recipe, groups=tuple(groups))


def weights_only(recipe: Recipe) -> Recipe:
    """The recipe with its activations left as they are."""
    return with_schemes(recipe, {g.name: g.scheme.partition("+")[0] for g in recipe.groups})


def candidates(uniform: Recipe, found: Recipe, planted: Sequence[str]) -> dict[str, Recipe]:
    """What is measured: name -> recipe."""
    return {
        "weights, uniform": weights_only(uniform),
        "weights, found": weights_only(found),
        "W8A8, uniform": uniform,
        "W8A8, found": found,
        "W8A8, walls in FP8": with_schemes(uniform, dict.fromkeys(planted, FP8)),
        "W8A8, walls in bf16": with_schemes(uniform, dict.fromkeys(planted, "bf16")),
    }


def measured(
    model: str | Path, recipes: Mapping[str, Recipe], text: str, tokens: int
) -> dict[str, float]:
    """The KL of each recipe against the model without it [nats per token]."""
    with MeasuredKl(str(model), load_text(text), tokens=tokens) as objective:
        return {name: float(np.mean(list(objective.evaluate(r)))) for name, r in recipes.items()}


def run_seed(options: argparse.Namespace, seed: int) -> dict[str, object]:
    """Plant, check, search and measure."""
    groups = find_layers(open_checkpoint(options.model)).groups
    walls = plan_walls(groups, seed=seed, share=options.max_finer)
    folder = options.work / f"seed-{seed}"
    walled = folder / "model"
    write_walled(Path(options.model), walled, walls)
    ids = torch.arange(128) * 7 % 1000  # any tokens do: equality is asked for, not sense
    differences = {
        str(dtype).removeprefix("torch."): largest_difference(
            Path(options.model), walled, ids, dtype
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    table, recipe = str(folder / "table.jsonl"), folder / "recipe.yaml"
    mofq("measure", str(walled), "--space", "llama3_70b_w8a8", "-o", table)
    mofq("search", table, "--max-finer", str(options.max_finer), "-o", str(recipe))
    found = load_recipe(recipe)
    planted = {wall.group.name for wall in walls}
    finer = {group.name for group in found.groups if group.scheme != INT8}
    checkpoint = open_checkpoint(walled)
    uniform = uniform_recipe(checkpoint, find_layers(checkpoint), INT8)
    recipes = candidates(uniform, found, sorted(planted))
    kl = measured(walled, recipes, options.text, options.tokens)
    if not options.keep:
        shutil.rmtree(walled)
    return {
        "seed": seed,
        "log2": walls[0].log2,
        "channels": len(walls[0].channels),
        "layers": sum(len(wall.group.layers) for wall in walls),
        "planted": sorted(planted),
        "found": {g.name: g.scheme for g in found.groups if g.name in finer},
        "missed": sorted(planted - finer),
        "others": sorted(finer - planted),
        "logits_differ_by": differences,
        "kl": kl,
    }


def print_results(results: Sequence[dict[str, object]], plain: Mapping[str, float]) -> None:
    """Two Markdown tables: what was found, and the KL."""
    found = []
    for one in results:
        missed, others = list(one["missed"]), list(one["others"])  # type: ignore[call-overload]
        planted = list(one["planted"])  # type: ignore[call-overload]
        by = ", ".join(f"{v:g} ({k})" for k, v in one["logits_differ_by"].items())  # type: ignore[attr-defined]
        found.append(
            [
                *(f"{one['seed']}", f"2^{one['log2']}", f"{one['channels']}"),
                f"{one['layers']} in {len(planted)} groups",
                f"{len(planted) - len(missed)} of {len(planted)} groups",
                *(f"{len(others)}", by),
            ]
        )
    heads = ["seed", "walls", "channels", "planted layers", "found", "others", "logits differ by"]
    print_markdown(heads, found)
    names = list(plain)
    costs = [["no walls", *(f"{plain[name]:.4f}" for name in names), ""]]
    for one in results:
        kl: dict[str, float] = one["kl"]  # type: ignore[assignment]
        lost = kl["weights, uniform"] - plain["weights, uniform"]
        recovered = (kl["weights, uniform"] - kl["weights, found"]) / lost
        values = [f"{kl[name]:.4f}" for name in names]
        costs.append([f"{one['seed']}", *values, f"{100 * recovered:.1f} %"])
    print_markdown(["seed", *names, "recovered, weights"], costs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all seeds, print the tables, keep the figures in results.json."""
    parser = model_parser(__doc__, ("--text", "text file to measure on"), tokens=2048)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max-finer", type=float, default=0.03)
    parser.add_argument("--keep", action="store_true", help="keep the walled checkpoints")
    options = parse_into_work(parser, arguments)
    checkpoint = open_checkpoint(options.model)
    layers = find_layers(checkpoint)
    if layers.architecture not in FAMILIES:
        parser.error(f"{layers.architecture}: its norm is not known to multiply by its weight")
    uniform = uniform_recipe(checkpoint, layers, INT8)
    every = candidates(uniform, uniform, ())
    plain = measured(options.model, every, options.text, options.tokens)
    results: list[dict[str, object]] = []
    for seed in range(options.seeds):
        results.append(run_seed(options, seed))
        content = {"no_walls": plain, "seeds": results}
        (options.work / "results.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print_results(results, plain)


if __name__ == "__main__":
    main()
