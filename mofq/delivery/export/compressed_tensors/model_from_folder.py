"""Loads a compressed-tensors checkpoint as engines do: its own config, tensors and schemes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.emulate import apply_group, apply_groups
from mofq.delivery.export.compressed_tensors.decoding import read_quantized
from mofq.delivery.export.compressed_tensors.recipe_from_folder import (
    STORED_PARTS,
)
from mofq.engines import is_read_transposed
from mofq.evidence.code_changes import CodeChanges
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.layers import FusionGroup
from mofq.model.layers.names_in_memory import find_in_memory, is_fused, known_type
from mofq.model.loading import load_model
from mofq.numbers.quantize import dequantize_weight
from mofq.numbers.schemes import Scheme, TensorScheme, parse_scheme


def load_compressed_tensors(
    stored: Checkpoint,
    recipe: Recipe,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a quantized checkpoint for emulation. Nothing is read but its own folder.

    Args:
        stored: The quantized checkpoint. Codes and scales are decoded; every other tensor
            is taken as it is.
        recipe: From ``recipe_from_compressed_tensors``.
        dtype: Of the arithmetic, as in ``load_model``.
        device: Where it runs.
        progress: Called with ``"decode"``, fusion groups done, and all of them.

    Returns:
        The model, with decoded weights; inputs of layers and the KV cache are rounded as the
        recipe says.

    Raises:
        BackendError: A tensor is missing, or not of the shape that its scheme gives it.
        CheckpointError: transformers cannot load the folder's config with these tensors.
        RecipeError: The recipe does not cover the model.
    """
    model = load_model(
        stored.folder, dtype=dtype, device=device, tensors=stored_tensors(stored, recipe.schemes)
    )
    return apply_groups(model, recipe, quantize_inputs, progress=progress, stage="decode")


def stored_tensors(
    stored: Checkpoint, schemes: Mapping[str, str]
) -> dict[str, Callable[[], Tensor]]:
    """Name -> what reads it, under the names that the model had before it was quantized.

    Args:
        stored: The quantized checkpoint.
        schemes: Layer -> its scheme.
    """
    weights = {
        layer: weight
        for layer, name in schemes.items()
        if (weight := parse_scheme(name).weight) is not None
    }
    tensors: dict[str, Callable[[], Tensor]] = {
        f"{layer}.weight": partial(_decode, stored, layer, weight)
        for layer, weight in weights.items()
    }
    for name, info in stored.tensors.items():
        if name not in tensors and name.rpartition(".")[2] not in STORED_PARTS:
            tensors[name] = partial(read_tensor, info)
    return _fuse_experts(tensors, str(stored.config.get("model_type")))


def _fuse_experts(
    tensors: Mapping[str, Callable[[], Tensor]], architecture: str
) -> dict[str, Callable[[], Tensor]]:
    """The same with experts in one tensor, where transformers does not read them one by one."""
    known = known_type(architecture)
    fused: dict[str, dict[tuple[int, int], Callable[[], Tensor]]] = {}
    found: dict[str, Callable[[], Tensor]] = {}
    for name, read in tensors.items():
        at = find_in_memory(name, architecture)
        if at.expert is not None and is_fused(at.name, known):
            fused.setdefault(at.name, {})[at.expert, at.part] = read
        else:
            found[name] = read
    for name, parts in fused.items():
        swaps = known is not None and known.transposed
        found[name] = partial(
            _stack, [parts[key] for key in sorted(parts)], list(parts), swaps=swaps
        )
    return found


def _stack(
    reads: Sequence[Callable[[], Tensor]], keys: Iterable[tuple[int, int]], *, swaps: bool
) -> Tensor:
    """[E, O, I] of all experts, [E, I, O] where ``swaps``, from their parts in order."""
    experts = 1 + max(expert for expert, _ in keys)
    weight_EOI = torch.cat([read() for read in reads]).unflatten(0, (experts, -1))
    weight: Tensor = weight_EOI.transpose(1, 2).contiguous() if swaps else weight_EOI
    return weight


def _decode(stored: Checkpoint, layer: str, weight: TensorScheme) -> Tensor:
    """The weight as the original has it: [out, in], or [in, out] of a Conv1D."""
    weight_OI = dequantize_weight(read_quantized(stored, layer, weight), weight)
    is_turned = is_read_transposed(layer, stored.config.get("model_type"))
    return weight_OI.T.contiguous() if is_turned else weight_OI


def quantize_inputs(
    model: nn.Module,
    group: FusionGroup,
    scheme: Scheme,
    *,
    sources: Mapping[str, Tensor],
    recipe: Recipe,
    changes: Mapping[str, CodeChanges],
) -> None:
    """Apply to a fusion group whose weights were decoded what its scheme says of inputs."""
    # The weights are rounded already, as learned: the inputs are what is left to do.
    apply_group(model, group, replace(scheme, weight=None), sources=sources, recipe=recipe)
