"""From evidence to what is served: the recipe, what it measures beside uniform ones, the export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from time import monotonic
from typing import TYPE_CHECKING

from mofq.api.calibrate import chosen_execution, judging_windows
from mofq.api.export import ExportResult, export
from mofq.api.inputs import load_corpora, load_named
from mofq.api.options import OnModel, Tell
from mofq.api.run_evidence import Evidence, Measured, Subject
from mofq.api.run_folder import SEARCHED, RunFiles
from mofq.api.run_request import CheckedRun, RunOptions
from mofq.api.search import decide_on_model
from mofq.exceptions import MofqError, Remark, option

if TYPE_CHECKING:
    from mofq.decision import Decision, Request
    from mofq.decision.recipe import Recipe
    from mofq.decision.rewriting import Rewriting
    from mofq.delivery.validation import Validation
    from mofq.evidence.table import Table

#: Steps of tuning with the effort `best`, and with `normal`.
_BEST_STEPS, _NORMAL_STEPS = 128, 32
#: `normal` makes steps from a predicted KL on [nats per token]: where less is lost, less can be
#: gained in the same time (docs/rounding-and-rewrites.md).
_LEAST_TUNED = 0.05
#: What a recipe notes of the request, beside its budget.
_ASKED = (
    "engine",
    "space",
    "space_sha256",
    "effort",
    "constraints",
    "corpus_weights",
    "objective",
)
#: What another tool's recipe is called in the folder of a run.
_FILES = {"torchao": "torchao.json", "modelopt": "hf_quant_config.json"}


def decide_run(asked: RunOptions, measured: Measured) -> Decision:
    """The decision; a budget in nats is proved on every other window of the text that validates.

    Args:
        asked: The run's options.
        measured: What the run goes on with.

    Raises:
        BudgetError: No recipe meets the budgets.
    """
    from mofq.decision import decide
    from mofq.decision.constraint_cost import constraint_note

    request, windows = asked.request, asked.windows
    table, subject = measured.table, measured.subject
    if request.budgets.max_kl is not None:
        on_model = OnModel(
            model=subject.model,
            text=asked.text,
            tokens=windows.tokens,
            sequence_length=windows.sequence_length,
            device=asked.running.device,
            execution=asked.forward_execution,
            stats=subject.stats,
        )
        found = decide_on_model(
            table,
            request,
            on_model,
            step=2,
            dtype=asked.running.dtype,
            progress=asked.progress,
            tell=asked.tell,
        )
    else:  # where none meets, deciding again says why
        found = measured.decision or decide(table, request)
    note = constraint_note(table, request, found)
    return replace(found, notes=(*found.notes, note)) if note else found


def beside_the_proof(validation: Validation, max_kl: float) -> str:
    """What the windows say that had no part in the proof of a budget in nats."""
    from mofq.decision.prediction import estimate

    found = estimate(validation.windows[1::2])
    kept = "within" if found.upper <= max_kl else "not within"
    return (
        f"On the {len(validation.windows[1::2])} windows in between, which had no part in the "
        f"choice, the recipe has {found.value:.3g} nats per token, with two standard errors "
        f"{found.upper:.3g}: {kept} {max_kl:.4g}."
    )


def with_notes_of_run(recipe: Recipe, effort: str, evidence: Evidence) -> Recipe:
    """A recipe that says what was tried on the way to it, and which model it is for."""
    found = (
        f"{one.name} {'no recipe' if kl is None else f'{kl:.3g}'}"
        + ("" if one.is_taken else " (not taken)")
        for one in evidence.tried
        for kl in [one.kl_nats_per_token]
    )
    made_by = {**recipe.made_by, "effort": effort, "tried": "; ".join(found)}
    return _with_rewriting(replace(recipe, made_by=made_by), evidence.best.subject.rewriting)


def _with_rewriting(recipe: Recipe, rewriting: Rewriting | None) -> Recipe:
    """A recipe of a table of a rewritten model, with what was rewritten among its decisions."""
    result = replace(recipe.result, decisions_sha256=None)
    return replace(recipe, rewriting=rewriting, result=result)


def uniform_rivals(
    table: Table, request: Request, recipe: Recipe, *, most: int
) -> dict[str, Recipe]:
    """The best uniform schemes of about the recipe's size, or the smallest where all are larger.

    Each notes the request that it answers as the recipe does: one of them may take its place.
    """
    from mofq.decision import uniform_recipes

    every = uniform_recipes(table, request)
    others = {name: one for name, one in every.items() if one.schemes != recipe.schemes}
    largest = 1.02 * (recipe.bits_per_weight or 0.0)
    fitting = [name for name, one in others.items() if (one.bits_per_weight or 0.0) <= largest]
    fitting.sort(key=lambda name: others[name].kl_nats_per_token or 0.0)
    smallest = sorted(others, key=lambda name: others[name].bits_per_weight or 0.0)[:1]
    asked = {key: recipe.made_by[key] for key in _ASKED if key in recipe.made_by}
    return {
        name: _with_rewriting(
            replace(others[name], made_by={**others[name].made_by, **asked}, budget=recipe.budget),
            recipe.rewriting,
        )
        for name in (fitting or smallest)[:most]
    }


def tune_where_it_helps(
    run: CheckedRun, files: RunFiles, recipe: Recipe, subject: Subject
) -> Recipe:
    """A recipe that was tuned, where that helps on what it was not tuned on.

    Args:
        run: That found the recipe.
        files: Of the run.
        recipe: Not tuned.
        subject: The model that it is applied to.

    Returns:
        The recipe as it was where it cannot be tuned here, or nothing is gained; that is told.
    """
    from torch import OutOfMemoryError

    from mofq.delivery.rewriting.remake import Base
    from mofq.delivery.tuning.tune_recipe import tune_recipe
    from mofq.model.checkpoint.headers import open_checkpoint

    tell = run.options.tell
    if set(recipe.schemes.values()) == {"bf16"}:
        return recipe
    if reason := _why_not_tuned(run):
        tell(Remark(f"The recipe is not tuned: {reason}."))
        return recipe
    steps, is_streamed = _steps(run.options.effort, recipe.kl_nats_per_token), _is_streamed(run)
    if steps and is_streamed and run.options.effort != "best":
        tell(Remark(f"Codes are tuned by compensation alone: {_takes_long(steps)}."))
        steps = 0
    try:
        found = tune_recipe(
            run.checkpoint,
            recipe,
            run.windows,
            judging=judging_windows(
                *(run.checkpoint, load_corpora(run.options.corpora), run.windows),
                samples=run.options.samples,
            ),
            base=Base(open_checkpoint(subject.model), subject.stats),
            plan=run.plan,
            steps=steps,
            device=run.options.running.device,
            is_streamed=is_streamed,
            work=files.tuning,
            progress=run.options.progress,
            tell=tell,
        )
    except (MemoryError, OutOfMemoryError):
        tell(Remark("The recipe is not tuned: memory ran out."))
        return recipe
    except MofqError as error:  # what is wrong with the recipe itself, its validation says
        tell(Remark(f"The recipe is not tuned: {error.template}"))
        return recipe
    if not found.helps:
        tell(f"The recipe is not tuned: it would have KL {found.tuning.gain}.")
        return recipe
    return found.recipe


def _why_not_tuned(run: CheckedRun) -> str | None:
    """Why a recipe is not tuned in a run; None where they are."""
    asked = run.options
    if asked.request.budgets.max_kl is not None:
        return "a budget in nats is proved of the recipe as it was found"
    if asked.other_tool is not None:
        return f"a file for {asked.other_tool} is of the model as it is"
    if asked.execution == "spread":
        return f"{option('execution', 'spread')} spreads the model"
    if asked.effort != "best" and asked.no_stats:
        return (
            f"codes compensate the errors of layers before by statistics, which are not stored, "
            f"and {_takes_long(_NORMAL_STEPS)}"
        )
    return None


def _takes_long(steps: int) -> str:
    """Why a model that is run layer by layer is not tuned in steps, unless that is asked for."""
    return (
        f"the model is run layer by layer, and {steps} steps would read and quantize all of it "
        f"{2 * steps} times. {option('effort', 'best')} takes them nevertheless, and so does "
        f"`mofq tune` with this recipe, without its section `tuning` where it has one"
    )


def _steps(effort: str, kl: float | None) -> int:
    """Steps of tuning that pay, by the predicted KL [nats per token]; 0: codes compensate alone."""
    if effort == "best":
        return _BEST_STEPS
    return _NORMAL_STEPS if kl is None or kl >= _LEAST_TUNED else 0


def _is_streamed(run: CheckedRun) -> bool:
    """Whether the model is tuned layer by layer."""
    from mofq.delivery.tuning.products import copies_bytes

    asked, device = run.options, run.options.running.device
    found = chosen_execution(
        *(asked.execution, run.checkpoint, run.layers, run.plan),
        device=device,
        more_bytes=copies_bytes(run.checkpoint, dtype=run.plan.dtype, device=device),
    )
    return found.is_streamed


def validate_candidates(
    asked: RunOptions, files: RunFiles, candidates: Mapping[str, Recipe], subject: Subject
) -> dict[str, Validation]:
    """Every candidate on the real model, against one run of the original.

    Args:
        asked: The run's options.
        files: Of the run.
        candidates: Name -> recipe; the searched one among them.
        subject: The model that was quantized.

    Raises:
        MofqError: The searched recipe is not enforced, or as `validate`.
    """
    from mofq.delivery.rewriting.remake import Base
    from mofq.delivery.validation import validate_many
    from mofq.model.checkpoint.headers import open_checkpoint

    rewritten = None
    if subject.rewriting is not None:
        rewritten = Base(open_checkpoint(subject.model), subject.stats)
    windows = asked.windows
    done = validate_many(
        asked.model,
        list(candidates.values()),
        load_named(asked.text),
        tokens=windows.tokens,
        sequence_length=windows.sequence_length,
        bos=windows.bos,
        dtype=asked.running.dtype,
        device=asked.running.device,
        stats=subject.stats,
        rewritten=rewritten,
        execution=asked.forward_execution,
        work=files.validating,
        progress=asked.progress,
        tell=asked.tell,
    )
    validations = dict(zip(candidates, done, strict=True))
    searched = validations[SEARCHED]
    if not searched.enforced:
        raise MofqError(
            f"the recipe that was found is not enforced: {searched.deviations[0]}. "
            f"This is a fault of mofq; please report it."
        )
    return validations


def within_budgets(
    table: Table,
    request: Request,
    candidates: Mapping[str, Recipe],
    validations: Mapping[str, Validation],
) -> dict[str, Validation]:
    """What may become the recipe: the searched one, and the uniform ones that keep the budgets."""
    from mofq.decision import request_problem
    from mofq.decision.budgets import budget_constraints, keeps_all
    from mofq.decision.timing import request_budgets

    problem = request_problem(table, request)
    constraints = budget_constraints(problem, request_budgets(table, problem, request))
    max_kl = request.budgets.max_kl
    found = {}
    for name, one in validations.items():
        if name == SEARCHED or (
            (max_kl is None or one.kl_upper <= max_kl)
            and keeps_all(constraints, problem.choice_of(candidates[name].scheme_of_group))
        ):
            found[name] = one
    return found


def preferred(
    validations: Mapping[str, Validation], candidates: Mapping[str, Recipe], tell: Tell
) -> str:
    """The searched recipe's name, or that of a uniform one no larger and measured no worse.

    A mixture that does not pay is not worth its complexity; what is preferred becomes
    ``recipe.yaml``. It is chosen on every other window, so that the rest, which had no part in the
    choice, say what it costs.
    """
    searched = validations[SEARCHED]
    for name, one in validations.items():
        is_smaller = one.bits_per_weight <= searched.bits_per_weight
        # Of a single window there is no rest.
        ours, theirs = (fmean(each.windows[::2]) for each in (one, searched))
        is_better = ours <= theirs
        if name != SEARCHED and is_smaller and is_better:
            is_everywhere = {group.scheme for group in candidates[name].groups} == {name}
            every = "layer" if is_everywhere else "layer that has a choice"
            tell(
                f"{name} for every {every} is as small as the mixture and measured as good: the "
                f"recipe is this uniform one." + _on_the_rest(one, searched)
            )
            return name
    return SEARCHED


def _on_the_rest(one: Validation, searched: Validation) -> str:
    """What the windows say that had no part in choosing one of two."""
    ours, theirs = one.windows[1::2], searched.windows[1::2]
    if not ours:
        return ""
    return (
        f" Chosen on every other window; on the {len(ours)} in between it has {fmean(ours):.3g} "
        f"nats per token, the mixture {fmean(theirs):.3g}."
    )


def export_recipe(
    asked: RunOptions, files: RunFiles, recipe: Recipe, subject: Subject, validation: Validation
) -> ExportResult:
    """What the engine reads; a checkpoint that a former run wrote is proved and kept.

    Args:
        asked: The run's options; they name an engine.
        files: Of the run.
        recipe: That the run ends with.
        subject: The model that it is applied to.
        validation: Of the recipe.
    """
    engine, tool = asked.request.engine, asked.other_tool
    assert engine is not None
    if tool is not None:
        return export(asked.model, recipe, files.named(_FILES.get(tool, f"{tool}.txt")), to=tool)
    from mofq.engines import find_engine

    reads = find_engine(engine).reads
    if files.model.exists() and any(files.model.iterdir()):
        from mofq.delivery.export.compressed_tensors import read_export
        from mofq.model.checkpoint.headers import open_checkpoint

        start = monotonic()
        model = open_checkpoint(subject.model)
        done = read_export(model, recipe, files.model, engine=engine, stats=subject.stats)
        seconds = monotonic() - start
        return ExportResult(subject.model, recipe, files.model, reads, engine, done, seconds)
    return export(
        subject.model,
        recipe,
        files.model,
        to=reads,
        engine=engine,
        stats=subject.stats,
        validations=[validation],
        progress=asked.progress,
    )
