"""FP8 with a scale, an exponent bias or neither: what a tensor's scale is worth, and how to set it.

    python scripts/reproduce/fp8_formats.py MODEL --stats STATS --text FILE --work FOLDER

- arXiv:2209.05433: E4M3 and E5M2 as they are, with the bias of the format; with a power of two
  for each tensor, which is an exponent bias of its own; with a full scale for each tensor.
- FP8-LM (arXiv:2310.18313) lets a small share of the values saturate: the static scale of
  the inputs is halved for as long as no more than 0.001 % of the calibration's inputs would.
  The share is its rule for gradients as recalled, not read in the source.
- SwitchBack (arXiv:2304.13013): inputs row by row, weights as one tensor.

Emulated here. `fp8_e4m3.tensor` with static or per-token inputs is what engines serve.

The source of the formats: PTQ "of language models trained using 16-bit formats that resisted
fixed point int8 quantization" is among what FP8 allows (abstract of 2209.05433; no figure).
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.shared.reproduction import (
    arguments,
    input_amax,
    measure_recipes,
    print_measured,
    reference_of,
    uniform_of,
)

#: Of the inputs; FP8-LM's threshold.
SATURATED = 1e-5
SCHEMES = {
    "E4M3, bias of the format": "fp8_e4m3.unscaled+fp8_e4m3.unscaled",
    "E5M2, bias of the format": "fp8_e5m2.unscaled+fp8_e5m2.unscaled",
    "E4M3, bias for each tensor": "fp8_e4m3.tensor.s-e8m0ceil+fp8_e4m3.tensor.s-e8m0ceil",
    "E4M3, scale for each tensor": "fp8_e4m3.tensor+fp8_e4m3.tensor",
    "INT8, scale for each tensor": "int8.tensor+int8.tensor",
    "SwitchBack's pair, E4M3": "fp8_e4m3.tensor+fp8_e4m3.token",
    "SwitchBack's pair, INT8": "int8.tensor+int8.token",
    "E4M3, channel and token": "fp8_e4m3.channel+fp8_e4m3.token",
}
#: Static scales that saturate a little.
AUTOMATIC = ("fp8_e4m3.tensor+fp8_e4m3.tensor", "int8.tensor+int8.tensor")


def main(given: Sequence[str] | None = None) -> None:
    """One table."""
    options = arguments(
        __doc__, given, ("--stats", "from `mofq calibrate`"), ("--text", "held-out text")
    )
    amax = input_amax(options.model, options.stats)
    recipes = {
        f"{label} `{scheme}`": uniform_of(options.model, scheme, amax=amax)
        for label, scheme in SCHEMES.items()
    }
    halved = input_amax(options.model, options.stats, saturated=SATURATED)
    for scheme in AUTOMATIC:
        label = f"automatic scaling `{scheme}`"
        recipes[label] = uniform_of(options.model, scheme, amax=halved)
    print_measured(measure_recipes(reference_of(options), recipes))
    changed = sum(halved[layer] < amax[layer] for layer in amax)
    print(f"Automatic scaling makes the scale of {changed} of {len(amax)} layers smaller.")


if __name__ == "__main__":
    main()
