"""A model in memory beside its checkpoint: which module holds a layer, and what weight it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.decision.recipe import Recipe
from mofq.delivery.recipe_layers import find_recipe_layers
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.checkpoint.tensors import (
    read_kept_layer,
    read_layer_rows,
    read_tensor,
)
from mofq.model.layers import FUSION_RULES, LinearLayer, ModelLayers, find_loaded_names
from mofq.model.layers.names_in_memory import find_in_memory, is_swapped
from mofq.model.streaming.weights import has_values
from mofq.numbers.schemes import Scheme

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def find_loaded_layers(model: PreTrainedModel, recipe: Recipe) -> ModelLayers:
    """The linear layers of a model in memory.

    Args:
        model: As transformers loads it.
        recipe: See ``find_recipe_layers``.

    Returns:
        The layers under the names that they have on disk; ``tensor``,
        ``expert`` and ``row_start`` say which part of which parameter of the
        model each is.

    Raises:
        CheckpointError: The model's family is unknown, or a matrix of a decoder
            layer is covered by no rule.
    """
    name = str(getattr(model.config, "name_or_path", "")) or type(model).__name__
    # Each once: a state_dict has what several modules share under every name.
    own = {key for key, _ in (*model.named_parameters(), *model.named_buffers())}
    tensors = {
        key: TensorInfo(key, _DTYPE_NAMES[value.dtype], tuple(value.shape), Path(name), 0, 0)
        for key, value in model.state_dict().items()
        if value.dtype in _DTYPE_NAMES and key in own
    }
    loaded = Checkpoint(Path(name), name, model.config.to_dict(), tensors, index_sha256="")
    return find_recipe_layers(loaded, recipe)


def loaded_weight(model: nn.Module, layer: LinearLayer) -> Tensor:
    """A view of the model's own weight, [out_features, in_features]."""
    weight = model.get_parameter(layer.tensor).detach()
    if layer.expert is not None:
        weight = weight[layer.expert]
    if layer.transposed:
        weight = weight.T
    return weight[layer.row_start : layer.row_start + layer.out_features]


def loaded_tensor(tensors: Mapping[str, Tensor], name: str, architecture: str) -> Tensor | None:
    """What a model in memory holds of a checkpoint's tensor that is no linear layer's weight.

    Args:
        tensors: The model's ``state_dict()``.
        name: Of the tensor in the checkpoint.
        architecture: ``ModelLayers.architecture``.

    Returns:
        The tensor, or None for one of another tower, or of a buffer that the model's class
        computes.
    """
    if architecture not in FUSION_RULES:
        at = find_in_memory(name, architecture)
        whole = tensors.get(at.name)
        if whole is not None and at.expert is not None:
            whole = whole[at.expert] if at.expert < len(whole) else None
        if whole is not None and is_swapped(name, architecture):
            whole = whole.T
        if whole is None or at.parts == 1:
            return whole
        return whole.chunk(at.parts)[at.part]
    names = find_loaded_names(name, architecture)
    return next((tensors[key] for key in names if key in tensors), None)


def module_path(layer: LinearLayer) -> str:
    """Where a model in memory has the module of a layer that ``find_loaded_layers`` found."""
    return layer.tensor.rpartition(".")[0]


def module_paths(model: nn.Module, layer: LinearLayer) -> tuple[str, ...]:
    """The same, and the lm_head's module where the layer is an embedding that it is tied to.

    Raises:
        BackendError: The model's lm_head is not tied, as its config says.
    """
    path = module_path(layer)
    if layer.role != "tied":
        return (path,)
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not model.get_parameter(layer.tensor):
        raise BackendError(
            f"{layer.name}: the loaded model's lm_head does not share its weight, as the config "
            f"says. Load the model as transformers does."
        )
    return (path, next(name for name, module in model.named_modules() if module is head))


def replace_weight(model: nn.Module, layer: LinearLayer, weight_OI: Tensor) -> None:
    """Put copies of an embedding's modules in their place, which have another weight.

    Args:
        model: Is changed; whoever keeps the modules that it had can put them back.
        layer: An embedding. Where the lm_head is tied to it, it stays so.
        weight_OI: Of any float dtype.
    """
    before = model.get_parameter(layer.tensor)
    weight = nn.Parameter(weight_OI.to(before).contiguous(), requires_grad=False)
    for path in module_paths(model, layer):
        module = copy(model.get_submodule(path))
        module._parameters = {**module._parameters, "weight": weight}
        replace_module(model, path, module)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put another module in the place of one of a model's."""
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


@dataclass(frozen=True, slots=True)
class Sources(Mapping[str, Tensor]):
    """Weights by layer, each read when it is asked for: those of all experts need not fit."""

    readers: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def scheme_source(checkpoint: Checkpoint, layer: LinearLayer, scheme: Scheme) -> Tensor:
    """The weight that a scheme rounds, or the one that it leaves as an export writes it."""
    read = read_kept_layer if scheme.weight is None else read_layer_rows
    return read(checkpoint, layer, 0, layer.out_features)


def round_kept(
    model: nn.Module, loaded: ModelLayers, *, checkpoint: Checkpoint, on_disk: ModelLayers
) -> None:
    """Round the weights of an FP8 source as an export does those that stay unquantized.

    Args:
        model: Of the checkpoint, nothing applied to it yet; is changed where it has values.
        loaded: Its layers, from ``find_loaded_layers``.
        checkpoint: Where the exact weights are; one that is not FP8 is left as it is.
        on_disk: The same layers there.
    """
    if checkpoint.source_format is None:
        return
    stored = {layer.name: layer for layer in on_disk.linear_layers}
    for layer in loaded.linear_layers:
        source = stored[layer.name]
        weight_OI = loaded_weight(model, layer)
        if checkpoint.tensors[source.tensor].decoded and has_values(weight_OI):
            kept_OI = read_kept_layer(checkpoint, source, 0, source.out_features)
            weight_OI.copy_(kept_OI)
    taken = {layer.tensor for layer in stored.values()}
    parameters = model.state_dict()
    for name, info in checkpoint.tensors.items():
        target = loaded_tensor(parameters, name, loaded.architecture)
        if info.decoded and name not in taken and target is not None and has_values(target):
            target.copy_(read_tensor(info).bfloat16())
