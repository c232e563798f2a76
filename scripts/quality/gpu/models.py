"""Calibration and validation: the device against the CPU, and the rates of an 8B model on it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mofq.delivery.backends import apply_recipe
from mofq.demo import demo_model_folder
from mofq.evidence.calibration.calibrate import run_and_write, run_sequence, sample_scores
from mofq.evidence.calibration.capture import capture_layers
from mofq.evidence.calibration.gains import read_gains, write_gains
from mofq.evidence.calibration.stats import CorpusPlan, Plan
from mofq.evidence.metrics import kl_divergence
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo, open_checkpoint
from mofq.model.layers import ModelLayers, find_layers
from mofq.model.loading import load_model
from scripts.make.synthetic_checkpoint import COMMON, CONFIGS, SMALL, shapes_of
from scripts.quality.gpu.applier import demo_windows, logits_of, mixed_recipe
from scripts.quality.gpu.report import Report, best_seconds, peak_gb, synchronise

# Of tests/support, which `report` has put on the path.
from calibrated import calibrate_folder  # isort: skip

#: In float32 sums differ by their order alone; what is kept is rounded to bfloat16, where few
#: numbers fall to the other side. Of the norm of a tensor, so much may differ.
STATS_TOLERANCE = 2e-3
#: Of a gain, and of a divergence, which are sums of many.
SUM_TOLERANCE = 1e-3
EMULATED = ("int8.channel+int8.token", "int4.g32", "nvfp4", "fp8_e4m3.channel+fp8_e4m3.token")
TOKENS = 2048


def check_calibration(report: Report, folder: Path) -> None:
    """The bundled model's stats, made on both."""
    windows = {"a": demo_windows(windows=2 if report.small else 4, tokens=128)}
    model_folder = demo_model_folder()
    stats = {
        device: calibrate_folder(
            model_folder,
            folder / device.replace(":", "-"),
            windows,
            model=load_model(model_folder, dtype="float32", device=device),
            kept=1,
        )
        for device in dict.fromkeys(["cpu", report.device])
    }
    needed, found = (load_file(stats[d].sequence_files("a")[0]) for d in ("cpu", report.device))
    apart = {
        key: float((found[key].double() - value.double()).norm() / value.double().norm())
        for key, value in needed.items()
        if value.is_floating_point()
    }
    worst = max(apart, key=apart.__getitem__)
    report.check(
        f"{len(apart)} inputs and gradients",
        found.keys() == needed.keys() and apart[worst] <= STATS_TOLERANCE,
        f"the furthest is {worst}, by {apart[worst]:.2g} of its norm",
    )
    theirs, ours = (read_gains(stats[d].gains_files("a")[0]) for d in ("cpu", report.device))
    ratio = max(
        abs(mine / other - 1)
        for name, one in ours.items()
        for kind in ("weight", "input")
        for mine, other in zip(getattr(one, kind), getattr(theirs[name], kind), strict=True)
    )
    report.check("gains", ratio <= SUM_TOLERANCE, f"the furthest by {ratio:.2g} of itself")
    # Answers are sums of either sign, and may be near zero.
    size = max(abs(answer) for one in theirs.values() for answer in one.scaling)
    furthest = max(
        abs(mine - other)
        for name, one in ours.items()
        for mine, other in zip(one.scaling, theirs[name].scaling, strict=True)
    )
    furthest /= size
    report.check("answers", furthest <= STATS_TOLERANCE, f"the furthest by {furthest:.2g} of one")


def check_divergence(report: Report) -> None:
    """What an emulated recipe costs, in float32 on both."""
    checkpoint = open_checkpoint(str(demo_model_folder()))
    recipe = mixed_recipe(checkpoint, ("int8.channel+int8.token", "int4.g32", "mxfp8+mxfp8"))
    windows_NT = demo_windows(windows=2 if report.small else 8, tokens=256)
    found = {}
    for device in ("cpu", report.device):
        original = load_model(checkpoint.folder, device=device)
        before = logits_of(original, windows_NT, device)
        after = logits_of(apply_recipe(original, recipe, checkpoint=checkpoint), windows_NT, device)
        found[device] = float(kl_divergence(before, after).mean())
    ratio = found[report.device] / found["cpu"] - 1
    detail = f"{found[report.device]:.6g} and {found['cpu']:.6g} nats per token"
    # Inputs are rounded on the fly: a sum in another order takes a few to another code.
    report.check("KL of a recipe", abs(ratio) <= 10 * SUM_TOLERANCE, detail)


def large_model(report: Report) -> tuple[Any, ModelLayers, Plan]:
    """Llama-3-8B's shapes with random weights, made on the device, and a plan for it."""
    config = CONFIGS["llama3-8b"] | COMMON | (SMALL if report.small else {})
    tensors = {
        name: TensorInfo(name, "BF16", shape, Path("llama3-8b"), 0, 0)
        for name, shape in shapes_of(config)
    }
    checkpoint = Checkpoint(Path("llama3-8b"), "llama3-8b", config, tensors, index_sha256="0" * 64)
    options = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device(report.device):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **options), dtype=torch.bfloat16
        )
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    tokens = 64 if report.small else TOKENS
    plan = Plan(
        "llama3-8b",
        "0" * 64,
        seed=0,
        sequence_length=tokens,
        draws=1,
        dtype="bfloat16",
        corpora=(CorpusPlan("a", "random", "0" * 64, sequences=3, kept=1),),
    )
    return model, find_layers(checkpoint), plan


def measure_large(report: Report, folder: Path) -> None:
    """Tokens per second and memory, and where the time of calibration goes."""
    device = report.device
    model, layers, plan = large_model(report)
    synchronise(device)
    report.figure("8B: weights resident", peak_gb(device), "GB")
    tokens = plan.sequence_length
    generator = torch.Generator().manual_seed(0)
    window_T = torch.randint(model.config.vocab_size, (tokens,), generator=generator)
    repeats = 2

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(window_T[None].to(device)).logits[0]

    seconds = best_seconds(forward, device, repeats=repeats)
    report.figure("8B: forward", tokens / seconds, "tokens/s")
    embeddings = model.get_input_embeddings()

    def plain() -> None:
        with torch.enable_grad():
            x = embeddings(window_T[None].to(device)).requires_grad_(True)
            logits_TV = model(inputs_embeds=x).logits[0]
            logits_TV.backward(torch.ones_like(logits_TV))

    both = best_seconds(plain, device, repeats=repeats)
    report.figure("8B: forward and backward", tokens / both, "tokens/s")
    report.figure("8B: its peak memory", peak_gb(device), "GB")
    logits_TV = forward()
    drawing = best_seconds(lambda: sample_scores(logits_TV, seed=0), device, repeats=repeats)
    report.figure("8B: drawing scores, of that", drawing / both, "times")
    names = [layer.name for layer in layers.grouped_layers]
    with capture_layers(model, layers) as captured:

        def run_captured() -> None:
            captured.clear()
            run_sequence(model, window_T, [0])

        captured_s = best_seconds(run_captured, device, repeats=repeats)
        report.figure("8B: with capture, to forward and backward", captured_s / both, "times")
        report.figure("8B: its peak memory with capture", peak_gb(device), "GB")
        start = perf_counter()
        write_gains(folder / "gains.json", captured, names)
        gains_s = perf_counter() - start
        report.figure("8B: gains, to forward and backward", gains_s / both, "times")
    (folder / "a").mkdir(exist_ok=True)
    corpus = plan.corpora[0]
    sequences = [(corpus, index, window_T) for index in range(corpus.sequences)]
    start = perf_counter()
    run_and_write(model, layers, sequences, plan=plan, folder=folder)
    seconds = perf_counter() - start
    rate = tokens * corpus.sequences / seconds
    report.figure("8B: calibrate, one of three sequences kept", rate, "tokens/s")
    report.figure("8B: calibrate, its peak memory", peak_gb(device), "GB")


def run(report: Report) -> None:
    """The bundled model first, then rates."""
    with TemporaryDirectory() as folder:
        check_calibration(report, Path(folder))
        check_divergence(report)
        measure_large(report, Path(folder))
