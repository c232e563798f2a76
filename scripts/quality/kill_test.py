"""Kills commands at random moments, resumes them, and compares with undisturbed runs.

    python scripts/quality/kill_test.py --moments 40

Each of `calibrate` (whole and layer by layer), `validate` (layer by layer), `measure`, `export`,
`search --solver optuna` (SQLite, journal, and two objectives) and `run` works on the bundled
model, is killed with SIGKILL at a random moment between its start and its end, and is run again.
A moment is a share of the processor time of an undisturbed run, and some milliseconds, in which
it may wait for the disk: on a busy machine
a share of the time on the clock would often be past the end. After the kill no file may stand
half-written under its final name; after the second run every file must have the bytes of an
undisturbed run (times that a file notes left out), and of an Optuna study the same trials.
Exit code 1 where one does not.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.shared.command import script_parser

SPACE = "version: 1\nschemes: [int4.g64, int4.g32, int8.channel]\n"
#: Of a run, which fits codes too: that takes longest.
RUN_SPACE = "version: 1\nschemes: [int4.g64, int8.channel]\n"
TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "32")
#: What only says when, or for how long.
_TIMES = ("seconds", "seconds_original")

#: How often a process that is to be killed is looked at.
_LOOK_SECONDS = 0.004
#: A moment is at most this much after its share of the processor time.
_MORE_SECONDS = 0.02
#: Runs are not equally long: a moment past the end is drawn again, but not forever.
_DRAWS = 3

Tree = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Case:
    """A command, and which of its files may grow while it runs."""

    name: str
    arguments: Sequence[str]
    growing: tuple[str, ...] = ()  #: a beginning of the finished file is no damage
    study: str | None = None  #: an Optuna storage, compared by its trials
    is_refused_again: bool = False  #: once it is complete, which a killed run may have made it


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of one case."""

    name: str
    seconds: float  #: of processor time, of the undisturbed run
    kills: int  #: that met the command alive
    faults: tuple[str, ...]


def child(arguments: Sequence[str], out: str) -> None:
    """Run `mofq` in this process, silently."""
    from mofq.cli import main

    with open(out, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["mofq", *arguments]
    main()


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill."""

    processor_seconds: float
    more_seconds: float


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of one run."""

    is_killed: bool  #: it was alive at the moment
    processor_seconds: float


class Runner:
    """Starts commands from a process that has torch and mofq loaded already."""

    def __init__(self, log: Path) -> None:
        self._log = str(log)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [
                "torch",
                "transformers",
                "transformers.models.llama.modeling_llama",
                "optuna",
                "sqlalchemy",
                "alembic.command",
                "scipy.stats",
                "mofq.cli.commands",
                "mofq.decision",
                "mofq.decision.measured.study",
                "mofq.delivery.validation",
                "mofq.evidence.calibration.calibrate",
                "mofq.evidence.calibration.streamed",
                "mofq.evidence.measure.fill_table",
            ]
        )

    def run(self, arguments: Sequence[str], *, kill_after: Moment | None = None) -> Ran:
        """Run a command, or kill it.

        Raises:
            RuntimeError: It failed by itself.
        """
        process = self._context.Process(target=child, args=(list(arguments), self._log))
        process.start()
        assert process.pid is not None
        spent = 0.0
        while process.exitcode is None:
            spent = _processor_seconds(process.pid) or spent
            if kill_after is not None and spent >= kill_after.processor_seconds:
                time.sleep(kill_after.more_seconds)
                break
            process.join(_LOOK_SECONDS)
        alive = process.is_alive()
        if alive:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        elif process.exitcode:
            raise RuntimeError(f"exit code {process.exitcode}: {Path(self._log).read_text()}")
        return Ran(alive, spent)


def _processor_seconds(pid: int) -> float | None:
    """What a process and all its threads have spent; None where it has ended.

    Source: clock_getcpuclockid(3), whose clock for a process is this number on Linux.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None


def read_tree(folder: Path) -> Tree:
    """Every file that is not hidden, times left out."""
    return {
        str(path.relative_to(folder)): _without_times(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }


def _without_times(path: Path) -> bytes:
    if path.name != "validation.json":
        return path.read_bytes()
    # With the hook, in the validations inside of it too: those of the uniform rivals of a run.
    content = json.loads(
        path.read_bytes(),
        object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k not in _TIMES},
    )
    return json.dumps(content).encode()


def half_written(case: Case, found: Tree, whole: Tree) -> list[str]:
    """Files of a killed run that are no file of an undisturbed one."""
    faults = []
    for name, data in found.items():
        if name.endswith((".partial", ".part")) or _is_study(name):
            continue
        if name in case.growing:
            if not whole[name].startswith(data[: data.rfind(b"\n") + 1]):
                faults.append(f"{name}: not a beginning of the undisturbed file")
        elif whole.get(name) != data:
            faults.append(f"{name}: {len(data)} bytes, not those of an undisturbed run")
    return faults


def differences(case: Case, found: Tree, whole: Tree) -> list[str]:
    """Where a resumed run did not end as an undisturbed one."""
    names = [name for name in {**whole, **found} if not _is_study(name)]
    return [
        f"{name}: differs after resuming" for name in names if found.get(name) != whole.get(name)
    ]


def _is_study(name: str) -> bool:
    return any(word in name for word in (".db", ".journal"))


def trials(storage: Path) -> list[object]:
    """Recipe, windows and end of every trial that ended, in order."""
    import optuna
    from optuna.trial import TrialState

    from mofq.decision.measured.study_storage import open_study

    text = str(storage)
    backend = f"sqlite:///{text}"
    if storage.suffix != ".db":
        backend = optuna.storages.JournalStorage(  # type: ignore[assignment]
            optuna.storages.journal.JournalFileBackend(text)
        )
    (name,) = optuna.get_all_study_names(backend)
    ended = open_study(text, name).get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [(t.user_attrs["recipe"], t.intermediate_values, t.state.name) for t in ended]


def check(case: Case, runner: Runner, folder: Path, moments: int, seed: int) -> Tally:
    """Run one case undisturbed, then kill and resume it."""

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    clear()
    seconds = runner.run(case.arguments).processor_seconds
    whole = read_tree(folder)
    measured = trials(folder / case.study) if case.study else []
    generator = random.Random(f"{seed}/{case.name}")
    faults: list[str] = []
    kills = 0
    for moment in range(moments):
        for _ in range(_DRAWS):
            clear()
            after = Moment(seconds * generator.random(), _MORE_SECONDS * generator.random())
            is_killed = runner.run(case.arguments, kill_after=after).is_killed
            if is_killed:
                break
        kills += is_killed
        found = half_written(case, read_tree(folder), whole) if is_killed else []
        try:
            if not (case.is_refused_again and read_tree(folder) == whole):
                runner.run(case.arguments)
            found += differences(case, read_tree(folder), whole)
            if case.study and trials(folder / case.study) != measured:
                found.append(f"{case.study}: other trials than those of an undisturbed run")
            left = [
                p.name for p in folder.rglob("*") if p.name.endswith((".tmp", ".part", ".partial"))
            ]
            found += [f"{name}: left behind" for name in left]
        except RuntimeError as problem:
            found.append(f"cannot be resumed: {problem}")
        when = f"killed after {after.processor_seconds:.3f} s (moment {moment})"
        faults += [f"{case.name}, {when}: {fault}" for fault in found]
    return Tally(case.name, seconds, kills, tuple(faults))


def make_cases(inputs: Path, out: Path) -> tuple[list[Sequence[str]], list[Case]]:
    """What is run once to make inputs, and what is killed."""
    from mofq.demo import demo_model_folder

    model, space = str(demo_model_folder()), inputs / "space.yaml"
    space.write_text(SPACE)
    (run_space := inputs / "run.yaml").write_text(RUN_SPACE)
    corpus = ("--corpus", "en=demo-en-calibration", "--sequences", "3", "--sequence-length", "48")

    def calibrate(folder: Path) -> Sequence[str]:
        return ("calibrate", model, *corpus, "-o", str(folder / "stats"))

    def measure(folder: Path) -> Sequence[str]:
        stats = ("--stats", str(inputs / "stats"))
        return ("measure", model, "--space", str(space), *stats, "-o", str(folder / "table.jsonl"))

    def search(folder: Path, *more: str) -> Sequence[str]:
        table = str(inputs / "table.jsonl")
        return ("search", table, "--max-bits", "5", "-o", str(folder / "recipe.yaml"), *more)

    optuna = ("--solver", "optuna", "--trials", "7", "--model", model, *TEXT)
    two = ("--multi-objective", "--storage", str(out / "front.db"))
    journal = ("--storage", str(out / "study.journal"))
    recipe = str(inputs / "recipe.yaml")
    to = ("--to", "compressed-tensors", "-o", str(out / "model"))
    run = ("--space", str(run_space), "--max-bits", "5", *corpus[:2], "--sequences", "2", *TEXT)
    streamed = ("--execution", "streamed")
    validate = ("validate", model, recipe, *TEXT, "-o", str(out / "validation.json"))
    twelve = (*corpus[:2], "--sequences", "12", *corpus[4:], "--steps", "3")
    tune = ("tune", model, recipe, *twelve, "-o", str(out / "tuned.yaml"))
    cases = [
        Case("calibrate", calibrate(out)),
        Case("calibrate-streamed", (*calibrate(out), *streamed)),
        Case("validate-streamed", (*validate, *streamed)),
        Case("tune-streamed", (*tune, *streamed)),
        Case("measure", measure(out), growing=("table.jsonl",)),
        Case("export", ("export", model, recipe, *to), is_refused_again=True),
        Case("search", search(out, *optuna), study="recipe.optuna.db"),
        Case("search-journal", search(out, *optuna, *journal), study="study.journal"),
        Case("search-front", search(out, *optuna, *two), study="front.db"),
        Case(
            "run",
            ("run", model, *run, "--engine", "vllm-hopper", "-o", str(out / "run")),
            growing=("run/table.jsonl",),
        ),
    ]
    return [calibrate(inputs), measure(inputs), search(inputs)], cases


def main() -> int:
    """Check every case; 1 where something was lost."""
    parser = script_parser(__doc__)
    parser.add_argument("--moments", type=int, default=40, help="kills of each command")
    parser.add_argument("--only", nargs="*", help="cases, by name")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tallies = []
    with TemporaryDirectory(prefix="mofq-kill-") as made:
        inputs, out = Path(made) / "inputs", Path(made) / "out"
        inputs.mkdir()
        runner = Runner(Path(made) / "log")
        before, cases = make_cases(inputs, out)
        for arguments in before:
            runner.run(arguments)
        for case in cases:
            if options.only and case.name not in options.only:
                continue
            tally = check(case, runner, out, options.moments, options.seed)
            tallies.append(tally)
            print(
                f"{tally.name}: {tally.seconds:.2f} s of processor time undisturbed, "
                f"{tally.kills} of {options.moments} killed, {len(tally.faults)} faults",
                flush=True,
            )
            for fault in tally.faults:
                print(f"  {fault}", flush=True)
    return int(any(tally.faults for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
