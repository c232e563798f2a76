"""Chooses one scheme for each fusion group of a table under budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.formatting import short_bytes, with_error
from mofq.api.inputs import load_named, open_table, save_recipe, text_file
from mofq.api.options import (
    AnyTable,
    Budget,
    Choices,
    Method,
    OnModel,
    Option,
    RecipeOutput,
    Study,
    Tell,
    Timing,
    documented,
    silent,
)
from mofq.api.preconditions import check_output
from mofq.api.request import make_request
from mofq.exceptions import MofqError, Remark, option
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.decision import Decision, Request
    from mofq.decision.explain import Explanation
    from mofq.decision.recipe import Recipe
    from mofq.delivery.validation.measured_kl import Objective
    from mofq.evidence.constraints import Selection
    from mofq.evidence.corpora import Bos
    from mofq.evidence.refusals import Refused
    from mofq.evidence.table import Table
    from mofq.model.checkpoint.headers import Checkpoint


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A recipe, and how it came about."""

    output: Path | None
    decision: Decision
    table: Table
    engine: str | None  #: that the recipe was searched for
    refused: tuple[Refused, ...]  #: what the engine keeps from the search
    explained: tuple[Explanation, ...]  #: of the layers that were asked for
    selections: tuple[Selection, ...]  #: how many layers each constraint of the request names
    seconds: float

    @property
    def recipe(self) -> Recipe:
        """The decision alone: which layer has which scheme."""
        return self.decision.recipe

    def served_by(self) -> tuple[str, ...]:
        """The engines that serve the recipe as it was measured."""
        from mofq.decision.serving import serving_engines

        return serving_engines(self.table, self.recipe)

    def to_json(self) -> dict[str, Any]:
        """What was decided, for machines."""
        decision, recipe = self.decision, self.recipe
        return {
            "recipe": None if self.output is None else str(self.output),
            "kl_nats_per_token": None,  # unless it is known
            **recipe.result.known(),
            "finer_layers": list(decision.finer_layers),
            "tied_layers": decision.tied_layers,
            "moved_layers": decision.moved_layers,
            "prices": None if decision.prices is None else dict(decision.prices),
            "notes": list(decision.notes),
            "schemes": dict(Counter(recipe.schemes.values())),
            "kv_cache": dict(Counter(one.scheme for one in recipe.kv_cache)),
            "selections": [asdict(one) for one in self.selections],
            "refused": [asdict(one) for one in self.refused],
            "served_by": list(self.served_by()),
            "explained": [asdict(one) for one in self.explained],
            "elapsed_seconds": round(self.seconds, 3),
        }


@documented
def search(
    table: AnyTable,
    output: RecipeOutput = None,
    *,
    budget: Budget = Budget(),
    choices: Choices = Choices(),
    timing: Timing = Timing(),
    method: Method = Method(),
    explain: Annotated[Sequence[str], Option("Why this layer has its scheme; repeatable.")] = (),
    on_model: OnModel = OnModel(),
    study: Study = Study(),
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> SearchResult:
    """Choose one scheme for each fusion group under a budget.

    Needs neither the model nor torch, unless the method measures recipes on the model
    (``Method(refine=…)`` and ``Method(solver="optuna")``), or a budget in nats is to be proved:
    ``Budget(max_kl=…)`` with ``OnModel(model=…, text=…)``.

    Returns:
        The recipe, what the engine refused, and explanations.

    Raises:
        MofqError: No recipe meets the budgets, or an input is not valid.
    """
    from mofq.decision import decide
    from mofq.decision.constraint_cost import constraint_note
    from mofq.decision.explain import check_layers
    from mofq.decision.explain import explain as explain_layer
    from mofq.decision.serving import engine_refusals
    from mofq.evidence.constraints import selections_of

    start = monotonic()
    tell = tell or silent
    path = None if output is None else Path(output)
    request = make_request(choices, budget=budget, timing=timing, method=method)
    if choices.kv_tokens and budget.max_size is None and budget.max_kl is None:
        raise MofqError(
            f"{option('kv_tokens')} counts the cache into a size; give {option('max_size')} or "
            f"{option('max_kl')}."
        )
    measures = _measures(method, study, on_model, max_kl=budget.max_kl)
    if path is not None:
        _check_output(path, table, on_model, timing, name="output")
    if measures and method.solver == "optuna":
        from mofq.decision.measured.study_storage import storage_file

        study = replace(study, storage=study.storage or _beside(path))
        if file := storage_file(str(study.storage)):
            _check_output(file, table, on_model, timing, name="storage")
            if study.trial is not None and not file.exists():
                raise MofqError(
                    f"{option('trial', study.trial)}: there is no study in {file}. Give the "
                    f"{option('storage')} of the search that named the trial; by default it lies "
                    f"beside {option('output')}."
                )
    opened = open_table(table, tell)
    check_layers(opened, explain)
    if measures:
        _check_inputs(on_model)
        decision = decide_on_model(
            opened,
            request,
            on_model,
            refine=method.refine,
            study=study,
            progress=progress,
            tell=tell,
        )
    else:
        decision = decide(opened, request)
    if note := constraint_note(opened, request, decision):
        decision = replace(decision, notes=(*decision.notes, note))
    if path is not None:
        save_recipe(decision.recipe, path, tell)
    return SearchResult(
        path,
        decision,
        table=opened,
        engine=choices.engine,
        refused=engine_refusals(opened, request),
        explained=tuple(explain_layer(opened, request, decision, layer) for layer in explain),
        selections=selections_of(request.constraints, opened.header.groups),
        seconds=monotonic() - start,
    )


def _measures(method: Method, study: Study, on_model: OnModel, *, max_kl: float | None) -> bool:
    """Whether the model itself is run.

    Raises:
        MofqError: Options contradict each other, or what measures is not named.
    """
    is_study = method.solver == "optuna"
    if study.multi_objective and not is_study:
        raise MofqError(f"{option('multi_objective')} is for {option('solver', 'optuna')}.")
    if study.trial is not None and not study.multi_objective:
        raise MofqError(f"{option('trial')} is for {option('multi_objective')}.")
    if is_study and method.refine:
        raise MofqError(
            f"{option('refine')} does not go with {option('solver', 'optuna')}, which measures "
            f"recipes by itself: leave one of them out."
        )
    proves = not is_study and not method.refine
    if proves and (max_kl is None or on_model.text is on_model.model is None):
        return False
    asked = option("solver", "optuna") if is_study else option("refine", method.refine)
    if proves:
        given = "model" if on_model.text is None else "text"
        asked = option("max_kl", max_kl) + " with " + option(given)
    for name, value in (("model", on_model.model), ("text", on_model.text)):
        if value is None:
            raise MofqError(
                f"{asked} measures recipes on the model itself and needs {option(name)}; the text "
                f"should be neither what was calibrated on nor what will validate."
            )
    return True


def _check_inputs(on_model: OnModel) -> None:
    """Read what can be read of model and text at once, before torch is imported.

    Raises:
        MofqError: One of them is missing or not valid.
    """
    from mofq.model.checkpoint.headers import open_checkpoint

    assert on_model.text is not None
    load_named(on_model.text)
    open_checkpoint(str(on_model.model))


def _check_output(
    path: Path, table: Table | str | Path, on_model: OnModel, timing: Timing, *, name: str
) -> None:
    text = [] if on_model.text is None else [text_file(on_model.text)]
    check_output(
        path,
        files=[table, timing.device_model, *text],
        folders=[on_model.model, on_model.stats],
        name=name,
    )


def _beside(output: Path | None) -> str:
    """The file of trials beside a recipe."""
    if output is None:
        raise MofqError(
            f"optuna keeps its trials in a file: give {option('output')} or {option('storage')}."
        )
    return str(output.with_suffix(".optuna.db"))


def decide_on_model(
    table: Table,
    request: Request,
    on_model: OnModel,
    *,
    refine: int = 0,
    study: Study = Study(),
    step: int = 1,
    dtype: str = "float32",
    progress: Progress | None,
    tell: Tell,
) -> Decision:
    """Decide, and let measurements on the model have the last word.

    Args:
        table: Of the model.
        request: With a budget in nats, where neither swaps nor a study are asked for.
        on_model: The model, and the text.
        refine: Swaps to measure.
        study: Of the solver ``optuna``.
        step: Of the text's windows every so many-th is run; those in between have no part in the
            choice, and may say what it costs.
        dtype: Of the arithmetic.
        progress: As of `search`.
        tell: As of `search`.

    Raises:
        MofqError: As `search`.
    """
    from mofq.decision.measured.proved_budget import decide_proved
    from mofq.decision.measured.refine import decide_refined
    from mofq.delivery.validation.measured_kl import MeasuredKl
    from mofq.delivery.validation.streamed_kl import StreamedKl
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.streaming.execution import choose_execution

    assert on_model.text is not None
    chosen = choose_execution(
        on_model.execution,
        open_checkpoint(str(on_model.model)),
        dtype=dtype,
        device=on_model.device,
    )
    if chosen.remark is not None:
        tell(chosen.remark)
    kind = StreamedKl if chosen.is_streamed else MeasuredKl
    with kind(
        str(on_model.model),
        load_named(on_model.text),
        tokens=on_model.tokens,
        step=step,
        sequence_length=on_model.sequence_length,
        bos=bos_of(table),
        dtype=dtype,
        device=on_model.device,
        stats=on_model.stats,
        progress=progress,
    ) as objective:
        check_model(table, objective.checkpoint)
        calibrated = table.header.stats
        if calibrated is not None and objective.text.sha256 in calibrated.corpora.values():
            tell(
                f"{on_model.text}: was calibrated on too, which flatters every recipe that is "
                f"measured on it. Search on another text."
            )
        if not refine and request.solver != "optuna":
            return decide_proved(
                table,
                request,
                evaluate=objective.evaluate,
                text_sha256=objective.text.sha256,
                tokens=objective.tokens,
                progress=progress,
            )
        if not refine:
            with _other_workers(table, request, on_model, study, tell=tell):
                return _decide_in_study(
                    table, request, on_model, study, objective, progress=progress, tell=tell
                )
        return decide_refined(
            table,
            request,
            evaluate=objective.evaluate,
            expect=objective.expect,
            swaps=refine,
            text_sha256=objective.text.sha256,
            progress=progress,
        )


def _decide_in_study(
    table: Table,
    request: Request,
    on_model: OnModel,
    study: Study,
    objective: Objective,
    *,
    progress: Progress | None,
    tell: Tell,
) -> Decision:
    from mofq.decision.measured.study import StudyPlan, decide_in_study

    assert study.storage is not None
    found = decide_in_study(
        table,
        request,
        evaluate=objective.evaluate,
        plan=StudyPlan(
            storage=study.storage,
            text_sha256=objective.text.sha256,
            tokens=objective.tokens,
            sequence_length=on_model.sequence_length,
            bos=bool(objective.leading),
            device=on_model.device,
            trials=study.trials,
            seed=study.seed,
            with_size=study.multi_objective,
            trial=study.trial,
        ),
        progress=progress,
    )
    for point in found.frontier:
        kl = with_error(point.measured.kl.value, point.measured.kl.stderr)
        size = f"{point.size:.4f} bits"
        if request.kv_tokens:
            size = f"{short_bytes(round(point.size))} with the cache"
        tell(f"trial {point.trial}: {size}, {kl} nats per token")
    if found.frontier and study.trial is None:
        tell(
            Remark(f"The same search with the number of one as {option('trial')} takes its recipe.")
        )
    return found.decision


@contextmanager
def _other_workers(
    table: Table, request: Request, on_model: OnModel, study: Study, *, tell: Tell
) -> Iterator[None]:
    """Processes that work on the same study, until it has its trials."""
    from multiprocessing import get_context

    context = get_context("spawn")  # a fork of a process that uses torch hangs
    arguments = (table, request, on_model)
    options = {"study": replace(study, workers=1), "progress": None, "tell": silent}
    processes = [
        context.Process(target=decide_on_model, args=arguments, kwargs=options, daemon=True)
        for _ in range(study.workers - 1)
    ]
    for process in processes:
        process.start()
    try:
        yield
    except BaseException:
        for process in processes:
            process.terminate()  # a program that calls the library may go on for long
        raise
    for process in processes:
        process.join()
        if process.exitcode:
            tell(f"A worker ended with exit code {process.exitcode}; the others did its part.")


def bos_of(table: Table) -> Bos:
    """How windows begin that are compared with a table's errors: as those that calibrated."""
    calibrated = table.header.stats
    if calibrated is None:
        return "auto"
    return "always" if calibrated.bos else "never"


def check_model(table: Table, checkpoint: Checkpoint) -> None:
    """Refuse to measure another model than the table's.

    Raises:
        MofqError: It is another.
    """
    from mofq.model.checkpoint.weights_hash import hash_weights

    for key, ours, theirs in (
        ("index_sha256", table.header.index_sha256, checkpoint.index_sha256),
        ("weights_sha256", table.header.weights_sha256, hash_weights(checkpoint)),
    ):
        if ours not in (None, theirs):
            raise MofqError(
                f"the table is of {table.header.model_name} with {key} {ours[:8]}, and "
                f"{option('model')} has {theirs[:8]}. Give the model that was measured."
            )
