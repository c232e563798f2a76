"""Codes and scales on the device are the CPU's, bit for bit: eager, and compiled to Triton."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from time import perf_counter

import torch
from torch import Tensor

from mofq.numbers.formats import ELEMENT_FORMATS
from mofq.numbers.quantize import (
    factorise_hessian,
    fake_quantize_activation,
    quantize_weight,
    round_to_format,
)
from mofq.numbers.quantize.cache_kernels import round_by_kernel
from mofq.numbers.quantize.compiled import pass_maker
from mofq.numbers.quantize.rounding_errors import deltas_pass, is_candidate, to_bands
from scripts.quality.gpu.report import Report

# Of tests/support, which `report` has put on the path.
from number_cases import (  # isort: skip
    WEIGHT_SCHEMES,
    activation_scheme,
    adversarial_weight,
    trained_like_weight,
    weight_scheme,
)

#: One of every kind, where time is short.
FEW = (
    *("int8.channel", "int4.g32.asym", "int4.g32@mse", "int8.tensor.s-f32", "nvfp4"),
    *("fp8_e4m3.block32", "int4.block8x32@fullrange", "nf4.g64", "mx6", "mxfp6_e2m3@mse"),
)
#: Also those whose scale is the very quotient: no rounding to bfloat16 hides its last bit.
QUOTIENTS = ("int8.channel.s-f32", "int4.g32.s-f32", "fp8_e4m3.channel.s-f32", "nvfp4@mse")
INPUTS = (
    *("int8.token", "fp8_e4m3.token", "int8.g32", "int4.g32.asym", "mxfp8", "mxfp4", "nvfp4"),
    *("int8.tensor", "fp8_e4m3.tensor"),
)
FITTED = ("int4.g32~gptq", "int4.channel@mse~gptq", "int4.g32@nats", "nvfp4~gptq")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Schemes of one program that is compiled: few, so that many are ready when time is up.
_TOGETHER = 4


def every_bfloat16() -> Tensor:
    """All finite bfloat16 numbers, [256, 256], neighbours in one row; the others are zeros."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float().reshape(256, 256)
    return torch.where(values.isfinite(), values, 0.0)


def spread_bfloat16() -> Tensor:
    """The same where each row has all mantissas and the exponents of a trained weight's row."""
    values = 1 + torch.arange(128) / 128
    exponents = torch.exp2(-torch.arange(256.0).remainder(24))
    signs = 1 - 2 * (torch.arange(256) % 2)
    return torch.outer(exponents * signs, values.repeat(2)).roll(1, 1)


def weights(*, small: bool) -> dict[str, Tensor]:
    """What is quantized, float32."""
    rows = 64 if small else 512
    adversarial = adversarial_weight(64, 128)
    return {
        "adversarial": adversarial,
        "adversarial, negative": -adversarial,
        "random": trained_like_weight(rows, 256),
        "every bfloat16": every_bfloat16(),
        "every mantissa": spread_bfloat16(),
    }


def first_difference(found: Tensor, needed: Tensor) -> str:
    """Where two tensors differ first, and both values there; nothing where no bit does."""
    found = found.cpu()
    if found.dtype != needed.dtype or found.shape != needed.shape:
        return f"{found.dtype} {list(found.shape)}, needed {needed.dtype} {list(needed.shape)}"
    bits = _BITS[needed.element_size()]
    differs = found.contiguous().view(bits) != needed.contiguous().view(bits)
    if not bool(differs.any()):
        return ""
    place = tuple(differs.nonzero()[0].tolist())
    return (
        f"{int(differs.sum())} of {differs.numel()} differ, first at {list(place)}: "
        f"{_exact(found[place])}, needed {_exact(needed[place])}"
    )


def _exact(value: Tensor) -> str:
    number = value.item()
    return f"{number!r} = {number.hex()}" if isinstance(number, float) else repr(number)


def weight_difference(weight_OI: Tensor, scheme_name: str, device: str, **options: object) -> str:
    """How codes and scales of the device differ from the CPU's."""
    scheme = weight_scheme(scheme_name)
    amax = float(weight_OI.abs().max())
    needed = quantize_weight(weight_OI, scheme, tensor_amax=amax, **options)
    found = quantize_weight(weight_OI.to(device), scheme, tensor_amax=amax, **options)
    for part in ("scale", "zero_point", "global_scale", "codes_OI"):
        ours, theirs = getattr(needed, part), getattr(found, part)
        if ours is not None and (difference := first_difference(theirs, ours)):
            return f"{part}: {difference}"
    return ""


def check_eager(report: Report) -> None:
    """Weights, inputs, caches and fitted codes, as they are written."""
    names = dict.fromkeys([*FEW, *QUOTIENTS] if report.small else [*WEIGHT_SCHEMES, *QUOTIENTS])
    matrices = weights(small=report.small)
    bad = 0
    for name in names:
        for label, weight_OI in matrices.items():
            if difference := weight_difference(weight_OI, name, report.device):
                bad += 1
                report.check(f"eager {name}, {label}", False, difference)
    total = len(names) * len(matrices)
    report.check(f"eager: {total - bad} of {total} weights the CPU's bits", not bad)
    _check_formats(report)
    _check_inputs(report, matrices)
    _check_fitted(report)


def _check_formats(report: Report) -> None:
    """Every element format over every bfloat16, scaled and not."""
    bad = []
    for name, element in ELEMENT_FORMATS.items():
        for factor in (1.0, 1.0 / 3.0):
            x = every_bfloat16() * factor
            difference = first_difference(
                round_to_format(x.to(report.device), element), round_to_format(x, element)
            )
            bad += [f"{name} times {factor:g}: {difference}"] if difference else []
    report.check("every bfloat16 rounded to every element format", not bad, "; ".join(bad[:3]))


def _check_inputs(report: Report, matrices: dict[str, Tensor]) -> None:
    bad = []
    for name in INPUTS:
        scheme = activation_scheme(name)
        for label, x_TI in matrices.items():
            for dtype in (torch.float32, torch.bfloat16):
                x = x_TI.to(dtype).nan_to_num()
                amax = float(x.float().abs().max()) / 2
                needed = fake_quantize_activation(x, scheme, static_amax=amax)
                found = fake_quantize_activation(x.to(report.device), scheme, static_amax=amax)
                if difference := first_difference(found, needed):
                    bad.append(f"{name}, {label}, {dtype}: {difference}")
    report.check("inputs rounded on the fly", not bad, "; ".join(bad[:3]))
    x_TD = trained_like_weight(64, 128, seed=7)
    for kernel in ("token_head", "rotated", "nvfp4", "nvfp4_fouroversix"):
        element = ELEMENT_FORMATS["int8"]
        needed = round_by_kernel(x_TD, kernel, element)
        difference = first_difference(
            round_by_kernel(x_TD.to(report.device), kernel, element), needed
        )
        report.check(f"KV cache as {kernel}", not difference, difference)


def _check_fitted(report: Report) -> None:
    rows, columns = (64, 128) if report.small else (256, 512)
    weight_OI = trained_like_weight(rows, columns, seed=3)
    x_TI = trained_like_weight(4 * columns, columns, seed=4).double()
    feedback = factorise_hessian(x_TI.T @ x_TI)
    importance = x_TI.square().sum(0).float()
    for name in FITTED:
        by_feedback = weight_scheme(name).rounding == "gptq"
        options = {"feedback": feedback} if by_feedback else {"importance": importance}
        if by_feedback:
            difference = weight_difference(weight_OI, name, report.device, **options)
        else:
            difference = _importance_difference(weight_OI, name, report.device, importance)
        report.check(f"fitted: {name}", not difference, difference)


def _importance_difference(weight_OI: Tensor, name: str, device: str, importance_I: Tensor) -> str:
    scheme = weight_scheme(name)
    needed = quantize_weight(weight_OI, scheme, importance=importance_I)
    found = quantize_weight(weight_OI.to(device), scheme, importance=importance_I.to(device))
    return first_difference(found.codes_OI, needed.codes_OI)


def compiled_differences(
    names: Sequence[str], device: str, small: bool
) -> tuple[list[str], float, list[str]]:
    """Compile a pass over some schemes and compare it with the same code on the CPU.

    Returns:
        Differences, the seconds that compiling took, and what the compiler had to say.
    """
    os.environ["MOFQ_COMPILE"] = "1"
    schemes = [weight_scheme(name) for name in names]
    told: list[str] = []
    start = perf_counter()
    compiled = pass_maker(device=device, tell=told.append)("deltas", schemes, torch.float32, 0)
    seconds = perf_counter() - start
    bad = []
    for label, weight_OI in weights(small=small).items():
        x_ARJK = to_bands(weight_OI, schemes)
        amax = weight_OI.abs().max()
        needed = deltas_pass(schemes)(x_ARJK, amax)
        found = compiled(x_ARJK.to(device), amax.to(device))
        for name, ours, theirs in zip(names, needed, found.cpu(), strict=True):
            # A zero may have another sign, in errors that are differences.
            if difference := first_difference(theirs + 0.0, ours + 0.0):
                bad.append(f"{name}, {label}: {difference}")
    return bad, seconds, [line for line in told if "cannot" in line]


def check_compiled(report: Report) -> None:
    """Every scheme in compiled programs, made side by side by several processes."""
    candidates = [n for n in (*QUOTIENTS, *WEIGHT_SCHEMES) if is_candidate(weight_scheme(n))]
    names = ["int8.channel.s-f32"] if report.small else list(dict.fromkeys(candidates))
    # What is slow to compile comes last.
    names.sort(key=lambda name: weight_scheme(name).scale_rule in ("mse", "fouroversix"))
    parts = [names[i : i + _TOGETHER] for i in range(0, len(names), _TOGETHER)]
    done = 0
    for part, (bad, seconds, told) in _compare_all(parts, report):
        done += len(part)
        report.check(
            f"compiled ({done} of {len(names)}): {', '.join(part)}",
            not bad and not told,
            "; ".join([*told, *bad[:3]]),
        )
        report.figure(f"compiling {part[0]} and {len(part) - 1} more", seconds, "s")


def _compare_all(
    parts: Sequence[Sequence[str]], report: Report
) -> Iterator[tuple[Sequence[str], tuple[list[str], float, list[str]]]]:
    if len(parts) == 1:
        yield parts[0], compiled_differences(parts[0], report.device, report.small)
        return
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # of each; it would start as many itself
    workers = max(1, min(8, (os.cpu_count() or 2) // 2, len(parts)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(compiled_differences, part, report.device, report.small): part
            for part in parts
        }
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def run(report: Report) -> None:
    """Eager first: it is fast, and what is exported."""
    check_eager(report)
    check_compiled(report)
