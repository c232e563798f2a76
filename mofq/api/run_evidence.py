"""What `mofq run` measures before it decides: the model as it is, and rewritten where that pays.

A rewriting (`mofq.delivery.rewriting`) moves scales between tensors, or rotates them; the function
stays. Scales are chosen under the schemes that a search chooses for the model before they move, its
statistics follow from those that are there, and its schemes are measured into a table of its own.
The model whose best recipe is predicted to cost least goes on. With ``best`` the model is rotated
too, and scales move in the rotated one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING

from mofq.api.figures import short_bytes
from mofq.api.measure import fits_beside
from mofq.api.options import Tell
from mofq.api.run_effort import (
    ROUNDS,
    ROUNDS_WITHOUT_STATS,
    Timed,
    Tried,
    Twins,
    fit_where_chosen,
    predicted,
)
from mofq.api.run_request import Checked, may_be_rewritten
from mofq.exceptions import BudgetError, Remark, RewriteError
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.api.run_folder import RunFiles
    from mofq.decision import Request
    from mofq.decision.problem import Problem
    from mofq.decision.rewriting import Rewriting
    from mofq.evidence.table import Table
    from mofq.model.checkpoint.headers import Checkpoint

#: Of the free disk, what a rewritten model and its statistics may take.
_SHARE_OF_DISK = 0.5
#: The share of the predicted KL that a rewriting must be expected to save to be measured.
_WORTH_MEASURING = 0.05
#: Of the signs of a rotation.
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model whose schemes are measured."""

    model: str
    stats: Path  #: that fitted schemes rest on
    table: Path
    rewriting: Rewriting | None = None  #: that made it of the original


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a run decides by."""

    subject: Subject
    table: Table  #: rows that this request asked for
    tried: tuple[Tried, ...]


#: Measures a model's schemes, of the twins those that are named, and returns all of its table.
Measure = Callable[[Subject, Twins], "Table"]


def gather_evidence(
    run: Checked,
    files: RunFiles,
    *,
    measure: Measure,
    is_stored: bool,
    timed: Timed,
    progress: Progress | None,
    tell: Tell,
) -> Evidence:
    """Measure what the effort asks for, and keep the model that is predicted best.

    Args:
        run: What is asked for.
        files: Of the run.
        measure: Measures.
        is_stored: Whether the samples of the statistics are stored.
        timed: Times a stage under a name.
        progress: As of `run`.
        tell: As of `run`.

    Returns:
        Model, table, and what was tried.

    Raises:
        MofqError: As `measure`.
    """
    from mofq.decision.guesses import rows_for

    request, twins = run.request.request, run.offered.twins
    stats = files.stats if is_stored else fits_beside(files.table)
    first = Subject(run.request.model, stats, files.table)
    with timed("measure") as seconds:
        table = rows_for(measure(first, {}), twins, {})
    rounded = predicted("codes rounded to nearest", table, request, seconds())
    tables, rewritten = {first: table}, list[tuple[Subject, Tried]]()
    if is_stored and may_be_rewritten(run):
        others = {}
        for subject, of_subject, said in _rewritten(
            run,
            files,
            table,
            first=first,
            measure=lambda subject: rows_for(measure(subject, {}), twins, {}),
            timed=timed,
            progress=progress,
            tell=tell,
        ):
            others[subject] = of_subject
            rewritten.append((subject, said))
        tables |= _best(others, request) if others else {}
        if run.request.effort == "normal":
            tables = _best(tables, request)
    if twins:
        with timed("fit") as seconds:
            tables = {
                subject: _fitted(subject, table, run, measure, is_stored=is_stored)
                for subject, table in tables.items()
            }
    ((subject, table),) = _best(tables, request).items()
    tried = [rounded, *(replace(one, is_taken=subject is of) for of, one in rewritten)]
    if twins:
        tried.append(predicted("fitted codes", table, request, seconds()))
    return Evidence(subject, table, tuple(tried))


def _fitted(
    subject: Subject,
    table: Table,
    run: Checked,
    measure: Measure,
    *,
    is_stored: bool,
) -> Table:
    """The table with the twins that the effort asks for."""
    if run.request.effort == "best":
        return measure(subject, run.offered.everything(table))
    return fit_where_chosen(
        table,
        run.request.request,
        run.offered,
        measure=lambda twins: measure(subject, twins),
        rounds=ROUNDS if is_stored else ROUNDS_WITHOUT_STATS,
    )


def _best(tables: Mapping[Subject, Table], request: Request) -> dict[Subject, Table]:
    """The model whose best recipe is predicted to cost least; the first where none meets."""

    def cost(subject: Subject) -> tuple[bool, float]:
        found = predicted("", tables[subject], request, 0.0)
        if found.kl_nats_per_token is None:
            return (True, 0.0)
        # A budget in nats is met by all: of these the smallest counts.
        by_size = request.budgets.max_kl is not None
        return (False, (found.bits_per_weight if by_size else found.kl_nats_per_token) or 0.0)

    best = min(tables, key=cost)
    return {best: tables[best]}


def _rewritten(
    run: Checked,
    files: RunFiles,
    table: Table,
    *,
    first: Subject,
    measure: Callable[[Subject], Table],
    timed: Timed,
    progress: Progress | None,
    tell: Tell,
) -> list[tuple[Subject, Table, Tried]]:
    """The rewritten models that an effort tries, each with its table and what it predicts.

    Args:
        run: What is asked.
        files: Of the run.
        table: Of the model as it is.
        first: The model as it is.
        measure: Measures the schemes of a rewritten model, without fitted codes.
        timed: As of `gather_evidence`.
        progress: As of `run`.
        tell: As of `run`.
    """
    made: list[tuple[Subject, Table, Tried]] = []

    def added(stage: str, make: Callable[[], Subject | None]) -> bool:
        with timed(stage) as seconds:
            subject = make()
            of_subject = None if subject is None else measure(subject)
        if subject is None or of_subject is None:
            return False
        said = predicted(_words(subject), of_subject, run.request.request, seconds())
        made.append((subject, of_subject, said))
        return True

    move = partial(rewrite_where_it_pays, run, files, first=first, progress=progress, tell=tell)
    added("rewrite", lambda: move(table=table, before=first))
    if run.request.effort == "best" and added(
        "rotate", lambda: rotate_where_possible(run, files, first=first, tell=tell)
    ):
        rotated, of_rotated, _ = made[-1]
        added("rewrite rotated", lambda: move(table=of_rotated, before=rotated))
    return made


def _words(subject: Subject) -> str:
    """What was done to a model."""
    assert subject.rewriting is not None
    sites = len(subject.rewriting.sites)
    scales = f"scales moved at {sites} inputs"
    if subject.rewriting.rotation is None:
        return scales
    return f"rotated, and {scales}" if sites else "rotated"


def rotate_where_possible(
    run: Checked, files: RunFiles, *, first: Subject, tell: Tell
) -> Subject | None:
    """Rotate the model; None where that would not be exact, which is told.

    Args:
        run: Whose model it is.
        files: Of the run.
        first: The model as it is.
        tell: As of `run`.
    """
    from mofq.delivery.rewriting.remake import make_base, rewriting_of
    from mofq.delivery.rewriting.rotate import plan_rotation, rotated_model
    from mofq.evidence.calibration.stats import read_stats

    checkpoint = run.checkpoint
    if not _fits_disk(checkpoint, files, first, tell):
        return None
    stats = read_stats(first.stats)
    try:
        rotation = rotated_model(plan_rotation(checkpoint, _SEED), _SEED)
        rewriting = rewriting_of(checkpoint, stats, (), rotation=rotation)
        subject = _subject(checkpoint, files.folder, rewriting)
        folders = (Path(subject.model), subject.stats)
        make_base(rewriting, checkpoint, stats, folders=folders)
    except RewriteError as error:
        tell(str(error))
        return None
    return subject


def rewrite_where_it_pays(
    run: Checked,
    files: RunFiles,
    table: Table,
    *,
    first: Subject,
    before: Subject,
    progress: Progress | None,
    tell: Tell,
) -> Subject | None:
    """Move scales for the recipe that is best before; None where that would not pay.

    Args:
        run: With the effort ``best`` sites of weight-only schemes are looked at too.
        files: Of the run.
        table: Of what scales move in, without fitted codes.
        first: The model as it is.
        before: What scales move in: ``first``, or the rotated model.
        progress: As of `run`.
        tell: As of `run`.
    """
    from mofq.decision import decide, request_problem

    checkpoint, request, is_best = run.checkpoint, run.request.request, run.request.effort == "best"
    try:
        recipe = decide(table, request).recipe
    except BudgetError:
        return None
    from mofq.delivery.rewriting.for_recipe import choose_for_recipe, rounds_inputs
    from mofq.delivery.rewriting.remake import make_base, rewriting_of
    from mofq.evidence.calibration.stats import read_stats
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.layers import find_layers

    schemes = {group.name: group.scheme for group in recipe.groups}
    if not (is_best or rounds_inputs(schemes)) or not _fits_disk(checkpoint, files, first, tell):
        return None
    problem, rotation, layers = request_problem(table, request), None, run.layers
    if before.rewriting is not None:
        rotation, checkpoint = before.rewriting.rotation, open_checkpoint(before.model)
        layers = find_layers(checkpoint)
    try:
        choices = choose_for_recipe(
            checkpoint,
            layers,
            stats=read_stats(before.stats),
            schemes=schemes,
            offered=_offered_by_group(problem),
            for_weights=is_best,
            progress=progress,
        )
        saved = sum(one.nats_before - one.nats_after for one in choices)
        if not saved > _WORTH_MEASURING * (recipe.kl_nats_per_token or 0.0):
            return None
        stats = read_stats(first.stats)
        rewriting = rewriting_of(run.checkpoint, stats, choices, rotation=rotation)
        subject = _subject(run.checkpoint, files.folder, rewriting)
        folders = (Path(subject.model), subject.stats)
        make_base(rewriting, run.checkpoint, stats, folders=folders)
    except RewriteError as error:
        tell(f"{error} It is not rewritten.")
        return None
    return subject


def _offered_by_group(problem: Problem) -> dict[str, tuple[str, ...]]:
    """Fusion group -> every scheme that it may have."""
    ends = zip(problem.groups, problem.start_F[:-1], problem.start_F[1:], strict=True)
    return {group.name: problem.schemes[start:stop] for group, start, stop in ends}


def _subject(checkpoint: Checkpoint, folder: Path, rewriting: Rewriting) -> Subject:
    """Where a rewritten model, its statistics and its table lie in the folder of a run."""
    content = json.dumps(asdict(rewriting), sort_keys=True)
    name = f"rewritten-{sha256(content.encode()).hexdigest()[:8]}"
    return Subject(
        str(folder / f"{Path(checkpoint.name).name}-{name}"),
        folder / f"stats-{name}",
        folder / f"table-{name}.jsonl",
        rewriting,
    )


def _fits_disk(checkpoint: Checkpoint, files: RunFiles, first: Subject, tell: Tell) -> bool:
    """Whether a second model and second statistics have room."""
    needed = sum(one.nbytes for one in checkpoint.tensors.values())
    needed += sum(path.stat().st_size for path in first.stats.rglob("*") if path.is_file())
    free = disk_usage(files.folder).free
    if needed <= _SHARE_OF_DISK * free:
        return True
    tell(
        Remark(
            f"A rewritten model and its statistics would take {short_bytes(needed)}, and "
            f"{short_bytes(free)} are free in {files.folder}: it is not rewritten."
        )
    )
    return False
