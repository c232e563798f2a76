"""What `mofq rewrite` holds in memory, and what moving the model's statistics after it holds.

    python -m scripts.bench.rewriting llama3-8b --decoder-layers 2 --work /data/rewriting

Writes a checkpoint of the model's true shapes with random weights and calibrates it layer by layer,
where that was not done yet. Each method then rewrites it, and its statistics are moved as for a
recipe that rewrites, each in a process of its own; what they write is deleted. Printed are the time
that passed, the processor time, and the peak of anonymous memory beyond the imports (`RssAnon` of
/proc, looked at every few milliseconds; pages of files, which the system may drop, do not count).
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.bench.streaming import watched
from scripts.bench.whole_run import write_model
from scripts.make.synthetic_checkpoint import COMMON, CONFIGS, shapes_of
from scripts.shared.command import print_markdown, script_parser

METHODS = ("smoothquant", "awq", "rotate")


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a model, or move its statistics, in the process that is for it."""
    from mofq.api import rewrite
    from mofq.decision.rewriting import RotatedModel
    from mofq.delivery.rewriting.remake import make_base
    from mofq.evidence.calibration.stats import read_stats
    from mofq.model.checkpoint.headers import open_checkpoint

    found: dict[str, Any] = {}
    method, model = task["method"], task["model"]
    folders = (Path(task["output"]) / "model", Path(task["output"]) / "stats")
    start = time.monotonic()
    if task["what"] == "rewrite":
        stats = None if method == "rotate" else task["stats"]
        with watched(found):
            result = rewrite(model, folders[0], stats=stats, method=method)
        found["rotation"] = result.rotation and asdict(result.rotation)
    else:
        rotation = task["rotation"] and RotatedModel(**task["rotation"])
        rewriting = _rewriting(folders[0], rotation)
        with watched(found):
            make_base(rewriting, open_checkpoint(model), read_stats(task["stats"]), folders)
    found["seconds"] = time.monotonic() - start
    return found


def _rewriting(rewritten: Path, rotation: Any) -> Any:
    """What a recipe would note of a rewritten folder."""
    from mofq.decision.rewriting import Rewriting, SiteRewriting

    lineage = json.loads((rewritten / "rewrite.json").read_text("utf-8"))
    sites = {
        group: SiteRewriting(one["method"], one["strength"]["alpha"], one["strength"]["beta"])
        for group, one in lineage.get("sites", {}).items()
        if one["strength"] is not None
    }
    of = lineage["model"]
    return Rewriting(
        of["name"],
        of["index_sha256"],
        of["weights_sha256"],
        lineage.get("stats_sha256"),
        sites=sites,
        rotation=rotation,
    )


def run(**task: Any) -> dict[str, Any]:
    """Do one piece of work in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench.rewriting", "--task", json.dumps(task)]
    done = subprocess.run([*command, "llama3-8b"], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Make what is missing, and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("--decoder-layers", type=int, default=1, help="a slice of so many")
    parser.add_argument("--work", type=Path, help="folder for everything made")
    parser.add_argument("--sequences", type=int, default=4, help="of calibration")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--method", action="append", choices=METHODS, help="all by default")
    parser.add_argument("--task", help="of a process that this script starts")
    options = parser.parse_args(given)
    if options.task:
        print(json.dumps(work(json.loads(options.task))))
        return 0
    config = {**COMMON, **CONFIGS[options.model], "num_hidden_layers": options.decoder_layers}
    model, stats = options.work / "model", options.work / "stats"
    if not (model / "config.json").exists():
        write_model(config, model)
    if not (stats / "stats.json").exists():
        _calibrate(model, stats, options.sequences, options.sequence_length)
    rows = []
    for method in options.method or METHODS:
        task = {"model": str(model), "stats": str(stats), "method": method}
        task["output"] = str(options.work / method)
        rotation = None
        for what in ("rewrite", "move statistics"):
            found = run(what=what, rotation=rotation, **task)
            rotation = rotation or found.get("rotation")
            rows.append(
                [
                    method if what == "rewrite" else "its statistics",
                    f"{found['seconds']:,.0f} s",
                    f"{found['processor_seconds']:,.0f} s",
                    f"{found['peak_bytes'] / 1e9:.2f} GB",
                ]
            )
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
        shutil.rmtree(task["output"])
    shapes = [(name, math.prod(shape)) for name, shape in shapes_of(config)]
    layer = sum(2 * size for name, size in shapes if name.startswith("model.layers.0."))
    samples = max(path.stat().st_size for path in stats.rglob("sequence-*.safetensors"))
    print(f"{options.model}, {options.decoder_layers} decoder layers of {layer / 1e9:.2f} GB;")
    print(f"samples of a sequence of {options.sequence_length} tokens: {samples / 1e9:.2f} GB\n")
    print_markdown(["what", "passed", "processor", "peak memory"], rows)
    return 0


def _calibrate(model: Path, stats: Path, sequences: int, sequence_length: int) -> None:
    from mofq.api import Samples, Where, calibrate

    calibrate(
        model,
        ["en=demo-en-calibration"],
        stats,
        samples=Samples(sequences=sequences, sequence_length=sequence_length),
        execution="streamed",
        where=Where(dtype="bfloat16"),
    )


if __name__ == "__main__":
    sys.exit(main())
