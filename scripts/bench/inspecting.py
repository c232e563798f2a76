"""How long `mofq inspect` takes on a mixture of a large model's true size, and its memory.

    python scripts/bench/inspecting.py qwen3-235b-a22b --work inspecting

The checkpoint has the model's names and shapes, 36,096 matrices of experts for the 235B one, and
no data: its files are sparse. It is inspected by its family's rules, inferred from names and shapes
(an empty file for ``--layers``), and with what an engine serves of a search space.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.bench.large_table import write_sparse
from scripts.make.synthetic_checkpoint import COMMON, CONFIGS


def inspect(model: Path, *options: str) -> dict[str, Any]:
    """The JSON of ``mofq inspect``, in a process of its own."""
    command = [sys.executable, "-c", "from mofq.cli import main; main()", "inspect", str(model)]
    ran = subprocess.run([*command, *options, "--json"], check=True, capture_output=True, text=True)
    content: dict[str, Any] = json.loads(ran.stdout)
    return content


def _processor_seconds() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Write the checkpoint, inspect it, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("--work", type=Path, required=True, help="a folder that is made anew")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    model = options.work / "model"
    write_sparse({**COMMON, **CONFIGS[options.model]}, model)
    layers = options.work / "layers.yaml"
    layers.write_text("version: 1\n", "utf-8")
    ways = {
        "by rules": (),
        "inferred": ("--layers", str(layers)),
        "with an engine": ("--engine", "vllm-hopper"),
    }
    for way, flags in ways.items():
        start, before = time.perf_counter(), _processor_seconds()
        found = inspect(model, *flags)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(
            f"{way}: {seconds:.1f} s, {_processor_seconds() - before:.1f} s of a processor, at most"
            f" {peak:.2f} GB so far, {found['linear_layers']:,} linear layers in"
            f" {len(found['groups']):,} groups, {found['weights']:,} weights"
        )


if __name__ == "__main__":
    main()
