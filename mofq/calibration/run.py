"""Calibration: one forward and one backward pass for each sequence."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from mofq.calibration.capture import capture_layers
from mofq.calibration.captured import Captured
from mofq.calibration.stats import Plan, Stats, finish_stats, sequence_path, start_plan
from mofq.exceptions import StatsError
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
        model: Frozen, in eval mode.
        layers: Of its checkpoint; those in fusion groups are kept.
        plan: What is computed; a folder begun with the same plan is continued.
        windows: Corpus name -> token ids, [sequences, sequence_length], int64.
        folder: Where the stats go.
        activation_checkpointing: Trade time for memory in the backward pass.
        progress: Called with corpus, sequences done, sequences in all.

    Returns:
        The finished stats.

    Raises:
        StatsError: The folder belongs to another plan, or a gradient is not finite.

    Source: the Fisher information as the second-order expansion of KL, S. Amari, "Natural
    gradient works efficiently in learning", 1998, section 3.
    """
    start_plan(folder, plan)
    files: list[Path] = []
    layer_names = [layer.name for group in layers.groups for layer in group.layers]
    with capture_layers(
        model, layers, activation_checkpointing=activation_checkpointing
    ) as captured:
        for corpus in plan.corpora:
            (folder / corpus.name).mkdir(exist_ok=True)
            for index in range(corpus.sequences):
                path = sequence_path(folder, corpus.name, index)
                if not path.exists():
                    captured.clear()
                    seeds = [
                        label_seed(plan.seed, corpus.name, index, d) for d in range(plan.draws)
                    ]
                    run_sequence(model, windows[corpus.name][index], seeds)
                    write_sequence(path, captured, layer_names)
                files.append(path)
                if progress is not None:
                    progress(corpus.name, index + 1, corpus.sequences)
    return finish_stats(folder, plan, files)


def run_sequence(model: PreTrainedModel, token_T: Tensor, seeds: Sequence[int]) -> None:
    """One forward pass, and one backward pass for each draw of labels.

    Args:
        model: Frozen, with gradients started at its embeddings.
        token_T: Token ids, [T], int64.
        seeds: One for each draw.
    """
    device = model.get_input_embeddings().weight.device
    logits_TV = model(token_T[None].to(device)).logits[0]
    if not torch.isfinite(logits_TV.detach()).all():
        raise StatsError("the model's logits are not finite. Use --dtype float32 or bfloat16.")
    for draw, seed in enumerate(seeds):
        label_T = sample_labels(logits_TV.detach(), seed=seed).to(logits_TV.device)
        loss = F.cross_entropy(logits_TV.float(), label_T, reduction="sum")
        loss.backward(retain_graph=draw < len(seeds) - 1)


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


def label_seed(seed: int, corpus: str, sequence: int, draw: int) -> int:
    """A seed for one draw: the same wherever and in whatever order sequences are run."""
    digest = hashlib.sha256(f"{seed}/{corpus}/{sequence}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def write_sequence(path: Path, captured: Captured, layer_names: Sequence[str]) -> None:
    """Write one sequence's samples beside its final name and rename it.

    Raises:
        StatsError: A gradient is not finite.
    """
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, str | None] = {}
    for name in layer_names:
        if name not in captured.source:
            inputs[name] = None
            continue
        inputs[name] = captured.source[name]
        grad_DTO = torch.stack(captured.grads[name])
        if not torch.isfinite(grad_DTO).all():
            raise StatsError(
                f"{name}: an output gradient is not finite in {path.name}. "
                f"Use --dtype float32, or look for broken weights in this layer."
            )
        tensors[f"grad/{name}"] = grad_DTO
        if captured.source[name] == name:
            tensors[f"x/{name}"] = captured.x[name].contiguous()
        if name in captured.tokens:
            tensors[f"tokens/{name}"] = captured.tokens[name]
    temporary = path.with_name(path.name + ".part")
    save_file(tensors, temporary, metadata={"version": "1", "inputs": json.dumps(inputs)})
    os.replace(temporary, path)
