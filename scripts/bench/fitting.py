"""What fitting `~gptq` takes: one wide layer's Hessian, its factor and its rows, and a model's sum.

    python scripts/bench/fitting.py --inputs 4096 --rows 1024
    python scripts/bench/fitting.py --inputs 28672 --rows 2048 --threads 2   # takes 12 GB
    python scripts/bench/fitting.py --precision mofq/demo/model --stats STATS

Processor and wall time of each step for random inputs, with the operations (a multiplication and
an addition are two) that it needs and their rate. *70B* is the same operations of the linear layers
of Llama-3-70B with as many inputs (8,192 or 28,672) at these rates, for `mofq measure` of one
scheme: each layer is fitted twice, to each half of 8 x 512 tokens.

``--precision`` compares codes that are fitted by a Hessian and a factor in float32 with those in
float64, for each layer of a model: how many differ, and what the change costs by the Hessian.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, process_time

import torch
from torch import Tensor

from mofq.evidence.calibration.stats import open_sequences, read_stats
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import find_layers
from mofq.numbers.quantize import Feedback, factorise_hessian, fake_quantize_weight
from mofq.numbers.quantize.gptq import DAMPING, factorise_flipped
from mofq.numbers.schemes import parse_scheme

#: out_features, in_features of the linear layers of a decoder layer of Llama-3-70B, and how many.
LLAMA3_70B = (
    *((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)),
    (28672, 8192),
    (28672, 8192),
    (8192, 28672),
)
DECODER_LAYERS, TOKENS, STRIP, ROWS = 80, 4096, 512, 1024


def run_on(threads: ThreadPoolExecutor) -> Callable[[Iterable[Callable[[], None]]], None]:
    """What runs work on some threads."""

    def run_all(work: Iterable[Callable[[], None]]) -> None:
        list(threads.map(lambda one: one(), work))

    return run_all


def timed(name: str, operations: float, work: Callable[[], object]) -> float:
    """Do some work, print what it took, and return its rate [operations per processor second]."""
    start, cpu = perf_counter(), process_time()
    work()
    seconds, cpu = perf_counter() - start, process_time() - cpu
    print(
        f"{name:>10}: {cpu:8.2f} s of processor time, {seconds:8.2f} s, "
        f"{operations / cpu / 1e9:6.1f} G operations a second"
    )
    return operations / cpu


def add_hessian(total_II: Tensor, x_TI: Tensor, run_all: Callable[..., None]) -> None:
    """Sum the lower triangle of a Hessian, in strips as `mofq.evidence.fits` does."""

    def add(start: int) -> None:
        stop = min(start + STRIP, len(total_II))
        total_II[start:stop, :stop] += x_TI[:, start:stop].T @ x_TI[:, :stop]

    run_all((lambda start=start: add(start)) for start in range(0, len(total_II), STRIP))


def wide_layer(inputs: int, rows: int, tokens: int, threads: int, scheme: str) -> list[float]:
    """Rates of the three steps of fitting one layer."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    weight = parse_scheme(scheme).quantized_weight
    x_TI = torch.randn(tokens, inputs, dtype=torch.float64)
    total_II = torch.zeros(inputs, inputs, dtype=torch.float64)
    weight_OI = torch.randn(rows, inputs) * 0.02
    found: list[Feedback] = []
    with ThreadPoolExecutor(threads) as pool:
        run_all = run_on(pool)

        def factorise() -> None:
            keep = weight.rounding == "descent"
            found.append(factorise_flipped(total_II, run_all=run_all, keep=keep))

        def quantize(start: int) -> None:
            fake_quantize_weight(weight_OI[start : start + ROWS], weight, feedback=found[0])

        rates = [
            timed("Hessian", tokens * inputs**2, lambda: add_hessian(total_II, x_TI, run_all)),
            timed("factor", inputs**3 / 3, factorise),
        ]
        blocks = [lambda start=start: quantize(start) for start in range(0, rows, ROWS)]
        rates.append(timed("rows", rows * inputs**2, lambda: run_all(blocks)))
    return rates


def seventy_billion(rates: list[float], inputs: int, threads: int) -> None:
    """Print what a model's layers of this many inputs take at some rates."""
    outputs = [out for out, columns in LLAMA3_70B if columns == inputs]
    operations = (
        TOKENS * inputs**2 * len(outputs),
        2 * inputs**3 / 3 * len(outputs),
        2 * inputs**2 * sum(outputs),
    )
    hours = [DECODER_LAYERS * n / rate / 3600 for n, rate in zip(operations, rates, strict=True)]
    print(
        f"70B, layers of {inputs} inputs, processor hours: Hessians {hours[0]:.1f}, factors "
        f"{hours[1]:.1f}, rows of each scheme {hours[2]:.1f}; on {threads} threads "
        f"{sum(hours) / threads:.1f} h"
    )


def precision(model: str, folder: str, scheme: str) -> None:
    """Print how codes of float32 factors differ from those of float64."""
    checkpoint = open_checkpoint(model)
    weight = parse_scheme(scheme).quantized_weight
    stack, files = open_sequences(read_stats(folder))
    different = total = 0
    cost64 = cost32 = 0.0
    with stack:
        for layer in find_layers(checkpoint).grouped_layers:
            hessian_II = torch.zeros(layer.in_features, layer.in_features).double()
            for file in next(iter(files.values())):
                samples = file.read(layer.name)
                if samples is None:
                    continue
                norm_T = samples.grad_DTO.double().square().sum((0, 2)).sqrt()
                x_TI = samples.x_TI.double() * norm_T[:, None]
                hessian_II += x_TI.T @ x_TI
            weight_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features).float()
            codes = [
                fake_quantize_weight(weight_OI, weight, feedback=feedback)
                for feedback in (factorise_hessian(hessian_II), _in_float32(hessian_II))
            ]
            different += int((codes[0] != codes[1]).sum())
            total += codes[0].numel()
            deltas = [(one - weight_OI).double() for one in codes]
            costs = [float(((d @ hessian_II) * d).sum()) for d in deltas]
            cost64, cost32 = cost64 + costs[0], cost32 + costs[1]
    print(
        f"{scheme}: {different} of {total} codes differ ({different / total:.2e}); the cost by the "
        f"Hessian is {cost32 / cost64 - 1:+.2e} of that in float64"
    )


def _in_float32(hessian_II: Tensor) -> Feedback:
    flipped_II = hessian_II.flip(0, 1).float()
    flipped_II.diagonal().add_(DAMPING * float(flipped_II.diagonal().mean()))
    lower_II = torch.linalg.cholesky(flipped_II)
    root_I = lower_II.diagonal().flip(0)
    return Feedback(lower_II.flip(0, 1) / root_I, root_I.square() / root_I.square().max())


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--for-threads", type=int, default=8, help="of the extrapolation")
    parser.add_argument("--scheme", default="int4.g128@nats~gptq")
    parser.add_argument("--precision", metavar="MODEL")
    parser.add_argument("--stats")
    options = parser.parse_args()
    if options.precision:
        precision(options.precision, options.stats, options.scheme)
        return
    rates = wide_layer(
        options.inputs, options.rows, options.tokens, options.threads, options.scheme
    )
    seventy_billion(rates, options.inputs, options.for_threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
