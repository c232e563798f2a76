"""A compressed-tensors checkpoint in memory, its own codes and scales, whoever chose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.emulate import apply_group, apply_groups
from mofq.delivery.apply.loaded_model import find_loaded_layers, loaded_tensor, loaded_weight
from mofq.delivery.export.compressed_tensors.decoding import read_quantized
from mofq.delivery.export.compressed_tensors.recipe_from_folder import find_stored_layers
from mofq.exceptions import BackendError
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows, read_tensor
from mofq.model.layers import FusionGroup, ModelLayers
from mofq.numbers.quantize import dequantize_weight
from mofq.numbers.schemes import Scheme


def load_compressed_tensors(
    model: PreTrainedModel,
    recipe: Recipe,
    stored: Checkpoint,
    *,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Give a loaded original all tensors of a quantized checkpoint, in place.

    Args:
        model: The original, as transformers loads it.
        recipe: From ``recipe_from_compressed_tensors``.
        stored: The quantized checkpoint. Its codes and scales are taken as they are; so
            are norms and everything else, which other tools may have changed too.
        progress: Called with ``"decode"``, fusion groups done, and all of them.

    Returns:
        The model, its quantized layers emulated.

    Raises:
        BackendError: A tensor is missing, or not of the model's shape.
        RecipeError: The recipe does not cover the model.
    """
    loaded = find_loaded_layers(model, recipe)
    on_disk = find_stored_layers(stored)
    model = apply_groups(
        model, recipe, partial(_decode_group, stored=stored), progress=progress, stage="decode"
    )
    taken = _copy_linear_layers(model, loaded, on_disk, stored)
    _copy_others(model, stored, on_disk, taken)
    return model


def _decode_group(
    model: nn.Module,
    group: FusionGroup,
    scheme: Scheme,
    *,
    sources: Mapping[str, Tensor],
    recipe: Recipe,
    stored: Checkpoint,
) -> None:
    weight = scheme.quantized_weight
    decoded = {
        name: dequantize_weight(read_quantized(stored, name, weight), weight) for name in sources
    }
    for name, source in sources.items():
        _check_shape(stored, name, decoded[name].shape, source.shape)
    # The weights are rounded already: the inputs are what is left to do.
    inputs_only = replace(scheme, weight=None)
    apply_group(model, group, inputs_only, sources=decoded, recipe=recipe)


def _copy_linear_layers(
    model: nn.Module, loaded: ModelLayers, on_disk: ModelLayers, stored: Checkpoint
) -> set[str]:
    """Linear layers that are not quantized; the names of all tensors of linear layers."""
    sources = {layer.name: layer for layer in on_disk.linear_layers}
    for layer in loaded.linear_layers:
        source = sources.get(layer.name)
        if source is None or f"{layer.name}.weight_scale" in stored.tensors:
            continue
        rows_OI = read_layer_rows(stored, source, 0, source.out_features)
        weight_OI = loaded_weight(model, layer)
        _check_shape(stored, layer.name, rows_OI.shape, weight_OI.shape)
        weight_OI.copy_(rows_OI)
    return {source.tensor for source in sources.values()}


def _copy_others(
    model: nn.Module, stored: Checkpoint, on_disk: ModelLayers, taken: set[str]
) -> None:
    """Biases, norms and embeddings."""
    loaded = model.state_dict()
    for name, info in stored.tensors.items():
        is_quantized = f"{name.rpartition('.')[0]}.weight_scale" in stored.tensors
        if name in taken or (is_quantized and not name.endswith(".bias")):
            continue
        target = loaded_tensor(loaded, name, on_disk.architecture)
        if target is None or not target.is_floating_point():
            continue
        value = read_tensor(info)
        _check_shape(stored, name, value.shape, target.shape)
        target.copy_(value)


def _check_shape(
    stored: Checkpoint, name: str, found: tuple[int, ...], needed: tuple[int, ...]
) -> None:
    if tuple(found) != tuple(needed):
        raise BackendError(
            f"{stored.folder}: {name!r} has shape {list(found)}, and the model's is "
            f"{list(needed)}. Give the original that the checkpoint was made from."
        )
