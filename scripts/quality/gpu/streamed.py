"""A model run layer by layer on the device: against a resident run of it, and at 8B's shapes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mofq.delivery.validation import validate_many
from mofq.demo import demo_mixture_folder, demo_model_folder
from mofq.evidence.calibration.stats import Stats
from mofq.evidence.calibration.streamed import calibrate_streamed
from mofq.evidence.corpora import load_text
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.model.streaming.streamed import open_streamed
from scripts.make.synthetic_checkpoint import COMMON, CONFIGS, SMALL, write_checkpoint
from scripts.quality.gpu.applier import mixed_recipe
from scripts.quality.gpu.report import Report, peak_gb, synchronise

# Of tests/support, which `report` has put on the path.
from calibrated import calibrate_folder, plan_of, some_tokens  # isort: skip

#: The same kernels run on the same numbers; some of CUDA's add in an order of their own.
STATS_TOLERANCE = 2e-3
KL_TOLERANCE = 1e-3
SCHEMES = ("int8.channel+int8.token", "int4.g32", "bf16")
DECODER_LAYERS = 8
TOKENS = 2048
SEQUENCES = 4


def calibrate_by_layers(
    folder: Path, out: Path, windows: dict[str, Tensor], device: str, **changes: Any
) -> Stats:
    """As ``calibrate_folder``, with one decoder layer on the device."""
    plan = plan_of(folder, windows, **changes)
    with open_streamed(folder, dtype=plan.dtype, device=device) as model:
        return calibrate_streamed(
            model,
            find_layers(open_checkpoint(str(folder))),
            plan=plan,
            windows=windows,
            folder=out,
        )


def check_calibration(report: Report, name: str, folder: Path, work: Path) -> None:
    """The statistics of one model, made in both ways on the device."""
    windows = {"a": some_tokens(2, 64 if report.small else 256, vocabulary=200)}
    resident = calibrate_folder(
        folder,
        work / f"{name}-resident",
        windows,
        model=load_model(folder, dtype="float32", device=report.device),
    )
    streamed = calibrate_by_layers(folder, work / f"{name}-streamed", windows, report.device)
    same, count, apart = 0, 0, {}
    for ours, theirs in zip(
        streamed.sequence_files("a"), resident.sequence_files("a"), strict=True
    ):
        found, needed = load_file(ours), load_file(theirs)
        if found.keys() != needed.keys():
            report.check(f"{name}: tensors of the statistics", False, f"{ours} has others")
            return
        for key, value in needed.items():
            count += 1
            same += torch.equal(found[key], value)
            if value.is_floating_point():
                norm = max(float(value.double().norm()), 1e-30)
                apart[f"{ours.name} {key}"] = (
                    float((found[key].double() - value.double()).norm()) / norm
                )
    worst = max(apart, key=apart.__getitem__)
    report.check(
        f"{name}: statistics of a streamed run",
        apart[worst] <= STATS_TOLERANCE,
        f"{same} of {count} tensors in every bit; the furthest is {worst}, by "
        f"{apart[worst]:.2g} of its norm",
    )


def check_validation(report: Report, name: str, folder: Path) -> None:
    """The KL of a recipe, measured in both ways on the device."""
    recipe = mixed_recipe(open_checkpoint(str(folder)), SCHEMES)
    found = {}
    for execution in ("resident", "streamed"):
        (one,) = validate_many(
            str(folder),
            [recipe],
            load_text("demo-en"),
            tokens=256 if report.small else 2048,
            sequence_length=64 if report.small else 256,
            device=report.device,
            execution=execution,  # type: ignore[arg-type]
        )
        report.check(f"{name}: enforced, {execution}", one.enforced is True)
        found[execution] = one.kl_nats_per_token
    ratio = found["streamed"] / found["resident"] - 1
    detail = f"{found['streamed']:.8g} and {found['resident']:.8g} nats per token"
    report.check(f"{name}: KL of a streamed run", abs(ratio) <= KL_TOLERANCE, detail)


def timed(device: str, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of some work, and the device's peak memory in it [GB]."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = perf_counter()
    work()
    synchronise(device)
    return perf_counter() - start, peak_gb(device)


def measure_large(report: Report, work: Path) -> None:
    """Calibration of some decoder layers of Llama-3-8B's shapes, read from files, in both ways."""
    config = COMMON | CONFIGS["llama3-8b"] | {"num_hidden_layers": DECODER_LAYERS}
    if report.small:
        config |= SMALL
    folder = work / "llama3-8b"
    write_checkpoint(config, folder, shard_bytes=5 * 10**9, seed=0)
    tokens = 64 if report.small else TOKENS
    windows = {"a": some_tokens(SEQUENCES, tokens, vocabulary=config["vocab_size"])}
    label = f"{config['num_hidden_layers']} layers of 8B"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report.figure(f"{label}: weights", size / 1e9, "GB")
    runs: dict[str, Callable[[Path], object]] = {
        "streamed": lambda out: calibrate_by_layers(
            folder, out, windows, report.device, dtype="bfloat16"
        ),
        "resident": lambda out: calibrate_folder(
            folder,
            out,
            windows,
            model=load_model(folder, dtype="bfloat16", device=report.device),
            dtype="bfloat16",
        ),
    }
    seconds = {}
    for name, run_one in runs.items():
        out = work / name
        seconds[name], memory = timed(report.device, lambda: run_one(out))  # noqa: B023
        shutil.rmtree(out)
        rate = SEQUENCES * tokens / seconds[name]
        report.figure(f"{label}: calibrate {name}, reading included", rate, "tokens/s")
        report.figure(f"{label}: its peak memory, {name}", memory, "GB")
    ratio = seconds["streamed"] / seconds["resident"]
    report.figure(f"{label}: streamed to resident", ratio, "times", aim="at most 1.3")


def run(report: Report) -> None:
    """The bundled models first, then rates."""
    with TemporaryDirectory() as folder:
        work = Path(folder)
        for name, model in (("dense", demo_model_folder()), ("mixture", demo_mixture_folder())):
            check_calibration(report, name, model, work)
            check_validation(report, name, model)
        measure_large(report, work)
