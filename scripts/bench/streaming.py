"""What running a model layer by layer costs beside running it whole, in one run.

    python -m scripts.bench.streaming
    python -m scripts.bench.streaming --model ~/.cache/mofq/SmolLM2-135M --sequences 8 --tokens 8192

For the bundled model, a mixture of random weights and every model that is named, each in a
process of its own: `calibrate` whole and layer by layer; `validate` of five candidates (four
uniform recipes and a mixture of their schemes), one after the other whole, in one run whole, and
in one run layer by layer; and `tune` of the first of them in a few steps. Printed are whether all
files of the statistics have the same bytes, all validations the same numbers and what was tuned
the same hash, the processor time (imports left out) and its ratio, and the
peak of anonymous memory (`RssAnon` of /proc, looked at every few milliseconds; pages of files,
which the system may drop, do not count).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.shared.command import print_markdown, script_parser

SCHEMES = (
    "int4.g32@mse",
    "int4.g128@mse",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "int8.channel+int8.token",
)
_TIMES = ("seconds", "seconds_original")
_LOOK_SECONDS = 0.005
#: Sequences that are tuned on and judge.
_TUNED = 16


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one piece of work in a process of its own."""

    processor_seconds: float
    peak_bytes: int  #: anonymous, beyond the imports
    result: Any


def anonymous_bytes() -> int:
    """Of this process, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status says nothing of anonymous memory")


@contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """Note processor time and peak memory of what is done in the context."""
    before, done = anonymous_bytes(), threading.Event()
    peak = [before]

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    start = time.process_time()
    try:
        yield
    finally:
        found["processor_seconds"] = time.process_time() - start
        done.set()
        thread.join()
        found["peak_bytes"] = peak[0] - before


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Do one piece of work, in the process that is for it."""
    import mofq.delivery.tuning.streamed
    import mofq.delivery.validation.streamed
    import mofq.evidence.calibration.streamed  # noqa: F401
    from mofq.api import Excerpts, Running, Samples, Where, calibrate, tune
    from mofq.delivery.validation import validate_many
    from mofq.evidence.corpora import load_text

    found: dict[str, Any] = {}
    if task["what"] == "calibrate":
        with watched(found):
            calibrate(
                task["model"],
                ["en=demo-en-calibration"],
                task["output"],
                samples=Samples(
                    sequences=task["sequences"], sequence_length=task["sequence_length"]
                ),
                execution=task["execution"],
                where=Where(dtype=task["dtype"]),
            )
        return found
    if task["what"] == "tune":
        with watched(found):
            tuned = tune(
                task["model"],
                task["recipe"],
                ["en=demo-en-calibration"],
                steps=task["steps"],
                excerpts=Excerpts(
                    sequences=task["sequences"], sequence_length=task["sequence_length"]
                ),
                execution=task["execution"],
                running=Running(dtype=task["dtype"]),
            )
        found["result"] = tuned.tuning.sha256
        return found
    text = load_text("demo-en")
    with watched(found):
        validations = [
            one
            for candidates in task["candidates"]
            for one in validate_many(
                task["model"],
                candidates,
                text,
                tokens=task["tokens"],
                sequence_length=task["sequence_length"],
                dtype=task["dtype"],
                execution=task["execution"],
            )
        ]
    found["result"] = [
        {key: value for key, value in one.to_json().items() if key not in _TIMES}
        for one in validations
    ]
    return found


def run(**task: Any) -> Cost:
    """Do one piece of work in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench.streaming", "--task", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Cost(found["processor_seconds"], int(found["peak_bytes"]), found.get("result"))


def write_recipes(model: str, folder: Path) -> list[str]:
    """Four uniform recipes, and a mixture that changes scheme from group to group."""
    from mofq.api import uniform
    from mofq.decision.recipe import write_recipe

    recipes = [uniform(model, scheme).recipe for scheme in SCHEMES]
    groups = tuple(recipes[n % len(recipes)].groups[n] for n in range(len(recipes[0].groups)))
    recipes.append(replace(recipes[0], groups=groups))
    paths = []
    for number, recipe in enumerate(recipes):
        paths.append(str(folder / f"recipe-{number}.yaml"))
        write_recipe(recipe, paths[-1])
    return paths


def write_mixture(folder: Path) -> Path:
    """A mixture of experts with random weights, and the tokenizer of the bundled model."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from mofq.demo import demo_model_folder

    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same_files(first: Path, second: Path) -> bool:
    """Whether two folders have the same files, byte for byte."""
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    ]
    return names[0] == names[1] and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names[0]
    )


def compare(name: str, model: str, made: Path, options: Any) -> list[list[str]]:
    """The rows of one model."""
    plan = {
        "model": model,
        "dtype": options.dtype,
        "sequence_length": options.sequence_length,
    }
    outputs = {execution: made / f"stats-{execution}" for execution in ("resident", "streamed")}
    costs = {
        execution: run(
            what="calibrate",
            output=str(output),
            sequences=options.sequences,
            execution=execution,
            **plan,
        )
        for execution, output in outputs.items()
    }
    is_same = same_files(*outputs.values())
    rows = [_row(name, "calibrate", costs["resident"], costs["streamed"], is_same)]
    recipes = write_recipes(model, made)
    plan |= {"what": "validate", "tokens": options.tokens}
    one_by_one = run(candidates=[[one] for one in recipes], execution="resident", **plan)
    at_once = run(candidates=[recipes], execution="resident", **plan)
    streamed = run(candidates=[recipes], execution="streamed", **plan)
    for what, cost in (("five runs", one_by_one), ("one run", at_once)):
        is_same = cost.result == streamed.result
        rows.append(_row(name, f"validate, {what}", cost, streamed, is_same))
    plan |= {"what": "tune", "recipe": recipes[0], "sequences": _TUNED, "steps": options.steps}
    whole, streamed = (run(execution=one, **plan) for one in ("resident", "streamed"))
    rows.append(_row(name, "tune", whole, streamed, whole.result == streamed.result))
    for output in outputs.values():
        shutil.rmtree(output)
    return rows


def _row(name: str, what: str, whole: Cost, streamed: Cost, is_same: bool) -> list[str]:
    return [
        name,
        what,
        "yes" if is_same else "NO",
        f"{whole.processor_seconds:.1f} s",
        f"{streamed.processor_seconds:.1f} s",
        f"{streamed.processor_seconds / whole.processor_seconds:.2f}",
        f"{whole.peak_bytes / 1e6:,.0f} MB",
        f"{streamed.peak_bytes / 1e6:,.0f} MB",
    ]


def main(given: Sequence[str] | None = None) -> int:
    """Print the table; 1 where something differs."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", action="append", default=[], help="folder; repeatable")
    parser.add_argument("--sequences", type=int, default=8, help="of calibration")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096, help="to validate on")
    parser.add_argument("--steps", type=int, default=8, help="of tuning")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--task", help="of a process that this script starts")
    options = parser.parse_args(given)
    if options.task:
        print(json.dumps(work(json.loads(options.task))))
        return 0
    from mofq.demo import demo_model_folder

    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="mofq-streaming-") as made:
        models = {
            "bundled": str(demo_model_folder()),
            "mixture": str(write_mixture(Path(made) / "mixture")),
            **{Path(one).name: str(Path(one).expanduser()) for one in options.model},
        }
        for name, model in models.items():
            folder = Path(made) / f"of-{name}"
            os.makedirs(folder)
            rows += compare(name, model, folder, options)
            for row in rows[-4:]:
                print(*row, sep=", ", file=sys.stderr, flush=True)
    heads = ["model", "what", "same", "whole", "streamed", "ratio", "memory, whole", "streamed"]
    print_markdown(heads, rows)
    return int(any(row[2] != "yes" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
