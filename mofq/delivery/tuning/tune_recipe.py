"""From a recipe and some text to the recipe with tuned norms and learned codes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from mofq import __version__
from mofq.decision.recipe import Recipe, join_hashes, recipe_text
from mofq.decision.tuning import Tuning, tuned_file
from mofq.delivery.backends import apply_recipe
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.recipe_layers import checked_layers
from mofq.delivery.rewriting.remake import Base
from mofq.delivery.tuning.codes import LearnedCodes, learned_layers, learning_bytes
from mofq.delivery.tuning.norms import find_norms
from mofq.delivery.tuning.resident import Resident
from mofq.delivery.tuning.streamed import open_tuning
from mofq.delivery.tuning.tune import (
    BATCH,
    Split,
    Tunable,
    Tuned,
    split_sequences,
    tune_model,
)
from mofq.delivery.validation.divergence import OriginalLogits, run_original
from mofq.delivery.validation.streamed import drop_unfinished, work_folder
from mofq.evidence.calibration.stats import Plan
from mofq.evidence.code_changes import to_tensors
from mofq.exceptions import CorpusError, RecipeError, option
from mofq.files.progress import Progress, Steps, Tell
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import ModelLayers
from mofq.model.loading import load_model
from mofq.model.streaming.execution import free_bytes

#: Of the memory that is free: the rest is for what a pass keeps.
_OF_FREE = 0.8
#: Fewer sequences that judge say nothing.
_FEWEST_HELD_OUT = 3


@dataclass(frozen=True, slots=True)
class TunedRecipe:
    """A recipe with tuned norms and learned codes, whether or not they help."""

    recipe: Recipe
    tuning: Tuning
    helps: bool  #: whether less KL was measured on what was held out, beyond its error
    note: str | None = None  #: which codes were not learned and why, where they were to be


def tune_recipe(
    original: Checkpoint,
    recipe: Recipe,
    windows: Mapping[str, Tensor],
    *,
    base: Base,
    plan: Plan,
    steps: int,
    codes: bool = True,
    device: str = "cpu",
    is_streamed: bool = False,
    work: Path | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> TunedRecipe:
    """Tune the norms of a recipe's model against the original, and learn its codes and scales.

    Args:
        original: The model as it is.
        recipe: Of ``base``, not tuned.
        windows: Corpus -> token ids, [N, T], int64: some are stepped on, others judge.
        base: What the recipe is applied to.
        plan: Of a calibration on the windows.
        steps: Of four sequences each.
        codes: Whether codes and scales are learned beside norms.
        device: Where the models run, one after the other.
        is_streamed: Whether one decoder layer is in memory at a time, and not the whole model.
        work: Where what is kept between layers lies until all is done, so that a run that was
            stopped goes on; None: in a temporary folder.
        progress: Called with ``"original"`` and ``"tune"``, sequences or layers run, and all of
            them.
        tell: Called with what the disk has to hold.

    Returns:
        The recipe, which names the weights that it is for, and what tuning does on what no step
        saw.

    Raises:
        CorpusError: There are too few sequences.
        RecipeError: The model has neither norms nor codes that can be tuned, or as `apply_recipe`.
        StreamingError: The model cannot be tuned layer by layer.
        MofqError: The disk has too little space, or logits are not finite.
    """
    split = split_sequences(windows, most=steps * BATCH)
    if len(split.held_out_NT) < _FEWEST_HELD_OUT:
        raise CorpusError(
            f"a model is tuned on three sequences of four and judged by the fourth: at least "
            f"{_FEWEST_HELD_OUT} are needed to judge, found {len(split.held_out_NT)}: of a text "
            f"too few windows were cut. Give longer text, a larger {option('sequences')}, or a "
            f"smaller {option('sequence_length')}."
        )
    layers = checked_layers(base.checkpoint, recipe, experts_apart=True)
    asked = _Asked(original, recipe, base, layers, plan, split, steps, codes, device, progress)
    with ExitStack() as stack:
        if is_streamed:
            model, note = _streamed(stack, asked, work=work, tell=tell), None
        else:
            if work is not None:
                drop_unfinished(work)
            model, note = _resident(stack, asked)
        if model.is_empty:
            raise RecipeError(
                f"{recipe.title}: {base.checkpoint.folder} has no norms with weights of their own, "
                f"and no codes that can be learned."
            )
        tuned = tune_model(model, split, steps=steps)
    bound = replace(recipe, weights_sha256=hash_weights(base.checkpoint))
    done = _with_tuned(bound, tuned, split, plan, steps=steps)
    assert done.tuning is not None
    return TunedRecipe(done, done.tuning, tuned.helps, note)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What `tune_recipe` was given, checked."""

    original: Checkpoint
    recipe: Recipe
    base: Base
    layers: ModelLayers  #: of the base
    plan: Plan
    split: Split
    steps: int
    codes: bool
    device: str
    progress: Progress | None


def _resident(stack: ExitStack, asked: _Asked) -> tuple[Tunable, str | None]:
    """The quantized model in memory, after the original; and which codes are not learned."""
    stepped, held_out = (stack.enter_context(OriginalLogits()) for _ in range(2))
    _run_original(asked, into=(stepped, held_out))
    recipe, layers, checkpoint = asked.recipe, asked.layers, asked.base.checkpoint
    stats, device, progress = asked.base.stats, asked.device, asked.progress
    model = load_model(checkpoint.folder, dtype=asked.plan.dtype, device=device)
    apply_recipe(model, recipe, checkpoint=checkpoint, stats=stats, progress=progress)
    norms = find_norms(model, checkpoint, layers.architecture)
    room = _find_room(layers, recipe, device) if asked.codes else _Room(codes=False)
    learned: list[LearnedCodes] = []
    if room.codes:
        with open_fits(recipe, stats, index_sha256=checkpoint.index_sha256) as fits:
            learned = list(
                learned_layers(model, recipe, layers, checkpoint, fits=fits, experts=room.experts)
            )
    found = Resident(model, norms, learned, asked.split, stepped, held_out, asked.steps, progress)
    return found, room.note


def _streamed(stack: ExitStack, asked: _Asked, *, work: Path | None, tell: Tell | None) -> Tunable:
    """The same layer by layer; what a tuning of the same left on the disk is taken."""
    recipe, checkpoint, split = asked.recipe, asked.base.checkpoint, asked.split
    same = {
        "mofq": __version__,
        "models": [[one.index_sha256, hash_weights(one)] for one in (asked.original, checkpoint)],
        "recipe": hashlib.sha256(recipe_text(recipe).encode()).hexdigest(),
        "sequences": [
            hashlib.sha256(one.numpy().tobytes()).hexdigest()
            for one in (split.stepped_NT, split.held_out_NT)
        ],
        "steps": asked.steps,
        "codes": asked.codes,
        "arithmetic": [asked.plan.dtype, asked.device],
    }
    folder = stack.enter_context(work_folder(work, same))
    fits = open_fits(recipe, asked.base.stats, index_sha256=checkpoint.index_sha256)
    return stack.enter_context(
        open_tuning(
            *(asked.original, recipe, checkpoint, split),
            layers=asked.layers,
            fits=stack.enter_context(fits),
            folder=folder,
            steps=asked.steps,
            codes=asked.codes,
            dtype=asked.plan.dtype,
            device=asked.device,
            progress=asked.progress,
            tell=tell,
        )
    )


@dataclass(frozen=True, slots=True)
class _Room:
    """What can be learned in memory."""

    codes: bool
    experts: bool = True
    note: str | None = None  #: why not all


def _find_room(layers: ModelLayers, recipe: Recipe, device: str) -> _Room:
    """What can be learned beside a model that is in memory: all, all but experts, or nothing."""
    needed = learning_bytes(recipe, layers)
    without = learning_bytes(recipe, layers, experts=False)
    free = free_bytes(device)
    if free is None or needed <= _OF_FREE * free:
        return _Room(codes=True)
    takes = (
        f"that takes {needed / 1e9:.3g} GB of memory beside the model, and {free / 1e9:.3g} GB "
        f"are free on {device}"
    )
    if 0 < without <= _OF_FREE * free:
        return _Room(codes=True, experts=False, note=f"No codes of experts are learned: {takes}.")
    return _Room(codes=False, note=f"No codes are learned: {takes}.")


def _run_original(asked: _Asked, *, into: tuple[OriginalLogits, OriginalLogits]) -> None:
    """Keep what the original predicts; it is out of memory afterwards."""
    split = asked.split
    model: PreTrainedModel = load_model(
        asked.original.folder, dtype=asked.plan.dtype, device=asked.device
    )
    step = Steps(asked.progress, "original", len(split.stepped_NT) + len(split.held_out_NT))
    for tokens_NT, logits in zip((split.stepped_NT, split.held_out_NT), into, strict=True):
        run_original(model, tokens_NT, into=logits, progress=lambda *_: step())


def _with_tuned(recipe: Recipe, tuned: Tuned, split: Split, plan: Plan, *, steps: int) -> Recipe:
    tensors = tuned.tensors | to_tensors(tuned.changes)
    content = save({name: tensors[name].contiguous() for name in sorted(tensors)})
    sha256 = hashlib.sha256(content).hexdigest()
    tuning = Tuning(
        file=tuned_file(sha256),
        sha256=sha256,
        decisions_sha256=recipe.decisions_sha256,
        mofq=__version__,
        tensors=len(tuned.tensors),
        layers=len(tuned.changes),
        steps=steps,
        sequences=len(split.stepped_NT),
        sequence_length=plan.sequence_length,
        bos=bool(plan.bos),
        corpora_sha256=join_hashes(one.text_sha256 for one in plan.corpora),
        held_out=len(split.held_out_NT),
        kl_before=float(tuned.before_N.mean()),
        kl_after=float(tuned.after_N.mean()),
        kl_saved_stderr=tuned.saved_stderr,
    )
    return replace(recipe, tuning=tuning, tuned=content)
