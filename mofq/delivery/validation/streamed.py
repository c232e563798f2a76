"""Validates quantized models in one pass over the decoder layers of the original.

A layer is read once. The original and every recipe move their own windows through it; what two
recipes make alike of its weights is made once, and compared with the original's files once. A
folder has weights of its own, and so has the model that recipes rewrite the original to: these are
streamed likewise, one checkpoint after the other. At the head the logits of a window are
compared as soon as both are there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq import __version__
from mofq.delivery.apply.apply_by_unit import Applied, Choices, UnitModules, unit_modules
from mofq.delivery.apply.emulate import apply_group, prepare
from mofq.delivery.deviation import Deviation
from mofq.delivery.export.compressed_tensors.model_from_folder import (
    quantize_inputs,
    stored_tensors,
)
from mofq.delivery.recipe_fits import check_fits, open_fits
from mofq.delivery.tuning.tensors import replaced
from mofq.delivery.validation.against_original import (
    Original,
    tokens_of,
    validation_of,
    with_those_of_folder,
)
from mofq.delivery.validation.candidates import Candidate, naming_deviations
from mofq.delivery.validation.divergence import (
    WindowScore,
    check_logits,
    next_token_entropy,
    score_window,
)
from mofq.delivery.validation.enforcement import Enforcement, enforcement
from mofq.delivery.validation.report import Validation
from mofq.delivery.validation.windows import cut_windows
from mofq.evidence.corpora import Bos, Corpus
from mofq.exceptions import MofqError, StreamingError
from mofq.files.documents import write_beside_and_rename
from mofq.files.locks import hold_folder
from mofq.files.progress import Progress, Steps
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import layers_of
from mofq.model.layers.module_layers import layers_within
from mofq.model.streaming.disk import KEPT_STEPS, check_disk, hidden_size
from mofq.model.streaming.replay import StreamedSequence
from mofq.model.streaming.streamed import StreamedModel, open_streamed

#: What differs in one unit: of fusion groups, of other linear layers, of other tensors, of caches.
_Found = tuple[list[Deviation], list[Deviation], list[Deviation], list[Deviation]]


@dataclass(slots=True)
class Subject:
    """What moves its own windows through the layers: the original, or a candidate."""

    folder: Path
    candidate: Candidate | None = None  #: None: the original
    applied: Applied | None = None  #: None: the weights run as they are
    enforced: Enforcement | None = None  #: what it should be; None: nothing is enforced
    sequences: list[StreamedSequence] = field(default_factory=list)
    seconds: float = 0.0

    def set_windows(self, windows_NT: Tensor) -> None:
        """Give it its windows, each with a folder."""
        for index, window_T in enumerate(windows_NT):
            sequence = StreamedSequence(window_T, self.folder / f"{index:05d}")
            sequence.folder.mkdir(parents=True, exist_ok=True)
            self.sequences.append(sequence)

    def findings(self, unit: str) -> Path:
        """The file of the deviations in a unit; it is there once they were looked for."""
        return self.folder / f"enforced-{unit}.json"

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of what is done for it."""
        start = monotonic()
        try:
            yield
        finally:
            self.seconds += monotonic() - start


@dataclass(frozen=True, slots=True)
class Run:
    """Subjects that share the weights of one checkpoint."""

    streamed: StreamedModel
    subjects: list[Subject]

    @property
    def recipes(self) -> list[Applied]:
        """What is applied, for one subject after the other."""
        return [one.applied for one in self.subjects if one.applied is not None]


def validate_streamed(
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    text: Corpus,
    *,
    tokens: int,
    sequence_length: int,
    bos: Bos,
    dtype: str,
    device: str,
    work: Path | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[Validation, ...]:
    """As ``validate_many``, with one decoder layer in memory.

    Args:
        checkpoint: The original.
        candidates: From ``open_candidate``, with the backend ``emulate``.
        text: As ``validate_many`` has it, and so have the other arguments.
        tokens: At most.
        sequence_length: Of a window.
        bos: Whether windows begin with it.
        dtype: Of the arithmetic.
        device: Where it runs.
        work: What is kept between layers lies here until `drop_unfinished`, so that a run that was
            stopped goes on; None: in a temporary folder.
        progress: Called with ``"validate"``, units done, units in all.
        tell: Called with remarks on the text, and on what the disk has to hold.

    Returns:
        One validation for each candidate, in their order.

    Raises:
        StreamingError: The model cannot be run unit by unit.
        MofqError: The disk has too little space, another process uses ``work``, or as
            ``validate_many``.
    """
    asked = {
        "mofq": __version__,
        "model": [checkpoint.index_sha256, hash_weights(checkpoint)],
        "candidates": [_identity(one) for one in candidates],
        "text": [text.sha256, tokens, sequence_length, bos],
        "arithmetic": [dtype, device],
    }
    with work_folder(work, asked) as folder, ExitStack() as stack:
        places = [folder / f"candidate-{number}" for number in range(len(candidates))]
        recipes: dict[int, list[Subject]] = {id(checkpoint): [Subject(folder / "original")]}
        for place, candidate in zip(places, candidates, strict=True):
            if candidate.folder is None:
                subject = Subject(place, candidate)
                recipes.setdefault(id(candidate.base), []).append(subject)
        open_run = partial(_open_recipes, stack, dtype=dtype, device=device)
        first = open_run(checkpoint, recipes.pop(id(checkpoint)))
        start = monotonic()
        model = first.streamed.model
        windows = cut_windows(
            checkpoint, model, text, tokens=tokens, sequence_length=sequence_length, bos=bos
        )
        windows.tell_unknown(text, tell)
        original = Original(
            checkpoint=checkpoint,
            text=text,
            windows=windows,
            entropies=(),
            dtype=dtype,
            device=device,
            seconds=monotonic() - start,
        )
        runs = [first]
        for of_base in recipes.values():
            assert of_base[0].candidate is not None
            runs.append(open_run(of_base[0].candidate.base, of_base))
        for place, candidate in zip(places, candidates, strict=True):
            if candidate.folder is not None:
                runs.append(_open_folder(stack, candidate, original, folder=place))
        for run in runs:
            for subject in run.subjects:
                own = original.windows.tokens_NT
                if subject.candidate is not None:
                    with naming_deviations(subject.candidate):
                        _, own = tokens_of(subject.candidate, original)
                subject.set_windows(own)
        subjects = [one for run in runs for one in run.subjects]
        needed = check_room(folder, len(subjects), windows.tokens_NT, model=model, dtype=dtype)
        if tell is not None:
            where = work or Path(tempfile.gettempdir())
            tell(f"Between layers, about {needed / 1e9:.2f} GB are kept in {where}.")
        return _run_all(runs, original, candidates, progress=progress)


def _run_all(
    runs: Sequence[Run],
    original: Original,
    candidates: Sequence[Candidate],
    *,
    progress: Progress | None,
) -> tuple[Validation, ...]:
    subjects = [one for run in runs for one in run.subjects]
    total = sum(len(run.streamed.weights.units) for run in runs)
    tell = Steps(progress, "validate", total)
    heads = []
    for run in runs:
        named = [one for one in run.subjects if one.candidate is not None]
        with naming_deviations(named[0].candidate) if run is not runs[0] else nullcontext():  # type: ignore[arg-type]
            heads.append(run_layers(run, tell))
    entropies, scores = _compare(runs, heads, original)
    (the_original,) = (one for one in subjects if one.candidate is None)
    original = replace(
        original, entropies=entropies, seconds=original.seconds + the_original.seconds
    )
    validations = {}
    for subject in subjects:
        if subject.candidate is not None:
            key = id(subject.candidate)
            validations[key] = validation_of(
                subject.candidate,
                original,
                scores=scores[key],
                deviations=_deviations(subject, runs),
                seconds=subject.seconds,
            )
    return tuple(validations[id(one)] for one in candidates)


def _open_recipes(
    stack: ExitStack, base: Checkpoint, subjects: list[Subject], *, dtype: str, device: str
) -> Run:
    """A checkpoint with the recipes that are applied to it; all is checked.

    Args:
        stack: Closes what is opened.
        base: The original, or what recipes rewrite it to.
        subjects: The original, where it is that; and the recipes, which get what is applied.
        dtype: Of the arithmetic.
        device: Where it runs.
    """
    streamed = stack.enter_context(open_streamed(base.folder, dtype=dtype, device=device))
    for subject in subjects:
        if subject.candidate is None:
            continue
        recipe = subject.candidate.recipe
        assert recipe is not None
        fits = stack.enter_context(
            open_fits(recipe, subject.candidate.stats, index_sha256=base.index_sha256)
        )
        prepared = prepare(streamed.model, recipe, check=partial(check_fits, fits), checkpoint=base)
        subject.applied = Applied(prepared, partial(apply_group, fits=fits), streamed.head)
        subject.enforced = enforcement(recipe, base, fits=fits, decoded=False)
    run = Run(streamed, subjects)
    check_units(run, base)
    return run


def _open_folder(
    stack: ExitStack, candidate: Candidate, original: Original, *, folder: Path
) -> Run:
    """A folder's own weights, decoded, with inputs and caches quantized as its config says."""
    stored, served, recipe = candidate.folder, candidate.served, candidate.recipe
    assert stored is not None
    base = candidate.base
    with naming_deviations(candidate):
        streamed = stack.enter_context(
            open_streamed(
                stored.folder,
                dtype=original.dtype,
                device=original.device,
                tensors=None if served is None else stored_tensors(stored, served.schemes),
            )
        )
        applied = None
        if served is not None:
            applied = Applied(prepare(streamed.model, served), quantize_inputs, streamed.head)
    enforced = None
    if recipe is not None and not candidate.is_foreign:
        fits = stack.enter_context(
            open_fits(recipe, candidate.stats, index_sha256=base.index_sha256)
        )
        enforced = enforcement(recipe, base, fits=fits, decoded=True)
    run = Run(streamed, [Subject(folder, candidate, applied, enforced=enforced)])
    check_units(run, None)
    return run


def check_room(
    folder: Path, subjects: int, windows_NT: Tensor, *, model: PreTrainedModel, dtype: str
) -> int:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: That what is kept between layers is written to.
        subjects: That move the windows through the layers.
        windows_NT: Token ids, [N, T].
        model: It needs no weights.
        dtype: Of the arithmetic.

    Returns:
        What is kept at once, about [bytes]; a model with several streams keeps more.

    Raises:
        MofqError: There is less space than that.
    """
    itemsize: int = getattr(torch, dtype).itemsize
    needed = subjects * windows_NT.numel() * hidden_size(model) * itemsize * KEPT_STEPS
    check_disk(folder, needed, fewer="tokens")
    return needed


def check_units(run: Run, checkpoint: Checkpoint | None) -> None:
    """Refuse what a recipe would change outside of the units."""
    units = run.streamed.weights.units
    for applied in run.recipes:
        inside = {group.name for unit in units for group in applied.layers_within(unit).groups}
        for group in applied.prepared.quantized:
            if group.name not in inside:
                raise StreamingError(f"{group.name} lies outside of the decoder layers")
    if checkpoint is not None and checkpoint.source_format is not None and run.recipes:
        for name in run.streamed.weights.outside:
            if checkpoint.tensors[name].decoded:
                raise StreamingError(f"{name} is in FP8, outside of the decoder layers")


def run_layers(run: Run, tell: Callable[[], None]) -> int:
    """Move all windows of all subjects up to the head; the step of the head."""
    streamed, seen = run.streamed, set()
    first = run.subjects[0].sequences[0]
    for step in count():
        unit = streamed.unit_at(first, step)
        if unit == streamed.head:
            break
        seen.add(unit)
        left = [
            one
            for one in run.subjects
            if not one.findings(unit).exists() or not all(s.has(step) for s in one.sequences)
        ]
        if left:
            with streamed.weights.loaded(unit, ahead=streamed.next_unit(unit)):
                _run_unit(run, left, unit, step)
                streamed.writer.wait()
        streamed.replayer.forget([s for one in run.subjects for s in one.sequences], step)
        tell()
    for unit in streamed.weights.units:
        left = [one for one in run.subjects if not one.findings(unit).exists()]
        if unit not in seen and unit != streamed.head and any(one.enforced for one in left):
            with streamed.weights.loaded(unit):
                _run_unit(run, left, unit, None)
            tell()
    return step


def _run_unit(run: Run, subjects: Sequence[Subject], unit: str, step: int | None) -> None:
    """Apply every recipe to a unit whose weights are there, prove it, and run the windows."""
    recipes = [one.applied for one in subjects if one.applied is not None]
    modules = unit_modules(run.streamed.model, unit, recipes)
    known: dict[tuple[str, Choices], list[Deviation]] = {}
    for subject in subjects:
        with subject.timed(), _applied(modules, subject):
            if not subject.findings(unit).exists():
                _enforce(run, subject, unit, known)
            for sequence in subject.sequences if step is not None else ():
                assert step is not None
                if not sequence.has(step):
                    run.streamed.run_step(sequence, step, unit)


@contextmanager
def _applied(modules: UnitModules, subject: Subject) -> Iterator[None]:
    with nullcontext() if subject.applied is None else modules.applied(subject.applied):
        yield


def _enforce(
    run: Run, subject: Subject, unit: str, known: dict[tuple[str, Choices], list[Deviation]]
) -> None:
    """Write down what differs from the recipe in a unit, to which it is applied.

    Args:
        run: Whose weights are there.
        subject: That the recipe is of.
        unit: Its path.
        known: What was found already of modules that several recipes have; is added to.
    """
    found: _Found = ([], [], [], [])
    if subject.enforced is not None:
        found = _found_in(run, subject, subject.enforced, unit, known)
    content = [[asdict(one) for one in kind] for kind in found]
    write_beside_and_rename(subject.findings(unit), json.dumps(content))


def _found_in(
    run: Run,
    subject: Subject,
    enforced: Enforcement,
    unit: str,
    known: dict[tuple[str, Choices], list[Deviation]],
) -> _Found:
    model, groups = run.streamed.model, list[Deviation]()
    inside = layers_within(enforced.layers, unit, head=run.streamed.head)
    applied: dict[str, tuple[str, Choices]] = {}
    if subject.applied is not None:
        for together in subject.applied.together_within(unit):
            choices = subject.applied.choices(together)
            applied |= {group.name: (group.name, choices) for group in together}
    for group in inside.groups:
        choice = None if enforced.decoded else applied.get(group.name)
        deviations = known.get(choice) if choice is not None else None
        if deviations is None:
            deviations = enforced.of_group(model, group)
        if choice is not None:
            known[choice] = deviations
        groups += deviations
    state = model.get_submodule(unit).state_dict(prefix=f"{unit}.")
    return (
        groups,
        enforced.of_unquantized(model, inside),
        list(enforced.of_others(state)),
        enforced.of_caches(model, inside),
    )


def _deviations(subject: Subject, runs: Sequence[Run]) -> tuple[Deviation, ...] | None:
    """Every deviation of a subject, in the order of ``find_deviations``."""
    enforced = subject.enforced
    if enforced is None:
        return None
    assert subject.candidate is not None
    (run,) = (one for one in runs if subject in one.subjects)
    kinds: _Found = ([], [], [], [])
    for unit in run.streamed.weights.units:
        found = json.loads(subject.findings(unit).read_text("utf-8"))
        for kind, deviations in zip(kinds, found, strict=True):
            kind.extend(Deviation(**one) for one in deviations)
    units = tuple(f"{unit}." for unit in run.streamed.weights.units)
    model = run.streamed.model
    tuned = [] if subject.applied is None else subject.applied.prepared.tuned_targets(model)
    with replaced(tuned):
        rest = {n: one for n, one in model.state_dict().items() if not n.startswith(units)}
        kinds[2].extend(enforced.of_others(rest))
    order = {layer.name: n for n, layer in enumerate(layers_of(enforced.layers.groups))}
    kinds[0][:] = dict.fromkeys(kinds[0])  # a tied embedding is in two units
    kinds[0].sort(key=lambda one: order[one.layer])
    names = {name: n for n, name in enumerate(enforced.checkpoint.tensors)}
    kinds[2].sort(key=lambda one: names[one.layer])
    return with_those_of_folder(subject.candidate, [one for kind in kinds for one in kind])


def _compare(
    runs: Sequence[Run], heads: Sequence[int], original: Original
) -> tuple[tuple[float, ...], dict[int, list[WindowScore]]]:
    """The original's entropies, and the scores of every candidate by its ``id``."""
    first, the_original = runs[0], runs[0].subjects[0]
    entropies: list[float] = []
    scores: dict[int, list[WindowScore]] = {}
    count_of_windows = len(original.windows.tokens_NT)
    with first.streamed.weights.loaded(first.streamed.head):
        for number, (run, head) in enumerate(zip(runs, heads, strict=True)):
            unit = run.streamed.head
            loaded = nullcontext() if number == 0 else run.streamed.weights.loaded(unit)
            with loaded:
                modules = unit_modules(
                    run.streamed.model, unit, run.recipes, times=count_of_windows + 1
                )
                known: dict[tuple[str, Choices], list[Deviation]] = {}
                for subject in run.subjects:
                    with subject.timed(), _applied(modules, subject):
                        _enforce(run, subject, unit, known)
                for index, window_T in enumerate(original.windows.tokens_NT):
                    with the_original.timed():
                        reference_TV = first.streamed.logits(
                            the_original.sequences[index], heads[0]
                        )
                        check_logits(reference_TV, what="the original model")
                        if number == 0:
                            entropies.append(next_token_entropy(reference_TV, window_T))
                    for subject in run.subjects:
                        if subject.candidate is None:
                            continue
                        sequence = subject.sequences[index]
                        with subject.timed(), _applied(modules, subject):
                            logits_TV = run.streamed.logits(sequence, head)
                            check_logits(logits_TV, what="the quantized model")
                            scores.setdefault(id(subject.candidate), []).append(
                                score_window(reference_TV, logits_TV, sequence.token_T)
                            )
    return tuple(entropies), scores


def _identity(candidate: Candidate) -> list[str | None]:
    folder = candidate.folder
    return [
        candidate.recipe_sha256,
        None if folder is None else folder.index_sha256,
        None if folder is None else hash_weights(folder),
    ]


@contextmanager
def work_folder(work: Path | None, asked: object) -> Iterator[Path]:
    """A folder for what is kept between layers; one of a run that asked the same is continued.

    It stays until `drop_unfinished`.

    Args:
        work: Has it, and no other; None: it is a temporary one.
        asked: All that decides what is kept.
    """
    if work is None:
        with tempfile.TemporaryDirectory(prefix="mofq-") as temporary:
            yield Path(temporary)
        return
    text, work = json.dumps(asked, sort_keys=True), work.resolve()  # it may be a link to a disk
    folder = work / hashlib.sha256(text.encode()).hexdigest()[:16]
    work.mkdir(parents=True, exist_ok=True)
    with hold_folder(work, partial(_busy, work)):
        for other in work.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        yield folder


def drop_unfinished(work: Path) -> None:
    """Delete what a run kept between layers or found by them, unless one goes on there."""
    if (work := work.resolve()).is_dir():
        with suppress(MofqError), hold_folder(work, partial(_busy, work)):
            shutil.rmtree(work, ignore_errors=True)


def _busy(work: Path, who: str) -> MofqError:
    return MofqError(
        f"{work}: {who} runs a model layer by layer there. Wait for it, or give another output."
    )
