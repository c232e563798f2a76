"""The whole flow into one folder: calibrate, measure, search, validate, export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.calibrate import calibrate
from mofq.api.export import ExportResult
from mofq.api.measure import MeasureResult, measure_space
from mofq.api.options import (
    Aim,
    Budget,
    Choices,
    Constraints,
    Corpora,
    Engine,
    GradientExecution,
    LayersFile,
    Method,
    Model,
    Option,
    Running,
    Samples,
    Sequences,
    Space,
    Tell,
    Vocabulary,
    Windows,
    documented,
    silent,
)
from mofq.api.preconditions import check_folder
from mofq.api.request import make_request
from mofq.api.run_delivery import (
    beside_the_proof,
    decide_run,
    export_recipe,
    preferred,
    tune_where_it_helps,
    uniform_rivals,
    validate_candidates,
    with_notes_of_run,
    within_budgets,
)
from mofq.api.run_effort import Effort, Offered, Timed, Tried, Twins
from mofq.api.run_evidence import Measure, Subject, gather_evidence
from mofq.api.run_folder import (
    SEARCHED,
    NotedRequest,
    RunFiles,
    check_ends_as_before,
    find_files,
    former_recipes,
    keep_former,
    write_results,
)
from mofq.api.run_request import CheckedRun, RunOptions, check_run, stores_stats
from mofq.exceptions import MofqError, Remark, option
from mofq.files.locks import hold_folder
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.decision import Request
    from mofq.decision.recipe import Recipe
    from mofq.decision.tuning import Tuning
    from mofq.delivery.validation import Validation
    from mofq.evidence.table import Table

#: What is calibrated on where no corpus is named.
_BUNDLED_TEXT = "demo-en-calibration"


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outcome of a run."""

    files: RunFiles  #: of this request, in the folder
    model: str  #: as it was given
    title: str
    recipe: Recipe  #: as it stands in the folder
    preferred: str  #: its key in ``validations``
    validations: Mapping[str, Validation]  #: of the searched recipe and of uniform schemes
    table: Table
    request: Request  #: that the recipe answers
    seconds: Mapping[str, float]  #: of each stage
    export: ExportResult | None  #: None: no engine was named
    tried: Sequence[Tried]  #: in order, each with all before it that was taken
    subject: Subject  #: the model that was quantized: as it was, or rewritten

    @property
    def tuning(self) -> Tuning | None:
        """What tuning the recipe was measured to gain; None where it was not."""
        return self.recipe.tuning

    @property
    def original_bits(self) -> float:
        """Bits per weight of the original."""
        from mofq.model.sizes import bits_per_weight

        header = self.table.header
        return bits_per_weight(header.source_bytes_of_groups, header.weights)

    def served_by(self) -> tuple[str, ...]:
        """The engines that serve the recipe as it was measured."""
        from mofq.decision.serving import serving_engines

        return serving_engines(self.table, self.recipe)

    def to_json(self) -> dict[str, Any]:
        """The outcome, for machines."""
        chosen = self.validations[self.preferred]
        return {
            "folder": str(self.files.folder),
            "recipe": str(self.files.recipe),
            "validation": str(self.files.validation),
            "table": str(self.subject.table),
            "rewritten": None if self.subject.rewriting is None else self.subject.model,
            "bits_per_weight": chosen.bits_per_weight,
            "kl_nats_per_token": chosen.kl_nats_per_token,
            "predicted_kl_nats_per_token": chosen.predicted_kl_nats_per_token,
            "enforced": chosen.enforced,
            "preferred": self.preferred,
            "schemes": dict(Counter(group.scheme for group in self.recipe.groups)),
            "tried": [one.to_json() for one in self.tried],
            "tuned": None if self.tuning is None else self.tuning.to_json(),
            "validations": {name: one.to_json() for name, one in self.validations.items()},
            "exported": None if self.export is None else str(self.export.output),
            "serve_command": None if self.export is None else self.export.serve_command,
            "seconds": {stage: round(time, 2) for stage, time in self.seconds.items()},
        }


@documented
def run(
    model: Model,
    output: Annotated[
        str | Path | None,
        Option("A folder for everything; by default NAME-mofq, here.", short="-o"),
    ] = None,
    *,
    space: Space = "serving",
    effort: Effort = "normal",
    budget: Budget = Budget(),
    corpora: Annotated[
        Corpora,
        Option("NAME=FILE for calibration; repeatable. Bundled text by default.", flag="--corpus"),
    ] = (),
    aim: Aim = Aim(),
    constraints: Constraints = Constraints(),
    text: Annotated[str, Option("What validates; no text that calibrates.")] = "demo-en",
    engine: Engine = None,
    layers: LayersFile = None,
    vocabulary: Vocabulary = Vocabulary(),
    windows: Windows = Windows(),
    sequences: Sequences = None,
    running: Running = Running(),
    execution: GradientExecution = "auto",
    no_stats: Annotated[
        bool,
        Option(
            "Measure while calibrating and store no statistics; without the option too, where the "
            "disk is too small for them.",
            is_first=False,
        ),
    ] = False,
    rivals: Annotated[
        int,
        Option("Uniform schemes to validate beside the recipe, at most.", least=0, is_first=False),
    ] = 4,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> RunResult:
    """The whole flow into one folder, for a budget and an engine.

    Recipe, validation and model appear when all of them are there. What a former run into the
    folder measured is kept and not done again. Its results for another budget, space, engine,
    effort or constraint on layers, or for corpora that count otherwise, stay; those of this run
    then say in their names how they differ, as ``recipe-5.0bits.yaml``. The effort ``best`` keeps
    other samples, and needs a folder of its own.
    Calibration takes sequences as long as the windows.

    Returns:
        The recipe, what it measures beside uniform schemes, and what was exported.

    Raises:
        MofqError: An input is not valid, which is found before anything runs, or a stage fails.
    """
    folder = Path(f"{Path(model).resolve().name}-mofq" if output is None else output)
    check_folder(folder, folders=[model])
    from mofq.evidence.spaces import load_search_space

    loaded = load_search_space(space)
    choices = Choices(
        engine=engine,
        space=Offered.at(effort, loaded).space.name,
        fixed=constraints.fixed,
        at_least=constraints.at_least,
        at_most=constraints.at_most,
        corpus_weights=aim.corpus_weights,
    )
    checked = check_run(
        RunOptions(
            model=str(model),
            request=make_request(choices, budget=budget, method=Method(objective=aim.objective)),
            space=loaded,
            effort=effort,
            corpora=corpora or (_BUNDLED_TEXT,),
            text=text,
            windows=windows,
            samples=Samples(sequences=sequences),
            layers=layers,
            vocabulary=vocabulary.and_of(loaded),
            running=running,
            execution=execution,
            no_stats=no_stats,
            rivals=rivals,
            progress=progress,
            tell=tell or silent,
        )
    )
    folder.mkdir(parents=True, exist_ok=True)

    def busy(who: str) -> MofqError:
        return MofqError(f"{folder}: {who} runs into this folder. Wait for it, or name another.")

    from mofq.evidence.measure.fill_table import table_space

    with hold_folder(folder, busy):
        files = find_files(
            folder,
            NotedRequest.of_request(checked.options.request, checked.offered.space, effort=effort),
            table_space(checked.offered.space, engine),
        )
        for selection in checked.selections:
            checked.options.tell(selection.remark)
        if not corpora:
            checked.options.tell(
                Remark(
                    f"No corpus is named: calibrating on {_BUNDLED_TEXT}, a little English text on "
                    f"administering Debian. Errors differ between texts: give text like what the "
                    f"model will see as {option('corpora')}, and other text of the kind as "
                    f"{option('text')} to validate on."
                )
            )
        return _run(checked, files)


def _run(run: CheckedRun, files: RunFiles) -> RunResult:
    """The stages, in their order."""
    from mofq.delivery.validation.streamed import drop_unfinished

    asked, request, timed = run.options, run.options.request, Timed()
    is_stored = stores_stats(run, files)
    if is_stored:
        with timed("calibrate"):
            _calibrate(asked, files)
    measure = _measurement(run, is_stored=is_stored)
    evidence = gather_evidence(run, files, measure=measure, is_stored=is_stored, timed=timed)
    subject, table = evidence.best.subject, evidence.best.table
    with timed("search"):
        decision = decide_run(asked, evidence.best)
        for note in decision.notes:
            asked.tell(note)
        searched = with_notes_of_run(decision.recipe, asked.effort, evidence)
        uniform = uniform_rivals(table, request, searched, most=asked.rivals)
        candidates = keep_former(files, {SEARCHED: searched, **uniform})
    if asked.effort != "quick" and not former_recipes(files):
        with timed("tune"):
            candidates[SEARCHED] = tune_where_it_helps(run, files, candidates[SEARCHED], subject)
    with timed("validate"):
        validations = validate_candidates(asked, files, candidates, subject)
    if request.budgets.max_kl is not None:
        asked.tell(beside_the_proof(validations[SEARCHED], request.budgets.max_kl))
    allowed = within_budgets(table, request, candidates, validations)
    name = preferred(allowed, candidates, asked.tell)
    check_ends_as_before(files, candidates[name])
    exported = None
    if request.engine is not None:
        with timed("export"):
            exported = export_recipe(asked, files, candidates[name], subject, validations[name])
    # Last, when all is well: a run that fails leaves the folder as it was.
    write_results(files, candidates[name], validations, chosen=name)
    drop_unfinished(files.validating)
    if "tune" in timed.seconds:
        drop_unfinished(files.tuning)
    return RunResult(
        files=files,
        model=asked.model,
        title=f"{asked.space.name}, {validations[name].tokens} tokens of {asked.text}",
        recipe=candidates[name],
        preferred=name,
        validations=validations,
        table=table,
        request=request,
        seconds=timed.seconds,
        export=exported,
        tried=evidence.tried,
        subject=subject,
    )


def _calibrate(asked: RunOptions, files: RunFiles) -> None:
    """Write the statistics; those that are there are kept."""
    calibrated = calibrate(
        asked.model,
        asked.corpora,
        files.stats,
        samples=asked.samples,
        where=asked.where,
        execution=asked.execution,
        kv_cache=bool(asked.space.kv_cache),
        layers=asked.layers,
        vocabulary=asked.vocabulary,
        progress=asked.progress,
        tell=asked.tell,
    )
    for line in calibrated.summary():
        asked.tell(line)


def _measurement(run: CheckedRun, *, is_stored: bool) -> Measure:
    """What measures schemes for this run."""
    asked, offered = run.options, run.offered
    passes = count(1)

    def measured(subject: Subject, twins: Twins) -> Table:
        name = "fit codes" if twins else "measure"
        name += "" if subject.rewriting is None else ", rewritten"
        if (number := next(passes)) > 1:
            name = f"{name} (pass {number})"
        found = measure_space(
            subject.model,
            offered.space,
            subject.table,
            stats=subject.stats if is_stored else None,
            corpora=() if is_stored else asked.corpora,
            samples=asked.samples,
            engine=asked.request.engine,
            layers=asked.layers,
            vocabulary=asked.vocabulary,
            where=asked.where,
            wanted=offered.wants(twins),
            progress=asked.progress and _named(asked.progress, name),
            tell=asked.tell,
        )
        if not twins and subject.rewriting is None:  # what is refused is told once
            for line in _without_twins(found, offered).summary():
                asked.tell(line)
        return found.table

    return measured


def _named(progress: Progress, name: str) -> Progress:
    """Progress that calls the stage ``measure`` by another name."""
    return lambda stage, done, total: progress(name if stage == "measure" else stage, done, total)


@documented
def demo(
    output: Annotated[
        str | Path | None,
        Option("A folder for everything; by default mofq-demo, or mofq-demo-mixture.", short="-o"),
    ] = None,
    *,
    mixture: Annotated[
        bool, Option("On the bundled mixture of experts, for vLLM on a GPU of the Hopper kind.")
    ] = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> RunResult:
    """`mofq run` on the small bundled model, for vLLM on a CPU.

    Returns:
        As `run`.

    Raises:
        MofqError: The folder holds something else.
    """
    from mofq.demo import demo_mixture_folder, demo_model_folder

    if output is None:
        output = "mofq-demo-mixture" if mixture else "mofq-demo"
    with _one_thread():
        return run(
            demo_mixture_folder() if mixture else demo_model_folder(),
            output,
            space="serving",
            effort="quick",
            # On a CPU no engine runs quantized experts.
            engine="vllm-hopper" if mixture else "vllm-cpu",
            budget=Budget(max_bits=5.0),
            corpora={"en": "demo-en-calibration", "pt": "demo-pt-calibration"},
            windows=Windows(sequence_length=256),
            sequences=16,
            progress=progress,
            tell=tell,
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The demo's matrices are small: threads would wait for each other longer than they work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _without_twins(found: MeasureResult, offered: Offered) -> MeasureResult:
    """What was measured, without refusals of twins: those of the schemes beside them say it."""
    refused = (
        replace(one, schemes=tuple(name for name in one.schemes if name not in offered.twins))
        for one in found.refused
    )
    return replace(found, refused=tuple(one for one in refused if one.schemes))
