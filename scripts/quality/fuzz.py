"""Coverage-guided fuzzing of everything that parses a file from a stranger, for a bounded time.

    pip install --constraint scripts/constraints.txt -e ".[fuzz]"
    python scripts/quality/fuzz.py --seconds 20

A parser may return, or raise a `MofqError`; anything else is a fault, and so is a document
that is accepted and does not read back as it was written. Exit code 1 where one is found;
what caused it is kept in the folder that is named. Seeds are files that mofq wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from scripts.shared.command import script_parser

PARSERS = ("recipe", "space", "table", "stats", "header")
#: Longest input that is tried [bytes].
_LONGEST = 4096
_MEMORY_MB = 4096  # torch alone takes half of one

_DIGEST = "ab" * 32
_RECIPE_SEED = b"""version: 1
model: {name: m, index_sha256: abababababab}
made_by: {solver: exact, seed: 0}
budget: {bits_per_weight: 4.5}
result: {bytes: 40, kl_nats_per_token: 1.0e-05}
groups:
  g:
    scheme: int8.channel+int8.tensor
    layers: [a]
    static_amax: {a: 1.5}
unquantized: [lm_head]
"""
_SPACE_SEED = b"""version: 1
description: d
schemes: ["int4.g[128,32]", nvfp4, fp8_e4m3.channel]
base: [nvfp4]
min_gain: 1
exclude: ["*.0.*"]
offer_unquantized: false
"""


def _recipe(_: Path) -> Callable[[bytes], object]:
    from mofq.decision.recipe import parse_recipe, recipe_text

    def one(data: bytes) -> None:
        recipe = parse_recipe(data.decode("utf-8", "replace"))
        if parse_recipe(recipe_text(recipe)) != recipe:
            raise AssertionError("the recipe reads back as another")

    return one


def _space(_: Path) -> Callable[[bytes], object]:
    from mofq.evidence.spaces import parse_search_space

    return lambda data: parse_search_space(
        data.decode("utf-8", "replace"), name="fuzzed", where="space"
    )


def _table(_: Path) -> Callable[[bytes], object]:
    from mofq.evidence.table.lines import decode_line, encode_line
    from mofq.evidence.table.reader import parse_table

    def one(data: bytes) -> None:
        table = parse_table(data, Path("fuzzed"))
        for line in (table.header, *table.spaces, *table.rejections, *table.rows):
            if decode_line(encode_line(line).rstrip("\n"), "again") != line:
                raise AssertionError("a line reads back as another")

    return one


def _stats(folder: Path) -> Callable[[bytes], object]:
    from mofq.evidence.calibration.stats import read_stats

    (folder / "c").mkdir()
    (folder / "c" / "sequence-00000.safetensors").write_bytes(b"x")

    def one(data: bytes) -> None:
        (folder / "stats.json").write_bytes(data)
        read_stats(folder)

    return one


def _header(folder: Path) -> Callable[[bytes], object]:
    from mofq.model.checkpoint.headers import read_header

    path = folder / "fuzzed.safetensors"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        tensors = read_header(path)
        if sum(info.nbytes for info in tensors.values()) > len(data):
            raise AssertionError("tensors larger than their file")

    return one


#: Parser -> what makes the function that is fed.
_TARGETS = {
    "recipe": _recipe,
    "space": _space,
    "table": _table,
    "stats": _stats,
    "header": _header,
}


def _table_seed() -> bytes:
    layer = {"name": "a", "out_features": 2, "in_features": 32, "dtype": "BF16"}
    layer |= {"decoder_layer": 0, "module": "a"}
    group = {"name": "g", "layers": [layer], "source_bytes": 128}
    model = {"name": "m", "index_sha256": _DIGEST, "weights_sha256": _DIGEST}
    lines = (
        {"kind": "header", "version": 1, "mofq": "0", "model": model, "stats": None}
        | {"groups": [group], "unquantized": ["lm_head"], "other_bytes": 7},
        {"kind": "space", "name": "s", "sha256": _DIGEST, "schemes": ["int4.g32"], "base": []}
        | {"min_gain": 1.0, "engine": None, "mofq": "0"},
        {"kind": "rejection", "group": "g", "scheme": "int4.g128", "reason": "no"},
        {"kind": "row", "group": "g", "scheme": "int4.g32", "unit": "relative_weight_error"}
        | {"corpus": None, "error": 0.5, "stderr": None, "bytes": 40, "sqnr_db": 3.0},
    )
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _stats_seed() -> bytes:
    corpus = {"name": "c", "source": "c.txt", "text_sha256": _DIGEST, "sequences": 1}
    stats = {"version": 1, "model_name": "m", "index_sha256": _DIGEST, "seed": 0}
    stats |= {"sequence_length": 2, "draws": 1, "dtype": "float32", "corpora": [corpus]}
    stats |= {"files": {"c/sequence-00000.safetensors": {"bytes": 1, "sha256": _DIGEST}}}
    return json.dumps(stats).encode()


def write_seeds(folder: Path) -> None:
    """One small valid file for each parser, as mofq writes it."""
    import torch
    from safetensors.torch import save

    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    seeds = {
        "recipe": _RECIPE_SEED,
        "space": _SPACE_SEED,
        "table": _table_seed(),
        "stats": _stats_seed(),
        "header": save(tensors, {"format": "pt"}),
    }
    for name, data in seeds.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "seed").write_bytes(data)


def fuzz(name: str, corpus: Path, seconds: int, found: Path) -> None:
    """Feed one parser in this process; ends the process."""
    import atheris

    from mofq.exceptions import MofqError

    memory = Path("/dev/shm")  # a thousand files a second
    folder = Path(tempfile.mkdtemp(prefix="mofq-fuzz-", dir=memory if memory.is_dir() else None))
    with atheris.instrument_imports(include=["mofq"]):
        parse = _TARGETS[name](folder)
    parse((corpus / "seed").read_bytes())  # valid, or nothing behind the first check is reached

    def one(data: bytes) -> None:
        try:
            parse(data)
        except MofqError as error:
            if not str(error).strip():
                raise AssertionError("an error that says nothing") from error

    options = [f"-max_total_time={seconds}", f"-max_len={_LONGEST}", f"-rss_limit_mb={_MEMORY_MB}"]
    options += ["-timeout=20", "-seed=1", f"-artifact_prefix={found}/{name}-", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


@contextmanager
def _folders(keep: str | None) -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="mofq-seeds-") as seeds:
        found = Path(keep or tempfile.mkdtemp(prefix="mofq-fuzz-found-"))
        found.mkdir(parents=True, exist_ok=True)
        write_seeds(Path(seeds) / "corpus")
        yield Path(seeds) / "corpus", found


def main() -> int:
    """Fuzz every parser; 1 where a fault was found."""
    parser = script_parser(__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="for each parser")
    parser.add_argument("--only", choices=PARSERS)
    parser.add_argument(
        "--together",
        type=int,
        default=os.cpu_count(),
        help="parsers at once; by default, one a processor",
    )
    parser.add_argument("--keep", help="folder for what causes a fault")
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.corpus:
        fuzz(options.only, Path(options.corpus), options.seconds, Path(options.keep))
        return 0
    names, faults = [options.only] if options.only else PARSERS, 0
    with (
        _folders(options.keep) as (corpus, found),
        ThreadPoolExecutor(options.together) as threads,  # each waits for a process
    ):

        def run_one(name: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, __file__, "--only", name, "--seconds", str(options.seconds)]
            command += ["--keep", str(found), "--corpus", str(corpus / name)]
            return subprocess.run(command, capture_output=True, text=True, errors="replace")

        for name, run in zip(names, threads.map(run_one, names), strict=True):
            tried = [line for line in run.stderr.splitlines() if line.startswith(("Done ", "#"))]
            print(f"{name}: {tried[-1] if tried else 'nothing tried'}", flush=True)
            if run.returncode:
                faults += 1
                print(f"{name}: FAULT, exit code {run.returncode}; the input is in {found}")
                print(run.stdout[-2000:] + run.stderr[-4000:])
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
