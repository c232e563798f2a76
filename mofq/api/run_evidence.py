"""What `mofq run` measures before it decides: the model as it is, and rewritten where that pays.

A rewriting (`mofq.delivery.rewriting`) moves scales between tensors, or rotates them; the function
stays. Scales are chosen under the schemes that a search chooses for the model before they move, its
statistics follow from those that are there, and its schemes are measured into a table of its own.
The model whose best recipe is predicted to cost least goes on. Where that of the model as it is
rounds the inputs of most weights, scales move, and the model is rotated too, and scales move in the
rotated one; with ``best`` always.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from mofq.api.measure import fits_beside
from mofq.api.run_effort import (
    ROUNDS,
    ROUNDS_WITHOUT_STATS,
    MeasureTwins,
    Timed,
    Tried,
    Twins,
    fit_where_chosen,
)
from mofq.api.run_folder import RunFiles, lack_of_space
from mofq.api.run_request import CheckedRun, may_be_rewritten
from mofq.exceptions import BudgetError, RewriteError

if TYPE_CHECKING:
    from mofq.decision import Decision, Request
    from mofq.decision.recipe import Recipe
    from mofq.decision.rewriting import Rewriting
    from mofq.evidence.calibration.stats import Stats
    from mofq.evidence.table import Table

#: The share of what sites lose that moving their scales must be expected to save to be measured.
_WORTH_MEASURING = 0.05
#: Bytes beside those of a recipe's scheme for which a fusion group may have another one: scales
#: of channels are a few thousandths more than one for a tensor.
_ABOUT_AS_MANY = 1.02
#: Of the signs of a rotation.
_SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model whose schemes are measured."""

    model: str
    stats: Path  #: that fitted schemes rest on
    table: Path
    rewriting: Rewriting | None = None  #: that made it of the original


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A model that was measured, and what is decided of it."""

    subject: Subject
    table: Table  #: rows that this request asked for
    decision: Decision | None  #: None: no recipe meets the budgets

    @classmethod
    def of(cls, subject: Subject, table: Table, request: Request) -> Measured:
        """Decide on a table."""
        from mofq.decision import decide

        try:
            return cls(subject, table, decide(table, request))
        except BudgetError:
            return cls(subject, table, None)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a run ends with."""

    best: Measured
    tried: tuple[Tried, ...]


#: Measures a model's schemes, of the twins those that are named, and returns all of its table.
Measure = Callable[[Subject, Twins], "Table"]


def gather_evidence(
    run: CheckedRun, files: RunFiles, *, measure: Measure, is_stored: bool, timed: Timed
) -> Evidence:
    """Measure what the effort asks for, and keep the model that is predicted best.

    Args:
        run: What is asked for.
        files: Of the run.
        measure: Measures.
        is_stored: Whether the samples of the statistics are stored.
        timed: Times a stage under a name.

    Returns:
        Model, table, and what was tried.

    Raises:
        MofqError: As `measure`.
    """
    from mofq.decision.guessed_rows import rows_for

    request, twins = run.options.request, run.offered.twins
    stats = files.stats if is_stored else fits_beside(files.table)
    subject = Subject(run.options.model, stats, files.table)
    with timed("measure") as seconds:
        table = rows_for(measure(subject, {}), twins, {})
    first = Measured.of(subject, table, request)
    own = (scheme for scheme in run.offered.space.schemes if scheme.name not in twins)
    is_fitted = any(scheme.is_fitted for scheme in own)
    name = "schemes of the search space" if is_fitted else "codes rounded to nearest"
    rounded = Tried.of(name, first.decision, seconds())
    going_on = [first]
    rewritten: list[tuple[Measured, Tried]] = []
    if is_stored and may_be_rewritten(run):
        rewritten = _rewritten(
            run,
            files,
            first,
            measure=lambda subject: rows_for(measure(subject, {}), twins, {}),
            timed=timed,
        )
        if rewritten:
            going_on.append(_best([one for one, _ in rewritten], request))
        if run.options.effort == "normal":
            going_on = [_best(going_on, request)]
    fitted: list[tuple[Measured, float]] = []
    if twins:
        rounds = ROUNDS if is_stored else ROUNDS_WITHOUT_STATS
        with timed("fit") as seconds:
            for one in going_on:
                begun = seconds()
                table = _fitted(one.table, run, partial(measure, one.subject), rounds=rounds)
                fitted.append((Measured.of(one.subject, table, request), seconds() - begun))
        going_on = [one for one, _ in fitted]
    best = _best(going_on, request)
    tried = [
        rounded,
        *(replace(said, is_taken=best.subject is one.subject) for one, said in rewritten),
    ]
    for one, took in sorted(fitted, key=lambda each: each[0] is best):
        name = "fitted codes" if one is best else f"fitted codes, {_words(one.subject)}"
        tried.append(replace(Tried.of(name, one.decision, took), is_taken=one is best))
    return Evidence(best, tuple(tried))


def _fitted(table: Table, run: CheckedRun, measure: MeasureTwins, *, rounds: int) -> Table:
    """The table with the twins that the effort asks for."""
    if run.options.effort == "best":
        return measure(run.offered.everything(table))
    request = run.options.request
    return fit_where_chosen(table, request, run.offered, measure=measure, rounds=rounds)


def _best(measured: Sequence[Measured], request: Request) -> Measured:
    """The model whose best recipe is predicted to cost least; the first where none meets."""

    def cost(one: Measured) -> tuple[bool, float]:
        recipe = None if one.decision is None else one.decision.recipe
        if recipe is None or recipe.kl_nats_per_token is None:
            return (True, 0.0)
        # A budget in nats is met by all: of these the smallest counts.
        by_size = request.budgets.max_kl is not None
        return (False, (recipe.bits_per_weight if by_size else recipe.kl_nats_per_token) or 0.0)

    return min(measured, key=cost)


def _rewritten(
    run: CheckedRun,
    files: RunFiles,
    first: Measured,
    *,
    measure: Callable[[Subject], Table],
    timed: Timed,
) -> list[tuple[Measured, Tried]]:
    """The rewritten models that an effort tries, and what each predicts.

    Args:
        run: What is asked.
        files: Of the run.
        first: The model as it is.
        measure: Measures the schemes of a rewritten model, without fitted codes.
        timed: As of `gather_evidence`.
    """
    made: list[tuple[Measured, Tried]] = []

    def added(stage: str, make: Callable[[], Subject | None]) -> Measured | None:
        with timed(stage) as seconds:
            subject = make()
            table = None if subject is None else measure(subject)
        if subject is None or table is None:
            return None
        found = Measured.of(subject, table, run.options.request)
        made.append((found, Tried.of(_words(subject), found.decision, seconds())))
        return found

    move = partial(rewrite_where_it_pays, run, files, first=first.subject)
    turn = partial(rotate_where_possible, run, files, first=first.subject)
    added("rewrite", lambda: move(before=first))
    is_tried = run.options.effort == "best" or _rounds_inputs(run, first)
    if is_tried and (rotated := added("rotate", turn)) is not None:
        added("rewrite rotated", lambda: move(before=rotated))
    return made


def _rounds_inputs(run: CheckedRun, measured: Measured) -> bool:
    """Whether the best recipe rounds the inputs of most weights."""
    from mofq.delivery.rewriting.for_recipe import rounds_inputs

    decision = measured.decision
    return decision is not None and rounds_inputs(_schemes(decision.recipe), run.layers)


def _schemes(recipe: Recipe) -> dict[str, str]:
    """Fusion group -> scheme."""
    return {group.name: group.scheme for group in recipe.groups}


def _affordable(decision: Decision) -> dict[str, tuple[str, ...]]:
    """Fusion group -> what it may have in about the bytes that the recipe gives it.

    Scales that help 8 bits most are others than those that help the 4 bits of the recipe.
    """
    problem, bytes_P = decision.problem, decision.problem.layer_bytes_P
    found = {}
    for at, group in enumerate(problem.groups):
        most = _ABOUT_AS_MANY * bytes_P[decision.choice_F[at]]
        options = range(problem.start_F[at], problem.start_F[at + 1])
        found[group.name] = tuple(problem.schemes[one] for one in options if bytes_P[one] <= most)
    return found


def _words(subject: Subject) -> str:
    """What was done to a model."""
    if subject.rewriting is None:
        return "not rewritten"
    sites = len(subject.rewriting.sites)
    scales = f"scales moved at {sites} inputs"
    if subject.rewriting.rotation is None:
        return scales
    return f"rotated, and {scales}" if sites else "rotated"


def rotate_where_possible(run: CheckedRun, files: RunFiles, *, first: Subject) -> Subject | None:
    """Rotate the model; None where that would not be exact, which is told.

    Args:
        run: Whose model it is.
        files: Of the run.
        first: The model as it is.
    """
    from mofq.delivery.rewriting.remake import rewriting_of
    from mofq.delivery.rewriting.rotate import plan_rotation, rotated_model
    from mofq.evidence.calibration.stats import read_stats

    if not _fits_disk(run, files, first):
        return None
    stats = read_stats(first.stats)
    try:
        rotation = rotated_model(plan_rotation(run.checkpoint, _SEED), _SEED)
        rewriting = rewriting_of(run.checkpoint, stats, (), rotation=rotation)
        return _make_subject(run, files, rewriting, stats)
    except RewriteError as error:
        run.options.tell(str(error))
        return None


def rewrite_where_it_pays(
    run: CheckedRun, files: RunFiles, *, first: Subject, before: Measured
) -> Subject | None:
    """Move scales for the recipe that is best before; None where that would not pay.

    Args:
        run: With the effort ``best`` sites of weight-only schemes are looked at too.
        files: Of the run.
        first: The model as it is.
        before: What scales move in, without fitted codes: ``first``, or the rotated model.
    """
    from mofq.delivery.rewriting.for_recipe import choose_for_recipe
    from mofq.delivery.rewriting.remake import rewriting_of
    from mofq.evidence.calibration.stats import read_stats
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.layers import find_layers

    decision, is_best = before.decision, run.options.effort == "best"
    if decision is None or not (is_best or _rounds_inputs(run, before)):
        return None
    subject, rotation = before.subject, None
    # What moves in a rotated model is made of one that is rotated anew, beside it.
    if not _fits_disk(run, files, first, copies=1 if subject.rewriting is None else 2):
        return None
    checkpoint, layers = run.checkpoint, run.layers
    if subject.rewriting is not None:
        rotation, checkpoint = subject.rewriting.rotation, open_checkpoint(subject.model)
        layers = find_layers(checkpoint)
    try:
        choices = choose_for_recipe(
            checkpoint,
            layers,
            stats=read_stats(subject.stats),
            schemes=_schemes(decision.recipe),
            offered=_affordable(decision),
            fitted={one for some in run.offered.twins.values() for one in some},
            for_weights=is_best,
            progress=run.options.progress,
        )
        saved = sum(one.nats_before - one.nats_after for one in choices)
        if not saved > _WORTH_MEASURING * sum(one.nats_before for one in choices):
            return None
        stats = read_stats(first.stats)
        rewriting = rewriting_of(run.checkpoint, stats, choices, rotation=rotation)
        return _make_subject(run, files, rewriting, stats)
    except RewriteError as error:
        run.options.tell(f"{error} It is not rewritten.")
        return None


def _make_subject(run: CheckedRun, files: RunFiles, rewriting: Rewriting, stats: Stats) -> Subject:
    """Write a rewritten model and its statistics into the folder of a run, unless they are there.

    Args:
        run: Whose model it is.
        files: Of the run.
        rewriting: Of the model.
        stats: Of the model as it is.

    Raises:
        RewriteError: As `make_base`.
    """
    from mofq.delivery.rewriting.remake import make_base

    content = asdict(rewriting)
    if rewriting.inputs == "kept":  # folders of before there was the key keep their names
        del content["inputs"]
    text = json.dumps(content, sort_keys=True)
    name = f"rewritten-{sha256(text.encode()).hexdigest()[:8]}"
    model = files.folder / f"{Path(run.checkpoint.name).name}-{name}"
    moved = files.folder / f"stats-{name}"
    make_base(rewriting, run.checkpoint, stats, folders=(model, moved))
    return Subject(str(model), moved, files.folder / f"table-{name}.jsonl", rewriting)


def _fits_disk(run: CheckedRun, files: RunFiles, first: Subject, *, copies: int = 1) -> bool:
    """Whether so many more models and their statistics have room; that they have none is told."""
    needed = sum(one.nbytes for one in run.checkpoint.tensors.values())
    needed += sum(path.stat().st_size for path in first.stats.rglob("*") if path.is_file())
    lack = lack_of_space(copies * needed, files.folder)
    if lack is not None:
        run.options.tell(
            f"A rewritten model and its statistics would take {lack}: it is not rewritten."
        )
    return lack is None
