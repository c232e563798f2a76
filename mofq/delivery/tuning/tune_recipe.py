"""From a recipe and some text to the recipe with tuned norms and learned codes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from mofq import __version__
from mofq.decision.recipe import Recipe, join_hashes
from mofq.decision.tuning import Tuning, tuned_file
from mofq.delivery.backends import apply_recipe
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.recipe_layers import checked_layers
from mofq.delivery.rewriting.remake import Base
from mofq.delivery.tuning.codes import LearnedCodes, learned_layers, learning_bytes
from mofq.delivery.tuning.norms import find_norms
from mofq.delivery.tuning.resident import Resident
from mofq.delivery.tuning.tune import BATCH, Split, Tuned, split_sequences, tune_model
from mofq.delivery.validation.divergence import OriginalLogits, run_original
from mofq.evidence.calibration.stats import Plan
from mofq.evidence.code_changes import to_tensors
from mofq.exceptions import CorpusError, RecipeError, option
from mofq.files.progress import Progress, Steps
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
    note: str | None = None  #: why no codes were learned, where they were to be


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
    progress: Progress | None = None,
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
        progress: Called with ``"original"`` and ``"tune"``, sequences run, and all of them.

    Returns:
        The recipe, which names the weights that it is for, and what tuning does on what no step
        saw.

    Raises:
        CorpusError: There are too few sequences.
        RecipeError: The model has neither norms nor codes that can be tuned, or as `apply_recipe`.
        MofqError: There is no room for the original's logits, or logits are not finite.
    """
    split = split_sequences(windows, most=steps * BATCH)
    if len(split.held_out_NT) < _FEWEST_HELD_OUT:
        raise CorpusError(
            f"a model is tuned on three sequences of four and judged by the fourth: at least "
            f"{_FEWEST_HELD_OUT} are needed to judge, found {len(split.held_out_NT)}. Give longer "
            f"text, or a larger {option('sequences')}."
        )
    with OriginalLogits() as stepped, OriginalLogits() as held_out:
        _run_original(original, split, plan, device, into=(stepped, held_out), progress=progress)
        model = load_model(base.checkpoint.folder, dtype=plan.dtype, device=device)
        apply_recipe(model, recipe, checkpoint=base.checkpoint, stats=base.stats, progress=progress)
        layers = checked_layers(base.checkpoint, recipe, experts_apart=True)
        norms = find_norms(model, base.checkpoint, layers.architecture)
        note = _why_no_codes(layers, recipe, device) if codes else None
        learned: list[LearnedCodes] = []
        if codes and note is None:
            index_sha256 = base.checkpoint.index_sha256
            with open_fits(recipe, base.stats, index_sha256=index_sha256) as fits:
                learned = list(learned_layers(model, recipe, layers, base.checkpoint, fits=fits))
        if not norms and not learned:
            raise RecipeError(
                f"{recipe.title}: {base.checkpoint.folder} has no norms with weights of their own, "
                f"and no codes that can be learned."
            )
        resident = Resident(model, norms, learned, split, stepped, held_out, steps, progress)
        tuned = tune_model(resident, split, steps=steps)
    bound = replace(recipe, weights_sha256=hash_weights(base.checkpoint))
    done = _with_tuned(bound, tuned, split, plan, steps=steps)
    assert done.tuning is not None
    return TunedRecipe(done, done.tuning, tuned.helps, note)


def _why_no_codes(layers: ModelLayers, recipe: Recipe, device: str) -> str | None:
    """Why codes cannot be learned beside a model that is in memory; None where they can be."""
    needed = learning_bytes(recipe, layers)
    free = free_bytes(device)
    if free is None or needed <= _OF_FREE * free:
        return None
    return (
        f"that takes {needed / 1e9:.3g} GB of memory beside the model, and {free / 1e9:.3g} GB "
        f"are free on {device}"
    )


def _run_original(
    original: Checkpoint,
    split: Split,
    plan: Plan,
    device: str,
    *,
    into: tuple[OriginalLogits, OriginalLogits],
    progress: Progress | None,
) -> None:
    """Keep what the original predicts; it is out of memory afterwards."""
    model: PreTrainedModel = load_model(original.folder, dtype=plan.dtype, device=device)
    step = Steps(progress, "original", len(split.stepped_NT) + len(split.held_out_NT))
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
