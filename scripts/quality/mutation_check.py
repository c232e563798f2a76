"""Plants faults in a copy of the source, one at a time, and counts those that the tests catch.

    python scripts/quality/mutation_check.py

Every fault is one edit that a person could make by mistake. It must be caught by the tests
of its module or by the laws; a fault that survives is printed, and needs a test. Takes
about fifteen minutes of one core, so it is run by hand and not with the tests. Exit code 1
where a fault survives, or where the source no longer has the words that a fault replaces.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from scripts.quality.mutation_fault import Fault, find_fault, find_tests, read_sources
from scripts.quality.mutation_faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent.parent
COPIED = ("mofq", "tests", "search_spaces", "scripts", "docs", "pyproject.toml", "README.md")
#: Of processor time, for the tests of one fault.
LIMIT_SECONDS = 600


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
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1, -signal.SIGXCPU):
        raise RuntimeError(f"the tests of {fault.name!r} did not run: {log.read_text()}")
    return code != 0  # a test that never ends fails too


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
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 5))
    tests = find_tests(fault, copy)
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


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
    parser.add_argument("--only", nargs="*", help="faults whose name has one of these in it")
    options = parser.parse_args()
    words = options.only or [""]
    chosen = [fault for fault in FAULTS if any(word in fault.name for word in words)]
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
        sources = read_sources(copy)
        for fault in chosen:
            start = time.monotonic()
            path = find_fault(fault, sources)
            sys.stdout.flush()
            if path is None:
                bad.append(f"{fault.name}: its words stand not once in mofq/; mend the fault")
                continue
            path.write_text(sources[path].replace(fault.old, fault.new), "utf-8")
            if is_caught(fault, copy, Path(made) / "log"):
                caught += 1
                word = "caught"
            else:
                word = "SURVIVED"
                bad.append(f"{fault.name}: survived {fault.tests}")
            path.write_text(sources[path], "utf-8")
            print(f"{word:8} {time.monotonic() - start:5.0f} s  {fault.name}", flush=True)
    print(f"{caught} of {len(chosen)} faults caught")
    print("\n".join(bad))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
