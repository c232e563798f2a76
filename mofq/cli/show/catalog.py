"""What `mofq spaces`, `formats`, `engines` and `devices` show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofq.api.formatting import short_bytes
from mofq.cli.show.terminal import note, print_table

if TYPE_CHECKING:
    from mofq.api import DevicesResult, EnginesResult, FormatsResult, SpacesResult


def show_spaces(result: SpacesResult) -> None:
    """`mofq spaces`."""
    rows = [[name, str(len(s.candidates)), s.description] for name, s in result.spaces.items()]
    print_table("search spaces", ["name", "choices", "for"], rows)


def show_formats(result: FormatsResult) -> None:
    """`mofq formats`."""
    elements = [
        [name, str(one.bits), f"{one.max:g}", one.source] for name, one in result.elements.items()
    ]
    print_table("element formats", ["name", "bits", "largest", "source"], elements)
    scales = [
        [name, str(one.bits), str(one.global_scale_bits or "–"), one.source]
        for name, one in result.scales.items()
    ]
    print_table("scale formats", ["name", "bits", "global scale bits", "source"], scales)
    print_table("names", ["name", "stands for"], [[a, b] for a, b in result.aliases.items()])


def show_engines(result: EnginesResult) -> None:
    """`mofq engines`."""
    from mofq.engines.rules import readable

    for name, engine in result.engines.items():
        capability = engine.capability
        where = (
            "" if capability is None else f", compute capability {capability[0]}.{capability[1]}"
        )
        rows = [
            [readable(rule), rule.kernel or f"refused: {rule.refused}", rule.source]
            for rule in engine.applicable_rules
        ]
        rows += [[readable(one), one.how, one.source] for one in engine.applicable_caches]
        title = f"{name} {engine.version}{where}, reads {engine.reads}"
        print_table(title, ["schemes", "kernel", "source"], rows)
    note("Where devices share every layer, NAME:tp=4 checks what one of them holds.")


def show_devices(result: DevicesResult) -> None:
    """`mofq devices`."""
    rows = []
    for name, one in result.devices.items():
        peaks = {key: f"{1e-12 * peak:g}" for key, peak in one.operations_per_second.items()}
        peaks |= dict.fromkeys(one.unrated, "not stated")
        rates = [peaks.get(key, "–") for key in ("bf16", "int8", "fp8", "fp4")]
        rows.append(
            [name, short_bytes(one.memory_bytes), f"{one.bytes_per_second / 1e12:g}", *rates]
        )
    columns = ["device", "memory", "TB/s", "bf16 TFLOPS", "int8 TOPS", "fp8", "fp4"]
    print_table("device models: dense peaks, so times are lower bounds", columns, rows)
    for name, one in result.devices.items():
        note(f"{name}: {one.source}")
