"""The whole flow into one folder: calibrate, measure, search, validate, export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from statistics import fmean
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mofq.api.calibrate import (
    calibrate,
    check_gradient_dtype,
    plan_calibration,
    without_inputs,
)
from mofq.api.export import ExportResult, export
from mofq.api.figures import short_bytes
from mofq.api.inputs import load_corpora, load_named, open_layers, sources_of
from mofq.api.measure import MeasureResult, fits_beside, measure_space
from mofq.api.options import (
    WHOLE_MODEL,
    AtLeast,
    AtMost,
    Budget,
    Choices,
    Corpora,
    CorpusWeights,
    Device,
    DeviceMap,
    Engine,
    Execution,
    Fixed,
    GradientDtype,
    LayersFile,
    Method,
    Model,
    Objective,
    OnModel,
    Option,
    Samples,
    Sequences,
    Space,
    Tell,
    Vocabulary,
    Where,
    Windows,
    documented,
    silent,
)
from mofq.api.preconditions import (
    check_device,
    check_engine,
    check_folder,
    check_vocabulary,
)
from mofq.api.request import make_request, read_corpus_weights
from mofq.api.run_effort import EFFORTS, Effort, Offered, Timed, Tried, Twins
from mofq.api.run_evidence import Evidence, Original, Subject, gather_evidence
from mofq.api.run_folder import (
    SEARCHED,
    Asked,
    RunFiles,
    check_ends_as_before,
    find_files,
    keep_former,
    write_results,
)
from mofq.api.search import prove_on_every_other
from mofq.exceptions import BudgetError, CorpusError, MofqError, Remark, nearest_name, option
from mofq.files.locks import hold_folder
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.decision import Decision, Request
    from mofq.decision.recipe import Recipe
    from mofq.decision.rewriting import Rewriting
    from mofq.delivery.validation import Validation
    from mofq.evidence.constraints import Selection
    from mofq.evidence.spaces import SearchSpace
    from mofq.evidence.table import Table
    from mofq.model.checkpoint.headers import Checkpoint

#: What is calibrated on where no corpus is named.
_BUNDLED_TEXT = "demo-en-calibration"
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
#: Sequences of each corpus whose samples are kept with the effort ``best``.
_KEPT_AT_BEST = 32
#: Of the free disk, what statistics may take; the rest is for what is exported and in between.
_SHARE_OF_DISK = 0.5
#: What another tool's recipe is called in the folder of a run.
_FILES = {"torchao": "torchao.json", "modelopt": "hf_quant_config.json"}


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
    corpus_weights: CorpusWeights = None,
    objective: Objective = "mean",
    fixed: Fixed = (),
    at_least: AtLeast = (),
    at_most: AtMost = (),
    text: Annotated[str, Option("To validate on; not a corpus.")] = "demo-en",
    engine: Engine = None,
    layers: LayersFile = None,
    vocabulary: Vocabulary = Vocabulary(),
    windows: Windows = Windows(),
    sequences: Sequences = None,
    dtype: GradientDtype = "float32",
    device: Device = "cpu",
    device_map: DeviceMap = None,
    execution: Execution = "auto",
    no_stats: Annotated[
        bool,
        Option(
            "Measure while calibrating and store no statistics; so by itself where the disk is "
            "too small for them."
        ),
    ] = False,
    rivals: Annotated[
        int, Option("Uniform schemes to validate beside the recipe, at most.", least=0)
    ] = 4,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> RunResult:
    """The whole flow into one folder, ready to serve: give a budget, and the engine.

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
    model, tell = str(model), tell or silent
    folder = Path(f"{Path(model).resolve().name}-mofq" if output is None else output)
    sources = sources_of(corpora) or (_BUNDLED_TEXT,)
    check_folder(folder, folders=[model])
    from mofq.evidence.spaces import load_search_space

    _check_effort(effort)
    loaded = load_search_space(space)
    choices = Choices(
        engine=engine,
        space=Offered.at(effort, loaded).space.name,
        fixed=fixed,
        at_least=at_least,
        at_most=at_most,
        corpus_weights=corpus_weights,
    )
    method = Method(objective=objective)
    request = make_request(choices, budget=budget, method=method)
    checkpoint, offered, selections = _check_request(
        model, loaded, effort, request, layers, vocabulary
    )
    _check_texts(sources, text, corpus_weights)
    check_device(device)
    check_gradient_dtype(dtype)
    if no_stats and any(vocabulary.asked.values()):
        raise MofqError(
            f"{option('no_stats')}: the model is run layer by layer then, where {WHOLE_MODEL}. "
            f"Leave {option('no_stats')} out."
        )
    if no_stats and device_map is not None:
        raise MofqError(
            f"{option('no_stats')}: the model is run layer by layer then. Leave "
            f"{option('device_map')} out."
        )
    windows = _checked_windows(checkpoint, text, windows, least=1 if budget.max_kl is None else 4)
    samples = Samples(sequences=sequences, sequence_length=windows.sequence_length, bos=windows.bos)
    if effort == "best":
        samples = replace(samples, keep=_KEPT_AT_BEST)
    _check_halves(checkpoint, layers, samples, effort=effort, sources=sources, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)

    def busy(who: str) -> MofqError:
        return MofqError(f"{folder}: {who} runs into this folder. Wait for it, or name another.")

    from mofq.evidence.measure.fill_table import table_space

    with hold_folder(folder, busy):
        asked = Asked.of_request(request, offered.space, effort=effort)
        files = find_files(folder, asked, table_space(offered.space, engine))
        _tell_all((one.remark for one in selections), tell)
        if not corpora:
            tell(
                Remark(
                    f"No corpus is named: calibrating on {_BUNDLED_TEXT}, a little English text on "
                    f"administering Debian. Errors differ between texts: give text like what the "
                    f"model will see as {option('corpora')}, and other text of the kind as "
                    f"{option('text')} to validate on."
                )
            )
        timed = Timed()
        is_stored = not no_stats and _can_store(
            checkpoint,
            layers,
            files,
            samples,
            vocabulary=vocabulary,
            sources=sources,
            dtype=dtype,
            tell=tell,
        )
        if is_stored:
            with timed("calibrate"):
                calibrated = calibrate(
                    model,
                    sources,
                    files.stats,
                    samples=samples,
                    dtype=dtype,
                    where=Where(device=device),
                    device_map=device_map,
                    execution=execution,
                    kv_cache=bool(loaded.kv_cache),
                    layers=layers,
                    vocabulary=vocabulary,
                    progress=progress,
                    tell=tell,
                )
                _tell_all(calibrated.summary(), tell)

        def measured(subject: Subject, twins: Twins) -> Table:
            found = measure_space(
                subject.model,
                offered.space,
                subject.table,
                stats=subject.stats if is_stored else None,
                corpora=() if is_stored else sources,
                samples=samples,
                dtype=dtype,
                engine=engine,
                layers=layers,
                vocabulary=vocabulary,
                where=Where(device=device),
                wanted=offered.wants(twins),
                progress=progress,
                tell=tell,
            )
            if not twins and subject.rewriting is None:  # what is refused is told once
                _tell_all(_without_twins(found, offered).summary(), tell)
            return found.table

        stats = files.stats if is_stored else fits_beside(files.table)
        evidence = gather_evidence(
            Subject(model, stats, files.table),
            request,
            offered=offered,
            effort=effort,
            measure=measured,
            is_stored=is_stored,
            rewritable=_rewritable(
                checkpoint,
                layers,
                files,
                offered=offered,
                engine=engine,
                on=execution,
                dtype=dtype,
                device=device,
            )
            if is_stored and not any(vocabulary.asked.values()) and budget.max_kl is None
            else None,
            timed=timed,
            progress=progress,
            tell=tell,
        )
        subject, table = evidence.subject, evidence.table
        with timed("search"):
            on_model = OnModel(
                model=subject.model,
                text=text,
                tokens=windows.tokens,
                sequence_length=windows.sequence_length,
                bos=windows.bos,
                device=device,
                execution=execution,
                stats=subject.stats,
            )
            decision = _decide(table, request, on_model, progress=progress, tell=tell)
            _tell_all(decision.notes, tell)
            searched = _noting(decision.recipe, effort, evidence)
            uniform = _uniform_recipes(table, request, searched, most=rivals)
            candidates = keep_former(files, {SEARCHED: searched, **uniform})
        with timed("validate"):
            validations = _validate(
                model,
                candidates,
                text,
                subject=subject,
                windows=windows,
                dtype=dtype,
                device=device,
                execution=execution,
                work=files.folder / ".streamed",
                progress=progress,
                tell=tell,
            )
        if budget.max_kl is not None:
            tell(_beside_the_proof(validations[SEARCHED], budget.max_kl))
        may_be = _within_budgets(table, request, candidates, validations)
        name = _preferred(may_be, candidates, tell)
        check_ends_as_before(files, candidates[name])
        exported = None
        if engine is not None:
            with timed("export"):
                exported = _export(
                    model,
                    candidates[name],
                    files,
                    engine=engine,
                    subject=subject,
                    validation=validations[name],
                    progress=progress,
                )
        # Last, when all is well: a run that fails leaves the folder as it was.
        write_results(files, candidates[name], validations, chosen=name)
    return RunResult(
        files=files,
        model=model,
        title=f"{loaded.name}, {validations[name].tokens} tokens of {text}",
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


def _tell_all(lines: Iterable[str], tell: Tell) -> None:
    for line in lines:
        tell(line)


def _can_store(
    checkpoint: Checkpoint,
    layers: LayersFile,
    files: RunFiles,
    samples: Samples,
    *,
    vocabulary: Vocabulary,
    sources: Sequence[str],
    dtype: str,
    tell: Tell,
) -> bool:
    """Whether statistics are stored: as a former run did, else where the disk has room for them."""
    from mofq.evidence.calibration.needs import experts_per_token, inputs_bytes, samples_bytes
    from mofq.evidence.calibration.stats import passing_stats
    from mofq.evidence.table import read_table
    from mofq.model.layers import find_layers

    if files.stats.exists() or any(vocabulary.asked.values()):
        return True
    found = find_layers(checkpoint, **vocabulary.asked, stated=open_layers(layers))
    plan, _ = plan_calibration(
        checkpoint, found, load_corpora(sources), samples=samples, dtype=dtype, kv_cache=False
    )
    if files.table.exists():
        of_table = read_table(files.table).header.stats
        passing = {passing_stats(files.folder, one).sha256 for one in (plan, without_inputs(plan))}
        return of_table is None or of_table.sha256 not in passing
    count = sum(len(one.kept_indices) for one in plan.corpora)
    others = sum(one.sequences for one in plan.corpora) - count if plan.inputs else 0
    experts = experts_per_token(checkpoint.config)
    length, draws = plan.sequence_length, plan.draws
    needed = samples_bytes(found, tokens=count * length, draws=draws, experts_per_token=experts)
    needed += inputs_bytes(found, tokens=others * length, experts_per_token=experts)
    free = disk_usage(files.folder).free
    if needed <= _SHARE_OF_DISK * free:
        return True
    tell(
        Remark(
            f"Statistics would take about {short_bytes(needed)}, and {short_bytes(free)} are free "
            f"in {files.folder}: schemes are measured while the model is calibrated, and no "
            f"statistics are stored ({option('no_stats')})."
        )
    )
    return False


def _decide(
    table: Table,
    request: Request,
    on_model: OnModel,
    *,
    progress: Progress | None,
    tell: Tell,
) -> Decision:
    """Decide; a budget in nats is proved on every other window of the text that validates."""
    from mofq.decision import decide
    from mofq.decision.constraint_cost import constraint_note

    if request.budgets.max_kl is not None:
        found = prove_on_every_other(table, request, on_model, progress=progress, tell=tell)
    else:
        found = decide(table, request)
    note = constraint_note(table, request, found)
    return replace(found, notes=(*found.notes, note)) if note else found


def _beside_the_proof(validation: Validation, max_kl: float) -> str:
    """What the windows say that had no part in the proof of a budget in nats."""
    from mofq.decision.prediction import estimate

    found = estimate(validation.windows[1::2])
    kept = "within" if found.upper <= max_kl else "not within"
    return (
        f"On the {len(validation.windows[1::2])} windows in between, which had no part in the "
        f"choice, the recipe has {found.value:.3g} nats per token, with two standard errors "
        f"{found.upper:.3g}: {kept} {max_kl:.4g}."
    )


def _rewritable(
    checkpoint: Checkpoint,
    layers: LayersFile,
    files: RunFiles,
    *,
    offered: Offered,
    engine: str | None,
    on: Execution,
    dtype: str,
    device: str,
) -> Original | None:
    """The model, where what comes out of rewriting it can be measured, validated and exported.

    Samples of a KV cache are those of the model as it is; a model that is run layer by layer is
    validated with recipes of itself alone; files for other tools are of a model that is there; a
    quantized source would be written in bf16; and sites are those of inferred or ruled layers, not
    of stated ones.
    """
    from mofq.delivery.backends import RECIPE_EXPORTERS
    from mofq.engines import find_engine
    from mofq.model.layers import find_layers
    from mofq.model.streaming.execution import choose_execution

    if not offered.twins or offered.space.kv_cache or checkpoint.source_format is not None:
        return None
    if layers is not None:
        return None
    if engine is not None and find_engine(engine).reads in RECIPE_EXPORTERS:
        return None
    if choose_execution(on, checkpoint, dtype=dtype, device=device).is_streamed:
        return None
    return Original(checkpoint, find_layers(checkpoint), files)


def _check_effort(effort: str) -> None:
    """Refuse an effort that there is not."""
    if effort not in EFFORTS:
        raise MofqError(f"{option('effort', effort)}: unknown." + nearest_name(effort, EFFORTS))


def _check_halves(
    checkpoint: Checkpoint,
    layers: LayersFile,
    samples: Samples,
    *,
    effort: str,
    sources: Sequence[str],
    dtype: str,
) -> None:
    """Refuse to fit codes to a corpus that cannot be halved, before anything runs."""
    from mofq.model.layers import find_layers

    if effort == "quick":
        return
    found = find_layers(checkpoint, stated=open_layers(layers))
    plan, _ = plan_calibration(
        checkpoint, found, load_corpora(sources), samples=samples, dtype=dtype, kv_cache=False
    )
    for corpus in plan.corpora:
        if len(corpus.kept_indices) < 2:
            raise MofqError(
                f"{option('effort', effort)}: codes are fitted to one half of the sequences of a "
                f"corpus and judged by the other, and {corpus.name!r} has one sequence. Calibrate "
                f"on more, or run with {option('effort', 'quick')}."
            )


def _without_twins(found: MeasureResult, offered: Offered) -> MeasureResult:
    """What was measured, without refusals of twins: those of the schemes beside them say it."""
    refused = (
        replace(one, schemes=tuple(name for name in one.schemes if name not in offered.twins))
        for one in found.refused
    )
    return replace(found, refused=tuple(one for one in refused if one.schemes))


def _noting(recipe: Recipe, effort: str, evidence: Evidence) -> Recipe:
    """A recipe that says what was tried on the way to it, and which model it is for."""
    found = (
        f"{one.name} {'no recipe' if kl is None else f'{kl:.3g}'}"
        + ("" if one.is_taken else " (not taken)")
        for one in evidence.tried
        for kl in [one.kl_nats_per_token]
    )
    made_by = {**recipe.made_by, "effort": effort, "tried": "; ".join(found)}
    return _rewriting(replace(recipe, made_by=made_by), evidence.subject.rewriting)


def _rewriting(recipe: Recipe, rewriting: Rewriting | None) -> Recipe:
    """A recipe of a table of a rewritten model, with what was rewritten among its decisions."""
    result = replace(recipe.result, decisions_sha256=None)
    return replace(recipe, rewriting=rewriting, result=result)


def _uniform_recipes(
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
        name: _rewriting(
            replace(others[name], made_by={**others[name].made_by, **asked}, budget=recipe.budget),
            recipe.rewriting,
        )
        for name in (fitting or smallest)[:most]
    }


def _validate(
    model: str,
    candidates: Mapping[str, Recipe],
    text: str,
    *,
    subject: Subject,
    windows: Windows,
    dtype: str,
    device: str,
    execution: Literal["auto", "resident", "streamed"],
    work: Path,
    progress: Progress | None,
    tell: Tell,
) -> dict[str, Validation]:
    """Every candidate on the real model, against one run of the original."""
    from mofq.delivery.rewriting.remake import Base
    from mofq.delivery.validation import validate_many
    from mofq.model.checkpoint.headers import open_checkpoint

    rewritten = None
    if subject.rewriting is not None:
        rewritten = Base(open_checkpoint(subject.model), subject.stats)
    done = validate_many(
        model,
        list(candidates.values()),
        load_named(text),
        tokens=windows.tokens,
        sequence_length=windows.sequence_length,
        bos=windows.bos,
        dtype=dtype,
        device=device,
        stats=subject.stats,
        rewritten=rewritten,
        execution=execution,
        work=work,
        progress=progress,
        tell=tell,
    )
    validations = dict(zip(candidates, done, strict=True))
    searched = validations[SEARCHED]
    if not searched.enforced:
        raise MofqError(
            f"the recipe that was found is not enforced: {searched.deviations[0]}. "
            f"This is a fault of mofq; please report it."
        )
    return validations


def _within_budgets(
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
        recipe = candidates[name]
        schemes = {group.name: group.scheme for group in recipe.groups}
        schemes |= {cache.name: cache.scheme for cache in recipe.kv_cache}
        if name == SEARCHED or (
            (max_kl is None or one.kl_upper <= max_kl)
            and keeps_all(constraints, problem.choice_of(schemes))
        ):
            found[name] = one
    return found


def _preferred(
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


def _export(
    model: str,
    recipe: Recipe,
    files: RunFiles,
    *,
    engine: str,
    subject: Subject,
    validation: Validation,
    progress: Progress | None,
) -> ExportResult:
    """What the engine reads; a checkpoint that a former run wrote is proved and kept."""
    from mofq.delivery.backends import RECIPE_EXPORTERS
    from mofq.engines import find_engine

    reads = find_engine(engine).reads
    if reads in RECIPE_EXPORTERS:
        return export(model, recipe, files.named(_FILES.get(reads, f"{reads}.txt")), to=reads)
    if files.model.exists() and any(files.model.iterdir()):
        return _read_export(recipe, files, engine=engine, subject=subject, to=reads)
    return export(
        subject.model,
        recipe,
        files.model,
        to=reads,
        engine=engine,
        stats=subject.stats,
        validations=[validation],
        progress=progress,
    )


def _read_export(
    recipe: Recipe, files: RunFiles, *, engine: str, subject: Subject, to: str
) -> ExportResult:
    """What a former run exported, proved byte for byte.

    Raises:
        EnforcementError: The folder is not what the recipe makes of the model.
    """
    from mofq.delivery.export.compressed_tensors import Export, check_compressed_tensors
    from mofq.delivery.export.compressed_tensors.export import load_code, serve_command
    from mofq.delivery.export.compressed_tensors.plan import plan_export
    from mofq.delivery.recipe_fits import open_fits
    from mofq.model.checkpoint.headers import open_checkpoint

    start = monotonic()
    checkpoint, exported = open_checkpoint(subject.model), files.model
    with open_fits(recipe, subject.stats, index_sha256=checkpoint.index_sha256) as fits:
        check_compressed_tensors(checkpoint, recipe, exported, fits=fits)
    plan = plan_export(checkpoint, recipe)
    size = sum(tensor.nbytes for tensor in plan.tensors.values())
    command = serve_command(plan, exported, engine=engine)
    done = Export(exported, plan.group_bytes, size, command, load_code(exported, engine))
    return ExportResult(subject.model, recipe, exported, to, engine, done, monotonic() - start)


def _check_request(
    model: str,
    space: SearchSpace,
    effort: str,
    request: Request,
    layers: LayersFile,
    vocabulary: Vocabulary,
) -> tuple[Checkpoint, Offered, tuple[Selection, ...]]:
    """Refuse what no recipe can meet, or no engine serves, from headers alone.

    Returns:
        The model, opened; what the space offers of this model at the effort; how many layers each
        of the request's constraints names.
    """
    from mofq.decision import check_budget
    from mofq.delivery.backends import find_exporter
    from mofq.engines import find_engine, legality
    from mofq.evidence.constraints import selections_of
    from mofq.evidence.spaces import offer_schemes, selected_layers, with_stored
    from mofq.model.checkpoint.headers import CONFIG_FILE, open_checkpoint
    from mofq.model.layers import find_layers
    from mofq.model.layers.model_class import check_next_tokens
    from mofq.model.notes import wider_dtype

    engine, budgets = request.engine, request.budgets
    checkpoint = open_checkpoint(model)
    found = find_layers(checkpoint, **vocabulary.asked, stated=open_layers(layers))
    check = None if engine is None else legality(engine, found.architecture)
    check_next_tokens(checkpoint.config, where=str(checkpoint.folder / CONFIG_FILE))
    check_engine(engine, found)
    selected_layers(space, found)
    offered = Offered.at(effort, with_stored(space, checkpoint, found.groups))
    selections = selections_of(request.constraints, found.groups)
    offers = offer_schemes(
        offered.space, found.groups, legality=check, has_stats=True, constraints=request.constraints
    )
    check_vocabulary(offers, space)
    if not budgets.any_given and any(one.is_unquantized for one in space.schemes):
        raise BudgetError(
            f"needed a budget, found none; without one every layer stays as it is. Give "
            f"{option('max_bits', 5)}, {option('max_size', '4GB')} or {option('max_kl', 0.02)}, "
            f"for example."
        )
    if budgets.max_finer is not None and not space.base:
        raise BudgetError(
            f"{option('max_finer')}: the search space {space.name} names no `base` schemes, so "
            f"that nothing is finer. Add the key `base`, or drop the budget."
        )
    try:
        check_budget(offers, budgets, other_bytes=found.other_bytes)
    except BudgetError as error:
        raise BudgetError(" ".join(filter(None, [*error.args, wider_dtype(checkpoint)]))) from None
    if engine is not None:
        find_exporter(find_engine(engine).reads)
    return checkpoint, offered, selections


def _check_texts(
    sources: Sequence[str], source: str, weights: str | Mapping[str, float] | None
) -> None:
    """Refuse to validate on a text that was calibrated on, and weights of other corpora."""
    from mofq.decision.request import weights_in_order

    text, corpora = load_named(source), load_corpora(sources)
    if (found := read_corpus_weights(weights)) is not None:
        weights_in_order(found, [corpus.name for corpus in corpora])
    for corpus in corpora:
        if corpus.sha256 == text.sha256:
            raise CorpusError(
                f"{source}: is the calibration corpus {corpus.name!r} too, and would flatter the "
                f"recipe. Validate on another text."
            )


def _checked_windows(
    checkpoint: Checkpoint, source: str, windows: Windows, *, least: int
) -> Windows:
    """Windows no longer than the model's context, of which the text fills enough."""
    from mofq.evidence.corpora import leading_tokens, tokenize
    from mofq.model.loading import load_tokenizer

    limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    length = min(windows.sequence_length, int(limit or windows.sequence_length))
    tokenizer = load_tokenizer(checkpoint.folder)
    windows_NT = tokenize(
        load_named(source),
        tokenizer,
        tokens=windows.tokens,
        sequence_length=length,
        leading=leading_tokens(tokenizer, windows.bos),
    )
    if len(windows_NT) < least:
        raise CorpusError(
            f"{source}: {option('max_kl')} is proved on every other window, and the others say "
            f"what the recipe costs; that needs {least} windows, found {len(windows_NT)}. Give "
            f"more {option('tokens')}, a longer text, or a shorter {option('sequence_length')}."
        )
    return replace(windows, sequence_length=length)
