"""What a part of the GPU check found, kept in a file while it runs: a part that is stopped counts.

Also how its times are taken, and where tests' helpers are found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch

SUPPORT = Path(__file__).resolve().parents[3] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))


class Report:
    """Checks, which hold or do not, and figures, of one part."""

    def __init__(self, path: Path, *, device: str, small: bool) -> None:
        self.device = device
        self.small = small
        self._path = path
        self._start = monotonic()
        self._found: dict[str, Any] = {"checks": [], "figures": {}, "complete": False}
        self._found |= {"machine": machine(device), "versions": versions()}
        self._write()

    def check(self, name: str, holds: bool, detail: str = "") -> None:
        """Note whether something holds; where it does not, ``detail`` says how."""
        self._found["checks"].append({"name": name, "holds": holds, "detail": detail})
        self._say(f"{'ok  ' if holds else 'FAIL'} {name}{': ' if detail else ''}{detail}")

    def figure(self, name: str, value: float, unit: str, *, aim: str = "") -> None:
        """Note a measured number; ``aim`` says what it should be, and decides nothing."""
        rounded = float(f"{value:.4g}")
        self._found["figures"][name] = {"value": rounded, "unit": unit, "aim": aim}
        self._say(f"     {name}: {rounded:g} {unit}{f' (aim: {aim})' if aim else ''}")

    def complete(self) -> None:
        """The part came to its end."""
        self._found["complete"] = True
        self._write()

    def _say(self, line: str) -> None:
        print(f"[{monotonic() - self._start:5.1f} s] {line}", flush=True)
        self._write()

    def _write(self) -> None:
        unfinished = self._path.with_suffix(".partial")
        unfinished.write_text(json.dumps(self._found), encoding="utf-8")
        os.replace(unfinished, self._path)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were taken on."""
    found: dict[str, Any] = {"device": device, "processors": os.cpu_count()}
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "gpu_memory_gb": round(gpu.total_memory / 1e9, 1),
            "multiprocessors": gpu.multi_processor_count,
        }
    return found


def versions() -> dict[str, str]:
    """Of Python, CUDA and the packages that matter."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0], "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "transformers", "torchao", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def synchronise(device: str) -> None:
    """Wait for what the device was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable[[], object], device: str, *, repeats: int = 5) -> float:
    """The shortest of some runs after a first one, waited for to its end [s]."""
    work()
    found = []
    for _ in range(repeats):
        synchronise(device)
        start = perf_counter()
        work()
        synchronise(device)
        found.append(perf_counter() - start)
    return min(found)


def peak_gb(device: str) -> float:
    """The most memory that torch held on the device since the last call [GB]; 0 on the CPU."""
    if torch.device(device).type != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return found
