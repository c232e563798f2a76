"""Validates one or several quantized models against one run of the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mofq import __version__
from mofq.decision.recipe import Recipe, find_recipe
from mofq.delivery.deviation import Deviation
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.rewriting.remake import Base, base_of
from mofq.delivery.validation.candidates import (
    Candidate,
    load_candidate,
    naming_deviations,
    open_candidate,
)
from mofq.delivery.validation.divergence import (
    OriginalLogits,
    WindowScore,
    compare,
    run_original,
)
from mofq.delivery.validation.enforcement import find_deviations
from mofq.delivery.validation.report import Lineage, Validation, summarize
from mofq.delivery.validation.tasks import (
    TaskResult,
    TaskRunner,
    Tasks,
    TaskScore,
    compare_tasks,
)
from mofq.delivery.validation.windows import Windows, cut_windows
from mofq.evidence.corpora import Bos, Corpus
from mofq.exceptions import EnforcementError
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.loading import load_model, load_tokenizer
from mofq.model.streaming.execution import Execution, choose_execution, model_bytes


def validate_many(
    model_source: str,
    candidates: Sequence[str | Path | Recipe],
    text: Corpus,
    *,
    tokens: int = 8192,
    sequence_length: int = 512,
    bos: Bos = "auto",
    dtype: str = "float32",
    device: str = "cpu",
    tasks: Tasks | None = None,
    backend: str = "emulate",
    emulated: Sequence[str] = (),
    stats: str | Path | None = None,
    rewritten: Base | None = None,
    execution: Execution = "auto",
    work: Path | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[Validation, ...]:
    """Validate quantized models against one run of the original.

    One model is in memory at a time; the original's logits wait in a temporary
    file of tokens times vocabulary times 4 bytes. A model that does not fit is run layer by
    layer (`mofq.delivery.validation.streamed`), with the same results.

    Args:
        model_source: The original: a folder, or a hub id.
        candidates: Recipes, their files, or model folders.
        text: To predict; not what was calibrated on.
        tokens: How many to use, at most, in windows spread over it.
        sequence_length: Tokens of a window.
        bos: Whether windows begin with BOS, as in ``leading_tokens``.
        dtype: Of both models' arithmetic.
        device: Where they run.
        tasks: That lm-eval scores both models by, besides the text.
        backend: That applies recipes, as in ``apply_recipe``.
        emulated: Layers that it may emulate, likewise.
        stats: The folder that recipes with fitted schemes (``@nats``, ``~gptq``, ``~descent``)
            rest on.
        rewritten: What recipes with a rewriting are applied to, where it is there already; None:
            it is made again.
        execution: ``resident``, ``streamed``, or ``auto``: as free memory allows.
        work: Where a streamed run keeps what it needs to be continued, until `drop_unfinished`,
            which is called when the results are written; None: nowhere.
        progress: Called with a stage, what is done of it, and all of it.
        tell: Called with remarks on the text, and on how the models are run.

    Returns:
        One validation for each candidate, in their order.

    Raises:
        MofqError: Any input is not valid; all are read before a model runs.
    """
    checkpoint = open_checkpoint(model_source)
    with ExitStack() as stack:
        opened = [
            _open(
                candidate,
                checkpoint,
                stack,
                backend=backend,
                emulated=emulated,
                stats=stats,
                rewritten=rewritten,
            )
            for candidate in candidates
        ]
        runner = None if tasks is None else TaskRunner(tasks)
        unless = None
        if tasks is not None:
            unless = "lm-eval runs a whole model"
        elif backend != "emulate":
            unless = f"the backend {backend!r} changes a whole model"
        largest = max(
            (checkpoint, *(one.base for one in opened)), key=lambda one: model_bytes(one, dtype)
        )
        chosen = choose_execution(execution, largest, dtype=dtype, device=device, unless=unless)
        if chosen.remark is not None and tell is not None:
            tell(chosen.remark)
        if chosen.is_streamed:
            from mofq.delivery.validation.streamed import validate_streamed

            return validate_streamed(
                checkpoint,
                opened,
                text,
                tokens=tokens,
                sequence_length=sequence_length,
                bos=bos,
                dtype=dtype,
                device=device,
                work=work,
                progress=progress,
                tell=tell,
            )
        with OriginalLogits() as logits:
            original = _run_original(
                checkpoint,
                text,
                logits=logits,
                tokens=tokens,
                sequence_length=sequence_length,
                bos=bos,
                dtype=dtype,
                device=device,
                runner=runner,
                progress=progress,
                tell=tell,
            )
            validations = tuple(
                _validate_one(
                    each, original, progress=progress and _part(progress, number, len(opened))
                )
                for number, each in enumerate(opened)
            )
    return validations


def _open(
    source: str | Path | Recipe,
    checkpoint: Checkpoint,
    stack: ExitStack,
    *,
    backend: str,
    emulated: Sequence[str],
    stats: str | Path | None,
    rewritten: Base | None,
) -> Candidate:
    """A candidate, on the model that its recipe is applied to: rewritten, where it says so."""
    recipe = find_recipe(source)
    base = Base(checkpoint, stats)
    if recipe is not None and recipe.rewriting is not None:
        base = rewritten or stack.enter_context(base_of(recipe, checkpoint, stats))
    return open_candidate(
        source, base.checkpoint, backend=backend, emulated=emulated, stats=base.stats
    )


def _part(progress: Progress, number: int, count: int) -> Progress:
    """Takes what is done of one candidate, and tells what is done of all, stage by stage."""
    return lambda stage, done, total: progress(stage, number * total + done, count * total)


@dataclass(frozen=True, slots=True)
class Original:
    """The original after its run, and what it ran on."""

    checkpoint: Checkpoint
    text: Corpus
    windows: Windows  #: of the text
    entropies: tuple[float, ...]
    dtype: str
    device: str
    seconds: float
    logits: OriginalLogits | None = None  #: where they were kept
    runner: TaskRunner | None = None
    task_scores: tuple[TaskScore, ...] = ()


def _run_original(
    checkpoint: Checkpoint,
    text: Corpus,
    *,
    logits: OriginalLogits,
    tokens: int,
    sequence_length: int,
    bos: Bos,
    dtype: str,
    device: str,
    runner: TaskRunner | None,
    progress: Progress | None,
    tell: Callable[[str], None] | None,
) -> Original:
    start = monotonic()
    model = load_model(checkpoint.folder, dtype=dtype, device=device)
    windows = cut_windows(
        checkpoint, model, text, tokens=tokens, sequence_length=sequence_length, bos=bos
    )
    windows.tell_unknown(text, tell)
    entropies = run_original(model, windows.tokens_NT, into=logits, progress=progress)
    return Original(
        checkpoint=checkpoint,
        text=text,
        windows=windows,
        logits=logits,
        entropies=entropies,
        dtype=dtype,
        device=device,
        runner=runner,
        task_scores=() if runner is None else runner.run(model, windows.tokenizer),
        seconds=monotonic() - start,
    )


def _validate_one(
    candidate: Candidate, original: Original, *, progress: Progress | None
) -> Validation:
    start = monotonic()
    model = load_candidate(
        candidate, dtype=original.dtype, device=original.device, progress=progress
    )
    deviations = _enforce(model, candidate, progress=progress)
    with naming_deviations(candidate):
        tokenizer, windows_NT = tokens_of(candidate, original)
        assert original.logits is not None
        scores = compare(model, windows_NT, original=original.logits, progress=progress)
    task_scores: tuple[TaskScore, ...] = ()
    if original.runner is not None:
        task_scores = original.runner.run(model, tokenizer)
    return validation_of(
        candidate,
        original,
        scores=scores,
        deviations=deviations,
        tasks=compare_tasks(task_scores, original.task_scores),
        seconds=monotonic() - start,
    )


def validation_of(
    candidate: Candidate,
    original: Original,
    *,
    scores: Sequence[WindowScore],
    deviations: tuple[Deviation, ...] | None,
    tasks: tuple[TaskResult, ...] = (),
    seconds: float,
) -> Validation:
    """What was measured of a candidate, beside what was predicted.

    Args:
        candidate: That was run.
        original: That it was compared with.
        scores: Of each window.
        deviations: From the recipe; None where nothing is enforced.
        tasks: Of lm-eval.
        seconds: To apply, enforce and run the candidate.
    """
    recipe = candidate.recipe
    windows_NT = original.windows.tokens_NT
    agreement = summarize(scores, original.entropies, sequence_length=windows_NT.shape[1])
    asked = None if recipe is None else recipe.budget.get("kl_nats_per_token")
    budget = float(asked) if isinstance(asked, int | float) else None
    found = Validation(
        lineage=_lineage(candidate, original),
        tokens=windows_NT.numel(),
        kl_nats_per_token=agreement.kl_nats_per_token,
        kl_stderr=agreement.kl_stderr,
        predicted_kl_nats_per_token=None if recipe is None else recipe.kl_nats_per_token,
        predicted_kl_stderr=None if recipe is None else recipe.result.kl_stderr,
        kl_budget_nats_per_token=budget,
        within_kl_budget=None,
        perplexity=agreement.perplexity,
        perplexity_original=agreement.perplexity_original,
        top1_agreement=agreement.top1_agreement,
        bits_per_weight=candidate.bits_per_weight,
        enforced=None if deviations is None else not deviations,
        deviations=deviations or (),
        windows=agreement.windows,
        tasks=tasks,
        predicted_kl_low=None if recipe is None else recipe.result.kl_low,
        predicted_kl_high=None if recipe is None else recipe.result.kl_high,
        is_tuned=recipe is not None and recipe.tuning is not None,
        seconds=seconds,
        seconds_original=original.seconds,
    )
    return found if budget is None else replace(found, within_kl_budget=found.kl_upper <= budget)


def tokens_of(candidate: Candidate, original: Original) -> tuple[PreTrainedTokenizerBase, Tensor]:
    """Tokenizer and windows of a candidate: those of the original but for an exported folder.

    Raises:
        EnforcementError: The folder's tokenizer cuts the text into another number of windows.
    """
    if candidate.folder is None or candidate.recipe is None or candidate.is_foreign:
        return original.windows.tokenizer, original.windows.tokens_NT
    tokenizer = load_tokenizer(candidate.folder.folder)
    windows_NT = original.windows.cut_by(tokenizer)
    if windows_NT.shape != original.windows.tokens_NT.shape:
        raise EnforcementError(
            f"{candidate.source}: its tokenizer makes {windows_NT.numel()} tokens of the text, "
            f"the original's {original.windows.tokens_NT.numel()}, so the two cannot be compared."
        )
    return tokenizer, windows_NT


def _enforce(
    model: PreTrainedModel, candidate: Candidate, *, progress: Progress | None
) -> tuple[Deviation, ...] | None:
    """How a model deviates from its recipe; None where there is nothing to enforce.

    What differs in a folder differs in the model too, and is named once.
    """
    recipe = candidate.recipe
    # What another tool's codes should be is not known.
    if recipe is None or candidate.is_foreign:
        return None
    base = candidate.base
    with open_fits(recipe, candidate.stats, index_sha256=base.index_sha256) as fits:
        in_model = find_deviations(
            model,
            recipe,
            checkpoint=base,
            fits=fits,
            decoded=candidate.folder is not None,
            progress=progress,
        )
    return with_those_of_folder(candidate, in_model)


def with_those_of_folder(
    candidate: Candidate, in_model: Sequence[Deviation]
) -> tuple[Deviation, ...]:
    """The deviations of a candidate's folder, and those of its model that follow from none."""
    named = {one.layer for one in candidate.deviations}
    named |= {name.rpartition(".")[0] for name in named}
    return (*candidate.deviations, *(one for one in in_model if one.layer not in named))


def _lineage(candidate: Candidate, original: Original) -> Lineage:
    folder, text = candidate.folder, original.text
    return Lineage(
        mofq=__version__,
        model=original.checkpoint.name,
        index_sha256=original.checkpoint.index_sha256,
        weights_sha256=hash_weights(original.checkpoint),
        candidate=candidate.source,
        recipe_sha256=candidate.recipe_sha256,
        folder_index_sha256=None if folder is None else folder.index_sha256,
        text=text.source,
        text_sha256=text.sha256,
        dtype=original.dtype,
        device=original.device,
        backend=candidate.backend,
        sequence_length=original.windows.tokens_NT.shape[1],
        bos=bool(original.windows.leading),
        stats_bos=_stats_bos(candidate.recipe),
        stats_sequence_length=_stats_sequence_length(candidate.recipe),
        text_use=None if candidate.recipe is None else candidate.recipe.use_of(text.sha256),
    )


def _stats_bos(recipe: Recipe | None) -> bool | None:
    """Whether the sequences that a recipe was calibrated on began with BOS; None: on none."""
    if recipe is None or recipe.made_by.get("stats_sha256") is None:
        return None
    return bool(recipe.made_by.get("bos"))


def _stats_sequence_length(recipe: Recipe | None) -> int | None:
    """Tokens of each sequence that a recipe was calibrated on; None: on none, or not known."""
    length = None if recipe is None else recipe.made_by.get("sequence_length")
    return None if length is None else int(length)
