"""Shared microexponents (arXiv:2302.08007) beside the OCP microscaling formats, on one model.

    python scripts/reproduce/microexponents.py MODEL --text FILE --work FOLDER

MX9, MX6 and MX4 have blocks of 16 under one power of two, which pairs of elements may halve.
MXINT8, MXFP8, MXFP6 and MXFP4 have blocks of 32 under one power of two, by the floor rule of
the standard or, where it says so, by the smallest that saturates nothing. Every linear layer
has the same format, weights alone or weights and inputs. All of it is emulated.

The source: formats "based on shared microexponents (MX) are identified, which outperform
other state-of-the-art quantization approaches, including narrow-precision floating-point and
block floating-point" (abstract; no figure).
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.shared.reproduction import (
    arguments,
    measure_recipes,
    print_measured,
    reference_of,
    uniform_of,
)

CEILING = {8: "fp8_e4m3.g32.s-e8m0ceil", 4: "fp4_e2m1.g32.s-e8m0ceil"}
BOTH = {
    "MX9": "mx9+mx9",
    "MXINT8": "mxint8+mxint8",
    "MXFP8 E4M3": "mxfp8+mxfp8",
    "MXFP8 E4M3, ceiling": f"{CEILING[8]}+{CEILING[8]}",
    "MX6": "mx6+mx6",
    "MXFP6 E2M3": "mxfp6_e2m3+mxfp6_e2m3",
    "MXFP6 E3M2": "mxfp6_e3m2+mxfp6_e3m2",
    "MX4": "mx4+mx4",
    "MXFP4": "mxfp4+mxfp4",
}
WEIGHTS = {
    "MX6, weights": "mx6",
    "MXFP6 E2M3, weights": "mxfp6_e2m3",
    "MX4, weights": "mx4",
    "MXFP4, weights": "mxfp4",
    "MXFP4, ceiling, weights": CEILING[4],
    "INT4 group 32, weights": "int4.g32",
}


def main(given: Sequence[str] | None = None) -> None:
    """One table."""
    options = arguments(__doc__, given, ("--text", "held-out text"))
    recipes = {
        f"{label} `{scheme}`": uniform_of(options.model, scheme)
        for label, scheme in (BOTH | WEIGHTS).items()
    }
    print_measured(measure_recipes(reference_of(options), recipes))


if __name__ == "__main__":
    main()
