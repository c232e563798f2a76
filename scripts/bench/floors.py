"""What the stages of a run of Llama-3-70B take at least, on machines that it was not run on.

    python scripts/bench/floors.py

The operations of each stage (a multiplication and an addition are two) at a machine's rate, and the
bytes that it reads and writes at that of its disk; the larger of the two is the floor. Of T tokens
that are run, K that are kept and V to validate on, for each weight:

*Calibrate*: 6 T operations (a forward pass, the same again, and gradients of inputs); weights are
read twice by each worker, of whom there are at most as many as sequences. *Measure*, eight schemes,
two of them with activations: what `scripts/bench/measuring.py` counts, in float32; weights are read
once. *Validate*: 4 V, for the original and one recipe; read once. *Export*: read once, 4.5 bits
written. Neither is spread over a cluster, so each has one node or one GPU. *Fit*, `~gptq` of one
scheme to both halves: what `scripts/bench/fitting.py` measured, in processor hours; with a GPU the
Hessians and factors alone, which are found on the CPU: rows that are rounded on the GPU are not
counted.

Rates of GPUs are those of data sheets, that of a processor is what `scripts/bench/measuring.py`
found of one. Statistics on the disk are not counted. Real stages take a multiple: two of the floor
for measuring on a CPU, ten and more for validating few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS = 68.5e9
RUN, KEPT, VALIDATED = 32 * 512, 8 * 512, 8192
SCHEMES, ACTIVATIONS, OUTPUT_TOKENS = 8, 2, 512
#: Processor hours of one scheme (docs/scale.md, `~gptq` at size).
FACTOR_HOURS, ROW_HOURS = 0.8 + 1.7 + 1.5 + 9.1, 16.3 + 12.6


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how long a stage takes."""

    name: str
    processors: int
    disk: float  #: bytes a second
    readers: int = 1  #: workers of a calibration that each read all weights
    nodes: int = 1  #: with a share of its processors and of its disk's rate each
    gpus: int = 0

    @property
    def half(self) -> float:
        """Operations a second, bfloat16."""
        return self.gpus * _GPU_HALF or self.processors * _PROCESSOR

    @property
    def single(self) -> float:
        """The same, float32."""
        return self.gpus * _GPU_SINGLE or self.processors * _PROCESSOR


_PROCESSOR = 2 * 40e9  # operations a second; bfloat16 is taken for as fast
_GPU_HALF, _GPU_SINGLE = 989e12, 67e12  # H100 SXM, dense

MACHINES = (
    Machine("laptop, 32 GB, 8 threads", 8, 2e9),
    Machine("one GPU of 80 GB, 32 processors", 32, 5e9, gpus=1),
    Machine("eight of them, 256 processors", 256, 5e9, readers=8, gpus=8),
    Machine("16 nodes of 96 processors", 1536, 80e9, readers=32, nodes=16),
)


def seconds(machine: Machine) -> dict[str, float]:
    """The floor of each stage [s]."""
    read = 2 * WEIGHTS / machine.disk
    apart = machine.half / (machine.gpus or machine.nodes)  # what is not spread
    scored = 2 * ((1 + 2 * ACTIVATIONS) * KEPT + SCHEMES * OUTPUT_TOKENS)
    return {
        "calibrate": max(6 * RUN * WEIGHTS / machine.half, 2 * machine.readers * read),
        "measure": max(scored * WEIGHTS / machine.single, read),
        "fit": (FACTOR_HOURS + (not machine.gpus) * ROW_HOURS) * 3600 / machine.processors,
        "validate": max(4 * VALIDATED * WEIGHTS / apart, machine.nodes * read),
        "export": machine.nodes * (read + 4.5 / 8 * WEIGHTS / machine.disk),
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
