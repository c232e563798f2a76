"""What an export will hold, decided and checked before any weight is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mofq.decision.recipe import Recipe
from mofq.delivery.export.compressed_tensors.encoding import (
    encode_once,
    encode_rows,
    plan_layer,
)
from mofq.delivery.export.compressed_tensors.kv_cache import NO_CACHE, PlannedCache, plan_cache
from mofq.delivery.recipe_layers import checked_layers, group_schemes, static_amax
from mofq.delivery.tuning.tensors import learned_codes, tuned_tensors
from mofq.engines import is_read_transposed
from mofq.engines.exports.compressed_tensors import Storage, storage_of, tied_problem
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.fits import Fits
from mofq.evidence.layer_codes import layer_codes
from mofq.evidence.spaces import shape_rejection
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo
from mofq.model.checkpoint.tensors import (
    check_scales,
    read_kept_layer,
    read_layer_rows,
    read_shared_amax,
)
from mofq.model.checkpoint.writer import PlannedTensor
from mofq.model.layers import (
    CONFIG_KEY,
    FusionGroup,
    LinearLayer,
    ModelLayers,
    find_exported_name,
)
from mofq.numbers.quantize.tiles import row_blocks
from mofq.numbers.schemes import Scheme

#: Elements of a weight that are worked on at a time, unless one tile has more.
_BLOCK_ELEMENTS = 2**20
#: Blocks that are worked on at once: of 2**20 elements each takes about 30 MB.
_MOST_THREADS = 16

_Block = TypeVar("_Block")
_Encoded = TypeVar("_Encoded")


#: Types whose experts engines read in one tensor, where they are not quantized.
#: Source: vLLM 0.33.0 ``models/gpt_oss.py:239``, which takes one expert's weight as [in, out].
_FUSED_ALONE = frozenset({"gpt_oss"})


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """A fusion group that will be quantized."""

    group: FusionGroup
    scheme: Scheme
    storage: Storage
    static_amax: dict[str, float]  #: layer -> largest |input|; empty unless a scale is static
    changes: dict[str, CodeChanges]  #: layer -> what was learned of its codes


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Everything that is known of an export before it starts."""

    checkpoint: Checkpoint
    model_layers: ModelLayers
    quantized: tuple[PlannedGroup, ...]
    ignored: tuple[str, ...]  #: every linear layer that is not quantized
    kept: tuple[TensorInfo, ...]  #: of the checkpoint, under the names that they are written as
    split: tuple[LinearLayer, ...]  #: unquantized experts, stored fused and written one by one
    tensors: dict[str, PlannedTensor]  #: every tensor of the export, in order
    group_bytes: int  #: of the fusion groups' tensors, quantized or not, without noted shapes
    cache: PlannedCache = NO_CACHE  #: what it says of the KV cache
    tuned: Mapping[str, Tensor] = field(default_factory=dict)  #: name -> the recipe's own

    @property
    def checkpoint_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_export(checkpoint: Checkpoint, recipe: Recipe) -> ExportPlan:
    """Check that a recipe can be written down for a checkpoint.

    Args:
        checkpoint: The original model.
        recipe: Of that model.

    Returns:
        The plan; of the weights, no more than the scales of an FP8 source has been read.

    Raises:
        BackendError: A scheme cannot be expressed, or does not fit its layer; the
            message names the layer and what to do.
        CheckpointError: The model is of an unknown family.
        RecipeError: The recipe is not for this model, splits a fusion group, or
            lacks a static scale.
    """
    model_layers = checked_layers(checkpoint, recipe)
    if recipe.layers is not None:
        config = checkpoint.config | {CONFIG_KEY: recipe.layers.to_json()}
        checkpoint = replace(checkpoint, config=config)
    check_scales(checkpoint)
    schemes = group_schemes(model_layers, recipe)
    changes = learned_codes(recipe, model_layers)
    quantized, ignored = [], [layer.name for layer in model_layers.unquantized]
    split: list[LinearLayer] = []
    for group in model_layers.groups:
        scheme = schemes[group.name]
        if scheme.is_unquantized:
            ignored += [layer.name for layer in group.layers]
            if model_layers.architecture not in _FUSED_ALONE:
                split += [layer for layer in group.layers if layer.expert is not None]
        else:
            quantized.append(_plan_group(group, scheme, recipe, changes, model_layers.architecture))
    if model_layers.tied_lm_head:
        ignored.append("lm_head")
    parts = {
        layer.name: _as_stored(
            layer, plan_layer(layer.out_features, layer.in_features, planned.scheme)
        )
        for planned in quantized
        for layer in planned.group.layers
    }
    for layer in split:
        dtype = checkpoint.tensors[layer.tensor].kept_dtype
        parts[layer.name] = {
            "weight": PlannedTensor(dtype, (layer.out_features, layer.in_features))
        }
    replaced = {layer.tensor for layer in model_layers.grouped_layers if layer.name in parts}
    kept = {
        name: replace(info, name=find_exported_name(name, model_layers))
        for name, info in checkpoint.tensors.items()
        if name not in replaced
    }
    cache = plan_cache(recipe, model_layers)
    tuned = tuned_tensors(recipe, checkpoint)
    return ExportPlan(
        checkpoint=checkpoint,
        model_layers=model_layers,
        quantized=tuple(quantized),
        ignored=tuple(ignored),
        kept=tuple(info for name, info in kept.items() if name not in tuned),
        split=tuple(split),
        tensors=_order_tensors(checkpoint, model_layers, parts, kept) | cache.planned,
        group_bytes=_group_bytes(checkpoint, model_layers, parts),
        cache=cache,
        tuned={kept[name].name: tensor for name, tensor in tuned.items()},
    )


def _order_tensors(
    checkpoint: Checkpoint,
    layers: ModelLayers,
    parts: dict[str, dict[str, PlannedTensor]],
    kept: dict[str, TensorInfo],
) -> dict[str, PlannedTensor]:
    """All tensors in the checkpoint's order, each layer's own where its weight was."""
    made: dict[str, dict[str, PlannedTensor]] = {}
    for layer in layers.grouped_layers:
        for word, tensor in parts.get(layer.name, {}).items():
            made.setdefault(layer.tensor, {})[f"{layer.name}.{word}"] = tensor
    tensors: dict[str, PlannedTensor] = {}
    for name in checkpoint.tensors:
        if name in kept:
            tensors[kept[name].name] = PlannedTensor(kept[name].kept_dtype, kept[name].shape)
        else:
            tensors.update(made[name])
    return tensors


def _group_bytes(
    checkpoint: Checkpoint, layers: ModelLayers, parts: dict[str, dict[str, PlannedTensor]]
) -> int:
    copied = {layer.tensor for layer in layers.grouped_layers if layer.name not in parts}
    total = sum(checkpoint.tensors[name].kept_bytes for name in copied)
    return total + sum(
        tensor.nbytes
        for part in parts.values()
        for word, tensor in part.items()
        if word != "weight_shape"
    )


def _is_turned(layer: LinearLayer) -> bool:
    """Whether the codes of a layer are stored as [in, out] where they are called ``weight``."""
    return layer.transposed and layer.expert is None


def _as_stored(layer: LinearLayer, planned: dict[str, PlannedTensor]) -> dict[str, PlannedTensor]:
    if _is_turned(layer) and "weight" in planned:
        codes = planned["weight"]
        planned["weight"] = replace(codes, shape=codes.shape[::-1])
    return planned


def _plan_group(
    group: FusionGroup,
    scheme: Scheme,
    recipe: Recipe,
    changes: Mapping[str, CodeChanges],
    architecture: str,
) -> PlannedGroup:
    first = group.layers[0]
    storage = storage_of(scheme, where=first.name)
    if problem := tied_problem(group):
        raise BackendError(f"{first.name}: compressed-tensors {problem}.")
    for layer in group.layers:
        if _is_turned(layer) and not is_read_transposed(layer.name, architecture):
            raise BackendError(
                f"{layer.name}: is stored transposed (the Conv1D of GPT-2), and no engine that "
                f"reads compressed-tensors loads such layers of {architecture}. Take bf16 for it."
            )
        if reason := shape_rejection(scheme, layer):
            raise BackendError(f"{reason}. Take a size that divides, or bf16.")
    own = {layer.name: changes[layer.name] for layer in group.layers if layer.name in changes}
    return PlannedGroup(group, scheme, storage, static_amax(group, scheme, recipe), own)


def split_rows(plan: ExportPlan) -> Iterator[tuple[str, int, Tensor]]:
    """The unquantized experts that are written one by one, block of rows by block of rows.

    Yields:
        Name of the tensor, first row, rows; the rows of each come in order and cover it.
    """
    for layer in plan.split:
        for start, stop in row_blocks(
            layer.out_features, layer.in_features, elements=_BLOCK_ELEMENTS
        ):
            rows_OI = read_kept_layer(plan.checkpoint, layer, start, stop)
            yield f"{layer.name}.weight", start, rows_OI


def encoded_parts(
    checkpoint: Checkpoint, planned: PlannedGroup, *, fits: Fits | None = None
) -> Iterator[tuple[LinearLayer, str, int, Tensor]]:
    """The stored tensors of a fusion group, block of rows by block of rows.

    Args:
        checkpoint: The original model.
        planned: The group.
        fits: Of the recipe's own stats; where the scheme is fitted.

    Yields:
        Layer, last word of the tensor's name, first row in that tensor, rows. The
        rows of each tensor come in order and cover it.

    Raises:
        SchemeError: A weight is not finite; the message names the layer.
        StatsError: The scheme is fitted to statistics, and there are none.
    """
    weight = planned.scheme.quantized_weight
    amax = read_shared_amax(checkpoint, planned.group, weight) if weight.needs_tensor_amax else {}
    for layer in planned.group.layers:
        yield from _encoded_layer(checkpoint, planned, layer, amax.get(layer.name), fits=fits)


def _encoded_layer(
    checkpoint: Checkpoint,
    planned: PlannedGroup,
    layer: LinearLayer,
    amax: float | None,
    *,
    fits: Fits | None,
) -> Iterator[tuple[LinearLayer, str, int, Tensor]]:
    weight = planned.scheme.quantized_weight
    read_rows = partial(read_layer_rows, checkpoint, layer)
    codes = layer_codes(
        fits,
        layer,
        weight,
        read_rows,
        tensor_amax=amax,
        changes=planned.changes.get(layer.name),
    )
    zero_points, columns = [], []
    done: dict[str, int] = {}

    def encode(block: tuple[int, int]) -> tuple[int, Tensor | None, dict[str, Tensor]]:
        quantized = codes.rows(*block)
        return block[0], quantized.zero_point, encode_rows(quantized, planned.scheme)

    blocks = row_blocks(
        layer.out_features,
        layer.in_features,
        elements=_BLOCK_ELEMENTS,
        tile_rows=weight.granularity.rows,
    )
    for start, zero_point, parts in _ahead(encode, blocks):
        if zero_point is not None:
            zero_points.append(zero_point)
        for word, part in parts.items():
            if word == "weight_scale" and weight.granularity.kind == "tensor" and start:
                continue  # one scale for the whole tensor, given with the first block
            if word == "weight" and _is_turned(layer):
                columns.append(part.T)
                continue
            yield layer, word, done.get(word, 0), part
            done[word] = done.get(word, 0) + part.shape[0]
    if columns:
        yield layer, "weight", 0, torch.cat(columns, dim=1).contiguous()
    once = encode_once(
        layer.out_features,
        layer.in_features,
        planned.scheme,
        weight_amax=amax,
        input_amax=planned.static_amax.get(layer.name),
        zero_point_AG=torch.cat(zero_points) if zero_points else None,
    )
    for word, part in once.items():
        yield layer, word, 0, part


def _ahead(encode: Callable[[_Block], _Encoded], blocks: Iterable[_Block]) -> Iterator[_Encoded]:
    """What is made of each block, in order, by as many threads as torch may use.

    Each element is rounded by itself, so no number of threads changes one.
    """
    threads = min(torch.get_num_threads(), _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future[_Encoded]] = deque()
        try:
            for block in blocks:
                coming.append(pool.submit(encode, block))
                if len(coming) > threads:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
