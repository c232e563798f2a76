r"""The three schemes of "Give Me BF16 or Give Me Death"? (arXiv:2411.02355), on one model.

    python scripts/reproduce/bf16_or_death.py MODEL --stats STATS --text FILE --work FOLDER \
        [--calibration FILE]

- W8A8-FP: FP8 E4M3 weights per channel, inputs per token and dynamic, rounded to nearest.
- W8A8-INT: INT8 weights per channel by GPTQ, inputs per token and dynamic.
- W4A16-INT: INT4 weights in groups of 128 (64 or 32 where 128 does not divide a layer) with
  scales of least squared error, by GPTQ.

GPTQ rounds to the statistics of the calibration; each of its schemes stands beside the same one
rounded to nearest. The source also smooths the inputs of W8A8-INT where that is needed: with the
text that the statistics are of, `mofq rewrite --method smoothquant` moves the scales of the sites
where that lowers the predicted KL, and the rewritten model is calibrated anew and rounded by GPTQ.
Recovery is the original's perplexity in percent of the quantized model's.

The source, for Llama-3.1 and benchmarks: "(1) FP8 (W8A8-FP) is effectively lossless across all
model scales, (2) well-tuned INT8 (W8A8-INT) achieves surprisingly low (1-3%) accuracy
degradation, and (3) INT4 weight-only (W4A16-INT) is more competitive than expected" (abstract).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from scripts.shared.reproduction import (
    Measured,
    arguments,
    calibrated_anew,
    measure_recipes,
    measure_versions,
    print_measured,
    reference_of,
    rewritten,
    uniform_of,
    version_of_rewritten,
)

SCHEMES = {
    "W8A8-FP": ("fp8_e4m3.channel+fp8_e4m3.token",),
    "W8A8-INT, nearest": ("int8.channel+int8.token",),
    "W8A8-INT": ("int8.channel~gptq+int8.token",),
    "W4A16-INT, nearest, absmax": tuple(f"int4.g{n}" for n in (128, 64, 32)),
    "W4A16-INT, nearest": tuple(f"int4.g{n}@mse" for n in (128, 64, 32)),
    "W4A16-INT": tuple(f"int4.g{n}@mse~gptq" for n in (128, 64, 32)),
}


def main(given: Sequence[str] | None = None) -> None:
    """One table."""
    options = arguments(
        __doc__,
        given,
        ("--stats", "from `mofq calibrate`"),
        ("--text", "held-out text"),
        optional=[("--calibration", "text of the stats; smooths the inputs of W8A8-INT too")],
    )
    recipes = {
        f"{label} `{names[0]}`": uniform_of(options.model, *names)
        for label, names in SCHEMES.items()
    }
    done = measure_recipes(reference_of(options), recipes, stats=options.stats)
    if options.calibration:
        done |= smoothed(options)
    print_measured(done)


def smoothed(options: argparse.Namespace) -> dict[str, Measured]:
    """W8A8-INT of the model whose scales were moved, against the original."""
    made, stats = options.work / "smoothquant", options.work / "smoothquant-stats"
    folder = rewritten(options.model, options.stats, made, "smoothquant")
    own = calibrated_anew(folder, options.calibration, stats, like=options.stats)
    versions = {
        f"{label}, smoothed `{SCHEMES[label][0]}`": version_of_rewritten(
            str(folder), uniform_of(str(folder), *SCHEMES[label]), own
        )
        for label in ("W8A8-INT, nearest", "W8A8-INT")
    }
    return measure_versions(reference_of(options), versions)


if __name__ == "__main__":
    main()
