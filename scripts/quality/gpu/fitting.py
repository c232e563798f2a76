"""Rounding fitted to statistics, ``~gptq`` and ``~descent``: layers of 4,096 and 28,672 inputs."""

from __future__ import annotations

import torch

from mofq.numbers.quantize import Feedback, factorise_hessian, quantize_weight
from mofq.numbers.schemes import parse_scheme
from scripts.quality.gpu.measure import random_weight
from scripts.quality.gpu.report import Report, best_seconds, peak_gb

SCHEME = "int4.g128~gptq"
DESCENT = "int4.g128~descent"


def measure_rounding(report: Report, inputs: int, outputs: int) -> None:
    """One layer, its factors there already."""
    device = report.device
    scheme = parse_scheme(SCHEME).weight
    assert scheme is not None
    weight_OI = random_weight(outputs, inputs, device)
    # How much a column takes over is no matter to the time.
    passed_II = torch.triu(random_weight(inputs, inputs, device).float(), 1)
    passed_II.diagonal().fill_(1.0)
    feedback = Feedback(passed_II, torch.ones(inputs, device=device))
    seconds = best_seconds(
        lambda: quantize_weight(weight_OI, scheme, feedback=feedback), device, repeats=1
    )
    report.figure(f"rounding {outputs} by {inputs}", seconds, "s")
    report.figure(f"rounding {outputs} by {inputs}, each column", seconds / inputs * 1e6, "us")
    report.figure(f"rounding {outputs} by {inputs}, peak memory", peak_gb(device), "GB")


def check_descent(report: Report, inputs: int, outputs: int) -> None:
    """The bits of the CPU on a few rows, and the time of all."""
    device = report.device
    scheme = parse_scheme(DESCENT).weight
    assert scheme is not None
    weight_OI = random_weight(outputs, inputs, "cpu").to(device)
    x_TI = random_weight(2 * inputs, inputs, "cpu").float()
    hessian_II = (x_TI.T @ x_TI).double()
    hessian_II.diagonal().add_(float(hessian_II.diagonal().mean()))
    feedback = factorise_hessian(hessian_II, keep=True)
    some_OI, on_device = weight_OI[:64], feedback.to(device)
    needed = quantize_weight(some_OI.cpu(), scheme, feedback=feedback)
    found = quantize_weight(some_OI, scheme, feedback=on_device)
    assert needed.scale is not None
    assert found.scale is not None
    report.check(
        f"descent over 64 by {inputs}",
        torch.equal(found.codes_OI.cpu(), needed.codes_OI)
        and torch.equal(found.scale.cpu(), needed.scale),
        f"{int((found.codes_OI.cpu() != needed.codes_OI).sum())} codes differ",
    )
    seconds = best_seconds(
        lambda: quantize_weight(weight_OI, scheme, feedback=on_device), device, repeats=1
    )
    report.figure(f"descent over {outputs} by {inputs}", seconds, "s")


def measure_factors(report: Report, inputs: int) -> None:
    """The factors: on the CPU, whose bits count, and what the device would take."""
    device = report.device
    x_TI = random_weight(2 * inputs, inputs, device).float()
    hessian_II = (x_TI.T @ x_TI).double()
    hessian_II.diagonal().add_(float(hessian_II.diagonal().mean()))
    if inputs <= 4096:
        hessian_cpu = hessian_II.cpu()
        seconds = best_seconds(lambda: factorise_hessian(hessian_cpu), "cpu", repeats=1)
        report.figure(f"factors of {inputs} inputs, one thread of the CPU", seconds, "s")
    if device != "cpu":
        seconds = best_seconds(lambda: torch.linalg.cholesky_ex(hessian_II), device, repeats=1)
        report.figure(f"a Cholesky factor of {inputs} inputs there, float64", seconds, "s")


def run(report: Report) -> None:
    """The usual width, then that of the widest layer of Llama-3-70B."""
    shapes = [(128, 64), (256, 64)] if report.small else [(4096, 4096), (28672, 8192)]
    check_descent(report, *((256, 64) if report.small else (2048, 2048)))
    for inputs, outputs in shapes:
        measure_rounding(report, inputs, outputs)
        measure_factors(report, inputs)
    report.check("all layers were rounded", True)
