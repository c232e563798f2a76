"""Compares every layer of a model in memory with the recipe and the original weights.

What a layer should be is computed anew from the files of the original
checkpoint, block of rows by block of rows; nothing that the backend kept or
says of itself is trusted but the rounding of inputs, whose scheme is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.fake_quant_experts import FakeQuantExperts
from mofq.delivery.apply.kv_cache import RoundedCache
from mofq.delivery.apply.loaded_model import loaded_tensor
from mofq.delivery.apply.torchao import TorchaoLinear, weight_deviation
from mofq.delivery.deviation import Deviation
from mofq.delivery.recipe_layers import checked_layers, group_schemes, static_amax
from mofq.delivery.tuning.tensors import learned_codes, tuned_tensors
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.fits import Fits
from mofq.evidence.layer_codes import LayerCodes, layer_codes
from mofq.files.progress import Progress
from mofq.model.attention import cache_passages
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo
from mofq.model.checkpoint.tensors import (
    read_kept_layer,
    read_layer_rows,
    read_rows,
    read_shared_amax,
    read_tensor,
)
from mofq.model.layers import (
    FusionGroup,
    LinearLayer,
    LoadedWeight,
    ModelLayers,
    find_loaded_module,
    find_loaded_weight,
    lm_heads_of,
)
from mofq.numbers.quantize import FakeQuantLinear
from mofq.numbers.quantize.tiles import row_blocks
from mofq.numbers.schemes import Scheme, parse_scheme

#: Elements of a weight that are compared at once.
_BLOCK_ELEMENTS = 2**23

#: Two roundings to float32: of a reciprocal and of its own reciprocal, or of a maximum and of the
#: scale that is made of it, and one of the maximum itself.
DECODED_ROUNDING = 2.0**-22

_BITS = {2: torch.int16, 4: torch.int32}
_UNQUANTIZED = parse_scheme("bf16")


@dataclass(frozen=True, slots=True)
class _Expected:
    """What one layer should be."""

    layer: LinearLayer
    group: FusionGroup | None  #: None: left alone
    scheme: Scheme
    static_amax: float | None  #: of the inputs
    codes: LayerCodes | None = None  #: of its weight, where the scheme has some


def find_deviations(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    checkpoint: Checkpoint,
    fits: Fits | None = None,
    decoded: bool = False,
    progress: Progress | None = None,
) -> tuple[Deviation, ...]:
    """Compare every layer of a model with what a recipe makes of the original weights.

    Weights must be equal in every bit, after one rounding to the model's dtype;
    so must norms that it tuned, and everything that it leaves alone, biases, norms and
    embeddings included; what an FP8 checkpoint holds of that is rounded to bf16 first, as an
    export rounds it.

    Args:
        model: To which the recipe was applied.
        recipe: For the checkpoint.
        checkpoint: The original.
        fits: Of the recipe's own stats; where a scheme is fitted.
        decoded: The model is an exported folder's. Where that stores the reciprocal of a global
            scale, or the scale of static inputs for their maximum, the value read back has been
            rounded once more, and is the same within ``DECODED_ROUNDING``.
        progress: Called with ``"enforce"``, fusion groups done, and all of them.

    Returns:
        Every deviation, in order of the layers; empty where there is none.

    Raises:
        RecipeError: The recipe is not for the checkpoint.
        CheckpointError: The checkpoint cannot be read.
    """
    wanted = enforcement(recipe, checkpoint, fits=fits, decoded=decoded)
    layers = wanted.layers
    total = len(layers.groups) + 1
    found: list[Deviation] = []
    for done, group in enumerate(layers.groups):
        if progress is not None:
            progress("enforce", done, total)
        found += wanted.of_group(model, group)
    if progress is not None:
        progress("enforce", total - 1, total)
    found += wanted.of_unquantized(model, layers)
    found += wanted.of_others(model.state_dict())
    found += wanted.of_caches(model, layers)
    if progress is not None:
        progress("enforce", total, total)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Enforcement:
    """What a recipe makes of a checkpoint, to find how a model deviates from it."""

    recipe: Recipe
    checkpoint: Checkpoint
    layers: ModelLayers  #: of the checkpoint
    schemes: Mapping[str, Scheme]  #: of each fusion group
    fits: Fits | None
    decoded: bool  #: whether the model is an exported folder's, see `find_deviations`
    changes: Mapping[str, CodeChanges]  #: that were learned, to the codes of layers, by name
    tuned: Mapping[str, Tensor]  #: name in the checkpoint -> what the recipe tuned a norm to

    @property
    def rounding(self) -> float:
        """By how much static maxima may differ, relative to themselves."""
        return DECODED_ROUNDING if self.decoded else 0.0

    def of_group(self, model: nn.Module, group: FusionGroup) -> list[Deviation]:
        """How the layers of a fusion group differ from its scheme."""
        scheme = self.schemes[group.name]
        inputs = static_amax(group, scheme, self.recipe)
        weights = (
            read_shared_amax(self.checkpoint, group, scheme.quantized_weight)
            if scheme.needs_weight_amax
            else {}
        )
        found: list[Deviation] = []
        for layer in group.layers:
            codes = None
            if scheme.weight is not None:
                read_rows = partial(read_layer_rows, self.checkpoint, layer)
                amax = weights.get(layer.name)
                codes = layer_codes(
                    self.fits,
                    layer,
                    scheme.weight,
                    read_rows,
                    tensor_amax=amax,
                    changes=self.changes.get(layer.name),
                )
            one = _Expected(layer, group, scheme, static_amax=inputs.get(layer.name), codes=codes)
            found += self._of_layer(model, one)
        return found

    def of_unquantized(self, model: nn.Module, layers: ModelLayers) -> list[Deviation]:
        """How the layers that no recipe touches, of all or of some, differ from the original."""
        return [
            deviation
            for layer in layers.unquantized
            for deviation in self._of_layer(
                model, _Expected(layer, None, _UNQUANTIZED, static_amax=None)
            )
        ]

    def of_others(self, loaded: Mapping[str, Tensor]) -> Iterator[Deviation]:
        """Tensors that are no linear layer's weight: biases, norms, embeddings.

        Args:
            loaded: A model's ``state_dict()``, or a part of it: no more is compared.
        """
        skipped = {layer.tensor for layer in self.layers.linear_layers}
        architecture = self.layers.architecture
        if self.layers.tied_lm_head:  # a copy on disk that is never loaded
            skipped |= {f"{name}.weight" for name in lm_heads_of(architecture)}
        for name, info in self.checkpoint.tensors.items():
            found = loaded_tensor(loaded, name, architecture)
            if name in skipped or found is None or not found.is_floating_point():
                continue
            if _differs(found, info, self.tuned.get(name)):
                kept = "differs from the original, and no recipe touches it"
                yield Deviation(
                    name, "is not what the recipe tuned it to" if name in self.tuned else kept
                )

    def of_caches(self, model: nn.Module, layers: ModelLayers) -> list[Deviation]:
        """How what is done to the caches of all layers, or of some, differs from the recipe."""
        chosen = {cache.name: cache for cache in self.recipe.kv_cache}
        found = []
        for cache in layers.caches:
            one = chosen.get(cache.name)
            attention = model.get_submodule(find_loaded_module(cache, layers.architecture))
            passages = [p for p in cache_passages(attention) if isinstance(p, RoundedCache)]
            needed = "bf16" if one is None else one.scheme
            names = [passage.scheme.name for passage in passages] or ["bf16"]
            if names != [needed]:
                reason = f"needed the cache in {needed!r}, found {', '.join(names)}"
                found.append(Deviation(cache.name, reason))
            elif passages and not self._are_close(
                passages[0].static_amax, (one and one.static_amax) or {}
            ):
                reason = "the static maxima of its cache are not those of the recipe"
                found.append(Deviation(cache.name, reason))
        return found

    def _are_close(self, found: Mapping[str, float], needed: Mapping[str, float]) -> bool:
        return found.keys() == needed.keys() and all(
            math.isclose(found[key], needed[key], rel_tol=self.rounding) for key in needed
        )

    def _of_layer(self, model: nn.Module, expected: _Expected) -> Iterator[Deviation]:
        layer = expected.layer
        at = find_loaded_weight(layer, self.layers.architecture)
        path, _, parameter = at.name.rpartition(".")
        try:
            module = model.get_submodule(path)
            weight = module.get_parameter(parameter).detach()
        except AttributeError:
            yield Deviation(layer.name, f"the model has no weight {at.name!r}")
            return
        reason = _module_deviation(module, expected, at, rounding=self.rounding)
        if reason is not None:
            yield Deviation(layer.name, reason)
        if isinstance(module, TorchaoLinear):
            reason = _torchao_deviation(module, expected)
            if reason is not None:
                yield Deviation(layer.name, reason)
            return
        if at.expert is not None:
            weight = weight[at.expert]
        # FakeQuantLinear holds every weight as [out, in], GPT-2's own module does not.
        if at.transposed and not isinstance(module, FakeQuantLinear):
            weight = weight.T
        weight_OI = weight[at.row_start : at.row_start + layer.out_features]
        reason = _weight_deviation(weight_OI, expected, self.checkpoint, decoded=self.decoded)
        if reason is not None:
            yield Deviation(layer.name, reason)
        if layer.role == "tied" and not _is_head(model, weight):
            yield Deviation(layer.name, "the lm_head has another weight, and is tied to it")


def enforcement(
    recipe: Recipe, checkpoint: Checkpoint, *, fits: Fits | None, decoded: bool
) -> Enforcement:
    """What a recipe makes of a checkpoint; arguments and errors as `find_deviations`."""
    layers = checked_layers(checkpoint, recipe, experts_apart=True)
    schemes = group_schemes(layers, recipe)
    changes, tuned = learned_codes(recipe, layers), tuned_tensors(recipe, checkpoint)
    return Enforcement(recipe, checkpoint, layers, schemes, fits, decoded, changes, tuned)


def _is_head(model: nn.Module, weight: Tensor) -> bool:
    """Whether the lm_head has that very weight."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    return head is not None and head.get_parameter("weight").data_ptr() == weight.data_ptr()


def _module_deviation(
    module: nn.Module, expected: _Expected, at: LoadedWeight, *, rounding: float
) -> str | None:
    """How the module's type, scheme or input scale differs, if it does."""
    wanted = expected.scheme
    if not isinstance(module, FakeQuantLinear | FakeQuantExperts | TorchaoLinear):
        if wanted.activation is None:
            return None  # its weight tells
        return f"needed scheme {wanted.name!r}, found a plain {type(module).__name__}"
    scheme, found = _scheme_and_amax(module, at)
    if (None if scheme is None else scheme.activation) != wanted.activation:
        name = "bf16" if scheme is None else scheme.name
        return f"needed scheme {wanted.name!r}, found inputs quantized as {name!r} says"
    needed = expected.static_amax
    is_same = found == needed or (
        found is not None and needed is not None and math.isclose(found, needed, rel_tol=rounding)
    )
    if not is_same:
        return f"needed the static input maximum {needed}, found {found}"
    return None


def _scheme_and_amax(
    module: FakeQuantLinear | FakeQuantExperts | TorchaoLinear, at: LoadedWeight
) -> tuple[Scheme | None, float | None]:
    """The scheme of a layer in its module, and its static input maximum; None: it has none."""
    if not isinstance(module, FakeQuantExperts):
        return module.scheme, module.static_amax
    if at.expert is None:
        return None, None
    key = at.name.rpartition(".")[2], at.expert
    return module.schemes.get(key), module.static_amax.get(key)


def _torchao_deviation(module: TorchaoLinear, expected: _Expected) -> str | None:
    """How a layer that runs a kernel of TorchAO's differs from the scheme, if it does."""
    layer, scheme = expected.layer, expected.scheme
    if expected.group is None or expected.codes is None:
        return f"needed scheme {scheme.name!r}, found {type(module.weight.data).__name__}"
    return weight_deviation(
        module,
        expected.codes.rows(0, layer.out_features),
        scheme=scheme,
        group=expected.group,
        static_amax=expected.static_amax,
    )


def _weight_deviation(
    weight_OI: Tensor, expected: _Expected, checkpoint: Checkpoint, *, decoded: bool
) -> str | None:
    """How the weight differs from the scheme's, if it does."""
    layer, scheme = expected.layer, expected.scheme
    if type(weight_OI) not in (Tensor, nn.Parameter):
        return f"needed scheme {scheme.name!r}, found a weight of class {type(weight_OI).__name__}"
    shape = (layer.out_features, layer.in_features)
    if tuple(weight_OI.shape) != shape:
        return f"needed a weight of shape {list(shape)}, found {list(weight_OI.shape)}"
    has_reciprocal = scheme.weight is not None and scheme.weight.scale.global_scale_bits > 0
    rounding = 2 * torch.finfo(weight_OI.dtype).eps if decoded and has_reciprocal else 0.0
    different, first, is_source = 0, "", True
    tile_rows = 1 if scheme.weight is None else scheme.weight.granularity.rows
    for start, stop in row_blocks(*shape, elements=_BLOCK_ELEMENTS, tile_rows=tile_rows):
        source = read_layer_rows(checkpoint, layer, start, stop)
        if expected.codes is None:
            needed = read_kept_layer(checkpoint, layer, start, stop)
        else:
            needed = expected.codes.decoded(start, stop)
        found = weight_OI[start:stop].cpu()
        differs = _bits_differ(found, needed)
        if rounding:
            differs &= (found.float() - needed).abs() > rounding * needed.abs()
        if differs.any() and not different:
            row, column = differs.nonzero()[0].tolist()
            first = (
                f"first at [{start + row}, {column}], needed {float(needed[row, column])}, "
                f"found {float(found[row, column])}"
            )
        different += int(differs.sum())
        is_source = is_source and not bool(_bits_differ(found, source).any())
    if not different:
        return None
    if is_source:
        return f"needed scheme {scheme.name!r}, found the layer left unquantized"
    return (
        f"{different} of {layer.weights} weights are not those of scheme {scheme.name!r} ({first})"
    )


def _differs(found: Tensor, info: TensorInfo, tuned: Tensor | None) -> bool:
    """Whether a tensor is not the checkpoint's, or what it was tuned to; block by block of rows."""
    if tuned is not None or not info.shape:
        needed = read_tensor(info) if tuned is None else tuned
        return found.shape != needed.shape or bool(_bits_differ(found.cpu(), needed).any())
    if found.shape != info.shape:
        return True
    row = math.prod(info.shape[1:])
    for start, stop in row_blocks(info.shape[0], row, elements=_BLOCK_ELEMENTS):
        rows = read_rows(info, start, stop)
        if info.decoded:  # rounded as an export rounds it
            rows = rows.bfloat16()
        if _bits_differ(found[start:stop].cpu(), rows).any():
            return True
    return False


def _bits_differ(found: Tensor, needed: Tensor) -> Tensor:
    """Where a tensor is not another, rounded once to its dtype; -0 is not 0."""
    bits = _BITS[found.element_size()]
    return found.contiguous().view(bits) != needed.to(found.dtype).contiguous().view(bits)
