"""The ``stats/`` folder: what `calibrate` writes and `measure` reads.

``plan.json``
    Written first: model, seed, corpora with their hashes, sequence length. A second
    run continues a folder only where its own plan is the same, or the same with more
    corpora behind: it then makes what these add, and leaves the rest as it is.
``CORPUS/sequence-00000.safetensors``
    One sequence each, complete when it has this name; see ``sequence_file``. Where fewer
    sequences are kept than are run, one out of each range of neighbours.
``CORPUS/inputs-00001.safetensors``
    Of the sequences that are run and not kept, what codes are fitted to; where it is kept.
``CORPUS/gains-00000.json``
    Three numbers for each layer of every sequence that is run; see ``gains``.
``CORPUS/routing-00000.json``
    Of a mixture, what tokens that change their experts cost; see ``routing``.
``stats.json``
    Written last: the plan, the hash of every sequence, and per corpus the experts that
    no token reached, if any.
``.streamed/``
    What a run keeps that has one decoder layer in memory at a time, until it is finished.
``.lock``
    Empty; locked by the run that writes to the folder. Each worker of a cluster that runs layer by
    layer locks one in ``.streamed``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from shlex import quote
from shutil import rmtree
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from mofq.evidence.calibration.gains import gains_path
from mofq.evidence.calibration.routing import routing_path
from mofq.evidence.calibration.sequence_file import SequenceFile, inputs_path, sequence_path
from mofq.evidence.corpora import CORPUS_NAME
from mofq.exceptions import StatsError, option
from mofq.files.documents import hash_file, load_json, write_beside_and_rename
from mofq.files.locks import hold_file
from mofq.files.validated import (
    Count,
    Integer,
    Name,
    Sha256,
    SomeNames,
    Text,
    only_these_keys,
    validate,
)
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import StatedLayers

VERSION = 1

#: In the folder while a model is calibrated layer by layer; see `streamed`.
UNFINISHED = ".streamed"

#: Entries for 100,000 sequences are about 15 MB.
_MAX_BYTES = 64_000_000
#: What runs backward from the logits; see ``sample_scores``.
SCORES: Literal["signs"] = "signs"


@only_these_keys
@dataclass(frozen=True, slots=True)
class CorpusPlan:
    """One corpus of a calibration run."""

    name: Annotated[Name, Field(pattern=CORPUS_NAME)]
    source: Name
    text_sha256: Sha256
    sequences: Count  #: how many sequences are run
    kept: Count | None = None  #: of how many the samples are kept, fewer than those; None: all

    @property
    def clusters(self) -> tuple[range, ...]:
        """The sequences in as many ranges of neighbours as are kept."""
        kept = self.sequences if self.kept is None else self.kept
        ends = [self.sequences * n // kept for n in range(kept + 1)]
        return tuple(range(start, stop) for start, stop in pairwise(ends))

    @property
    def kept_indices(self) -> tuple[int, ...]:
        """Which sequences are kept: the middle one of each cluster."""
        return tuple(cluster[(len(cluster) - 1) // 2] for cluster in self.clusters)


@only_these_keys
@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides what a calibration run computes."""

    model_name: Name
    index_sha256: Sha256
    seed: Integer
    sequence_length: Annotated[Integer, Field(ge=2)]  #: tokens in each sequence
    draws: Count  #: of the output's gradient, for each sequence
    dtype: Name  #: of the model's arithmetic
    corpora: Annotated[tuple[CorpusPlan, ...], Field(min_length=1)]
    weights_sha256: Sha256 | None = None  #: of samples of the weights; None before 0.2
    #: What ran backward; None before it was noted: labels or signs.
    scores: Literal["signs"] | None = SCORES
    kv_cache: Literal[True] | None = None  #: True: what attention caches is kept too
    bos: Literal[True] | None = None  #: True: every sequence begins with BOS, as in engines
    #: True: gains of every sequence, also where all are kept, with what a change of size does;
    #: None in plans of before.
    scaling: Literal[True] | None = True
    layers: StatedLayers | None = None  #: what the user said of the model's layers
    #: True: what tokens that change experts cost, of every sequence; see ``routing``.
    routing: Literal[True] | None = None
    #: True: inputs are kept of every sequence, for codes that are fitted to them.
    inputs: Literal[True] | None = None
    vocabulary: SomeNames | None = None  #: fusion groups of the lm_head and the embedding

    def corpus(self, name: str) -> CorpusPlan:
        """One of the corpora."""
        return next(corpus for corpus in self.corpora if corpus.name == name)

    def to_json(self) -> dict[str, Any]:
        """The plan as it stands in ``plan.json``."""
        return {"version": VERSION, **_PLAN.dump_python(self, mode="json", exclude_none=True)}


@only_these_keys
@dataclass(frozen=True, slots=True)
class _FileEntry:
    """A file as it was written."""

    bytes: Count
    sha256: Sha256


_PLAN = TypeAdapter(Plan)
_FILES = TypeAdapter(dict[Text, _FileEntry])
_UNSEEN = TypeAdapter(dict[Text, Annotated[tuple[Name, ...], Field(min_length=1)]])


@dataclass(frozen=True, slots=True)
class Stats:
    """A complete stats folder."""

    folder: Path
    plan: Plan
    sha256: str
    #: Corpus -> experts that none of its tokens reached; only corpora that have such.
    unseen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: False: samples are measured as the model is calibrated, and are nowhere afterwards.
    is_stored: bool = True

    def sequence_files(self, corpus: str) -> tuple[Path, ...]:
        """The kept sequences of a corpus, in order."""
        indices = self.plan.corpus(corpus).kept_indices
        return tuple(sequence_path(self.folder, corpus, index) for index in indices)

    def inputs_files(self, corpus: str) -> tuple[Path, ...]:
        """The inputs of the sequences of a corpus that are not kept, in order; none if unknown."""
        plan = self.plan.corpus(corpus)
        others = sorted(set(range(plan.sequences)) - set(plan.kept_indices))
        indices = others if self.plan.inputs else []
        return tuple(inputs_path(self.folder, corpus, index) for index in indices)

    def gains_files(self, corpus: str) -> tuple[Path, ...]:
        """The gains of all sequences of a corpus, in order.

        None where all are kept, in statistics of before ``scaling``.
        """
        plan = self.plan.corpus(corpus)
        count = plan.sequences if has_gains(self.plan, plan) else 0
        return tuple(gains_path(self.folder, corpus, index) for index in range(count))

    def routing_files(self, corpus: str) -> tuple[Path, ...]:
        """What changes of experts cost, of all sequences of a corpus, in order; none if unknown."""
        count = self.plan.corpus(corpus).sequences if self.plan.routing else 0
        return tuple(routing_path(self.folder, corpus, index) for index in range(count))

    def files(self, corpus: str) -> tuple[Path, ...]:
        """Every file of a corpus."""
        return (
            *self.sequence_files(corpus),
            *self.inputs_files(corpus),
            *self.gains_files(corpus),
            *self.routing_files(corpus),
        )


def has_gains(plan: Plan, corpus: CorpusPlan) -> bool:
    """Whether gains are kept of the sequences of a corpus."""
    return bool(plan.scaling) or corpus.kept is not None


def read_stats(folder: str | Path) -> Stats:
    """Open a finished stats folder; no samples are read yet.

    Args:
        folder: What `mofq calibrate` was given as ``-o``.

    Raises:
        StatsError: The folder is not finished, or a sequence is missing or was cut short.
    """
    path = Path(folder) / "stats.json"
    if not path.exists():
        raise StatsError(
            f"{path}: not found. {folder} is not a finished stats folder: "
            f"run `mofq calibrate` with -o {folder} (it continues where it stopped)."
        )
    stats, files = _read_stats(path)
    for file, entry in _entries(stats, files):
        found = file.stat().st_size if file.is_file() else None
        if found != entry.bytes:
            raise StatsError(
                f"{file}: needed {entry.bytes} bytes, "
                f"found {'no file' if found is None else found}. {_remedy(file)}"
            )
    return stats


def _read_stats(path: Path) -> tuple[Stats, dict[str, _FileEntry]]:
    content = _read(path)
    files = validate(_FILES, content.pop("files", None), f"{path}: files", StatsError)
    unseen = validate(_UNSEEN, content.pop("unseen", {}), f"{path}: unseen", StatsError)
    return Stats(path.parent, _plan(content, path), hash_file(path), unseen=unseen), files


def passing_stats(folder: Path, plan: Plan) -> Stats:
    """Statistics whose samples are not stored; their hash is that of what decides them.

    Args:
        folder: Where gains and routing are while the model is calibrated.
        plan: What is computed. Where model and texts lie is not part of the hash, nor whether
            caches are watched, which changes no other number.
    """
    corpora = tuple(replace(one, source=one.name) for one in plan.corpora)
    content = replace(plan, model_name="model", corpora=corpora, kv_cache=None).to_json()
    sha256 = hashlib.sha256(_json_text(content).encode()).hexdigest()
    return Stats(folder, plan, sha256, is_stored=False)


def earlier_stats(stats: Stats) -> tuple[Stats, ...]:
    """The folder as it was before its last corpus was added, and before that.

    Args:
        stats: An open stats folder.

    Returns:
        With one corpus less each, the most first: what `read_stats` gave, if the folder was
        finished with these corpora.
    """
    counts = range(len(stats.plan.corpora) - 1, 0, -1)
    plans = [replace(stats.plan, corpora=stats.plan.corpora[:count]) for count in counts]
    if not stats.is_stored:
        return tuple(passing_stats(stats.folder, plan) for plan in plans)
    _, files = _read_stats(stats.folder / "stats.json")
    found = []
    for plan in plans:
        names = [corpus.name for corpus in plan.corpora]
        unseen = {name: stats.unseen[name] for name in names if name in stats.unseen}
        text = _json_text(_content(plan, files, unseen))
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        found.append(Stats(stats.folder, plan, sha256, unseen=unseen))
    return tuple(found)


def _content(
    plan: Plan, files: Mapping[str, _FileEntry], unseen: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """What ``stats.json`` holds: of the files, those of the plan's corpora."""
    names = {corpus.name for corpus in plan.corpora}
    entries = {
        name: asdict(entry) for name, entry in files.items() if name.rpartition("/")[0] in names
    }
    return {
        **plan.to_json(),
        "files": entries,
        **({"unseen": {name: list(some) for name, some in unseen.items()}} if unseen else {}),
    }


def check_same_model(stats: Stats, checkpoint: Checkpoint, *, weights_sha256: str) -> None:
    """Refuse the stats of another model, or of another training of the same.

    Args:
        stats: An open stats folder.
        checkpoint: The model.
        weights_sha256: Of its weights, from `hash_weights`.

    Raises:
        StatsError: They are.
    """
    if stats.plan.index_sha256 != checkpoint.index_sha256:
        raise StatsError(
            f"{stats.folder}: calibrated on {stats.plan.model_name} "
            f"({stats.plan.index_sha256[:8]}), but the model is {checkpoint.name} "
            f"({checkpoint.index_sha256[:8]}): other tensors, or another config.json. Calibrate "
            f"this model."
        )
    if stats.plan.weights_sha256 not in (None, weights_sha256):
        raise StatsError(
            f"{stats.folder}: calibrated on other weights of the same shapes as {checkpoint.name} "
            f"has: {stats.plan.weights_sha256}, found {weights_sha256}. Calibrate this model."
        )


def verify_sequences(stats: Stats) -> None:
    """Read every sequence and compare it with the hash that was noted when it was written.

    Args:
        stats: An open stats folder.

    Raises:
        StatsError: A sequence changed since.
    """
    for file, entry in _entries(*_read_stats(stats.folder / "stats.json")):
        if hash_file(file) != entry.sha256:
            raise StatsError(f"{file}: changed since it was written. {_remedy(file)}")


def _entries(stats: Stats, entries: Mapping[str, _FileEntry]) -> Iterator[tuple[Path, _FileEntry]]:
    for corpus in stats.plan.corpora:
        for file in stats.files(corpus.name):
            name = f"{corpus.name}/{file.name}"
            if name not in entries:
                raise StatsError(
                    f"{stats.folder / 'stats.json'}: files: the entry {name!r} is missing. "
                    f"Delete stats.json and run the same `mofq calibrate` again."
                )
            yield file, entries[name]


def _remedy(file: Path) -> str:
    return f"Delete {file} and run the same `mofq calibrate` again: it makes only this file."


def open_sequences(
    stats: Stats, *, inputs: bool = False
) -> tuple[ExitStack, dict[str, list[SequenceFile]]]:
    """Open every kept sequence of a stats folder.

    Args:
        stats: An open stats folder.
        inputs: In their place those of which inputs alone are kept.

    Returns:
        What closes them all, and the sequences of each corpus, in order.

    Raises:
        StatsError: One is missing or damaged; none is left open then.
    """
    with ExitStack() as opening:
        files = {
            corpus.name: [
                opening.enter_context(SequenceFile(file))
                for file in (stats.inputs_files if inputs else stats.sequence_files)(corpus.name)
            ]
            for corpus in stats.plan.corpora
        }
        return opening.pop_all(), files


@contextmanager
def open_plan(folder: Path, plan: Plan) -> Iterator[Plan]:
    """Hold a stats folder for writing; write its plan, or check that it has the same.

    A plan with more corpora behind those of the folder takes the place of the folder's.

    Args:
        folder: Is created.
        plan: Of this run.

    Yields:
        The plan with the names of model and texts that the folder has: files may have moved.

    Raises:
        StatsError: The folder belongs to another plan or to something else, or another run
            writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    busy = partial(busy_folder, folder)
    with hold_file(folder / ".lock", busy):
        for path in (folder / UNFINISHED).glob("*.lock"):
            with hold_file(path, busy):
                pass  # no worker has outlived the run that sent it
        path = folder / "plan.json"
        if (begun := begun_plan(folder)) is not None:
            _check_same(plan, begun, folder)
            added = plan.corpora[len(begun.corpora) :]
            plan = replace(plan, model_name=begun.model_name, corpora=(*begun.corpora, *added))
            if added:
                write_json(path, plan.to_json())
        elif other := next((p.name for p in folder.iterdir() if not p.name.startswith(".")), None):
            raise StatsError(
                f"{folder}: needed a new folder or one of statistics, found {other!r} in it and no "
                f"plan.json. Name another folder."
            )
        else:
            write_json(path, plan.to_json())
        yield plan


def busy_folder(folder: Path, who: str) -> StatsError:
    """The error where another process writes to a stats folder."""
    return StatsError(
        f"{folder}: {who} calibrates into this folder. Wait for it, or name another one."
    )


def begun_plan(folder: Path) -> Plan | None:
    """The plan that a folder was begun with; None where there is none yet.

    Raises:
        StatsError: It is damaged, or of another version.
    """
    path = folder / "plan.json"
    return _plan(_read(path), path) if path.exists() else None


def _check_same(plan: Plan, begun: Plan, folder: Path) -> None:
    """Refuse to continue a folder with another plan, and say what differs."""
    differences = list(_differences(plan, begun))
    if not differences:
        return
    options = _options_of(plan, begun)
    remedy = f"give {options} to go on with this one" if options else "delete this one"
    raise StatsError(
        f"{folder}: was begun otherwise than this run asks for: {'; '.join(differences)}. Name "
        f"another folder ({option('output')}), or {remedy}."
    )


def _options_of(plan: Plan, begun: Plan) -> str:
    """The options that a folder was begun with; empty where they are not all that differs."""
    given: list[str] = []
    corpora, theirs = plan.corpora, begun.corpora
    counts = [one.sequences for one in theirs]
    if [one.name for one in corpora[: len(theirs)]] != [one.name for one in theirs]:
        given += [option("corpora", quote(f"{one.name}={one.source}")) for one in theirs]
        corpora = theirs
    if plan.sequence_length != begun.sequence_length:
        given.append(option("sequence_length", begun.sequence_length))
    if [one.sequences for one in plan.corpora[: len(theirs)]] != counts:
        # A text that has fewer gives what it has.
        given.append(option("sequences", max(counts)))
        corpora = (
            *(
                replace(one, sequences=other.sequences, kept=other.kept)
                for one, other in zip(corpora, theirs, strict=False)
            ),
            *corpora[len(theirs) :],
        )
    if plan.bos != begun.bos:
        given.append(option("bos", "always" if begun.bos else "never"))
    mended = replace(plan, corpora=corpora, sequence_length=begun.sequence_length, bos=begun.bos)
    return "" if list(_differences(mended, begun)) else " ".join(given)


def _differences(plan: Plan, begun: Plan) -> Iterator[str]:
    """Where two plans differ, each in words."""
    if plan.index_sha256 != begun.index_sha256:
        yield (
            f"it is of the model {begun.model_name} ({begun.index_sha256[:8]}), and this is "
            f"{plan.model_name} ({plan.index_sha256[:8]})"
        )
    elif begun.weights_sha256 not in (None, plan.weights_sha256):  # None: may be the same
        yield f"it is of other weights of {plan.model_name}"
    yield from _corpus_differences(plan, begun)
    for what, ours, theirs in (
        ("tokens in a sequence", plan.sequence_length, begun.sequence_length),
        ("draws", plan.draws, begun.draws),
        ("seed", plan.seed, begun.seed),
        ("dtype", plan.dtype, begun.dtype),
        ("scores", plan.scores, begun.scores or "not noted"),
        ("answers to scaling", _kept(plan.scaling), _kept(begun.scaling)),
        ("inputs of all sequences", _kept(plan.inputs), _kept(begun.inputs)),
        ("changes of experts", _kept(plan.routing), _kept(begun.routing)),
        ("sequences begin", _beginning(plan.bos), _beginning(begun.bos)),
        ("lm_head and embeddings", _vocabulary(plan), _vocabulary(begun)),
        ("KV cache", _kept(plan.kv_cache), _kept(begun.kv_cache)),
    ):
        if ours != theirs:
            yield f"{what} {theirs}, asked for {ours}"


def _kept(asked: bool | None) -> str:
    return "kept" if asked else "not kept"


def _vocabulary(plan: Plan) -> str:
    return " and ".join(plan.vocabulary or ("not",)) + " kept"


def _beginning(bos: bool | None) -> str:
    return "with BOS" if bos else "without BOS"


def _corpus_differences(plan: Plan, begun: Plan) -> Iterator[str]:
    ours, theirs = ({one.name: one for one in each.corpora} for each in (plan, begun))
    if list(ours)[: len(theirs)] != list(theirs):
        yield (
            f"corpora {', '.join(theirs)}, asked for {', '.join(ours)} (corpora can be added "
            f"behind those that are there: give these first)"
        )
        return
    for name, other in theirs.items():
        one = ours[name]
        if one.text_sha256 != other.text_sha256:
            yield f"corpus {name}: another text, from {other.source}"
        for what, asked, found in (
            ("sequences", one.sequences, other.sequences),
            ("of them kept", one.kept or one.sequences, other.kept or other.sequences),
        ):
            if asked != found:
                yield f"corpus {name}: {what} {found}, asked for {asked}"


def read_plan(content: dict[str, Any], path: Path) -> Plan:
    """A plan as `Plan.to_json` gives it.

    Raises:
        StatsError: It is damaged, or of another version.
    """
    return _plan(_of_this_version(content, path), path)


def never_seen(sequences: Sequence[Mapping[str, str | None]]) -> list[str]:
    """The layers that no token of some sequences came to, by what each says of its layers."""
    return [name for name in sequences[0] if all(one.get(name) is None for one in sequences)]


def finish_stats(folder: Path, plan: Plan) -> Stats:
    """Write ``stats.json`` over complete sequences and open the folder."""
    files: dict[str, _FileEntry] = {}
    unseen: dict[str, list[str]] = {}
    stats = Stats(folder, plan, "")
    for corpus in plan.corpora:
        inputs = []
        kept = stats.sequence_files(corpus.name)
        for file in stats.files(corpus.name):
            entry = _FileEntry(file.stat().st_size, hash_file(file))
            files[f"{corpus.name}/{file.name}"] = entry
        for file in kept:
            with SequenceFile(file) as sequence:
                inputs.append(sequence.inputs)
        if missed := never_seen(inputs):
            unseen[corpus.name] = missed
    rmtree(folder / UNFINISHED, ignore_errors=True)
    write_json(folder / "stats.json", _content(plan, files, unseen))
    return read_stats(folder)


def _read(path: Path) -> dict[str, Any]:
    """The keys of a file of this version, but for the version."""
    content = load_json(path, StatsError, _MAX_BYTES)
    return _of_this_version(content, path)


def _of_this_version(content: Any, path: Path) -> dict[str, Any]:
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version != VERSION:
        raise StatsError(
            f"{path}: has version {version!r}, and this mofq reads version {VERSION}. "
            f"Calibrate again into another folder."
        )
    assert isinstance(content, dict)
    return content


def _plan(content: dict[str, Any], path: Path) -> Plan:
    plan = validate(_PLAN, {"scores": None, "scaling": None, **content}, str(path), StatsError)
    for corpus in plan.corpora:
        if corpus.kept is not None and corpus.kept >= corpus.sequences:
            raise StatsError(
                f"{path}: corpora: {corpus.name!r} keeps {corpus.kept} of {corpus.sequences} "
                f"sequences. Calibrate again."
            )
    if len({corpus.name for corpus in plan.corpora}) < len(plan.corpora):
        raise StatsError(f"{path}: corpora: a name stands twice. Calibrate again.")
    return plan


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside the final name and rename it."""
    write_beside_and_rename(path, _json_text(content))


def _json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
