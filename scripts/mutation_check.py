"""Plants faults in a copy of the source, one at a time, and counts those that the tests catch.

    python scripts/mutation_check.py

Every fault is one edit that a person could make by mistake. It must be caught by the tests
of its module or by the laws; a fault that survives is printed, and needs a test. Takes
about ten minutes of one core, so it is run by hand and not with the tests. Exit code 1
where a fault survives, or where the source no longer has the words that a fault replaces.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("mofq", "tests", "search_spaces", "scripts", "docs", "pyproject.toml", "README.md")
LIMIT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Fault:
    """One edit, and the tests that must see it."""

    name: str
    file: str  #: under mofq/
    old: str  #: stands there exactly once
    new: str
    tests: str  #: names of test files without test_ and .py


FAULTS = (
    Fault(
        "integers: ties away from even",
        "quantize/rounding.py",
        "return torch.round(torch.clamp(x, low, high))",
        "x = torch.clamp(x, low, high)\n    return torch.sign(x) * torch.floor(x.abs() + 0.5)",
        "quantize_references quantize formats",
    ),
    Fault(
        "floats: ties away from even",
        "quantize/rounding.py",
        "return torch.round(x / step) * step",
        "return torch.sign(x) * torch.floor((x / step).abs() + 0.5) * step",
        "formats quantize",
    ),
    Fault(
        "bf16 scales truncated",
        "quantize/rounding.py",
        "((bits + (0x7FFF + odd)) & _UPPER_HALF)",
        "((bits + 0 * odd) & _UPPER_HALF)",
        "quantize_scales quantize_references",
    ),
    Fault(
        "one step too coarse below the smallest normal",
        "quantize/rounding.py",
        "min=2.0**element.min_exponent)",
        "min=2.0 ** (element.min_exponent + 1))",
        "formats quantize",
    ),
    Fault(
        "codebook: ties to the upper value",
        "quantize/rounding.py",
        "codes = codes + (x > midpoint)",
        "codes = codes + (x >= midpoint)",
        "formats quantize_references quantize",
    ),
    Fault(
        "wrong zero point",
        "quantize/scales.py",
        "-middle, largest - middle) + middle\n",
        "-middle, largest - middle) + middle + 1\n",
        "quantize_scales quantize_references",
    ),
    Fault(
        "dropped global scale",
        "quantize/scales.py",
        "return self.scale if self.global_scale is None else self.scale * self.global_scale",
        "return self.scale",
        "quantize_scales quantize_references quantize",
    ),
    Fault(
        "global scale off by the FP8 range",
        "quantize/scales.py",
        "scale = tensor_amax / (largest_scale * scheme.element.max)",
        "scale = tensor_amax / scheme.element.max",
        "quantize_scales quantize_references",
    ),
    Fault(
        "full range: sign of the scale",
        "quantize/scales.py",
        "torch.where(_largest_is_positive(x_ARGK, amax), -scale, scale)",
        "torch.where(_largest_is_positive(x_ARGK, amax), scale, -scale)",
        "quantize_scales quantize_references",
    ),
    Fault(
        "off-by-one group",
        "quantize/tiles.py",
        "return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)",
        "x = x.roll(1, 1)\n"
        "    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)",
        "quantize quantize_scales quantize_references",
    ),
    Fault(
        "activations: one scale for all tokens",
        "quantize/activations.py",
        "return tiles, tile_scales(tiles, scheme, tensor_amax=amax)",
        "return tiles, tile_scales(\n"
        "        tiles.abs().amax(0, keepdim=True).expand_as(tiles), scheme, tensor_amax=amax\n"
        "    )",
        "quantize_activations",
    ),
    Fault(
        "export: a scale transposed",
        "backends/compressed_tensors/packing.py",
        "scale.reshape(-1) if _is_tensor(weight) else scale}",
        "scale.T.reshape(-1) if _is_tensor(weight) else scale.T.reshape(scale.shape)}",
        "laws compressed_tensors",
    ),
    Fault(
        "export: wrong packing order",
        "backends/compressed_tensors/packing.py",
        "words[..., word] |= (runs[..., place] << shift) & 0xFFFFFFFF",
        "words[..., word] |= (runs[..., _WORD_BITS - 1 - place] << shift) & 0xFFFFFFFF",
        "laws compressed_tensors",
    ),
    Fault(
        "export: halves of a byte swapped",
        "backends/compressed_tensors/packing.py",
        "return codes[:, ::2] | (codes[:, 1::2] << 4)",
        "return codes[:, 1::2] | (codes[:, ::2] << 4)",
        "laws compressed_tensors",
    ),
    Fault(
        "export: a multiplier written where a divisor is read",
        "backends/compressed_tensors/packing.py",
        "divisor: Tensor = 1.0 / multiplier",
        "divisor: Tensor = multiplier",
        "laws compressed_tensors",
    ),
    Fault(
        "estimator: a swapped sign",
        "measure/block.py",
        "change_MCR = (x_MCI - inputs.x[None]) @ weight_RI.T",
        "change_MCR = (inputs.x[None] - x_MCI) @ weight_RI.T",
        "measure_score prediction",
    ),
    Fault(
        "estimator: the half of the second order dropped",
        "measure/score.py",
        "error_NS=(error_NS / (2 * inputs.tokens)).cpu(),",
        "error_NS=(error_NS / inputs.tokens).cpu(),",
        "measure_score prediction",
    ),
    Fault(
        "estimator: tokens squared before they are summed",
        "measure/block.py",
        "whole_RNS = projection_RMS.unflatten(1, (sequences, -1)).sum(2)",
        "whole_RNS = projection_RMS.unflatten(1, (sequences, -1)).square().sum(2).sqrt()",
        "measure_score prediction",
    ),
    Fault(
        "a skipped layer of a fusion group",
        "measure/rows.py",
        "_corpus_rows(corpus, list(filled[corpus].values()), i, common)",
        "_corpus_rows(corpus, list(filled[corpus].values())[:1], i, common)",
        "measure measure_score prediction",
    ),
    Fault(
        "calibration: a mean for a sum",
        "calibration/run.py",
        'reduction="sum"',
        'reduction="mean"',
        "calibration prediction",
    ),
    Fault(
        "calibration: the same labels for every sequence",
        "calibration/run.py",
        '{seed}/{corpus}/{sequence}/{draw}"',
        '{seed}/{corpus}/{draw}"',
        "calibration",
    ),
    Fault(
        "cost: padding forgotten",
        "cost.py",
        "row_bytes = 4 * -(-columns * bits // 32) if",
        "row_bytes = 4 * (columns * bits // 32) if",
        "cost laws",
    ),
    Fault(
        "budget off by one",
        "solvers/budgets.py",
        "return n + 1 if times * (n + 1) / over <= limit else n",
        "return n + 1",
        "solvers laws",
    ),
    Fault(
        "a layer left out of its fusion group",
        "layers/families.py",
        '        "self_attn.v_proj": ("kv", "hidden"),\n    },\n    "attn.o": {',
        '    },\n    "attn.v": {"self_attn.v_proj": ("kv", "hidden")},\n    "attn.o": {',
        "layers",
    ),
    Fault(
        "a split fusion group accepted",
        "recipe.py",
        "if scheme != chosen[first]:",
        "if scheme == 0:",
        "recipe laws",
    ),
    Fault(
        "a file written under its final name",
        "documents.py",
        'beside = path.with_name(f".{path.name}.tmp")',
        "beside = path",
        "documents killed",
    ),
    Fault(
        "a half last line kept",
        "table/writer.py",
        "        os.ftruncate(file, len(complete))\n    return table",
        "        pass\n    return table",
        "table laws",
    ),
    Fault(
        "KL in the wrong direction",
        "metrics.py",
        "(log_p.exp() * (log_p - log_q))",
        "(log_q.exp() * (log_q - log_p))",
        "metrics",
    ),
    Fault(
        "emulation without the rounding of activations",
        "quantize/linear.py",
        "if self.scheme.activation is not None:",
        "if self.scheme.activation is not None and self.training:",
        "emulate quantize_activations",
    ),
    Fault(
        "enforcement of the first layer of each fusion group",
        "validate/enforcement.py",
        "    for layer in group.layers:\n        yield _Expected(",
        "    for layer in group.layers[:1]:\n        yield _Expected(",
        "enforcement",
    ),
)


def plant(fault: Fault, copy: Path) -> str | None:
    """Make the edit; the file's text before, or None where the words are not there once."""
    path = copy / "mofq" / fault.file
    text = path.read_text("utf-8")
    if text.count(fault.old) != 1:
        return None
    path.write_text(text.replace(fault.old, fault.new), "utf-8")
    return text


def is_caught(fault: Fault, copy: Path) -> bool:
    """Whether a test fails, or nothing ends."""
    files = [f"tests/test_{name}.py" for name in fault.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return True
    return run.returncode == 1


def main() -> int:
    """Plant every fault; 1 where one survives."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="faults whose name has this in it")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.only or options.only in fault.name]
    caught, bad = 0, []
    with TemporaryDirectory(prefix="mofq-mutants-") as made:
        copy = Path(made)
        for name in COPIED:
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=ignored)
            else:
                shutil.copyfile(source, copy / name)
        for fault in chosen:
            start = time.monotonic()
            before = plant(fault, copy)
            if before is None:
                bad.append(f"{fault.name}: mofq/{fault.file} has changed; mend the fault")
                continue
            if is_caught(fault, copy):
                caught += 1
                word = "caught"
            else:
                word = "SURVIVED"
                bad.append(f"{fault.name}: survived {fault.tests}")
            (copy / "mofq" / fault.file).write_text(before, "utf-8")
            print(f"{word:8} {time.monotonic() - start:5.0f} s  {fault.name}", flush=True)
    print(f"{caught} of {len(chosen)} faults caught")
    print("\n".join(bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
