"""The two remedies of arXiv:2408.15301 side by side, on a model that has the ailment.

    python scripts/reproduce/bismoothing.py MODEL --calibration FILE --text FILE --work FOLDER

The source finds that the weights of a few layers of LLaMA3-70B ruin INT8 per channel, and offers
finer groups for less than 3 % of the layers, or bi-smoothing, which keeps everything per channel.
Such layers are planted as in `walls.py`, without changing what the model computes.
For each seed the script prints the KL of uniform INT8 W8A8 on the original, on the model with
walls, with the layers that `--max-finer 0.03` finds in finer groups, and after
`mofq rewrite --method bismooth`. The source's abstract says how smoothing is meant and not by
which formula; ours is in `mofq/delivery/rewriting/scales.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mofq.decision.recipe import Recipe, load_recipe
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from scripts.reproduce.walls import INT8, plan_walls, write_walled
from scripts.shared.command import mofq, print_markdown, with_error
from scripts.shared.reproduction import (
    arguments,
    measure_recipes,
    reference_of,
    rewritten,
    stats_of,
    uniform_of,
)

SEEDS = range(3)
MAX_FINER = 0.03


def main(given: Sequence[str] | None = None) -> None:
    """Plant, remedy both ways, measure."""
    paths = (
        ("--calibration", "text to calibrate on"),
        ("--text", "that nothing was calibrated on"),
    )
    options = arguments(__doc__, given, *paths)
    plain = kl(options, options.model, uniform_of(options.model, INT8))
    rows = [["original", "–", plain, "–", "–"], *(seed_row(options, seed) for seed in SEEDS)]
    columns = ["walls", "planted in", "INT8", "finer groups found", "INT8 after bi-smoothing"]
    print_markdown(columns, rows)


def seed_row(options: argparse.Namespace, seed: int) -> list[str]:
    """Walls of one seed, and what each remedy makes of them."""
    work: Path = options.work
    groups = find_layers(open_checkpoint(options.model)).groups
    share = max(MAX_FINER, 3 / sum(len(group.layers) for group in groups))  # of a small model
    walls = plan_walls(groups, seed=seed, share=share)
    walled, smoothed = work / f"walled-{seed}", work / f"bismooth-{seed}"
    if not walled.exists():
        write_walled(Path(options.model), walled, walls)
    stats = stats_of(walled, {"en": options.calibration}, work / f"stats-{seed}")
    table, found = work / f"{seed}.jsonl", work / f"{seed}.yaml"
    mofq("measure", walled, "--space", "llama3_70b_w8a8", "-o", table)
    mofq("search", table, "--max-finer", str(share), "-o", found)
    rewritten(walled, stats, smoothed, "bismooth")
    return [
        f"seed {seed}: 2^{walls[0].log2} in {len(walls[0].channels)} channels",
        ", ".join(wall.group.name for wall in walls),
        kl(options, walled, uniform_of(str(walled), INT8)),
        kl(options, walled, load_recipe(found)),
        kl(options, smoothed, uniform_of(str(smoothed), INT8)),
    ]


def kl(options: argparse.Namespace, folder: str | Path, recipe: Recipe) -> str:
    """Of a recipe against the model that it is applied to, on the text."""
    done = measure_recipes(reference_of(options, model=folder), {"": recipe})[""]
    return with_error(done.kl, done.kl_stderr)


if __name__ == "__main__":
    main()
