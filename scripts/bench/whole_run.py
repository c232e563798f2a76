"""`mofq run` of a large model from nothing: memory and time of each stage, beside the arithmetic.

    python -m scripts.bench.whole_run llama3-8b --work /data/whole-run
    python -m scripts.bench.whole_run llama3-70b --decoder-layers 1 --work /data/slice

Writes a checkpoint of the model's true shapes with random weights
(`scripts/make/synthetic_checkpoint.py`) and the bundled model's tokenizer, and runs the whole flow
on it, up to an exported mixture of INT4 and INT8: calibration, measuring of five schemes with
statistics, search, validation of one window, export. Such weights say nothing of accuracy.

Printed are, for each stage, the time that passed, the processor time, the peak of anonymous memory
(`RssAnon` of /proc, looked at every few milliseconds; pages of files, which the system may drop, do
not count), and the arithmetic's floor: the multiplications and additions of its matrix products,
over the rate of a product of the shape of down_proj in processor time, measured first in the same
process. A run that is killed goes on with the same command, and then says the times of what was
left alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.streaming import anonymous_bytes
from scripts.make.synthetic_checkpoint import COMMON, CONFIGS, shapes_of, write_checkpoint
from scripts.shared.command import print_markdown, script_parser

SPACE = """\
version: 1
description: a mixture of INT4 and INT8, with and without INT8 activations
schemes: [int4.g128@mse, int4.g32@mse, int8.g128, int8.channel, int8.channel+int8.token]
base: [int8.channel]
"""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_LOOK_SECONDS = 0.01


@dataclass(slots=True)
class Stage:
    """What a stage took."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_bytes: int = 0


class Watch:
    """Notes what each stage takes; a stage lasts until another tells of itself."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.begin("check")

    def begin(self, name: str) -> None:
        """What is done from now on belongs to this stage."""
        self._name = name
        self._at = (time.monotonic(), time.process_time())
        self.stages.setdefault(name, Stage())

    def end(self) -> None:
        """Add what passed since the beginning of the stage."""
        stage = self.stages[self._name]
        stage.seconds += time.monotonic() - self._at[0]
        stage.processor_seconds += time.process_time() - self._at[1]

    def tell(self, stage: str, done: int, total: int) -> None:
        """As the progress of `mofq.api.run`."""
        if stage != self._name:
            self.end()
            self.begin(stage)
            print(f"{stage} (of {total})", file=sys.stderr, flush=True)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at the memory while the context is open."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(_LOOK_SECONDS):
                stage = self.stages[self._name]
                stage.peak_bytes = max(stage.peak_bytes, anonymous_bytes())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            self.end()
            done.set()
            thread.join()


def product_rate(config: Mapping[str, Any], tokens: int, dtype: str) -> float:
    """Multiplications and additions in a second of processor time, of products by down_proj."""
    import torch

    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    inputs = torch.randn(tokens, inner, dtype=getattr(torch, dtype))
    weight = torch.randn(config["hidden_size"], inner, dtype=getattr(torch, dtype))
    inputs @ weight.T
    start, repeats = time.process_time(), 3
    for _ in range(repeats):
        inputs @ weight.T
    return 2 * repeats * tokens * weight.numel() / (time.process_time() - start)


def operations(config: Mapping[str, Any], *, calibrated: int, validated: int) -> dict[str, float]:
    """Multiplications and additions of each stage's products with weights.

    A token passes a matrix forward in 2 for each weight that it uses. A calibration goes forward,
    forward again and backward to the inputs. Measuring multiplies inputs with gradients once for
    the weights and once for each of the two kinds of inputs, rounded or not. A validation is the
    original's forward pass and one of the recipe.

    Args:
        config: The ``config.json``.
        calibrated: Tokens.
        validated: Tokens.
    """
    used = {"layers": 0.0, "head": 0.0}
    for name, shape in shapes_of(dict(config)):
        if len(shape) == 2 and not name.startswith("model.embed_tokens"):
            share = (
                config["num_experts_per_tok"] / config["num_experts"] if ".experts." in name else 1
            )
            used["head" if name == "lm_head.weight" else "layers"] += shape[0] * shape[1] * share
    return {
        "calibrate": 2 * calibrated * (3 * used["layers"] + 2 * used["head"]),
        "measure": 2 * calibrated * 2 * used["layers"],
        "validate": 2 * validated * 2 * (used["layers"] + used["head"]),
    }


def main(given: Sequence[str] | None = None) -> int:
    """Make the checkpoint where there is none, run, and print the table."""
    parser = script_parser(__doc__)
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("--decoder-layers", type=int, help="a slice of so many; all by default")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--sequences", type=int, default=2, help="of calibration")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256, help="to validate on")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--max-bits", type=float, default=5.0)
    parser.add_argument("--engine", default="vllm-hopper")
    options = parser.parse_args(given)
    config = {**COMMON, **CONFIGS[options.model]}
    if options.decoder_layers is not None:
        config["num_hidden_layers"] = options.decoder_layers
    model = options.work / "model"
    if not (model / "config.json").exists():
        write_model(config, model)
    space = options.work / "space.yaml"
    space.write_text(SPACE, encoding="utf-8")

    rate = product_rate(config, options.sequence_length, options.dtype)
    floor = operations(
        config,
        calibrated=options.sequences * options.sequence_length,
        validated=options.tokens,
    )
    watch = Watch()
    from mofq.api import Budget, Running, Windows, run

    with watch.looking():
        result = run(
            model,
            options.work / "run",
            space=str(space),
            effort=options.effort,
            budget=Budget(max_bits=options.max_bits),
            engine=options.engine,
            windows=Windows(tokens=options.tokens, sequence_length=options.sequence_length),
            sequences=options.sequences,
            running=Running(dtype=options.dtype),
            execution="streamed",
            rivals=0,
            progress=watch.tell,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    print(json.dumps(result.to_json(), indent=1, default=str), file=sys.stderr)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{options.model}: {config['num_hidden_layers']} decoder layers, {size / 1e9:.2f} GB;")
    print(f"a product of down_proj's shape: {rate / 1e9:.1f} billion operations a second\n")
    print_markdown(
        ["stage", "passed", "processor", "peak memory", "arithmetic's floor"],
        [
            [
                name,
                f"{stage.seconds:,.0f} s",
                f"{stage.processor_seconds:,.0f} s",
                f"{stage.peak_bytes / 1e9:.2f} GB",
                f"{floor[name] / rate:,.0f} s" if name in floor else "",
            ]
            for name, stage in watch.stages.items()
        ],
    )
    return 0


def write_model(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint of a config with random weights, and the bundled model's tokenizer."""
    from mofq.demo import demo_model_folder

    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER:
        shutil.copy(demo_model_folder() / name, folder)
    write_checkpoint(config, folder, shard_bytes=5 * 10**9, seed=0)


if __name__ == "__main__":
    sys.exit(main())
