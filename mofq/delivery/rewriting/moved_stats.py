"""The statistics of a rewritten model, from those of the original: the model is not run again.

Where a scale ``s`` moved, the inputs of the layers behind it are divided by it, and the gradients
at the outputs of the linear layer before it are multiplied. Nothing else changes, and with it no
gain: see `mofq.evidence.calibration.gains`, of which only the ratios between sequences count.
Samples are rounded to bfloat16 once more.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mofq.delivery.rewriting.choose import Choice
from mofq.evidence.calibration.sequence_file import SequenceFile, write_samples
from mofq.evidence.calibration.stats import Stats, finish_stats, write_json
from mofq.exceptions import RewriteError
from mofq.files.locks import new_folder
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights


def write_moved_stats(
    stats: Stats, rewritten: Checkpoint, choices: Sequence[Choice], folder: str | Path
) -> Path:
    """Write the statistics of a rewritten model; the folder appears when it is complete.

    Args:
        stats: Of the original, without samples of the KV cache.
        rewritten: The model after ``choices``.
        choices: What was moved.
        folder: A folder that does not exist yet, or is empty.

    Returns:
        The folder, as `mofq calibrate` would have made it but for rounding.

    Raises:
        RewriteError: The folder is in the way, or samples of the cache are kept.
        StatsError: A file is missing or damaged, or the disk is full.
    """
    if stats.plan.kv_cache:
        raise RewriteError(
            f"{stats.folder}: holds samples of the KV cache, which are not those of a rewritten "
            f"model. Calibrate that model."
        )
    # A norm says nothing of a gradient whose channels are multiplied each by its own scale: codes
    # of the rewritten model are fitted to the sequences of which samples are kept.
    plan = replace(
        stats.plan,
        model_name=rewritten.name,
        weights_sha256=hash_weights(rewritten),
        inputs=None,
    )
    inputs, outputs = _moved(choices)
    with new_folder(Path(folder), RewriteError, last="stats.json") as target:
        write_json(target / "plan.json", plan.to_json())
        for corpus in plan.corpora:
            (target / corpus.name).mkdir()
            for path in (*stats.gains_files(corpus.name), *stats.routing_files(corpus.name)):
                shutil.copyfile(path, target / corpus.name / path.name)
            for path in stats.sequence_files(corpus.name):
                _write_sequence(path, target / corpus.name / path.name, inputs, outputs)
        finish_stats(target, plan)
    return Path(folder)


def _moved(choices: Sequence[Choice]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Layer -> what its inputs are divided by; layer -> what its gradients are multiplied by."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for choice in choices:
        if choice.strength is None:
            continue
        for layer in choice.site.consumers:
            inputs[layer.name] = choice.scale_P[list(choice.site.scale_of_I)]
        if choice.site.producer is not None:
            outputs[choice.site.producer.name] = choice.scale_P
    return inputs, outputs


def _write_sequence(
    path: Path, target: Path, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    tensors: dict[str, Tensor] = {}
    with SequenceFile(path) as file:
        for name in file.inputs:
            samples = file.read(name)
            if samples is None:
                continue
            grad_DTO = samples.grad_DTO
            if name in outputs:
                grad_DTO = (grad_DTO.double() * outputs[name]).to(grad_DTO.dtype)
            tensors[f"grad/{name}"] = grad_DTO
            if samples.source == name:
                x_TI = samples.x_TI
                if name in inputs:
                    x_TI = (x_TI.double() / inputs[name]).to(x_TI.dtype)
                tensors[f"x/{name}"] = x_TI
            if samples.token_T is not None:
                tensors[f"tokens/{name}"] = samples.token_T
        write_samples(target, tensors, file.inputs)
