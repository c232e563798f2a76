"""Calibration: one forward and one backward pass for each sequence."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from mofq.calibration.capture import capture_layers
from mofq.calibration.sequences import is_complete, sequence_path, write_sequence
from mofq.calibration.stats import CORPUS_NAME, CorpusPlan, Plan, Stats, finish_stats, open_plan
from mofq.exceptions import CorpusError, StatsError
from mofq.layers import ModelLayers

#: Rows of the vocabulary's cumulative distribution held at once, in float64.
_LABEL_ROWS = 64

Progress = Callable[[str, int, int], None]


def calibrate(
    model: PreTrainedModel,
    layers: ModelLayers,
    *,
    plan: Plan,
    windows: Mapping[str, Tensor],
    folder: Path,
    activation_checkpointing: bool = False,
    progress: Progress | None = None,
) -> Stats:
    """Run every sequence of every corpus and write the stats folder.

    Labels are sampled from the model's own distribution at every position, independently,
    at temperature 1; the loss is the sum of their negative log-likelihoods. So the gradients
    make an unbiased sample of the Fisher information of the whole sequence.

    Args:
        model: Frozen, in eval mode, bfloat16 or float32.
        layers: Of its checkpoint; those in fusion groups are kept.
        plan: What is computed; a folder begun with the same plan is continued.
        windows: Corpus name -> token ids, [sequences, sequence_length], int64.
        folder: Where the stats go.
        activation_checkpointing: Trade time for memory in the backward pass.
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
    _check_model(model, plan)
    for corpus in plan.corpora:
        _check_windows(model, windows[corpus.name], corpus, plan)
    layer_names = [layer.name for group in layers.groups for layer in group.layers]
    with (
        open_plan(folder, plan),
        capture_layers(
            model, layers, activation_checkpointing=activation_checkpointing
        ) as captured,
    ):
        for corpus in plan.corpora:
            (folder / corpus.name).mkdir(exist_ok=True)
            for index in range(corpus.sequences):
                path = sequence_path(folder, corpus.name, index)
                if not is_complete(path):
                    captured.clear()
                    run_sequence(model, windows[corpus.name][index], _seeds(plan, corpus, index))
                    write_sequence(path, captured, layer_names)
                    _check_disk(folder, path, left=corpus.sequences - index - 1)
                if progress is not None:
                    progress(corpus.name, index + 1, corpus.sequences)
        return finish_stats(folder, plan)


def _check_model(model: PreTrainedModel, plan: Plan) -> None:
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if "float16" in dtypes or plan.dtype == "float16":
        raise StatsError("gradients underflow in float16. Use --dtype bfloat16 or float32.")
    if plan.dtype not in dtypes:
        raise StatsError(
            f"the plan's dtype is {plan.dtype}, and the model's {', '.join(sorted(dtypes))}. "
            f"Load the model in the dtype that the plan says."
        )
    if model.training:
        raise StatsError("the model is in training mode, where dropout adds noise. Call eval().")


def _check_windows(
    model: PreTrainedModel, token_NT: Tensor, corpus: CorpusPlan, plan: Plan
) -> None:
    where = f"corpus {corpus.name!r}"
    if not re.match(CORPUS_NAME, corpus.name):
        raise CorpusError(
            f"{where}: the name is that of a folder, so it has no slash and does not begin "
            f"with a dot. Write --corpus NAME={corpus.source}."
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
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and plan.sequence_length > longest:
        raise CorpusError(
            f"{where}: a sequence length of {plan.sequence_length} is more than the model's "
            f"context of {longest}. Give a shorter one."
        )


def _check_disk(folder: Path, written: Path, *, left: int) -> None:
    """Stop after the first sequence where the disk cannot take the rest of its corpus."""
    needed, free = left * written.stat().st_size, shutil.disk_usage(folder).free
    if needed > free:
        raise StatsError(
            f"{folder}: {left} more sequences need {needed:,} bytes, found {free:,} free. What is "
            f"there is kept; free some space and run the same command again."
        )


def run_sequence(model: PreTrainedModel, token_T: Tensor, seeds: Sequence[int]) -> None:
    """One forward pass, and one backward pass for each draw of labels.

    Args:
        model: Frozen, with gradients started at its embeddings.
        token_T: Token ids, [T], int64.
        seeds: One for each draw.

    Raises:
        StatsError: The logits are not finite; the message names a weight that is not.
    """
    device = model.get_input_embeddings().weight.device
    logits_TV = model(token_T[None].to(device)).logits[0]
    if not torch.isfinite(logits_TV.detach()).all():
        raise StatsError(f"the model's logits are not finite. {_reason_of_infinity(model)}")
    for draw, seed in enumerate(seeds):
        label_T = sample_labels(logits_TV.detach(), seed=seed).to(logits_TV.device)
        loss = F.cross_entropy(logits_TV.float(), label_T, reduction="sum")
        loss.backward(retain_graph=draw < len(seeds) - 1)


def _reason_of_infinity(model: PreTrainedModel) -> str:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"The weight {name} is not: the checkpoint is damaged, or its training diverged."
    return "All its weights are: use --dtype float32."


def sample_labels(logits_TV: Tensor, *, seed: int) -> Tensor:
    """Sample one label at each position from the model's own distribution.

    The uniform numbers are drawn on the CPU, so a device changes no label but where the
    cumulative distribution itself differs.

    Args:
        logits_TV: [tokens, vocabulary].
        seed: Of this sequence and draw.

    Returns:
        [tokens], int64, on the device of the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform_T = torch.rand(logits_TV.shape[0], generator=generator, dtype=torch.float64)
    labels = []
    for start in range(0, logits_TV.shape[0], _LABEL_ROWS):
        rows_TV = logits_TV[start : start + _LABEL_ROWS].float().softmax(-1).double().cumsum(-1)
        wanted_T = uniform_T[start : start + _LABEL_ROWS].to(rows_TV.device) * rows_TV[:, -1]
        labels.append(torch.searchsorted(rows_TV, wanted_T[:, None], right=True)[:, 0])
    return torch.cat(labels).clamp(max=logits_TV.shape[1] - 1)


def _seeds(plan: Plan, corpus: CorpusPlan, sequence: int) -> list[int]:
    return [label_seed(plan.seed, corpus.name, sequence, draw) for draw in range(plan.draws)]


def label_seed(seed: int, corpus: str, sequence: int, draw: int) -> int:
    """A seed for one draw: the same wherever and in whatever order sequences are run."""
    digest = hashlib.sha256(f"{seed}/{corpus}/{sequence}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
