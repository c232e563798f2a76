"""The three schemes of "Give Me BF16 or Give Me Death"? (arXiv:2411.02355), on one model.

    python scripts/reproduce_bf16_or_death.py MODEL --stats STATS --text FILE --work FOLDER

- W8A8-FP: FP8 E4M3 weights per channel, inputs per token and dynamic, rounded to nearest.
- W8A8-INT: INT8 weights per channel by GPTQ, inputs per token and dynamic.
- W4A16-INT: INT4 weights in groups of 128 (64 or 32 where 128 does not divide a layer) with
  scales of least squared error, by GPTQ.

GPTQ rounds to the statistics of the calibration; each of its schemes stands beside the same one
rounded to nearest. The source also smooths the inputs of W8A8-INT where that helps, which is
not done here. Recovery is the original's perplexity in percent of the quantized model's.

The source, for Llama-3.1 and benchmarks: "(1) FP8 (W8A8-FP) is effectively lossless across all
model scales, (2) well-tuned INT8 (W8A8-INT) achieves surprisingly low (1-3%) accuracy
degradation, and (3) INT4 weight-only (W4A16-INT) is more competitive than expected" (abstract).
"""

from __future__ import annotations

from collections.abc import Sequence

from reproduction import arguments, measure_recipes, print_measured, uniform_of

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
        __doc__, given, ("--stats", "from `mofq calibrate`"), ("--text", "held-out text")
    )
    recipes = {
        f"{label} `{names[0]}`": uniform_of(options.model, *names)
        for label, names in SCHEMES.items()
    }
    print_measured(
        measure_recipes(
            options.model,
            recipes,
            options.text,
            cache=options.work / "measured.jsonl",
            tokens=options.tokens,
            stats=options.stats,
        )
    )


if __name__ == "__main__":
    main()
