"""Four over six (arXiv:2512.02010): NVFP4 whose blocks choose what their largest is mapped to.

    python scripts/reproduce/four_over_six.py MODEL --stats STATS --text FILE --work FOLDER

A block of 16 gets the scale under which its largest magnitude is 6, or the one under which it
is 4, by the lower squared error; the tensor's scale leaves room for both. Weights alone, and
weights and inputs (whose tensor scales are static). For weights the export is NVFP4 as engines
load it; for inputs no engine of `mofq engines` makes the choice, and it is emulated. Beside it
stands `@mse`, which searches 37 scales of a block.

The source: the method "evaluates two potential scale factors for each block of values"
(abstract; its figures are of training and tasks).
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

SCHEMES = (
    "nvfp4",
    "nvfp4@fouroversix",
    "nvfp4@mse",
    "nvfp4+nvfp4",
    "nvfp4@fouroversix+nvfp4",
    "nvfp4@fouroversix+nvfp4@fouroversix",
)


def main(given: Sequence[str] | None = None) -> None:
    """One table."""
    options = arguments(
        __doc__, given, ("--stats", "from `mofq calibrate`"), ("--text", "held-out text")
    )
    amax = input_amax(options.model, options.stats)
    recipes = {f"`{name}`": uniform_of(options.model, name, amax=amax) for name in SCHEMES}
    print_measured(measure_recipes(reference_of(options), recipes))


if __name__ == "__main__":
    main()
