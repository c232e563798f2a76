"""Emulates a recipe in memory: every scheme, in plain torch, on any device.

The weights become what ``quantize`` rounds them to, and inputs are rounded on
their way into a layer. Arithmetic stays in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mofq.decision.recipe import Recipe, check_recipe, check_weights
from mofq.delivery.apply.fake_quant_experts import FakeQuantExperts
from mofq.delivery.apply.kv_cache import apply_caches
from mofq.delivery.apply.loaded_model import (
    Sources,
    find_loaded_layers,
    loaded_weight,
    module_path,
    module_paths,
    replace_module,
    replace_weight,
    round_kept,
    scheme_source,
)
from mofq.delivery.recipe_fits import check_fits
from mofq.delivery.recipe_layers import find_recipe_layers, group_schemes, static_amax
from mofq.delivery.tuning.tensors import find_targets, learned_codes, tuned_tensors
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.fits import Fits
from mofq.evidence.layer_codes import LayerCodes, layer_codes
from mofq.exceptions import BackendError
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers, share_amax, stored_amax
from mofq.model.modules import is_plain_linear
from mofq.numbers.quantize import FakeQuantLinear
from mofq.numbers.quantize.tiles import row_blocks
from mofq.numbers.schemes import Scheme, TensorScheme

#: Elements of a weight that are quantized at once: several times as many bytes as of the weight.
_BLOCK_ELEMENTS = 2**22


def apply(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    checkpoint: Checkpoint | None = None,
    fits: Fits | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Emulate a recipe, in place.

    Args:
        model: As transformers loads it, any float dtype. It is left as it was
            if the recipe does not fit it.
        recipe: Covers every linear layer of the model.
        checkpoint: Where the weights to quantize are read; by default they are
            the model's own, which are the same where its dtype holds the
            checkpoint's.
        fits: Of the recipe's own stats, from ``open_fits``; where a scheme is fitted.
        progress: Called with ``"emulate"``, fusion groups done, and all of them.

    Returns:
        The model. Each layer with a scheme is a ``FakeQuantLinear`` now, and
        the experts of a mixture are a ``FakeQuantExperts``; an embedding is what it
        was, with other weights; layers without a scheme
        are untouched, except that FP8 weights of the checkpoint are rounded to
        bf16 as an export rounds them. Attention reads
        keys and values as the recipe's cache keeps them. Norms are as the recipe tuned them.

    Raises:
        RecipeError: The recipe does not cover the model, splits a fusion group,
            belongs to another checkpoint, gives a layer a scheme that its shape
            does not take, or lacks a static scale.
        SchemeError: A weight is not finite.
        StatsError: A scheme is fitted to statistics, and there are none.
        BackendError: A layer is quantized already.
        CheckpointError: The model's family is unknown.
    """
    return apply_groups(
        model,
        recipe,
        partial(apply_group, fits=fits),
        check=partial(check_fits, fits),
        checkpoint=checkpoint,
        progress=progress,
    )


def apply_groups(
    model: PreTrainedModel,
    recipe: Recipe,
    apply_one: Callable[..., None],
    *,
    check: Callable[[FusionGroup, Scheme], None] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    stage: str = "emulate",
) -> PreTrainedModel:
    """Apply a recipe with a function that does it for one fusion group.

    Args:
        model: As for ``apply``, and so are ``recipe``, ``checkpoint`` and ``progress``.
        recipe: Of the model.
        apply_one: Called as ``apply_group`` is.
        check: Raises where a group cannot be applied; called for all before any is.
        checkpoint: Where weights are read.
        progress: Called with ``stage``, fusion groups done, and all of them.
        stage: Its name.

    Returns:
        The model.

    Raises:
        MofqError: As ``apply``.
    """
    prepared = prepare(model, recipe, check=check, checkpoint=checkpoint)
    for group in prepared.quantized:
        check_modules(model, group)
    if checkpoint is not None:
        round_kept(model, prepared.layers, checkpoint=checkpoint, on_disk=prepared.on_disk)
    for done, group in enumerate(prepared.quantized):
        if progress is not None:
            progress(stage, done, len(prepared.quantized))
        apply_prepared(model, prepared, group, apply_one)
    apply_caches(model, recipe, prepared.layers)
    for target, tensor in prepared.tuned_targets(model):
        target.copy_(tensor)
    if progress is not None:
        progress(stage, len(prepared.quantized), len(prepared.quantized))
    return model


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe that was checked against a model, before anything is applied."""

    recipe: Recipe
    layers: ModelLayers  #: of the model in memory
    on_disk: ModelLayers  #: the same in the checkpoint, where weights are read there
    stored: Mapping[str, LinearLayer]  #: of these, by name
    schemes: Mapping[str, Scheme]  #: of each fusion group
    quantized: tuple[FusionGroup, ...]  #: those with another scheme than the unquantized one
    checkpoint: Checkpoint | None  #: where weights are read; None: in the model
    tuned: Mapping[str, Tensor]  #: norms that take the place of the checkpoint's
    changes: Mapping[str, CodeChanges]  #: to the codes of layers, by name

    def tuned_targets(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """The norms of a model that the recipe tuned, each with what it tuned it to."""
        if not self.tuned:
            return []
        architecture, where = self.layers.architecture, self.recipe.title
        return find_targets(model.state_dict(), self.tuned, architecture, where=where)


def prepare(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    check: Callable[[FusionGroup, Scheme], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Prepared:
    """Check a recipe against a model; its parameters need no values yet.

    Args:
        model: As for ``apply``, and so is ``recipe``.
        recipe: Of the model.
        check: Raises where a group cannot be applied.
        checkpoint: Where weights are read.

    Raises:
        MofqError: As ``apply``, but for what modules compute (`check_modules`).
    """
    layers = find_loaded_layers(model, recipe)
    check_recipe(recipe, layers, index_sha256=checkpoint.index_sha256 if checkpoint else None)
    if checkpoint is not None:
        check_weights(recipe, checkpoint)
    schemes = group_schemes(layers, recipe)
    quantized = tuple(g for g in layers.groups if not schemes[g.name].is_unquantized)
    for group in quantized:
        static_amax(group, schemes[group.name], recipe)  # refuses a recipe without it
        if check is not None:
            check(group, schemes[group.name])
    on_disk = layers if checkpoint is None else find_recipe_layers(checkpoint, recipe)
    stored = {layer.name: layer for layer in on_disk.grouped_layers}
    quantized = tuple(with_global_scales(group, stored) for group in quantized)
    tuned = tuned_tensors(recipe, checkpoint)
    prepared = Prepared(
        recipe,
        layers,
        on_disk,
        stored,
        schemes,
        quantized,
        checkpoint,
        tuned,
        learned_codes(recipe, layers),
    )
    prepared.tuned_targets(model)  # refuses a recipe whose norms the model has not
    return prepared


def with_global_scales(group: FusionGroup, stored: Mapping[str, LinearLayer]) -> FusionGroup:
    """A fusion group of a model in memory, with the global scales that an NVFP4 source has.

    Args:
        group: Of the model.
        stored: Every layer as the checkpoint has it, by name.
    """
    scales = [stored[layer.name].global_scale for layer in group.layers]
    if all(scale is None for scale in scales):
        return group
    layers = zip(group.layers, scales, strict=True)
    return replace(group, layers=tuple(replace(one, global_scale=scale) for one, scale in layers))


def apply_prepared(
    model: nn.Module, prepared: Prepared, group: FusionGroup, apply_one: Callable[..., None]
) -> None:
    """Apply a recipe to one fusion group.

    Args:
        model: The layers of the group have their weights.
        prepared: From `prepare`.
        group: One of those that are quantized.
        apply_one: Called as ``apply_group`` is.
    """
    scheme = prepared.schemes[group.name]
    checkpoint = prepared.checkpoint

    def read(layer: LinearLayer) -> Tensor:
        if checkpoint is None:
            return loaded_weight(model, layer)
        return scheme_source(checkpoint, prepared.stored[layer.name], scheme)

    sources = Sources({layer.name: partial(read, layer) for layer in group.layers})
    apply_one(
        model, group, scheme, sources=sources, recipe=prepared.recipe, changes=prepared.changes
    )


def weight_amax(
    group: FusionGroup, scheme: Scheme, sources: Mapping[str, Tensor]
) -> dict[str, Tensor | float]:
    """The largest magnitude behind the global scale of each weight of a fusion group.

    Args:
        group: Whose layers engines concatenate.
        scheme: Of the group.
        sources: Layer name -> its weight.

    Returns:
        Layer name -> float scalar; empty where the scheme needs none.
    """
    if not scheme.needs_weight_amax:
        return {}
    amax = {name: source.abs().amax() for name, source in sources.items()}
    if scheme.quantized_weight.has_stored_global_scale:
        return dict(stored_amax(group, {name: float(one) for name, one in amax.items()}))
    return dict(share_amax(group, amax))


def check_modules(model: nn.Module, group: FusionGroup) -> None:
    """Refuse modules that no scheme is applied to; they have their weights.

    Raises:
        BackendError: One is no linear layer of torch, or is quantized already.
    """
    for layer in group.layers:
        if layer.role != "linear":
            module_paths(model, layer)
            continue
        module = model.get_submodule(module_path(layer))
        if isinstance(module, FakeQuantLinear | FakeQuantExperts):
            raise BackendError(
                f"{layer.name}: a recipe was applied to this model already. Load the model again."
            )
        if layer.expert is not None:
            continue
        kind = type(module).__name__
        if isinstance(module, nn.Linear | Conv1D) and is_plain_linear(module):
            if type(module.weight.data) is Tensor:
                continue
            kind += f" with a weight of class {type(module.weight.data).__name__}"
        raise BackendError(
            f"{layer.name}: needed a linear layer of torch, found {kind}. "
            f"Load the model unquantized and without adapters."
        )


def apply_group(
    model: nn.Module,
    group: FusionGroup,
    scheme: Scheme,
    *,
    sources: Mapping[str, Tensor],
    recipe: Recipe,
    fits: Fits | None = None,
    changes: Mapping[str, CodeChanges] = MappingProxyType({}),
) -> None:
    """Emulate the scheme of one fusion group.

    Args:
        model: Its layers of the group are still the original's modules.
        group: As ``find_loaded_layers`` finds it.
        scheme: Not the unquantized one.
        sources: Layer name -> the weight to quantize, [out_features, in_features]; read one after
            the other.
        recipe: Has the static scales, where the scheme needs them.
        fits: As for ``apply``.
        changes: Layer name -> what was learned of its codes.
    """
    # Before anything is rounded: experts are rounded in place, where the source lies.
    amax = weight_amax(group, scheme, sources)

    def rounded(layer: LinearLayer) -> Tensor:
        weight_OI = sources[layer.name]
        if scheme.weight is None:
            return weight_OI
        codes = layer_codes(
            fits,
            layer,
            scheme.weight,
            partial(rows_of, weight_OI),
            tensor_amax=amax.get(layer.name),
            changes=changes.get(layer.name),
        )
        dtype = loaded_weight(model, layer).dtype
        return _decoded(codes, weight_OI, dtype=dtype, scheme=scheme.weight)

    put_group(model, group, scheme, rounded, recipe=recipe)


def put_group(
    model: nn.Module,
    group: FusionGroup,
    scheme: Scheme,
    rounded: Callable[[LinearLayer], Tensor],
    *,
    recipe: Recipe,
) -> None:
    """Put the scheme of one fusion group in the place of its layers, with weights that are known.

    Args:
        model: As `apply_group` has it, and so are ``group``, ``scheme`` and ``recipe``.
        group: Of the model.
        scheme: Of the group.
        rounded: Gives what the weight of a layer becomes, [out_features, in_features].
        recipe: Has the static scales.
    """
    inputs = static_amax(group, scheme, recipe)
    if any(layer.expert is not None for layer in group.layers):
        _replace_experts(model, group.layers, scheme, inputs)
    for layer in group.layers:
        weight_OI = rounded(layer)
        if layer.expert is not None:
            loaded_weight(model, layer).copy_(weight_OI)
            continue
        if layer.role != "linear":
            replace_weight(model, layer, weight_OI)
            continue
        path = module_path(layer)
        linear = FakeQuantLinear.from_linear(
            model.get_submodule(path),
            scheme,
            weight_OI=weight_OI.contiguous(),
            static_amax=inputs.get(layer.name),
            name=layer.name,
        )
        replace_module(model, path, linear)


def _decoded(
    codes: LayerCodes, weight_OI: Tensor, *, dtype: torch.dtype, scheme: TensorScheme
) -> Tensor:
    """What a weight becomes, in the model's dtype; in float32 are some rows at a time."""
    decoded_OI = torch.empty(weight_OI.shape, dtype=dtype, device=weight_OI.device)
    for start, stop in row_blocks(
        *weight_OI.shape, elements=_BLOCK_ELEMENTS, tile_rows=scheme.granularity.rows
    ):
        decoded_OI[start:stop] = codes.decoded(start, stop)
    return decoded_OI


def rows_of(weight_OI: Tensor, start: int, stop: int) -> Tensor:
    """Rows of a weight that is in memory, as `layer_codes` reads them."""
    return weight_OI[start:stop]


def _replace_experts(
    model: nn.Module,
    layers: Iterable[LinearLayer],
    scheme: Scheme,
    inputs: Mapping[str, float],
) -> None:
    """Put a module that quantizes inputs in the place of the experts of one decoder layer.

    Where they have several schemes, it is there for the second of their groups.
    """
    for layer in layers:
        path, _, parameter = layer.tensor.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, FakeQuantExperts):
            module = FakeQuantExperts(module, name=path)
            replace_module(model, path, module)
        assert layer.expert is not None
        module.set_scheme(parameter, layer.expert, scheme, static_amax=inputs.get(layer.name))
