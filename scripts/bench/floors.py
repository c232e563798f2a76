"""What the stages of a run of Llama-3-70B take at least, on machines that it was not run on.

    python scripts/bench/floors.py

The operations of each stage (a multiplication and an addition are two) at a machine's rate, and the
bytes that it reads and writes at that of its disk; the larger of the two is the floor. Of T tokens
that are run, K that are kept and V to validate on, for each weight:

*Calibrate*: 6 T operations (a forward pass, the same again, and gradients of inputs); weights are
read twice by each worker. *Measure*, eight schemes, two of them with activations: what
`scripts/bench/measuring.py` counts, in float32; weights are read once. *Validate*: 4 V, for the
original and one recipe; read once. *Export*: read once, 4.5 bits written. *Fit*, `~gptq` of one
scheme to both halves: what `scripts/bench/fitting.py` measured, in processor hours; factors are
found on the CPU whatever the device.

Rates of machines are those of data sheets, but for the laptop's, which is eight times what
`scripts/bench/measuring.py` found of one processor. Real stages take a multiple: two of the floor
for measuring on a CPU, ten and more for validating few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS = 68.5e9
RUN, KEPT, VALIDATED = 32 * 512, 8 * 512, 8192
SCHEMES, ACTIVATIONS, OUTPUT_TOKENS = 8, 2, 512
#: Of one scheme: 0.8 + 1.7 + 1.5 + 9.1 + 16.3 + 12.6 (docs/scale.md, `~gptq` at size).
FIT_PROCESSOR_HOURS = 42.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how long a stage takes."""

    name: str
    processors: int
    half: float  #: operations a second, bfloat16
    single: float  #: the same, float32
    disk: float  #: bytes a second
    readers: int = 1  #: workers of a calibration that each read all weights


_PROCESSOR = 2 * 40e9  # operations a second; bfloat16 is taken for as fast
_GPU = {"half": 989e12, "single": 67e12}  # H100 SXM, dense

MACHINES = (
    Machine("laptop, 32 GB, 8 threads", 8, 8 * _PROCESSOR, 8 * _PROCESSOR, 2e9),
    Machine("one GPU of 80 GB, 32 processors", 32, **_GPU, disk=5e9),
    Machine(
        "eight of them, 256 processors", 256, 8 * _GPU["half"], 8 * _GPU["single"], 5e9, readers=8
    ),
    Machine(
        "16 nodes of 96 processors", 1536, 1536 * _PROCESSOR, 1536 * _PROCESSOR, 80e9, readers=32
    ),
)


def seconds(machine: Machine) -> dict[str, float]:
    """The floor of each stage [s]."""
    read = 2 * WEIGHTS / machine.disk
    scored = 2 * ((1 + 2 * ACTIVATIONS) * KEPT + SCHEMES * OUTPUT_TOKENS)
    return {
        "calibrate": max(6 * RUN * WEIGHTS / machine.half, 2 * machine.readers * read),
        "measure": max(scored * WEIGHTS / machine.single, read),
        "fit": FIT_PROCESSOR_HOURS * 3600 / machine.processors,
        "validate": max(4 * VALIDATED * WEIGHTS / machine.half, read),
        "export": read + 4.5 / 8 * WEIGHTS / machine.disk,
    }


def _text(value: float) -> str:
    if value >= 3600:
        return f"{value / 3600:.1f} h"
    return f"{value / 60:.0f} min" if value >= 600 else f"{value:.0f} s"


def main() -> None:
    """Print a table."""
    stages = list(seconds(MACHINES[0]))
    print("| machine |", " | ".join(stages), "|")
    print("| --- |" + " ---: |" * len(stages))
    for machine in MACHINES:
        print(f"| {machine.name} |", " | ".join(map(_text, seconds(machine).values())), "|")


if __name__ == "__main__":
    main()
