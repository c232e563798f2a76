"""From a recipe and some text to the recipe with tuned norms and learned codes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save
from scipy.special import stdtrit
from torch import Tensor
from transformers import PreTrainedModel

from mofq import __version__
from mofq.decision.recipe import (
    Recipe,
    join_hashes,
    load_recipe,
    recipe_text,
    write_recipe,
)
from mofq.decision.tuning import Tuning, tuned_file
from mofq.delivery.backends import apply_recipe
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.recipe_layers import checked_layers
from mofq.delivery.rewriting.remake import Base
from mofq.delivery.tuning.codes import learning_bytes
from mofq.delivery.tuning.compensate import SeenTokens, compensate, has_compensated
from mofq.delivery.tuning.products import copies_bytes
from mofq.delivery.tuning.resident import Resident
from mofq.delivery.tuning.streamed import Streamed, open_tuning
from mofq.delivery.tuning.tune import (
    BATCH,
    Split,
    Tunable,
    Tuned,
    is_held_out,
    split_sequences,
    tune_model,
)
from mofq.delivery.tuning.unit_states import has_begun
from mofq.delivery.validation.divergence import OriginalLogits, run_original
from mofq.delivery.validation.streamed import work_folder
from mofq.evidence.calibration.stats import Plan, check_same_model, read_stats
from mofq.evidence.code_changes import CodeChanges, to_tensors
from mofq.evidence.fits import Fits
from mofq.exceptions import (
    CorpusError,
    RecipeError,
    Remark,
    StatsError,
    StreamingError,
    option,
)
from mofq.files.progress import Progress, Steps, Tell
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import ModelLayers
from mofq.model.loading import load_model
from mofq.model.streaming.execution import free_bytes, pass_bytes
from mofq.numbers.processor import multiplies_bfloat16

#: Of the memory that is free, and no less than a pass takes is left.
_OF_FREE = 0.8
#: Fewer sequences that judge say nothing.
_FEWEST_HELD_OUT = 3
#: How sure it must be that something is saved: the quantile of Student's t, a bound of the 95 %
#: interval of a mean of few sequences.
_SURE = 0.975
#: In the place of what a tuning layer by layer kept, once it is done.
_DONE = "tuned.yaml"


@dataclass(frozen=True, slots=True)
class TunedRecipe:
    """A recipe with tuned norms and learned codes, whether or not they help."""

    recipe: Recipe
    tuning: Tuning

    @property
    def helps(self) -> bool:
        """Whether less KL was measured on what was held out, by more than chance."""
        one = self.tuning
        sure = float(stdtrit(one.held_out - 1, _SURE)) * one.kl_saved_stderr
        return one.kl_before - one.kl_after > sure


def tune_recipe(
    original: Checkpoint,
    recipe: Recipe,
    windows: Mapping[str, Tensor],
    *,
    base: Base,
    plan: Plan,
    steps: int,
    judging: Mapping[str, Tensor] = MappingProxyType({}),
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
        windows: Corpus -> token ids, [N, T], int64, of a calibration: they are tuned on.
        base: What the recipe is applied to.
        plan: Of a calibration on the windows.
        judging: Corpus -> other token ids of the same texts, which judge; empty: every fourth
            of the windows does.
        steps: Of four sequences each; 0: codes compensate the errors of layers before, and no more.
        codes: Whether codes compensate, and codes and scales are learned beside norms.
        device: Where the models run, one after the other.
        is_streamed: Whether one decoder layer is in memory at a time, and not the whole model.
        work: Where what is kept between layers lies, so that a run that was stopped goes on; None:
            in a temporary folder. What was found stays there, small, until `drop_unfinished`: it
            is not lost where whoever asked for it cannot write it.
        progress: Called with ``"compensate"``, ``"original"`` and ``"tune"``, sequences or layers
            run, and all of them.
        tell: Called with what the disk has to hold, and which codes are not learned and why.

    Returns:
        The recipe, which names the weights that it is for, and what tuning does on what no step
        saw.

    Raises:
        CorpusError: There are too few sequences.
        RecipeError: The model has neither norms nor codes that can be tuned, or no codes that can
            compensate where nothing else is asked for, or as `apply_recipe`.
        StreamingError: The model cannot be tuned layer by layer.
        MofqError: The disk has too little space, or logits are not finite.
    """
    split = split_sequences(windows, judging, most=steps * BATCH)
    if len(split.held_out_NT) < _FEWEST_HELD_OUT:
        raise CorpusError(
            f"a model is tuned on three sequences of four and judged by the fourth: at least "
            f"{_FEWEST_HELD_OUT} are needed to judge, found {len(split.held_out_NT)}: of a text "
            f"too few windows were cut. Give longer text, a larger {option('sequences')}, or a "
            f"smaller {option('sequence_length')}."
        )
    if not steps and not codes:
        raise RecipeError(
            f"{recipe.title}: {option('steps', 0)} compensates by codes, and "
            f"{option('what', 'norms')} leaves them as they are. Take {option('what', 'all')}, or "
            f"at least one step."
        )
    layers = checked_layers(base.checkpoint, recipe, experts_apart=True)
    with ExitStack() as stack:
        index_sha256 = base.checkpoint.index_sha256
        fits = stack.enter_context(open_fits(recipe, base.stats, index_sha256=index_sha256))
        asked = _Asked(
            *(original, recipe, base, fits, layers, plan, windows, split, bool(judging)),
            *(steps, codes, device, progress, tell),
        )
        folder = None
        if is_streamed:
            folder = stack.enter_context(work_folder(work, asked.identity()))
            if (folder / _DONE).exists():
                return _tuned_recipe(replace(load_recipe(folder / _DONE), file=recipe.file))
        start = _compensated(asked, folder) if codes else {}
        judgements = 1 + bool(start) + bool(steps)
        model: Tunable
        if folder is None:
            model = _resident(stack, asked, judgements)
        else:
            model = _streamed(stack, asked, folder, judgements)
        tuned = tune_model(model, split, steps=steps, start=start)
        bound = replace(recipe, weights_sha256=hash_weights(base.checkpoint))
        done = _with_tuned(bound, tuned, split, plan)
        if folder is not None:
            _keep_alone(done, folder)
    return _tuned_recipe(done)


def _tuned_recipe(recipe: Recipe) -> TunedRecipe:
    assert recipe.tuning is not None
    return TunedRecipe(recipe, recipe.tuning)


def _keep_alone(recipe: Recipe, folder: Path) -> None:
    """Have a recipe in a folder, and then nothing else."""
    write_recipe(recipe, folder / _DONE)
    assert recipe.tuning is not None
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_DONE, recipe.tuning.file):
            path.unlink()


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What `tune_recipe` was given, checked."""

    original: Checkpoint
    recipe: Recipe
    base: Base
    fits: Fits | None  #: of its stats, where a scheme is fitted
    layers: ModelLayers  #: of the base
    plan: Plan
    windows: Mapping[str, Tensor]
    split: Split
    is_apart: bool  #: whether what judges is other text than the windows
    steps: int
    codes: bool
    device: str
    progress: Progress | None
    tell: Tell | None

    def identity(self) -> object:
        """All that decides what is found layer by layer."""
        return {
            "mofq": __version__,
            "models": [
                [one.index_sha256, hash_weights(one)]
                for one in (self.original, self.base.checkpoint)
            ],
            "recipe": hashlib.sha256(recipe_text(self.recipe).encode()).hexdigest(),
            "stats": None if self.fits is None else self.fits.stats.sha256,
            "seen": _sha256_of(self.base.stats),
            "sequences": [
                hashlib.sha256(one.numpy().tobytes()).hexdigest()
                for one in (*self.windows.values(), self.split.stepped_NT, self.split.held_out_NT)
            ],
            "steps": self.steps,
            "codes": self.codes,
            "arithmetic": [
                self.plan.dtype,
                self.device,
                multiplies_bfloat16(torch.device(self.device)),
            ],
        }


def _sha256_of(stats: str | Path | None) -> str | None:
    """Of statistics; None where there are none, which `_compensated` tells."""
    with suppress(StatsError):
        return None if stats is None else read_stats(stats).sha256
    return None


def _resident(stack: ExitStack, asked: _Asked, judgements: int) -> Resident:
    """The quantized model in memory, which is judged so often."""
    stepped, held_out = (stack.enter_context(OriginalLogits()) for _ in range(2))
    _run_original(asked, into=(stepped, held_out))
    recipe, checkpoint, split = asked.recipe, asked.base.checkpoint, asked.split
    model = load_model(checkpoint.folder, dtype=asked.plan.dtype, device=asked.device)
    apply_recipe(
        *(model, recipe),
        checkpoint=checkpoint,
        stats=asked.base.stats,
        progress=asked.progress,
    )
    room = _find_room(asked) if asked.codes and asked.steps else _Room(codes=False)
    if room.note and asked.tell is not None:
        asked.tell(Remark(room.note))
    total = asked.steps * BATCH + judgements * len(split.held_out_NT)
    return Resident(
        *(model, recipe, asked.layers, checkpoint, asked.fits, split, stepped, held_out),
        *(asked.steps, room.codes, room.experts, Steps(asked.progress, "tune", total)),
    )


def _compensated(asked: _Asked, folder: Path | None) -> dict[str, CodeChanges]:
    """What makes up for the errors of layers before, where the statistics say enough.

    Args:
        asked: What was asked.
        folder: Has what was done before, and what is kept between layers; None: a temporary one.

    Raises:
        RecipeError: They do not, and nothing else is asked for.
    """
    reason = None
    with ExitStack() as stack:
        try:
            found = None if asked.base.stats is None else read_stats(asked.base.stats)
            if found is None:
                reason = "there are no statistics"
            elif folder is not None and has_begun(folder) and not has_compensated(folder):
                reason = "steps that were made without it go on"
            elif not _is_of_windows(found.plan, asked.plan):
                reason = (
                    f"{found.folder} is not of these sequences: {option('corpora')}, "
                    f"{option('sequences')}, {option('sequence_length')} and {option('bos')} are "
                    f"to be those of `mofq calibrate`"
                )
            else:
                base = asked.base.checkpoint
                check_same_model(found, base, weights_sha256=hash_weights(base))
                seen = stack.enter_context(Fits(found))
                changes = compensate(
                    asked.base.checkpoint,
                    asked.recipe,
                    list(_stepped(asked.windows, found.plan, asked.is_apart)),
                    layers=asked.layers,
                    fits=asked.fits,
                    seen=seen,
                    dtype=asked.plan.dtype,
                    device=asked.device,
                    work=folder,
                    progress=asked.progress,
                    tell=asked.tell,
                )
                if changes:
                    return changes
                reason = "no layer outside of experts has codes and enough tokens for that"
        except (StatsError, StreamingError) as error:
            reason = error.template.rstrip(".")
    _not_compensated(asked, reason)
    return {}


def _not_compensated(asked: _Asked, reason: str | None) -> None:
    """Tell why codes do not compensate, where they were to.

    Raises:
        RecipeError: Nothing else is asked for.
    """
    said = f"Codes do not compensate the errors of layers before: {reason}."
    if not asked.steps:
        raise RecipeError(f"{asked.recipe.title}: {said}")
    if asked.codes and asked.tell is not None:
        asked.tell(Remark(said))


def _is_of_windows(plan: Plan, other: Plan) -> bool:
    """Whether two calibrations run the very same sequences."""
    one, two = (
        (
            [(corpus.name, corpus.text_sha256, corpus.sequences) for corpus in each.corpora],
            each.sequence_length,
            each.bos,
        )
        for each in (plan, other)
    )
    return one == two


def _stepped(windows: Mapping[str, Tensor], plan: Plan, is_apart: bool) -> Iterator[SeenTokens]:
    """The sequences that do not judge, of those whose inputs the statistics have."""
    for corpus, tokens_NT in windows.items():
        known = plan.corpus(corpus)
        for index in range(known.sequences) if plan.inputs else known.kept_indices:
            if is_apart or not is_held_out(index):
                yield SeenTokens(corpus, index, tokens_NT[index])


def _streamed(stack: ExitStack, asked: _Asked, folder: Path, judgements: int) -> Streamed:
    """The same layer by layer; what a tuning of the same left in the folder is taken."""
    return stack.enter_context(
        open_tuning(
            *(asked.original, asked.recipe, asked.base.checkpoint, asked.split),
            layers=asked.layers,
            fits=asked.fits,
            folder=folder,
            steps=asked.steps,
            codes=asked.codes,
            judgements=judgements,
            dtype=asked.plan.dtype,
            device=asked.device,
            progress=asked.progress,
            tell=asked.tell,
        )
    )


@dataclass(frozen=True, slots=True)
class _Room:
    """What can be learned in memory."""

    codes: bool
    experts: bool = True
    note: str | None = None  #: why not all


def _find_room(asked: _Asked) -> _Room:
    """What can be learned beside a model that is in memory: all, all but experts, or nothing."""
    layers, recipe, device = asked.layers, asked.recipe, asked.device
    copies = copies_bytes(asked.base.checkpoint, dtype=asked.plan.dtype, device=device)
    needed = learning_bytes(recipe, layers)
    without = learning_bytes(recipe, layers, experts=False)
    # Gradients of the sequences before are there beside the copies of this one.
    needed, without = (one and one + copies for one in (needed, without))
    free = free_bytes(device)
    if free is None:
        return _Room(codes=True)
    passes = pass_bytes(asked.base.checkpoint, layers, asked.plan.sequence_length) // 2
    left = min(_OF_FREE * free, free - passes)
    if needed <= left:
        return _Room(codes=True)
    takes = (
        f"that takes {needed / 1e9:.3g} GB of memory beside the model, a sequence "
        f"{passes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free on {device}"
    )
    if 0 < without <= left:
        return _Room(codes=True, experts=False, note=f"No codes of experts are learned: {takes}.")
    return _Room(codes=False, note=f"No codes are learned: {takes}.")


def _run_original(asked: _Asked, *, into: tuple[OriginalLogits, OriginalLogits]) -> None:
    """Keep what the original predicts; it is out of memory afterwards."""
    split = asked.split
    model: PreTrainedModel = load_model(
        asked.original.folder, dtype=asked.plan.dtype, device=asked.device
    )
    every = [(split.stepped_NT, into[0])] if asked.steps else []
    every.append((split.held_out_NT, into[1]))
    step = Steps(asked.progress, "original", sum(len(tokens_NT) for tokens_NT, _ in every))
    for tokens_NT, logits in every:
        run_original(model, tokens_NT, into=logits, progress=lambda *_: step())


def _with_tuned(recipe: Recipe, tuned: Tuned, split: Split, plan: Plan) -> Recipe:
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
        compensated=tuned.compensated,
        steps=tuned.steps,
        sequences=len(split.stepped_NT),
        sequence_length=plan.sequence_length,
        bos=bool(plan.bos),
        corpora_sha256=join_hashes(one.text_sha256 for one in plan.corpora),
        held_out=len(split.held_out_NT),
        # Of next to none a sum over the vocabulary may be less.
        kl_before=max(0.0, float(tuned.before_N.mean())),
        kl_after=max(0.0, float(tuned.after_N.mean())),
        kl_saved_stderr=tuned.saved_stderr,
    )
    return replace(recipe, tuning=tuning, tuned=content)
