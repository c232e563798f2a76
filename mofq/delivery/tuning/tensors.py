"""The tuned norms and learned codes of a recipe, for whatever applies, checks or exports it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mofq.decision.recipe import Recipe
from mofq.evidence.code_changes import CodeChanges, from_tensors, is_of_codes, unknown_names
from mofq.exceptions import RecipeError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.layers import ModelLayers
from mofq.numbers.schemes import parse_scheme


def tuned_tensors(recipe: Recipe, checkpoint: Checkpoint | None = None) -> dict[str, Tensor]:
    """Name in the checkpoint -> tuned norm; empty where a recipe has none.

    Args:
        recipe: From its file, or from `with_tuned`.
        checkpoint: That it is applied to; None: there is none to compare with.

    Raises:
        RecipeError: They are not of this checkpoint, or the file holds something else.
    """
    found = _read(recipe)
    tensors = {name: one for name, one in found.items() if not is_of_codes(name)}
    if checkpoint is not None:
        for name, tensor in tensors.items():
            _check_replaces(name, tensor, checkpoint, where=_where(recipe))
    return tensors


def learned_codes(recipe: Recipe, layers: ModelLayers) -> dict[str, CodeChanges]:
    """Layer -> what was learned of its codes; empty where a recipe has none.

    Args:
        recipe: As for `tuned_tensors`.
        layers: Of the model that it is applied to.

    Raises:
        RecipeError: They are not of these layers and schemes, or the file holds something else.
    """
    tensors = {name: one for name, one in _read(recipe).items() if is_of_codes(name)}
    if not tensors:
        return {}
    again = "Tune again for this model."
    try:
        changes = from_tensors(tensors)
    except KeyError as error:
        raise RecipeError(f"{_where(recipe)}: has no {error}. {again}") from error
    if unknown := unknown_names(tensors):
        raise RecipeError(
            f"{_where(recipe)}: has {unknown[0]!r}, of which this mofq knows nothing. Take the "
            f"mofq that tuned the recipe, or remove `tuning` from it."
        )
    known = {layer.name: layer for layer in layers.grouped_layers}
    schemes = recipe.schemes
    for name, one in changes.items():
        layer, scheme = known.get(name), schemes.get(name)
        weight = None if scheme is None else parse_scheme(scheme).weight
        if layer is None or weight is None:
            raise RecipeError(f"{_where(recipe)}: no weight of {name!r} is quantized. {again}")
        if fault := one.fault(weight, (layer.out_features, layer.in_features)):
            raise RecipeError(f"{_where(recipe)}: {name}: {fault}. {again}")
    return changes


def _where(recipe: Recipe) -> str:
    return f"{recipe.title}: tuning: {recipe.tuning.file if recipe.tuning else ''}"


def _read(recipe: Recipe) -> dict[str, Tensor]:
    """All tensors of the file of a recipe."""
    tuning = recipe.tuning
    if tuning is None:
        return {}
    where = _where(recipe)
    if hashlib.sha256(recipe.tuned).hexdigest() != tuning.sha256:
        raise RecipeError(
            f"{where}: is not there. Read the recipe from its file, which this one lies beside."
        )
    try:
        return load(recipe.tuned)
    except (SafetensorError, ValueError, KeyError) as error:  # the last of a dtype unknown to torch
        raise RecipeError(f"{where}: holds no tensors: {error}. Tune again.") from error


def _check_replaces(name: str, tensor: Tensor, checkpoint: Checkpoint, *, where: str) -> None:
    """Refuse a tensor that is no norm of the checkpoint, or no number."""
    info = checkpoint.tensors.get(name)
    needed = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
    is_vector = info is not None and len(info.shape) == 1 and not info.decoded
    if not (
        is_vector
        and info is not None
        and tuple(tensor.shape) == info.shape
        and TORCH_DTYPES.get(info.dtype) == tensor.dtype
        and bool(torch.isfinite(tensor).all())
    ):
        raise RecipeError(
            f"{where}: has {name!r} as {tensor.dtype} {list(tensor.shape)}, and {checkpoint.folder}"
            f" has {needed}, or it is not finite. Tune again for this model."
        )


def find_targets(
    loaded: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    architecture: str,
    *,
    where: str,
) -> list[tuple[Tensor, Tensor]]:
    """The tensors of a model that others take the place of, each with the other.

    Args:
        loaded: The model's ``state_dict()``; its tensors need no values.
        tensors: Name in the checkpoint -> tensor.
        architecture: ``ModelLayers.architecture``.
        where: Whose tensors they are, for messages.

    Raises:
        RecipeError: The model has no such tensor.
    """
    from mofq.delivery.apply.loaded_model import loaded_tensor  # with transformers

    found = []
    for name, tensor in tensors.items():
        target = loaded_tensor(loaded, name, architecture)
        if target is None or target.shape != tensor.shape:
            raise RecipeError(f"{where}: tuning: the model has no norm {name!r}.")
        found.append((target, tensor))
    return found


@contextmanager
def replaced(targets: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Have the values of others in a model's tensors for as long as the context lasts.

    Args:
        targets: From `find_targets`; those that have no values now are left alone.
    """
    from mofq.model.streaming.weights import has_values  # with transformers

    present = [(target, tensor) for target, tensor in targets if has_values(target)]
    before = [target.clone() for target, _ in present]
    try:
        for target, tensor in present:
            target.copy_(tensor)
        yield
    finally:
        for (target, _), values in zip(present, before, strict=True):
            target.copy_(values)
