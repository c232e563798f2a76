"""Proves on a GPU what was proved on a CPU, and measures it, in at most eight minutes.

    bash scripts/quality/gpu_check.sh                      # all parts, in order of value
    bash scripts/quality/gpu_check.sh --parts numbers,measure
    bash scripts/quality/gpu_check.sh --device cpu --small # what CI runs: the script itself

Each part is a process of its own with a time limit of its own: one that fails or is slow stops no
other, and what it found before it was stopped counts. A part that is over early leaves its time to
those behind it. At the end stand a table and, with `--json`, a file of all checks, figures,
versions and the machine. The exit status is 0 where every check of every part holds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A module of ``scripts.quality.gpu``, and how long it may take [s]."""

    about: str
    limit_s: float


#: In order of value.
PARTS = {
    "numbers": Part("codes and scales bit for bit, eager and compiled", 135),
    "applier": Part("TorchAO's kernels under a mixed recipe", 75),
    "models": Part("calibration and validation, 8B's shapes", 85),
    "measure": Part("the compiled pass, with and without statistics", 85),
    "streamed": Part("models run layer by layer", 50),
    "fitting": Part("~gptq and ~descent on wide layers", 40),
}
#: All of them together.
_TOTAL_S = 470.0
#: What a part has, however late it is.
_LEAST_S = 10.0


def run_part(name: str, path: Path, *, device: str, small: bool) -> None:
    """Run a part in this process."""
    import torch

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"gpu_check: torch {torch.__version__} sees no GPU.")
    from scripts.quality.gpu.report import Report

    report = Report(path, device=device, small=small)
    try:
        import_module(f"scripts.quality.gpu.{name}").run(report)
    except Exception:
        report.check("the part came to its end", False, traceback.format_exc())
        sys.exit(1)
    report.complete()


def start_part(name: str, folder: Path, options: argparse.Namespace, limit_s: float) -> Any:
    """Run a part in a process of its own, and say how it ended."""
    path = folder / f"{name}.json"
    command = [sys.executable, __file__, "--run", name, "--json", str(path)]
    command += ["--device", options.device, *(["--small"] if options.small else [])]
    print(f"\n== {name}: {PARTS[name].about}; at most {limit_s:.0f} s", flush=True)
    start = monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)
    found: dict[str, Any] = {"checks": [], "figures": {}, "complete": False}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
    failed = [one for one in found["checks"] if not one["holds"]]
    is_complete = found.pop("complete")
    if code is None:
        state = "out of time"
    elif code or not is_complete:
        state = f"ended with {code}"
    else:
        state = "failed" if failed or not found["checks"] else "passed"
    found |= {"state": state, "seconds": round(monotonic() - start, 1), "limit_s": limit_s}
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part with the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(found: dict[str, Any]) -> None:
    """The table, and what failed."""
    print(f"\n{json.dumps(found['machine'])}\n{json.dumps(found['versions'])}\n")
    print(f"{'part':10} {'state':14} {'seconds':>8}  checks that hold")
    for name, part in found["parts"].items():
        holding = sum(one["holds"] for one in part["checks"])
        print(f"{name:10} {part['state']:14} {part['seconds']:8.1f}  ", end="")
        print(f"{holding} of {len(part['checks'])}")
    for name, part in found["parts"].items():
        print(f"\n{name}")
        for label, one in part["figures"].items():
            aim = f"   aim: {one['aim']}" if one["aim"] else ""
            print(f"  {label:56} {one['value']:>10g} {one['unit']}{aim}")
        for one in part["checks"]:
            if not one["holds"]:
                print(f"  FAILED {one['name']}: {one['detail']}")


def main() -> None:
    """Run the parts, or one of them in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="few schemes and small layers")
    parser.add_argument("--seconds", type=float, default=_TOTAL_S, help="for all parts")
    parser.add_argument("--json", type=Path, help="where checks and figures go")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_part(options.run, options.json, device=options.device, small=options.small)
        return
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    found: dict[str, Any] = {"machine": {}, "versions": {}, "parts": {}}
    end = monotonic() + options.seconds
    with TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            # Each has its own share; what those before it left over, it may use.
            later_s = sum(PARTS[other].limit_s for other in names[number + 1 :])
            limit_s = max(_LEAST_S, min(2 * PARTS[name].limit_s, end - monotonic() - later_s))
            part = start_part(name, Path(folder), options, limit_s)
            found["machine"] |= part.pop("machine", {})
            found["versions"] |= part.pop("versions", {})
            found["parts"][name] = part
            if options.json is not None:  # also where this process is stopped
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)
    sys.exit(any(part["state"] != "passed" for part in found["parts"].values()))


if __name__ == "__main__":
    main()
