"""Plants faults in a copy of the source, one at a time, and counts those that the tests catch.

    python scripts/mutation_check.py

Every fault is one edit that a person could make by mistake. It must be caught by the tests
of its module or by the laws; a fault that survives is printed, and needs a test. Takes
about ten minutes of one core, so it is run by hand and not with the tests. Exit code 1
where a fault survives, or where the source no longer has the words that a fault replaces.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

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
        "return torch.copysign((x + magic) - magic, x)",
        "step = binade * 2.0**-element.mantissa_bits\n"
        "    return torch.copysign(torch.floor((x / step).abs() + 0.5) * step, x)",
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
        "scale = divide(tensor_amax, largest_scale * scheme.element.max)",
        "scale = divide(tensor_amax, scheme.element.max)",
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
        "calibration: the mean score not taken off",
        "calibration/run.py",
        "= root_RV - log_p_RV.exp() * mean_R1",
        "= root_RV - 0 * mean_R1",
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
        "documents",
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
        "            x = fake_quantize_activation(\n                x, self",
        "            _ = fake_quantize_activation(\n                x, self",
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


def is_caught(fault: Fault, copy: Path, log: Path) -> bool:
    """Whether a test fails, in a fork of this process, which has the libraries loaded."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _run_tests(fault, copy, log)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1):
                raise RuntimeError(f"the tests of {fault.name!r} did not run: {log.read_text()}")
            return code == 1
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True  # a test that never ends fails


def _run_tests(fault: Fault, copy: Path, log: Path) -> int:
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    # Plug-ins that the libraries have imported could not be loaded as pytest wants it.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path[:] = [str(copy), *(path for path in sys.path if path != str(ROOT))]
    # A file changes within a second, and keeps its size: compiled code would be taken for it.
    sys.dont_write_bytecode = True
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    files = [f"tests/test_{name}.py" for name in fault.tests.split()]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files]))


def load_libraries() -> None:
    """What every test imports, and none of mofq."""
    for name in ("torch", "transformers", "compressed_tensors", "ml_dtypes", "gguf"):
        importlib.import_module(name)
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM"):
        getattr(importlib.import_module("transformers"), name)
    importlib.import_module("optuna")
    importlib.import_module("scipy.optimize")
    importlib.import_module("compressed_tensors.quantization.lifecycle.forward")


def main() -> int:
    """Plant every fault; 1 where one survives."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="faults whose name has this in it")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.only or options.only in fault.name]
    load_libraries()
    caught, bad = 0, []
    with TemporaryDirectory(prefix="mofq-mutants-") as made:
        copy = Path(made) / "copy"
        copy.mkdir()
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
            sys.stdout.flush()
            if before is None:
                bad.append(f"{fault.name}: mofq/{fault.file} has changed; mend the fault")
                continue
            if is_caught(fault, copy, Path(made) / "log"):
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
