"""How fast weights are scored, and in how much memory, in ratios taken in one run.

    python scripts/bench/speed.py --model SmolLM2-135M
    python scripts/make/synthetic_checkpoint.py llama3-8b -o llama3-8b
    python scripts/bench/speed.py --model SmolLM2-135M --large llama3-8b --json speed.json

Eight schemes, without statistics, over all linear layers of a model and over one layer of
8192 by 8192:

- eager: ``fake_quantize_weight`` under one scheme after another, and the squared errors, in
  blocks of rows that stay in the cache; and the same of whole weights, as one would write it;
- compiled: what ``mofq measure`` does with a layer, reading included;
- read: the same reading, and the largest magnitude in one compiled pass.

All on the same number of threads, page cache warm, the best of ``--repeats`` (eager: of two).
Ratios are of processor time, which other processes on the machine disturb less; wall times
stand beside them. The speedup is over the faster of the two eager ways.
Compilation is timed apart, and so is loading a program that an earlier run left. With
``--large``, ``mofq measure`` and ``mofq export`` run as processes of their own: peak
resident memory beyond that of the imports, and GB/s beside plain sequential reading.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from mofq.evidence.measure.layer_inputs import PreparedLayer, RowReader, prepare_layer
from mofq.evidence.measure.schedule import score_layers
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows, read_rows
from mofq.model.checkpoint.writer import PlannedTensor, ShardWriter
from mofq.model.layers import find_layers
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.quantize.compiled import pass_maker
from mofq.numbers.quantize.rounding_errors import Pass
from mofq.numbers.schemes import parse_scheme

CHANNEL = ("int8.channel", "fp8_e4m3.channel", "int4.channel", "fp4_e2m1.channel")
_READ_BYTES = 16 * 2**20
_EXPORT = "compressed-tensors"
_IMPORTS = (
    "import torch, mofq.evidence.measure.fill_table, mofq.evidence.spaces, mofq.delivery.backends"
)


def schemes_of(group_size: int) -> tuple[str, ...]:
    """INT8, FP8, INT4 and FP4 by channel and by group."""
    return (*CHANNEL, *(name.replace("channel", f"g{group_size}") for name in CHANNEL))


def best_seconds(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Wall and processor time of the shortest of some runs [s]."""
    wall, processor = [], []
    for _ in range(repeats):
        start = perf_counter(), process_time()
        work()
        wall.append(perf_counter() - start[0])
        processor.append(process_time() - start[1])
    return min(wall), min(processor)  # on a GPU, what is waited for is wall time


Layer = tuple[RowReader, tuple[int, int]]


def model_layers(checkpoint: Checkpoint) -> list[Layer]:
    """How to read every linear layer, and its shape."""
    return [
        (partial(read_layer_rows, checkpoint, layer), (layer.out_features, layer.in_features))
        for layer in find_layers(checkpoint).grouped_layers
    ]


def large_layer(folder: Path, size: int) -> list[Layer]:
    """One layer of normal numbers in a file."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = (torch.randn(size, size, generator=generator) * 0.02).bfloat16()
    with ShardWriter(folder, {"weight": PlannedTensor("BF16", (size, size))}) as writer:
        writer.add("weight", weight_OI)
    from mofq.model.checkpoint.headers import read_header

    info = read_header(folder / "model.safetensors")["weight"]
    return [(partial(read_rows, info), (size, size))]


def prepared(
    layers: Sequence[Layer],
    names: Sequence[str],
    *,
    device: str,
    block_pass: Pass | None = None,
) -> Iterator[PreparedLayer]:
    """The layers, ready to be scored."""
    schemes = [parse_scheme(name) for name in names]
    options: dict[str, Any] = {} if block_pass is None else {"make_pass": lambda *_: block_pass}
    for rows, shape in layers:
        yield prepare_layer(rows, shape, schemes, samples={}, device=device, **options)


def run_eager(layers: Sequence[Layer], names: Sequence[str], device: str, *, whole: bool) -> None:
    """One scheme after another, over blocks of rows or over whole weights."""
    weights = [scheme.weight for scheme in map(parse_scheme, names)]
    for layer in prepared(layers, names, device=device):
        blocks = ((0, layer.blocks[-1][1]),) if whole else layer.blocks
        for start, stop in blocks:
            weight_RI = layer.read_rows(start, stop).to(device).float()
            for weight in weights:
                assert weight is not None
                delta_RI = fake_quantize_weight(weight_RI, weight) - weight_RI
                delta_RI.square().sum(0, dtype=torch.float64)


def run_read(
    layers: Sequence[Layer],
    names: Sequence[str],
    device: str,
    largest: Callable[[Tensor], Tensor],
) -> None:
    """Only read, and find the largest magnitude."""
    for layer in prepared(layers, names, device=device):
        for start, stop in layer.blocks:
            largest(layer.read_rows(start, stop).to(device))


def eager_seconds(
    layers: Sequence[Layer], names: Sequence[str], device: str
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Wall and processor time in blocks of rows, and of whole weights [s]."""
    in_blocks = best_seconds(lambda: run_eager(layers, names, device, whole=False), 2)
    return in_blocks, best_seconds(lambda: run_eager(layers, names, device, whole=True), 2)


def ready_pass(names: Sequence[str], device: str) -> tuple[Pass, float]:
    """The pass of some schemes over bfloat16 blocks, and the seconds it took to have it."""
    weights = [scheme.weight for scheme in map(parse_scheme, names) if scheme.weight]
    start = perf_counter()
    make = pass_maker(device=device, tell=lambda message: print(message, file=sys.stderr))
    return make("errors", weights, torch.bfloat16, 0), perf_counter() - start


def compare(
    layers: Sequence[Layer], names: Sequence[str], repeats: int, device: str
) -> dict[str, float]:
    """Eager, compiled and reading of some layers."""
    block_pass, made = ready_pass(names, device)
    largest = torch.compile(lambda x: torch.amax(torch.abs(x)), dynamic=True)
    run_read(layers, names, device, largest)

    def run_compiled() -> None:
        ready = prepared(layers, names, device=device, block_pass=block_pass)
        for _ in score_layers(ready, device=device):
            pass

    run_compiled()
    elements = sum(rows * columns for _, (rows, columns) in layers)
    compiled = best_seconds(run_compiled, repeats)
    read = best_seconds(lambda: run_read(layers, names, device, largest), repeats)
    in_blocks, whole = eager_seconds(layers, names, device)
    eager = tuple(map(min, in_blocks, whole))
    which = 1 if device == "cpu" else 0
    return {
        "elements": elements,
        "compiled_s": compiled[0],
        "read_s": read[0],
        "eager_s": in_blocks[0],
        "eager_whole_s": whole[0],
        "compiled_cpu_s": compiled[1],
        "read_cpu_s": read[1],
        "eager_cpu_s": in_blocks[1],
        "eager_whole_cpu_s": whole[1],
        "compile_or_load_s": made,
        "speedup_over_eager": eager[which] / compiled[which],
        "ratio_to_read": compiled[which] / read[which],
        "speedup_over_eager_wall": eager[0] / compiled[0],
        "ratio_to_read_wall": compiled[0] / read[0],
        "gb_per_s": 2e-9 * elements / compiled[which],
    }


#: A process's peak counts what the one that began it held at that moment; this one holds little.
_LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(status != 0)
"""


def run_process(command: Sequence[str]) -> tuple[float, float, float]:
    """Wall time and processor time [s], and peak resident memory [bytes], of a command."""
    start = perf_counter()
    words = [sys.executable, "-S", "-c", _LAUNCHER, *command]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    seconds = perf_counter() - start
    if done.returncode:
        sys.exit(f"speed.py: {' '.join(command)} failed")
    processor_seconds, peak = map(float, done.stdout.split())
    return seconds, processor_seconds, peak * 1024


def read_sequentially(folder: Path) -> float:
    """Seconds to read every shard from its first byte to its last."""
    buffer = memoryview(bytearray(_READ_BYTES))
    start = perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return perf_counter() - start


def large_checkpoint(folder: Path, work: Path, names: Sequence[str]) -> dict[str, float]:
    """`measure`, and `export` in INT4, as a user runs them."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    space, table, recipe = work / "space.yaml", work / "table.jsonl", work / "recipe.yaml"
    space.write_text("version: 1\nschemes: [bf16, " + ", ".join(names) + "]\n")
    *_, imports = run_process([sys.executable, "-c", _IMPORTS])
    mofq = [sys.executable, "-c", "from mofq.cli import main; main()"]
    reading = read_sequentially(folder)
    environment = {"MOFQ_COMPILE": "1"}
    os.environ.update(environment)
    measuring, measure_cpu, measure_peak = run_process(
        [*mofq, "measure", str(folder), "--space", str(space), "-o", str(table)]
    )
    run_process([*mofq, "recipe", "uniform", str(folder), "int4.g128", "-o", str(recipe)])
    exporting, export_cpu, export_peak = run_process(
        [*mofq, "export", str(folder), str(recipe), "--to", _EXPORT, "-o", str(work / "export")]
    )
    return {
        "checkpoint_gb": size / 1e9,
        "read_gb_per_s": size / 1e9 / reading,
        "measure_s": measuring,
        "measure_cpu_s": measure_cpu,
        "measure_gb_per_s": size / 1e9 / measuring,
        "measure_peak_gb_beyond_imports": (measure_peak - imports) / 1e9,
        "export_s": exporting,
        "export_cpu_s": export_cpu,
        "export_gb_per_s": size / 1e9 / exporting,
        "export_peak_gb_beyond_imports": (export_peak - imports) / 1e9,
        "imports_gb": imports / 1e9,
    }


def main() -> None:
    """Run, print, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder, for example SmolLM2-135M")
    parser.add_argument(
        "--large", type=Path, help="a folder of scripts/make/synthetic_checkpoint.py"
    )
    parser.add_argument("--work", type=Path, help="where --large's outputs go; a temporary folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("MOFQ_COMPILE", "1")
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"threads": options.threads, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        found["layer"] = compare(
            large_layer(Path(folder), 8192), schemes_of(128), options.repeats, options.device
        )
    if options.model is not None:
        layers = model_layers(open_checkpoint(str(options.model)))
        found["model"] = compare(layers, schemes_of(64), options.repeats, options.device)
    worst = [found[key] for key in ("layer", "model") if key in found]
    found["speedup_over_eager"] = min(one["speedup_over_eager"] for one in worst)
    found["ratio_to_read"] = max(one["ratio_to_read"] for one in worst)
    found["gb_per_s"] = min(one["gb_per_s"] for one in worst)
    found["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if options.large is not None:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            found["large"] = large_checkpoint(options.large, Path(folder), schemes_of(128))
        found["peak_rss_gb"] = found["large"]["measure_peak_gb_beyond_imports"]
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
