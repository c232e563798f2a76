"""Compares every file that two checkouts of mofq write for the same commands.

    python scripts/quality/same_files.py OLD NEW --model mofq/demo/model --work WORK
    python scripts/quality/same_files.py OLD NEW --model FOLDER --small --work WORK

For a change that must change no figure. Both checkouts run the whole flow on the model, from
`calibrate` to `export` and `run`: some sixty commands on a small model; `--small` has a search
space of nine schemes and leaves out what runs the model many times. What OLD wrote is kept in the
work folder, and only NEW runs again the next time.

One line for each artifact says `same`, `same but …` or `differs`, with the first difference.
Artifacts are the files that commands write, and what they print with `--json`. Bytes are
compared, but for three things:

- the keys of `--ignore` are taken out of JSON, JSON lines, YAML and Markdown on both sides: what a
  change removes on purpose, and times (`--time`);
- where a table's text differs in such keys alone, so do its SHA-256 in a recipe and the recipe's
  in whatever names it: a SHA-256 of an artifact is replaced by the artifact's name on both sides;
- of an HTML page its data are compared, not its scripts.

Exit code 1 where an artifact differs or is there on one side alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import file_digest
from pathlib import Path
from typing import Any

from scripts.shared.command import script_parser

ROOT = Path(__file__).resolve().parent.parent.parent

#: Removed on purpose, by name.
IGNORED = ("projections", "kl_joint*")
#: What only says how long something took.
TIMES = ("seconds", "seconds_original", "elapsed_seconds")
#: Databases note when something happened, locks are empty.
LEFT_OUT = ("*.db", "*.lock", "steps.json")
#: Compared as text, without the ignored keys; other files byte for byte.
TEXT = (".jsonl", ".json", ".yaml", ".md", ".html", ".txt", ".py", ".sh")

SMALL_SPACE = """version: 1
description: one of each kind
schemes: [int4.g64, int4.g32@mse, int4.g32@nats~gptq, fp8_e4m3.channel+fp8_e4m3.token,
  int8.channel+int8.token, nvfp4+nvfp4]
kv_cache: [kv:fp8_e4m3.tensor, kv:int8.token_head, kv:int4.token_head.s-bf16]
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One command of mofq."""

    name: str  #: what it prints becomes the artifact NAME.out
    arguments: Sequence[str]

    @property
    def output(self) -> str | None:
        """The file or folder that it writes."""
        words = list(self.arguments)
        return words[words.index("-o") + 1] if "-o" in words else None


def flow(model: str, *, is_small: bool) -> list[Step]:
    """The commands, each of which may read what those before it wrote."""
    steps = [*_measuring(model, is_small), *_deciding(), *_delivering(model, is_small)]
    return steps if is_small else [*steps, *_running_the_model(model)]


def _measuring(model: str, is_small: bool) -> Iterator[Step]:
    corpora: tuple[str, ...] = ("--corpus", "en=demo-en-calibration")
    corpora += () if is_small else ("--corpus", "pt=demo-pt-calibration")
    windows = ("--sequences", "2" if is_small else "4", "--sequence-length", "64")
    yield Step("inspect", ("inspect", model, "--json"))
    yield Step("calibrate", ("calibrate", model, *corpora, *windows, "--kv-cache", "-o", "stats"))
    spaces: list[tuple[str, tuple[str, ...]]] = [
        ("mixed", ("w4w8_mixed", "--stats", "stats")),
        ("kv", ("w8a8_kv", "--stats", "stats")),
        ("serving", ("serving", "--stats", "stats")),
        ("fitted", ("serving_fitted", "--stats", "stats", "--engine", "vllm-cpu")),
        ("weights", ("w4a16",)),
    ]
    if is_small:
        spaces = [("fitted", ("space.yaml", "--stats", "stats"))]
    for name, (space, *options) in spaces:
        yield Step(
            f"measure {name}",
            ("measure", model, "--space", space, *options, "-o", f"{name}.jsonl"),
        )
        yield Step(f"frontier {name}", ("frontier", f"{name}.jsonl", "--json"))


def _deciding() -> Iterator[Step]:
    """Searches of the table `fitted`, which every flow has."""
    searches: dict[str, tuple[str, ...]] = {
        "bits4": ("--max-bits", "4.3"),
        "bits5": ("--max-bits", "5"),
        "bits6": ("--max-bits", "6.5", "--ties", "off"),
        "engine": ("--max-bits", "5.5", "--engine", "vllm-cpu"),
        "kl": ("--max-kl", "0.05"),
        "greedy": ("--max-bits", "5", "--solver", "greedy"),
        "worst": ("--max-bits", "5", "--objective", "worst-corpus"),
        "mse": ("--max-bits", "5", "--unit", "output_mse"),
        "explained": ("--max-bits", "5", "--explain", "layers.0.mlp.down"),
        "time": (*("--max-bits", "6", "--max-time", "1s", "--device-model", "h100"),
                 *("--workload", "decode:batch=8,context=1024")),
    }  # fmt: skip
    for name, options in searches.items():
        yield _search("fitted", name, *options)
    yield Step("diff", ("diff", "bits5.yaml", "kl.yaml", "--table", "fitted.jsonl", "--json"))
    yield Step("frontier polished", ("frontier", "fitted.jsonl", "--polish", "3", "--json"))
    yield Step("explore", ("explore", "fitted.jsonl", "bits5.yaml", "kl.yaml", "-o", "page.html"))


def _delivering(model: str, is_small: bool) -> Iterator[Step]:
    yield Step("uniform", ("recipe", "uniform", model, "int4.g32@mse", "-o", "uniform.yaml"))
    yield Step("uniform int8", ("recipe", "uniform", model, "int8.channel", "-o", "int8.yaml"))
    text = ("--text", "demo-en", "--tokens", "128" if is_small else "512")
    for recipe in ("bits5", "uniform"):
        yield Step(
            f"validate {recipe}",
            ("validate", model, f"{recipe}.yaml", *text, "--sequence-length", "64",
             "--stats", "stats", "-o", f"{recipe}.validation.json"),
        )  # fmt: skip
    exports = [("fitted", "bits5"), ("int4", "uniform"), ("engine", "engine")]
    for name, recipe in exports[:1] if is_small else exports:
        yield Step(
            f"export {name}",
            ("export", model, f"{recipe}.yaml", "--to", "compressed-tensors", "--stats", "stats",
             "-o", f"exported-{name}"),
        )  # fmt: skip
    for tool, recipe in (
        ("torchao", "bits5"),
        ("llm-compressor", "bits5"),
        ("auto-round", "uniform"),
        ("llama.cpp", "bits5"),
        ("modelopt", "bits5"),  # refused: it has no fitted codes
    ):
        yield Step(
            f"export {tool}",
            ("export", model, f"{recipe}.yaml", "--to", tool, "--stats", "stats",
             "-o", f"exported-{tool}.txt"),
        )  # fmt: skip
    for method in ("smoothquant",) if is_small else ("smoothquant", "awq", "bismooth"):
        yield Step(
            f"rewrite {method}",
            ("rewrite", model, "--stats", "stats", "--method", method, "-o", f"{method}-model"),
        )


def _running_the_model(model: str) -> Iterator[Step]:
    """What is left out of a small comparison, or what `fitted` has not."""
    text = ("--text", "demo-en", "--tokens", "256", "--sequence-length", "64")
    on_model = ("--model", model, *text)
    yield _search("mixed", "mixed", "--max-bits", "5.25")
    yield _search("mixed", "size", "--max-size", "1.2MB")
    yield _search("serving", "hopper", "--max-bits", "6", "--engine", "vllm-hopper")
    yield _search("weights", "relative", "--max-bits", "5")
    yield _search("kv", "context", "--max-size", "2.5MB", "--kv-tokens", "1024")
    yield _search("kv", "finer", "--max-finer", "0.5")
    yield _search("kv", "cached", "--max-bits", "9", "--max-kv-bits", "6")
    yield _search(
        "kv", "formats", "--max-bits", "9", "--max-kv-bits", "9", "--kv-cache", "fp8_e4m3.tensor"
    )
    yield _search(
        "serving", "refined", "--max-bits", "5", "--refine", "2", "--stats", "stats", *on_model
    )
    yield _search(
        "serving", "optuna", "--max-bits", "5", "--solver", "optuna", "--trials", "4", *on_model
    )
    yield Step(
        "search objectives",
        ("search", "serving.jsonl", "--max-bits", "5", "--solver", "optuna", "--trials", "4",
         "--multi-objective", *on_model, "-o", "objectives.yaml", "--json"),
    )  # fmt: skip
    kv = ("--max-kv-bits", "8")
    yield Step("frontier with cache", ("frontier", "kv.jsonl", *kv, "--json"))
    yield Step("explore with cache", ("explore", "kv.jsonl", *kv, "-o", "page-kv.html"))
    yield Step(
        "validate cached",
        ("validate", model, "cached.yaml", *text, "--stats", "stats",
         "-o", "cached.validation.json"),
    )  # fmt: skip
    yield Step("validate export", ("validate", model, "exported-int4", *text, "--json"))
    yield Step(
        "export cached",
        ("export", model, "cached.yaml", "--stats", "stats", "-o", "exported-cached"),
    )
    yield Step("recipe from", ("recipe", "from", "exported-int4", "-o", "read-back.yaml"))
    yield Step(
        "run",
        ("run", model, "--engine", "vllm-cpu", "--max-bits", "6", "--tokens", "512",
         "--sequences", "4", "--sequence-length", "64", "-o", "run", "--json"),
    )  # fmt: skip
    for name in ("spaces", "formats", "engines", "devices"):
        yield Step(name, (name, "--json"))


def _search(table: str, recipe: str, *options: str) -> Step:
    return Step(
        f"search {recipe}",
        ("search", f"{table}.jsonl", *options, "-o", f"{recipe}.yaml", "--json"),
    )


def run(checkout: Path, steps: Sequence[Step], folder: Path, *, model: str) -> None:
    """Run steps with one checkout's code, each in a process of its own, in a folder.

    Steps that the folder holds already are left out, unless they read what runs again.

    Args:
        checkout: The code.
        steps: In their order.
        folder: Where they write; ``steps.json`` there says what it holds.
        model: That stands in the steps. Wherever it lies, its name and its size say which it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(SMALL_SPACE, "utf-8")
    record = folder / "steps.json"
    known: dict[str, Any] = json.loads(record.read_text("utf-8")) if record.exists() else {}
    size = sum(file.stat().st_size for file in Path(model).iterdir() if file.is_file())
    identity = f"{Path(model).name}, {size} bytes"
    changed: set[str] = set()
    for number, step in enumerate(steps, 1):
        wanted = [str(checkout), *(identity if one == model else one for one in step.arguments)]
        if known.get(step.name) == wanted and not changed & set(step.arguments):
            continue
        print(f"{folder.name} {number}/{len(steps)}: {step.name}", file=sys.stderr, flush=True)
        if step.output is not None:
            changed.add(step.output)
            _remove(folder / step.output)
        _run_step(checkout, step, folder)
        known[step.name] = wanted
        record.write_text(json.dumps(known, indent=1), "utf-8")


def _remove(output: Path) -> None:
    """A former output, and the study of a measured search beside it."""
    output.with_suffix(".optuna.db").unlink(missing_ok=True)
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)


def _run_step(checkout: Path, step: Step, folder: Path) -> None:
    ended = _run_command(checkout, step.arguments, folder)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    if ended.returncode and not errors:
        raise SystemExit(f"{checkout}: {step.name} ended by itself:\n{ended.stderr}")
    for error in errors:
        print(f"  refused: {error}", file=sys.stderr, flush=True)
    # What is said of progress is no artifact, a refusal is.
    said = ended.stdout if "--json" in step.arguments else ""
    said += "".join(f"{error}\n" for error in errors)
    for kind in ("json", "txt"):
        _remove(folder / f"{step.name.replace(' ', '-')}.out.{kind}")
    if said:
        kind = "json" if said.startswith("{") else "txt"
        (folder / f"{step.name.replace(' ', '-')}.out.{kind}").write_text(said, "utf-8")


def _run_command(
    checkout: Path, arguments: Sequence[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, mofq; from pathlib import Path\n"
        f"assert Path(mofq.__file__).is_relative_to({str(checkout)!r}), mofq.__file__\n"
        "from mofq.cli import main; sys.argv[0] = 'mofq'; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def artifacts(folder: Path) -> dict[str, Path]:
    """Every file that is compared, by its path below the folder."""
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in LEFT_OUT)
    }


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """The name of each artifact by its SHA-256. Of two with the same bytes, the first."""
    named: dict[str, str] = {}
    for name, path in files.items():
        with path.open("rb") as file:
            named.setdefault(file_digest(file, "sha256").hexdigest(), name)
    return named


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the files of one side as they are compared."""

    files: Mapping[str, Path]
    named: Mapping[str, str]  #: artifacts by their SHA-256
    ignored: Sequence[str]  #: patterns of keys

    def lines(self, name: str) -> list[str]:
        """The lines of a text file, without ignored keys, artifacts' SHA-256 by name."""
        text = self.files[name].read_text("utf-8")
        if name.endswith(".html"):
            text = self._in_lines(_page_data(text))
        elif name.endswith(".json"):
            text = self._in_lines(text)
        elif name.endswith((".jsonl", ".yaml", ".md")):
            text = self._without_scalars(text)
        return re.sub(r"\b[0-9a-f]{64}\b", self._name, text).splitlines()

    def _name(self, found: re.Match[str]) -> str:
        name = self.named.get(found[0])
        return found[0] if name is None else f"(sha256 of {name})"

    def _in_lines(self, text: str) -> str:
        # Numbers stay as they are written: 1.0 is not 1, and no digit is lost.
        content = json.loads(text, parse_float=lambda number: f"<{number}>")
        return json.dumps(self._without(content), indent=1, ensure_ascii=False)

    def _without(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._without(v) for k, v in value.items() if not self._is_ignored(k)}
        return [self._without(one) for one in value] if isinstance(value, list) else value

    def _is_ignored(self, key: str) -> bool:
        return any(fnmatch(key, pattern) for pattern in self.ignored)

    def _without_scalars(self, text: str) -> str:
        """Text without `key: number` and `"key":"text"` members: everything else as it stands."""
        for pattern in self.ignored:
            key = re.escape(pattern).replace(r"\*", r"\w*")
            value = r"(?:\"[^\"]*\"|[^,}\]\s]+)"
            text = re.sub(rf",\s?\"?{key}\"?:\s?{value}", "", text)
        return text


def _page_data(page: str) -> str:
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    if found is None:
        raise SystemExit("a page of the explorer has no data")
    return found[1]


def compare(name: str, old: Reader, new: Reader) -> tuple[str, str]:
    """The verdict on an artifact (`same`, `same but …`, `differs`), and what differs first."""
    for side, other in (("OLD", new), ("NEW", old)):
        if name not in other.files:
            return "differs", f"is there in {side} alone"
    ours, theirs = old.files[name], new.files[name]
    if _are_equal_files(ours, theirs):
        return "same", ""
    if not name.endswith(TEXT):
        return "differs", _first_byte(ours, theirs)
    ours_lines, theirs_lines = old.lines(name), new.lines(name)
    if ours_lines == theirs_lines:
        return "same but for ignored keys and SHA-256 of artifacts", ""
    for number, (a, b) in enumerate(zip(ours_lines, theirs_lines, strict=False), 1):
        if a != b:
            return "differs", f"line {number}: {_around(a, b)}"
    return "differs", f"{len(ours_lines)} lines, {len(theirs_lines)} lines"


def _are_equal_files(ours: Path, theirs: Path) -> bool:
    if ours.stat().st_size != theirs.stat().st_size:
        return False
    with ours.open("rb") as a, theirs.open("rb") as b:
        return file_digest(a, "sha256").digest() == file_digest(b, "sha256").digest()


def _first_byte(ours: Path, theirs: Path) -> str:
    position = 0
    with ours.open("rb") as a, theirs.open("rb") as b:
        while True:
            first, second = a.read(2**20), b.read(2**20)
            if first != second:
                inside = next(
                    (at for at, pair in enumerate(zip(first, second, strict=False))
                     if pair[0] != pair[1]),
                    min(len(first), len(second)),
                )  # fmt: skip
                sizes = f"{ours.stat().st_size} and {theirs.stat().st_size} bytes"
                return f"byte {position + inside} of {sizes}"
            position += len(first)


def _around(ours: str, theirs: str) -> str:
    at = next(
        (index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    start = max(0, at - 40)
    return f"…{ours[start : at + 40]!r} became …{theirs[start : at + 40]!r}"


def main() -> None:
    """Run both sides and print the verdicts."""
    parser = script_parser(__doc__)
    parser.add_argument("old", type=Path, help="a checkout")
    parser.add_argument("new", type=Path, help="another checkout")
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--work", type=Path, required=True, help="where both sides write")
    parser.add_argument("--small", action="store_true", help="for a model of some size")
    parser.add_argument("--ignore", action="append", help=f"a key; by default {IGNORED}")
    parser.add_argument("--time", action="append", help=f"a key of a time; by default {TIMES}")
    parser.add_argument("--baseline", action="store_true", help="only run OLD, for later")
    parser.add_argument("--only-compare", action="store_true", help="what was written before")
    options = parser.parse_args()
    model = str(options.model.resolve())
    steps = flow(model, is_small=options.small)
    old_folder, new_folder = options.work.resolve() / "old", options.work.resolve() / "new"
    if not options.only_compare:
        run(options.old.resolve(), steps, old_folder, model=model)
        if options.baseline:
            return
        shutil.rmtree(new_folder, ignore_errors=True)
        run(options.new.resolve(), steps, new_folder, model=model)
    ignored = (*(options.ignore or IGNORED), *(options.time or TIMES))
    old, new = (
        Reader(files, digests(files), ignored)
        for files in (artifacts(old_folder), artifacts(new_folder))
    )
    print(f"ignored keys: {', '.join(ignored)}; a SHA-256 of an artifact stands for its name")
    verdicts = [_report(name, old, new) for name in sorted({*old.files, *new.files})]
    counts = {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    sys.exit(1 if "differs" in counts else 0)


def _report(name: str, old: Reader, new: Reader) -> str:
    verdict, difference = compare(name, old, new)
    print(f"{name}: {verdict}" + (f": {difference}" if difference else ""))
    return verdict


if __name__ == "__main__":
    main()
