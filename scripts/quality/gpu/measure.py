"""The pass over weights: a table of the device against the CPU's, and its rates."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mofq.api import Samples, Where, calibrate, measure
from mofq.demo import demo_model_folder
from mofq.evidence.measure.layer_inputs import prepare_layer
from mofq.evidence.measure.samples import CHUNK_TOKENS, ChunkedSamples
from mofq.evidence.measure.schedule import score_layers
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.quantize.compiled import Kind, eager_pass, pass_maker
from mofq.numbers.quantize.rounding_errors import Pass, to_bands
from mofq.numbers.schemes import TensorScheme, parse_scheme
from scripts.bench.speed import schemes_of
from scripts.quality.gpu.report import Report, best_seconds, peak_gb

SPACE = (
    "version: 1\nschemes: [bf16, int8.channel, int4.g32, int4.g32@mse, nvfp4, int4.g64~gptq,\n"
    " int4.g32@nats, int8.channel+int8.token, fp8_e4m3.channel+fp8_e4m3.token]\n"
)
#: Errors of weights are sums of the same numbers in another order; those in nats come through
#: products in float32, and of rounded inputs.
TOLERANCE = {"relative_weight_error": 1e-4, "output_mse": 1e-2, "kl_nats_per_token": 1e-2}
#: Out and in features of Llama-3-8B's layers, and how many of each a decoder layer has.
SHAPES = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}


def check_table(report: Report, folder: Path) -> None:
    """``mofq measure`` of the bundled model under every kind of scheme."""
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    model = str(demo_model_folder())
    samples = Samples(sequences=2 if report.small else 4, sequence_length=64)
    calibrate(model, ["en=demo-en-calibration"], folder / "stats", samples=samples)
    os.environ["MOFQ_COMPILE"] = "0"
    rows = {}
    for device in ("cpu", report.device):
        found = measure(
            model,
            str(folder / "space.yaml"),
            folder / f"{device.replace(':', '-')}.jsonl",
            stats=folder / "stats",
            where=Where(device=device),
        )
        rows[device] = {(r.group, r.scheme, r.unit, r.corpus): r.error for r in found.table.rows}
        if device == report.device == "cpu":
            break
    del os.environ["MOFQ_COMPILE"]
    needed, found_rows = rows["cpu"], rows[report.device]
    report.check("the same rows in both tables", needed.keys() == found_rows.keys())
    for unit, tolerance in TOLERANCE.items():
        apart = {
            key: abs(found_rows[key] - value) / max(abs(value), 1e-12)
            for key, value in needed.items()
            if key[2] == unit
        }
        worst = max(apart, key=apart.__getitem__)
        detail = f"{len(apart)} rows, the furthest {worst[:2]} by {apart[worst]:.2g} of itself"
        report.check(f"{unit} of the table", apart[worst] <= tolerance, detail)


def random_weight(rows: int, columns: int, device: str) -> Tensor:
    """Normal numbers in bfloat16, made where they are used."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(rows, columns, generator=generator, device=device)
    return (values * 0.02).bfloat16()


def bandwidth(device: str, nbytes: int) -> float:
    """What the device's memory moves in a copy, read and written, in bytes per second."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / best_seconds(lambda: target.copy_(source), device)


def transfer_rates(report: Report) -> None:
    """From the host to the device, from pageable memory and from pinned."""
    block = torch.empty(2**20 if report.small else 2**28, dtype=torch.uint8)
    seconds = best_seconds(lambda: block.to(report.device, copy=True), report.device)
    report.figure("host to device, pageable", len(block) / seconds / 1e9, "GB/s")
    if torch.device(report.device).type == "cuda":
        pinned = block.pin_memory()
        seconds = best_seconds(lambda: pinned.to(report.device, copy=True), report.device)
        report.figure("host to device, pinned", len(block) / seconds / 1e9, "GB/s")


def compiled_pass(report: Report, kind: Kind, schemes: list[TensorScheme]) -> Pass:
    """Compiled, and how long that took; on a small run as it is written."""
    if report.small:
        return eager_pass(kind, schemes)
    os.environ["MOFQ_COMPILE"] = "1"
    told: list[str] = []
    start = perf_counter()
    made = pass_maker(device=report.device, tell=told.append)(kind, schemes, torch.bfloat16, 0)
    report.figure(f"compiling {len(schemes)} schemes, {kind}", perf_counter() - start, "s")
    failed = [line for line in told if "cannot" in line]
    report.check(f"the pass is compiled, {kind}", not failed, "; ".join(failed))
    return made


def measure_pass(report: Report, rate: float) -> None:
    """Eight schemes without statistics: compiled, eager, and what memory would allow."""
    device = report.device
    schemes = [w for name in schemes_of(128) if (w := parse_scheme(name).weight) is not None]
    errors = compiled_pass(report, "errors", schemes)
    sizes = {"8192": {(8192, 8192): 1}, "8B's shapes": SHAPES}
    for label, shapes in sizes.items():
        compiled_s = eager_s = nbytes = 0.0
        for (rows, columns), count in shapes.items():
            if report.small:
                rows, columns = 64, 256
            weight_OI = random_weight(rows, columns, device)
            # As `mofq measure` cuts it; blocks are cut before, not in what is timed.
            step = max(64, 2**24 // columns // 64 * 64)
            blocks = [to_bands(part, schemes) for part in weight_OI.split(step)]
            amax = weight_OI.abs().max().float()

            def compiled(blocks: Any = blocks, amax: Tensor = amax) -> None:
                for block in blocks:
                    errors(block, amax)

            def eager(weight_OI: Tensor = weight_OI) -> None:
                weight_float = weight_OI.float()
                for scheme in schemes:
                    delta = fake_quantize_weight(weight_float, scheme) - weight_float
                    delta.square().sum(0, dtype=torch.float64)

            compiled_s += count * best_seconds(compiled, device)
            eager_s += count * best_seconds(eager, device, repeats=2)
            nbytes += count * weight_OI.nbytes
            if label == "8192":
                _check_sums(report, errors, schemes, blocks[0], amax)
        report.figure(f"{label}: the pass", nbytes / compiled_s / 1e9, "GB/s")
        reading = compiled_s / (nbytes / rate)
        report.figure(f"{label}: to reading", reading, "times", aim="at most 3")
        report.figure(f"{label}: eager to it", eager_s / compiled_s, "times", aim="at least 10")


def _check_sums(
    report: Report, errors: Pass, schemes: list[TensorScheme], block: Tensor, amax: Tensor
) -> None:
    """The sums of the compiled pass are the eager ones but for the order of adding."""
    found, needed = errors(block, amax), eager_pass("errors", schemes)(block, amax)
    apart = float(((found - needed).abs() / needed.clamp(min=1e-30)).max())
    # Sixty-four numbers of one sign: each addition rounds by 2**-24 at most.
    report.check("sums of squares of the pass", apart <= 64 * 2.0**-23, f"{apart:.2g} of each")


def measure_layer(report: Report, rate: float) -> None:
    """A layer as ``mofq measure`` scores it, from the host's memory; then with statistics."""
    device = report.device
    rows, columns = (64, 256) if report.small else (14336, 4096)
    weight_OI = random_weight(rows, columns, "cpu")
    schemes = [parse_scheme(name) for name in schemes_of(128)]
    tokens, sequences = (64, 2) if report.small else (512, 8)
    x_MCI, grad_MCO = (
        random_weight(sequences * tokens, size, "cpu").reshape(-1, CHUNK_TOKENS, size)
        for size in (columns, rows)
    )
    samples = ChunkedSamples(
        x_MCI=x_MCI,
        grad_MCO=grad_MCO,
        offset_MC=torch.arange(CHUNK_TOKENS).expand(len(x_MCI), -1),
        sequences=sequences,
        tokens=tokens,
    )
    for label, given in (("without", {}), ("with", {"a": samples})):
        kind: Kind = "deltas" if given else "errors"
        weights = [w for scheme in schemes if (w := scheme.weight) is not None]
        made = compiled_pass(report, kind, weights)
        prepare = partial(
            prepare_layer,
            lambda start, stop: weight_OI[start:stop],
            (rows, columns),
            schemes,
            samples=given,
            device=device,
            make_pass=lambda kind, schemes, made=made: made,
        )
        seconds = best_seconds(
            lambda prepare=prepare: list(score_layers([prepare()], device=device)),
            device,
            repeats=2,
        )
        nbytes = weight_OI.nbytes
        report.figure(f"a layer {label} statistics, from the host", nbytes / seconds / 1e9, "GB/s")
        report.figure(
            f"a layer {label} statistics, to reading it there", seconds / (nbytes / rate), "times"
        )
    report.figure("its peak memory", peak_gb(device), "GB")


def run(report: Report) -> None:
    """The table first, then rates."""
    with TemporaryDirectory() as folder:
        check_table(report, Path(folder))
    rate = bandwidth(report.device, 2**20 if report.small else 2**31)
    report.figure("memory: a copy, read and written", rate / 1e9, "GB/s")
    transfer_rates(report)
    measure_pass(report, rate)
    measure_layer(report, rate)
