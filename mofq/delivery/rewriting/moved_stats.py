"""The statistics of a rewritten model, from those of the original: the model is not run again.

Where a scale ``s`` moved, the inputs of the layers behind it are divided by it, and the gradients
at the outputs of the linear layer before it are multiplied. Where the model was rotated, inputs and
gradients are rotated, inputs after they were divided by the gain of the norm that was folded.
Samples are rounded to bfloat16 once more. Of tokens of which only the norm of the gradient is kept,
it grows by what those of the others do in the mean. Gains (`mofq.evidence.calibration.gains`) are
copied: of them only the ratios between sequences count. These are nearly those of the rewritten
model and not exactly, since a token's largest input becomes another one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mofq.delivery.rewriting.choose_scales import Choice
from mofq.delivery.rewriting.residual_stream import Place
from mofq.delivery.rewriting.rotate import Turning
from mofq.evidence.calibration.sequence_file import SequenceFile, copy_changed
from mofq.evidence.calibration.stats import Stats, finish_stats, write_json
from mofq.exceptions import RewriteError
from mofq.files.locks import new_folder
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import find_layers

#: A layer's samples, under its name, in the rewritten model.
_Change = Callable[[str, Tensor], Tensor]


def write_moved_stats(
    stats: Stats,
    rewritten: Checkpoint,
    choices: Sequence[Choice],
    folder: str | Path,
    *,
    inputs: bool = True,
) -> Path:
    """Write the statistics of a model in which scales moved.

    Args:
        stats: Of the original, without samples of the KV cache.
        rewritten: The model after ``choices``.
        choices: What was moved.
        folder: A folder that does not exist yet, or is empty; it appears when it is complete.
        inputs: Whether the inputs of sequences without samples are kept, where the original's are.

    Returns:
        The folder, as `mofq calibrate` would have made it but for rounding, and for the norms of
        gradients of layers whose outputs moved.

    Raises:
        RewriteError: The folder is in the way, or samples of the cache are kept.
        StatsError: A file is missing or damaged, or the disk is full.
    """
    divided, outputs = _moved(choices)
    inputs = inputs and bool(stats.plan.inputs)
    ratios = _norm_ratios(stats, outputs) if inputs else {}

    def move_x(layer: str, x_TI: Tensor) -> Tensor:
        return x_TI.double() / divided[layer] if layer in divided else x_TI

    def move_grad(layer: str, grad_DTO: Tensor) -> Tensor:
        return grad_DTO.double() * outputs[layer] if layer in outputs else grad_DTO

    def move_norm(layer: str, norm_T: Tensor) -> Tensor:
        return norm_T.double() * ratios.get(layer, 1.0)

    changes = {"x": move_x, "grad": move_grad, "norm": move_norm}
    return _write_stats(stats, rewritten, folder, changes, inputs=inputs)


def _norm_ratios(stats: Stats, outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer -> by how much the norms of its gradients grow, all sequences with samples together.

    Of a token whose gradient is not kept only the norm is known, and not which channels it is of:
    the mean over tokens stands for it.
    """
    before, after = dict.fromkeys(outputs, 0.0), dict.fromkeys(outputs, 0.0)
    for corpus in stats.plan.corpora:
        for path in stats.sequence_files(corpus.name):
            with SequenceFile(path) as file:
                for layer, scale_P in outputs.items():
                    grad_DTO = file.tensor(f"grad/{layer}").double()
                    before[layer] += float(grad_DTO.square().sum())
                    after[layer] += float((grad_DTO * scale_P).square().sum())
    return {layer: (after[layer] / total) ** 0.5 for layer, total in before.items() if total > 0}


def check_no_channel_lost(turning: Turning) -> None:
    """Refuse a model whose statistics do not say those of the rotated one.

    Raises:
        RewriteError: A norm has a gain of 0: what it makes 0 is not known of the rotated model.
    """
    for name, gain in turning.gains.items():
        if not bool(gain.all()):
            raise RewriteError(
                f"{turning.checkpoint.folder}: {name!r} multiplies a channel by 0, and statistics "
                f"of the rotated model do not follow from these. Calibrate that model."
            )


def write_rotated_stats(
    stats: Stats, rotated: Checkpoint, turning: Turning, folder: str | Path
) -> Path:
    """Write the statistics of a rotated model; a rotation keeps the norms of gradients.

    Args:
        stats: Of the original, without samples of the KV cache.
        rotated: The model after the rotation.
        turning: Of the original.
        folder: As of `write_moved_stats`; so are what is returned and raised.

    Raises:
        RewriteError: As `check_no_channel_lost`.
    """
    check_no_channel_lost(turning)
    layers = find_layers(turning.checkpoint).linear_layers
    places = {layer.name: turning.stream.places.get(layer.tensor, Place()) for layer in layers}

    def turn_x(layer: str, x_TI: Tensor) -> Tensor:
        place = places[layer]
        return turning.turn_inputs(x_TI, place) if place.reads or place.reads_values else x_TI

    def turn_grad(layer: str, grad_DTO: Tensor) -> Tensor:
        place = places[layer]
        return turning.turn_outputs(grad_DTO, place) if place.writes or place.values else grad_DTO

    inputs = bool(stats.plan.inputs)
    return _write_stats(stats, rotated, folder, {"x": turn_x, "grad": turn_grad}, inputs=inputs)


def _write_stats(
    stats: Stats,
    rewritten: Checkpoint,
    folder: str | Path,
    changes: Mapping[str, _Change],
    *,
    inputs: bool,
) -> Path:
    if stats.plan.kv_cache or stats.plan.vocabulary:
        what = "the KV cache" if stats.plan.kv_cache else "matrices of the vocabulary"
        raise RewriteError(
            f"{stats.folder}: holds samples of {what}, which are not those of a rewritten model. "
            f"Calibrate that model."
        )

    def change(kind: str, layer: str, tensor: Tensor) -> Tensor:
        return changes[kind](layer, tensor) if kind in changes else tensor

    plan = replace(
        stats.plan,
        model_name=rewritten.name,
        index_sha256=rewritten.index_sha256,
        weights_sha256=hash_weights(rewritten),
        inputs=stats.plan.inputs if inputs else None,
    )
    with new_folder(Path(folder), RewriteError, last="stats.json") as target:
        write_json(target / "plan.json", plan.to_json())
        for corpus in plan.corpora:
            (target / corpus.name).mkdir()
            for path in (*stats.gains_files(corpus.name), *stats.routing_files(corpus.name)):
                shutil.copyfile(path, target / corpus.name / path.name)
            others = stats.inputs_files(corpus.name) if inputs else ()
            for path in (*stats.sequence_files(corpus.name), *others):
                copy_changed(path, target / corpus.name / path.name, change)
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
