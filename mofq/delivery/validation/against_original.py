"""Validates one or several quantized models against one run of the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from torch import Tensor
from transformers import PreTrainedModel

import mofq
from mofq.decision.recipe import Recipe
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.validation.candidates import Candidate, load_candidate, open_candidate
from mofq.delivery.validation.divergence import OriginalLogits, compare, run_original
from mofq.delivery.validation.enforcement import Deviation, find_deviations
from mofq.delivery.validation.report import Lineage, Validation, summarize
from mofq.delivery.validation.tasks import TaskRunner, Tasks, TaskScore, compare_tasks
from mofq.evidence.corpora import Bos, Corpus, leading_tokens, tokenize
from mofq.exceptions import CorpusError
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.loading import load_model, load_tokenizer


def validate(
    model_source: str,
    recipe_or_folder: str | Path | Recipe,
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
    progress: Progress | None = None,
) -> Validation:
    """Validate one candidate; see ``validate_many``."""
    (validation,) = validate_many(
        model_source,
        [recipe_or_folder],
        text,
        tokens=tokens,
        sequence_length=sequence_length,
        bos=bos,
        dtype=dtype,
        device=device,
        tasks=tasks,
        backend=backend,
        emulated=emulated,
        stats=stats,
        progress=progress,
    )
    return validation


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
    progress: Progress | None = None,
) -> tuple[Validation, ...]:
    """Validate quantized models against one run of the original.

    One model is in memory at a time; the original's logits wait in a temporary
    file of tokens times vocabulary times 4 bytes.

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
        stats: The folder that recipes with fitted schemes (``@nats``, ``~gptq``) rest on.
        progress: Called with a stage, what is done of it, and all of it.

    Returns:
        One validation for each candidate, in their order.

    Raises:
        MofqError: Any input is not valid; all are read before a model runs.
    """
    checkpoint = open_checkpoint(model_source)
    opened = [
        open_candidate(candidate, checkpoint, backend=backend, emulated=emulated, stats=stats)
        for candidate in candidates
    ]
    runner = None if tasks is None else TaskRunner(tasks)
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
        )
        return tuple(_validate_one(each, original, progress=progress) for each in opened)


@dataclass(frozen=True, slots=True)
class _Original:
    """The original after its run, and what it ran on."""

    checkpoint: Checkpoint
    text: Corpus
    windows_NT: Tensor
    bos: bool  #: whether the windows begin with it
    logits: OriginalLogits
    entropies: tuple[float, ...]
    dtype: str
    device: str
    runner: TaskRunner | None
    task_scores: tuple[TaskScore, ...]
    seconds: float


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
) -> _Original:
    start = monotonic()
    tokenizer = load_tokenizer(checkpoint.folder)
    model = load_model(checkpoint.folder, dtype=dtype, device=device)
    check_context(model, sequence_length)
    leading = leading_tokens(tokenizer, bos)
    windows_NT = tokenize(
        text,
        tokenizer,
        tokens=tokens,
        sequence_length=sequence_length,
        leading=leading,
        vocabulary_size=model.get_input_embeddings().weight.shape[0],
    )
    entropies = run_original(model, windows_NT, into=logits, progress=progress)
    return _Original(
        checkpoint=checkpoint,
        text=text,
        windows_NT=windows_NT,
        bos=bool(leading),
        logits=logits,
        entropies=entropies,
        dtype=dtype,
        device=device,
        runner=runner,
        task_scores=() if runner is None else runner.run(model, tokenizer),
        seconds=monotonic() - start,
    )


def _validate_one(
    candidate: Candidate, original: _Original, *, progress: Progress | None
) -> Validation:
    start = monotonic()
    recipe, checkpoint = candidate.recipe, original.checkpoint
    model = load_candidate(
        candidate, checkpoint, dtype=original.dtype, device=original.device, progress=progress
    )
    deviations = _enforce(model, candidate, checkpoint, progress=progress)
    scores = compare(model, original.windows_NT, original=original.logits, progress=progress)
    agreement = summarize(scores, original.entropies, sequence_length=original.windows_NT.shape[1])
    task_scores: tuple[TaskScore, ...] = ()
    if original.runner is not None:
        task_scores = original.runner.run(model, load_tokenizer(checkpoint.folder))
    budget = _number(recipe, "budget", "kl_nats_per_token")
    return Validation(
        lineage=_lineage(candidate, original),
        tokens=original.windows_NT.numel(),
        kl_nats_per_token=agreement.kl_nats_per_token,
        kl_stderr=agreement.kl_stderr,
        predicted_kl_nats_per_token=_number(recipe, "result", "kl_nats_per_token"),
        predicted_kl_stderr=_number(recipe, "result", "kl_stderr"),
        kl_budget_nats_per_token=budget,
        within_kl_budget=None if budget is None else agreement.kl_nats_per_token <= budget,
        perplexity=agreement.perplexity,
        perplexity_original=agreement.perplexity_original,
        top1_agreement=agreement.top1_agreement,
        bits_per_weight=candidate.bits_per_weight,
        enforced=None if deviations is None else not deviations,
        deviations=deviations or (),
        windows=agreement.windows,
        tasks=compare_tasks(task_scores, original.task_scores),
        seconds=monotonic() - start,
        seconds_original=original.seconds,
    )


def _enforce(
    model: PreTrainedModel,
    candidate: Candidate,
    checkpoint: Checkpoint,
    *,
    progress: Progress | None,
) -> tuple[Deviation, ...] | None:
    """How a model deviates from its recipe; None where there is nothing to enforce."""
    recipe = candidate.recipe
    # What another tool's codes should be is not known.
    if recipe is None or candidate.is_foreign:
        return None
    with open_fits(recipe, candidate.stats, index_sha256=checkpoint.index_sha256) as fits:
        return find_deviations(model, recipe, checkpoint=checkpoint, fits=fits, progress=progress)


def _lineage(candidate: Candidate, original: _Original) -> Lineage:
    folder = candidate.folder
    return Lineage(
        mofq=mofq.__version__,
        model=original.checkpoint.name,
        index_sha256=original.checkpoint.index_sha256,
        weights_sha256=hash_weights(original.checkpoint),
        candidate=candidate.source,
        recipe_sha256=candidate.recipe_sha256,
        folder_index_sha256=None if folder is None else folder.index_sha256,
        text=original.text.source,
        text_sha256=original.text.sha256,
        dtype=original.dtype,
        device=original.device,
        backend=candidate.backend,
        sequence_length=original.windows_NT.shape[1],
        bos=original.bos,
        stats_bos=_stats_bos(candidate.recipe),
    )


def _stats_bos(recipe: Recipe | None) -> bool | None:
    """Whether the sequences that a recipe was calibrated on began with BOS; None: on none."""
    if recipe is None or recipe.made_by.get("stats_sha256") is None:
        return None
    return bool(recipe.made_by.get("bos"))


def _number(recipe: Recipe | None, part: str, key: str) -> float | None:
    value = None if recipe is None else getattr(recipe, part).get(key)
    return None if value is None else float(value)


def check_context(model: PreTrainedModel, sequence_length: int) -> None:
    """Refuse windows longer than what the model was made for.

    Raises:
        CorpusError: They are.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise CorpusError(
            f"a sequence length of {sequence_length} is more than the model's context of "
            f"{longest}. Give a shorter one."
        )
