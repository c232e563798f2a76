"""Calibration: one forward and one backward pass for each sequence."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.evidence.calibration.capture import Captured, capture_layers
from mofq.evidence.calibration.captured_place import captured_place
from mofq.evidence.calibration.gains import gains_path, write_gains
from mofq.evidence.calibration.routing import routing_path, run_margins, write_routing
from mofq.evidence.calibration.sequence_file import (
    inputs_path,
    is_complete,
    sequence_path,
    write_sequence,
)
from mofq.evidence.calibration.stats import (
    CorpusPlan,
    Plan,
    Stats,
    finish_stats,
    has_gains,
    open_plan,
)
from mofq.evidence.corpora import CORPUS_NAME, check_context
from mofq.exceptions import CorpusError, StatsError, option
from mofq.files.progress import Progress
from mofq.model.layers import PARTS, ModelLayers
from mofq.model.streaming.send_to_device import send
from mofq.model.streaming.weights import has_values

#: Positions whose scores are drawn at once.
_SCORE_ROWS = 64


def calibrate(
    model: PreTrainedModel,
    layers: ModelLayers,
    *,
    plan: Plan,
    windows: Mapping[str, Tensor],
    folder: Path,
    progress: Progress | None = None,
) -> Stats:
    """Run every sequence of every corpus and write the stats folder.

    What runs backward is a random vector at every position, whose covariance is the Fisher
    information of the model's own distribution there (`sample_scores`). So the gradients make
    an unbiased sample of the Fisher information of the whole sequence.

    Args:
        model: Frozen, in eval mode, bfloat16 or float32.
        layers: Of its checkpoint; those in fusion groups are kept.
        plan: What is computed; a folder begun with the same plan is continued.
        windows: Corpus name -> token ids, [sequences, sequence_length], int64.
        folder: Where the stats go.
        progress: Called with corpus, sequences done, sequences in all.

    Returns:
        The finished stats.

    Raises:
        StatsError: The model is in float16 or in training mode, the folder belongs to another
            plan or another run, a number is not finite, or the disk is full.
        CorpusError: The windows do not fit the plan or the model.

    Source: the Fisher information as the second-order expansion of KL, S. Amari, "Natural
    gradient works efficiently in learning", 1998, section 3.
    """
    check_model(model, plan)
    for corpus in plan.corpora:
        check_windows(model, windows[corpus.name], corpus, plan)
    with open_plan(folder, plan) as begun:
        for corpus in plan.corpora:
            (folder / corpus.name).mkdir(exist_ok=True)
        run_and_write(
            model,
            layers,
            planned_sequences(plan, windows),
            plan=plan,
            folder=folder,
            progress=progress,
        )
        return finish_stats(folder, begun)


def planned_sequences(
    plan: Plan, windows: Mapping[str, Tensor]
) -> list[tuple[CorpusPlan, int, Tensor]]:
    """Corpus, index in it and token ids [T] of every sequence, in the plan's order."""
    return [
        (corpus, index, windows[corpus.name][index])
        for corpus in plan.corpora
        for index in range(corpus.sequences)
    ]


def run_and_write(
    model: PreTrainedModel,
    layers: ModelLayers,
    sequences: Sequence[tuple[CorpusPlan, int, Tensor]],
    *,
    plan: Plan,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Run sequences, those that are there already left out, and write what is kept of each.

    Args:
        model: As `calibrate` has it.
        layers: Of its checkpoint.
        sequences: Corpus, index in it, token ids [T].
        plan: What is computed.
        folder: That holds a folder for each corpus.
        progress: Called with corpus, sequences done, sequences in all.
    """
    layer_names = kept_layers(layers, plan)
    with capture_layers(
        model,
        layers,
        kv_cache=bool(plan.kv_cache),
        routing=bool(plan.routing),
        place=captured_place(model, [layers], plan),
    ) as captured:
        for corpus, index, token_T in sequences:
            if not is_done(folder, plan, corpus, index):
                captured.clear()
                seeds = seeds_of(plan, corpus, index)
                if plan.routing:
                    run_sequence(model, token_T, seeds, keep_graph=True)
                    seed = score_seed(plan.seed, corpus.name, index, plan.draws)
                    routing = run_margins(captured, seed=seed)
                    write_routing(routing_path(folder, corpus.name, index), routing)
                else:
                    run_sequence(model, token_T, seeds)
                _write(folder, plan, corpus, index, captured=captured, layer_names=layer_names)
            if progress is not None:
                progress(corpus.name, index + 1, corpus.sequences)


def kept_layers(layers: ModelLayers, plan: Plan) -> list[str]:
    """The names under which something is kept, in order: layers, then parts of caches."""
    names = [layer.name for layer in layers.grouped_layers]
    if plan.kv_cache:
        names += [cache.part(part) for cache in layers.caches for part in PARTS]
    return names


def check_model(model: PreTrainedModel, plan: Plan) -> None:
    """Refuse a model that does not fit the plan, or that is not ready for gradients."""
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if "float16" in dtypes or plan.dtype == "float16":
        raise StatsError(
            f"gradients underflow in float16. Use {option('dtype', 'bfloat16')} or float32."
        )
    if plan.dtype not in dtypes:
        raise StatsError(
            f"the plan's dtype is {plan.dtype}, and the model's {', '.join(sorted(dtypes))}. "
            f"Load the model in the dtype that the plan says."
        )
    if model.training:
        raise StatsError("the model is in training mode, where dropout adds noise. Call eval().")


def check_windows(model: PreTrainedModel, token_NT: Tensor, corpus: CorpusPlan, plan: Plan) -> None:
    """Refuse token ids that do not fit the plan or the model."""
    where = f"corpus {corpus.name!r}"
    if not re.match(CORPUS_NAME, corpus.name):
        raise CorpusError(
            f"{where}: the name is that of a folder, so it has no slash and does not begin "
            f"with a dot. Write {option('corpora')} NAME={corpus.source}."
        )
    if token_NT.shape != (corpus.sequences, plan.sequence_length):
        raise CorpusError(
            f"{where}: needed {corpus.sequences} sequences of {plan.sequence_length} tokens, "
            f"found {list(token_NT.shape)}."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(token_NT.min()) < 0 or int(token_NT.max()) >= vocabulary:
        raise CorpusError(
            f"{where}: the tokens run from {int(token_NT.min())} to {int(token_NT.max())}, and the "
            f"model's vocabulary has {vocabulary}. Use the model's own tokenizer."
        )
    check_context(model, plan.sequence_length)


def is_done(
    folder: Path, plan: Plan, corpus: CorpusPlan, index: int, *, with_samples: bool = True
) -> bool:
    """Whether all that is kept of a sequence is there."""
    if plan.routing and not routing_path(folder, corpus.name, index).exists():
        return False
    if has_gains(plan, corpus) and not gains_path(folder, corpus.name, index).exists():
        return False
    path = samples_path(folder, plan, corpus, index)
    return not with_samples or path is None or is_complete(path)


def samples_path(folder: Path, plan: Plan, corpus: CorpusPlan, index: int) -> Path | None:
    """Where what is kept of a sequence is: its samples, or its inputs; None: nowhere."""
    if index in corpus.kept_indices:
        return sequence_path(folder, corpus.name, index)
    return inputs_path(folder, corpus.name, index) if plan.inputs else None


def _write(
    folder: Path,
    plan: Plan,
    corpus: CorpusPlan,
    index: int,
    *,
    captured: Captured,
    layer_names: Sequence[str],
) -> None:
    if has_gains(plan, corpus):
        write_gains(gains_path(folder, corpus.name, index), captured, layer_names)
    path = samples_path(folder, plan, corpus, index)
    if path is not None:
        is_kept = index in corpus.kept_indices
        write_sequence(path, captured, layer_names, inputs_alone=not is_kept)
        others = (
            samples_path(folder, plan, corpus, other)
            for other in range(index + 1, corpus.sequences)
            if (other in corpus.kept_indices) == is_kept  # the others have another size
        )
        left = sum(other is not None and not is_complete(other) for other in others)
        _check_disk(folder, path, left=left)


def _check_disk(folder: Path, written: Path, *, left: int) -> None:
    """Stop after the first sequence where the disk cannot take the rest of its corpus."""
    needed, free = left * written.stat().st_size, shutil.disk_usage(folder).free
    if needed > free:
        raise StatsError(
            f"{folder}: {left} more sequences need {needed:,} bytes, found {free:,} free. What is "
            f"there is kept; free some space and run the same command again."
        )


def run_sequence(
    model: PreTrainedModel, token_T: Tensor, seeds: Sequence[int], *, keep_graph: bool = False
) -> None:
    """One forward pass, and one backward pass for each draw of scores.

    Args:
        model: Frozen, with gradients started at its embeddings.
        token_T: Token ids, [T], int64.
        seeds: One for each draw.
        keep_graph: Whether something else will run backward behind them.

    Raises:
        StatsError: The logits are not finite; the message names a weight that is not.
    """
    device = model.get_input_embeddings().weight.device
    logits_TV = model(token_T[None].to(device)).logits[0]
    if not torch.isfinite(logits_TV.detach()).all():
        raise infinite_logits(model)
    for draw, seed in enumerate(seeds):
        score_TV = sample_scores(logits_TV.detach(), seed=seed)
        logits_TV.backward(score_TV, retain_graph=keep_graph or draw < len(seeds) - 1)


def infinite_logits(model: PreTrainedModel) -> StatsError:
    """The error, with a weight that is the reason if one in memory is."""
    where = f"All its weights are: use {option('dtype', 'float32')}."
    for name, parameter in model.named_parameters():
        if has_values(parameter) and not torch.isfinite(parameter).all():
            where = (
                f"The weight {name} is not: the checkpoint is damaged, or its training diverged."
            )
            break
    return StatsError(f"the model's logits are not finite. {where}")


def sample_scores(logits_TV: Tensor, *, seed: int) -> Tensor:
    """Sample, at each position, a gradient of the loss with respect to the logits.

    With probabilities ``p`` and independent random signs ``s``, one for each word of the
    vocabulary, it is ``u = sqrt(p) s - p sum(sqrt(p) s)``. Its mean is zero and its covariance
    ``diag(p) - p p^T``, the Fisher information, as that of ``p - onehot(y)`` with a label ``y``
    sampled from ``p``. But a label speaks of one word, and a rare one weighs heavily; signs
    speak of all words at once, and so say the same with less noise (docs/sensitivity.md). They
    are drawn on the CPU: they are the same on every device.

    Args:
        logits_TV: [tokens, vocabulary].
        seed: Of this sequence and draw.

    Returns:
        [tokens, vocabulary], of the device and dtype of the logits.

    Source: random signs for the trace of a matrix, M. F. Hutchinson, "A stochastic estimator of
    the trace of the influence matrix for Laplacian smoothing splines", 1989; ``u`` is a square
    root of the Fisher information times them.
    """
    generator = torch.Generator().manual_seed(seed)
    score_TV = torch.empty_like(logits_TV)
    for start in range(0, logits_TV.shape[0], _SCORE_ROWS):
        log_p_RV = logits_TV[start : start + _SCORE_ROWS].float().log_softmax(-1)
        sign_RV = torch.randint(2, log_p_RV.shape, generator=generator, dtype=torch.int8)
        sign_RV = send(sign_RV, log_p_RV.device)  # and draws on while the device works
        root_RV = (log_p_RV / 2).exp() * (2 * sign_RV - 1)
        mean_R1 = root_RV.sum(-1, keepdim=True)
        score_TV[start : start + _SCORE_ROWS] = root_RV - log_p_RV.exp() * mean_R1
    return score_TV


def seeds_of(plan: Plan, corpus: CorpusPlan, sequence: int) -> list[int]:
    """The seeds of a sequence, one for each draw."""
    return [score_seed(plan.seed, corpus.name, sequence, draw) for draw in range(plan.draws)]


def score_seed(seed: int, corpus: str, sequence: int, draw: int) -> int:
    """A seed for one draw: the same wherever and in whatever order sequences are run."""
    digest = hashlib.sha256(f"{seed}/{corpus}/{sequence}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
