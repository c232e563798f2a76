r"""The public table: every peer's method and ours, made anew and scored by one judge.

    python -m scripts.reproduce.peers.compare MODEL --calibration FILE --text FILE --work FOLDER \
        --results docs/benchmarks --page docs/benchmarks.md

Each peer runs in an environment of its own, which is made in the user's cache when first needed,
on one thread. What it makes is scored at once, and the result kept as a file of JSON in
`--results`, by default `--work`, which a rerun takes. `--only` names entries by patterns and runs them in this
order; `--only ''` runs none and writes the page alone. An entry that has not run is listed on it as
such. `--take` scores a folder in compressed-tensors that was made elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

from mofq import __version__
from mofq.exceptions import MofqError
from mofq.model.checkpoint.headers import CONFIG_FILE, open_checkpoint
from scripts.reproduce.peers.calibration import write_windows
from scripts.reproduce.peers.entries import ENTRIES, MOFQ, Entry
from scripts.reproduce.peers.environments import python_of
from scripts.reproduce.peers.handover import MADE, MODEL
from scripts.reproduce.peers.judge import Judge, read_entry
from scripts.reproduce.peers.page import write_table
from scripts.reproduce.peers.results import Result, Setting, made_name, result_name, write_result
from scripts.shared.command import parse_into_work, script_parser

_ROOT = Path(__file__).parents[3]
#: What `mofq run` writes, in the folder of an entry.
_RUN = "run"


def main(given: Sequence[str] | None = None) -> None:
    """Make, judge, write the page."""
    options = parse_into_work(_parser(), given)
    name = Path(options.model).name
    work: Path = options.work / name
    results: Path = (options.results or options.work) / name
    setting = Setting(
        options.model,
        open_checkpoint(options.model).index_sha256,
        options.calibration,
        options.text,
        options.windows,
        options.calibration_windows,
        options.sequence_length,
    )
    taken = {name: (Path(folder), seconds) for name, folder, seconds in options.take}
    only = options.only or ([] if taken else ["*"])
    if unknown := taken.keys() - {entry.name for entry in ENTRIES}:
        raise SystemExit(f"--take {min(unknown)}: there is no such entry.")
    matching = (e for name in (*taken, *only) for e in ENTRIES if fnmatchcase(e.name, name))
    asked = list(dict.fromkeys(matching))
    failed = []
    with ExitStack() as stack:
        judge: Judge | None = None
        for entry in asked:
            result, made = results / result_name(entry, setting), work / made_name(entry, setting)
            if entry.name in taken:
                take(made, *taken[entry.name])
            elif result.exists():
                continue
            try:
                if not (made / MADE).exists():
                    make(entry, setting, made)
                judge = judge or stack.enter_context(_judge(setting))
                results.mkdir(parents=True, exist_ok=True)
                write_result(judged(judge, made), result)
            except MofqError as error:
                # The others do not depend on it.
                print(f"{entry.name}: {error}", file=sys.stderr, flush=True)
                failed.append(entry.name)
                continue
            if not options.keep:
                shutil.rmtree(made)
    if options.page is not None:
        write_table(options.page, setting, results)
    if failed:
        raise SystemExit(f"not scored: {', '.join(failed)}")


def _parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.add_argument("model", help="folder")
    parser.add_argument("--calibration", required=True, help="text that peers calibrate on")
    parser.add_argument("--text", required=True, help="text to judge on, not calibrated on")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument(
        "--results", type=Path, help="folder of each entry's result, by default that of --work"
    )
    parser.add_argument("--only", action="append", help="entries, by a pattern; repeatable")
    parser.add_argument(
        "--take",
        nargs=3,
        action="append",
        default=[],
        metavar=("ENTRY", "FOLDER", "SECONDS"),
        help="a folder to score as an entry, and the processor time to make it, or -; repeatable",
    )
    parser.add_argument("--keep", action="store_true", help="what peers made, once it is scored")
    parser.add_argument("--windows", type=int, default=32, help="to judge on")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--page", type=Path, help="in which to write the table of this model")
    return parser


def _judge(setting: Setting) -> Judge:
    sizes = {"windows": setting.windows, "sequence_length": setting.sequence_length}
    return Judge(setting.model, setting.text, **sizes)


def take(made: Path, folder: Path, seconds: str) -> None:
    """Have a folder in compressed-tensors that was made elsewhere stand where it would be made.

    Args:
        made: As of `make`.
        folder: A model.
        seconds: Of the processor, to make it; ``-`` where they are not known.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise SystemExit(f"{folder}: is no folder of a model; give one that has {CONFIG_FILE}.")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    (made / MODEL).symlink_to(folder.resolve())
    _note(made, None if seconds == "-" else float(seconds))


def make(entry: Entry, setting: Setting, made: Path) -> None:
    """Have a peer make its entry on one thread; what it prints goes to a file beside the folder.

    Args:
        entry: What to make.
        setting: Of all entries.
        made: Folder; what an earlier try has left there is removed.

    Raises:
        MofqError: It failed; says how what it printed ends.
    """
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    print(f"{entry.name}: {entry.title}", file=sys.stderr, flush=True)
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    log = made.with_suffix(".log")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            _command(entry, setting, made),
            env=os.environ | own,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        printed = "\n".join(log.read_text("utf-8").splitlines()[-5:])
        raise MofqError(
            f"could not be made. All that it printed is in {log}, which ends:\n{printed}"
        )
    if entry.peer == MOFQ:
        os.replace(made / _RUN / MODEL, made / MODEL)
        shutil.rmtree(made / _RUN)  # statistics of gigabytes
        _note(made, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _command(entry: Entry, setting: Setting, made: Path) -> list[str]:
    if entry.peer == MOFQ:
        words = [*entry.settings["words"], "--corpus", f"calibration={setting.calibration}"]
        run = "from mofq.cli import main; main()"
        return [sys.executable, "-c", run, "run", setting.model, *words, "-o", str(made / _RUN)]
    calibration = made.parent / f"calibration-{setting.calibration_windows}"
    if not calibration.exists():
        write_windows(
            setting.model,
            setting.calibration,
            calibration,
            windows=setting.calibration_windows,
            sequence_length=setting.sequence_length,
        )
    script = f"scripts.reproduce.peers.with_{entry.peer.replace('-', '_')}"
    words = [setting.model, "--calibration", str(calibration), "-o", str(made)]
    settings = json.dumps(entry.settings)
    return [str(python_of(entry.peer)), "-m", script, *words, "--settings", settings]


def _note(made: Path, seconds: float | None) -> None:
    content = {"versions": {MOFQ: __version__}, "processor_seconds": seconds}
    (made / MADE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def judged(judge: Judge, made: Path) -> Result:
    """Score what was made."""
    note = json.loads((made / MADE).read_text("utf-8"))
    quantized = read_entry(judge.original, made)
    found = judge.judge(quantized)
    print(f"{made.name}: {found.kl_nats_per_token:.5f} nats/token", file=sys.stderr, flush=True)
    return Result(
        bits_per_weight=quantized.bits_per_weight,
        kl_nats_per_token=found.kl_nats_per_token,
        kl_stderr=found.kl_stderr,
        perplexity=found.perplexity,
        perplexity_original=found.perplexity_original,
        top1_agreement=found.top1_agreement,
        processor_seconds=note["processor_seconds"],
        versions=note["versions"],
        windows=found.windows,
    )


if __name__ == "__main__":
    main()
