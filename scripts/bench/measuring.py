"""What scoring with statistics takes: processor time beside the arithmetic's floor.

    python scripts/bench/measuring.py                      # Llama-3-70B's down_proj
    python scripts/bench/measuring.py --shape 8192 8192 --rows 1024 --layers 3 --threads 2

Layers of random bfloat16 weights, inputs and gradients that read one input, scored as
`mofq measure --stats` scores them, with compiled passes over the weights, after one layer that is
not counted. Some rows are scored;
gradients are those of all rows, which counts for memory.

*Floor* is the matrix products alone, at the rate of a float32 product of two matrices of 2048 by
2048 in the same run. For each weight: all tokens for the outer products of gradients and inputs,
of the inputs as they are and under each activation scheme; all again for what each of these
changes in the outputs; 512 tokens for the output error of each scheme. *Memory* is the peak, less
that of the process before the inputs were there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections import deque
from collections.abc import Iterator
from time import perf_counter, process_time

import torch

from mofq.evidence.calibration.sequence_file import LayerSamples
from mofq.evidence.measure.layer_inputs import PreparedLayer, prepare_layer
from mofq.evidence.measure.samples import ChunkedSamples, arrange_samples
from mofq.evidence.measure.schedule import score_layers
from mofq.evidence.measure.stored_inputs import SharedInputs
from mofq.evidence.measure.worker_threads import Workers, worker_threads
from mofq.numbers.quantize.compiled import pass_maker
from mofq.numbers.schemes import parse_scheme

SCHEMES = (
    "int8.channel+int8.token",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "int8.channel",
    "int8.g128",
    "int6.g128@mse",
    "int4.g128@mse",
    "int4.g32@mse",
    "int4.g32@fullrange",
)


def product_rate() -> float:
    """Multiplications and additions of a float32 product in a second of processor time."""
    a, seconds = torch.randn(2048, 2048), []
    for _ in range(3):
        start = process_time()
        _ = a @ a
        seconds.append(process_time() - start)
    return 2048**3 / min(seconds)


def samples_of(shape: tuple[int, int], sequences: int, tokens: int) -> ChunkedSamples:
    """Random samples of a layer."""
    outputs, inputs = shape
    found = [
        LayerSamples(
            x_TI=torch.randn(tokens, inputs, dtype=torch.bfloat16),
            grad_DTO=torch.randn(1, tokens, outputs, dtype=torch.bfloat16),
            token_T=None,
            source="layer",
        )
        for _ in range(sequences)
    ]
    arranged = arrange_samples(found, draws=1, sequence_length=tokens)
    assert arranged is not None
    return arranged


def peak_bytes() -> int:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(8192, 28672))
    parser.add_argument("--rows", type=int, default=512, help="of each layer that are scored")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("MOFQ_COMPILE", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    schemes = [parse_scheme(name) for name in options.schemes]
    rows, inputs = options.rows, options.shape[1]
    weight_OI = (torch.randn(rows, inputs) * 0.02).bfloat16()
    made = pass_maker(tell=lambda message: print(message, file=sys.stderr))
    weights = dict.fromkeys(s.weight for s in schemes if s.weight is not None)
    made("deltas", list(weights), torch.bfloat16, 0)
    rate, before = product_rate(), peak_bytes()
    samples = samples_of(tuple(options.shape), options.sequences, options.tokens)

    def layers(workers: Workers, count: int) -> Iterator[PreparedLayer]:
        shared = SharedInputs()
        for i in range(count):
            yield prepare_layer(
                lambda start, stop: weight_OI[start:stop],
                (rows, inputs),
                schemes,
                samples={"text": samples},
                name=f"layer{i}",
                make_pass=lambda kind, some: made(kind, some, torch.bfloat16, 0),
                shared=shared,
                workers=workers,
            )

    torch.set_num_threads(options.threads)
    with worker_threads() as workers:
        # Each thread loads the passes when it first needs them, once in a run.
        deque(score_layers(layers(workers, 1), workers=workers), maxlen=0)
        start = perf_counter(), process_time()
        deque(score_layers(layers(workers, options.layers), workers=workers), maxlen=0)
    wall, processor = perf_counter() - start[0], process_time() - start[1]
    peak = peak_bytes() - before
    torch.set_num_threads(1)
    rate = max(rate, product_rate())
    activations = len({s.activation for s in schemes} - {None})
    tokens = options.sequences * options.tokens
    products = (1 + 2 * activations) * tokens + min(512, tokens) * len(schemes)
    scored = options.layers * rows * inputs
    found = {
        "us_of_processor_per_weight": 1e6 * processor / scored,
        "floor_us_per_weight": 1e6 * products / rate,
        "us_of_wall_per_weight": 1e6 * wall / scored,
        "memory_gb": peak / 1e9,
        "product_gmac_per_s": rate / 1e9,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
