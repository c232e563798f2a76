"""The codes and scales of the layers of a quantized model while they are learned.

A weight is kept as a number within the cell of its code, at first as near to the original's as the
cell allows. Gradients of the rounded weight move it as if it were not rounded (straight through),
each step by the same part of the distance between codes, whatever the gradient's size; where it
leaves the cell, the code becomes the next one. A scale is multiplied by a factor, and stays in its
format.

Source: signed steps on rounding, W. Cheng et al., "Optimize Weight Rounding via Signed Gradient
Descent for the Quantization of LLMs", arXiv:2309.05516, which learns block after block on distances
of outputs; straight-through gradients, Y. Bengio et al., arXiv:1308.3432.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.fake_quant_experts import FakeQuantExperts
from mofq.delivery.recipe_layers import group_schemes
from mofq.evidence.code_changes import CodeChanges, can_learn, can_learn_scales
from mofq.evidence.fits import Fits
from mofq.evidence.layer_codes import LayerCodes, layer_codes
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows, read_shared_amax
from mofq.model.layers import (
    LinearLayer,
    LoadedWeight,
    ModelLayers,
    find_loaded_weight,
    is_expert,
)
from mofq.numbers.formats import FloatFormat
from mofq.numbers.quantize import (
    FakeQuantLinear,
    QuantizedWeight,
    dequantize_weight,
    quantize_with_scales,
)
from mofq.numbers.quantize.tiles import tile_shape, to_tiles
from mofq.numbers.schemes import TensorScheme

#: How far from its code a weight begins at most, in distances between codes: within the cell.
_IN_CELL = 0.4
#: Memory while codes are learned, for each weight beside the model: where it is in its cell and its
#: gradient in float32; its first code, of floating-point elements in float32 too [bytes].
_LATENT_BYTES, _INT_BYTES, _FLOAT_BYTES = 8, 1, 4
#: A layer that is all of its weight.
_WHOLE = LoadedWeight("")


@dataclass(slots=True)
class LearnedCodes:
    """The weight of one layer while its codes and scales are learned."""

    name: str
    scheme: TensorScheme
    before: QuantizedWeight  #: as the scheme rounds it
    latent_OI: Tensor  #: where each weight is in its cell, in the units of the weight, float32
    factor_AG: Tensor | None  #: relative change of each scale, float32; None: scales stay
    error: float  #: of the weight as rounded, relative to its norm
    start: CodeChanges | None = None  #: that were made to what the scheme rounds it to, before
    #: In the model, whose gradient is taken, as it computes; of an expert others have rows in it.
    weight: Tensor = field(init=False)
    at: LoadedWeight = field(init=False)  #: where the layer is in it

    @classmethod
    def of(
        cls, name: str, weight: Tensor, codes: LayerCodes, at: LoadedWeight = _WHOLE
    ) -> LearnedCodes:
        """Begin with what a scheme makes of a layer.

        Args:
            name: Of the layer.
            weight: As `place` has it, and so is ``at``; it holds what the scheme makes.
            codes: Of the layer; reads its rows.
            at: Where the layer is in the weight.
        """
        scheme, rows, device = codes.scheme, codes.layer.out_features, weight.device
        before = codes.rows(0, rows).to(device)
        weight_OI = codes.read_rows(0, rows).to(device, torch.float32)
        rounded_OI = dequantize_weight(before, scheme)
        error = float((rounded_OI - weight_OI).norm() / weight_OI.norm().clamp(min=1e-30))
        factor = None
        if before.scale is not None and can_learn_scales(scheme):
            factor = torch.zeros_like(before.scale, dtype=torch.float32)
        latent_OI = _in_cells(weight_OI, before, scheme)
        if codes.changes is not None:  # for a reason that the original's weight does not know
            at_N = codes.changes.at_N.to(device)
            latent_OI.view(-1)[at_N] = rounded_OI.reshape(-1)[at_N]
        found = cls(name, scheme, before, latent_OI, factor, error, codes.changes)
        found.place(weight, at)
        return found

    def place(self, weight: Tensor, at: LoadedWeight) -> None:
        """Say where it computes.

        Args:
            weight: A leaf of the model.
            at: Where the layer is in it, or in an expert's matrix that it is.
        """
        self.weight, self.at = weight, at

    def begin_step(self) -> None:
        """Ask for the gradient of the rounded weight."""
        self.weight.requires_grad_(True)

    def end_step(self) -> None:
        """Drop the gradient, once all layers in the weight have moved."""
        self.weight.grad = None
        self.weight.requires_grad_(False)

    @property
    def rounded_OI(self) -> Tensor:
        """What computes in the model: a view."""
        return self._own(self.weight.detach())

    def _own(self, weight: Tensor) -> Tensor:
        rows = slice(self.at.row_start, self.at.row_start + len(self.latent_OI))
        return (weight.T if self.at.transposed else weight)[rows]

    def step_codes(self, rate: float) -> None:
        """Move the weights in their cells, and leave the gradient of the scales' factors behind.

        Args:
            rate: Of the distance between codes.
        """
        if self.weight.grad is None:  # no token chose the expert
            if self.factor_AG is not None:
                self.factor_AG.grad = None
            return
        gradient_OI, rounded_OI = self._own(self.weight.grad).float(), self.rounded_OI
        if self.factor_AG is not None:
            out_features, in_features = rounded_OI.shape
            rows, columns = tile_shape(
                (out_features, in_features), self.scheme.granularity, name=self.name
            )
            by_factor_OI = gradient_OI * rounded_OI.float()
            summed_AG = to_tiles(by_factor_OI, rows, columns).sum((1, 3))
            self.factor_AG.grad = summed_AG / (1 + self.factor_AG.detach())
        distance_OI = _distances(self.before, self.scheme)
        self.latent_OI -= rate * distance_OI * gradient_OI.sign()

    def put(self) -> None:
        """Give the layer the weight as it is learned by now."""
        self.rounded_OI.copy_(dequantize_weight(self.learned(), self.scheme))

    def learned(self) -> QuantizedWeight:
        """Codes and scales by now."""
        codes_OI = _encoded(self.latent_OI, self.before, self.scheme)
        scale = self.before.scale
        if scale is not None and self.factor_AG is not None:
            scale = (scale.float() * (1 + self.factor_AG.detach())).to(scale.dtype)
        return replace(self.before, codes_OI=codes_OI, scale=scale)

    def changes(self) -> CodeChanges:
        """What is learned by now, on the CPU."""
        found = CodeChanges.between(self.before.to("cpu"), self.learned().to("cpu"))
        return found if self.start is None else self.start.then(found)


def learned_layers(
    model: nn.Module,
    recipe: Recipe,
    layers: ModelLayers,
    checkpoint: Checkpoint,
    *,
    fits: Fits | None,
    experts: bool = True,
    start: Mapping[str, CodeChanges] = MappingProxyType({}),
) -> Iterator[LearnedCodes]:
    """The layers of a model whose codes can be learned.

    Left out are embeddings, codebooks, weights without scales, and the scales of a source. Each
    expert's matrix becomes a tensor of its own in the model.

    Args:
        model: To which the recipe was applied by emulation, its weights as the schemes round them.
        recipe: Not tuned.
        layers: Of the checkpoint.
        checkpoint: That the recipe is applied to.
        fits: Of the recipe's own stats; where a scheme is fitted.
        experts: Whether those of a mixture are learned too.
        start: Layer -> changes to what its scheme makes, with which it begins; the model has them.
    """
    for weight, at, codes in _learnable(
        model, recipe, layers, checkpoint, fits=fits, experts=experts, changes=start
    ):
        yield LearnedCodes.of(codes.layer.name, weight, codes, at)


def put_codes(
    model: nn.Module,
    recipe: Recipe,
    layers: ModelLayers,
    checkpoint: Checkpoint,
    *,
    fits: Fits | None,
    changes: Mapping[str, CodeChanges],
    names: Collection[str],
) -> None:
    """Have layers compute with codes that changed; as `learned_layers`.

    Args:
        model: As there.
        recipe: As there.
        layers: As there.
        checkpoint: As there.
        fits: As there.
        changes: Layer -> changes to what its scheme makes; of those without, that is put.
        names: Of the layers.
    """
    for weight, at, codes in _learnable(
        model, recipe, layers, checkpoint, fits=fits, experts=False, changes=changes, names=names
    ):
        assert at is _WHOLE
        weight.copy_(codes.decoded(0, codes.layer.out_features))


def _learnable(
    model: nn.Module,
    recipe: Recipe,
    layers: ModelLayers,
    checkpoint: Checkpoint,
    *,
    fits: Fits | None,
    experts: bool,
    changes: Mapping[str, CodeChanges],
    names: Collection[str] | None = None,
) -> Iterator[tuple[Tensor, LoadedWeight, LayerCodes]]:
    """What computes, where the layer is in it, and its codes."""
    schemes = group_schemes(layers, recipe)
    for group in layers.groups:
        scheme = schemes[group.name].weight
        if scheme is None or not can_learn(scheme):
            continue
        amax = read_shared_amax(checkpoint, group, scheme) if scheme.needs_tensor_amax else {}
        for layer in group.layers:
            if not _is_learned(layer, experts=experts):
                continue
            if names is not None and layer.name not in names:
                continue
            found = find_leaf(model, layer, layers.architecture)
            if found is None:
                continue
            weight, at = found
            codes = layer_codes(
                fits,
                layer,
                scheme,
                partial(read_layer_rows, checkpoint, layer),
                tensor_amax=amax.get(layer.name),
                changes=changes.get(layer.name),
            )
            yield weight, at, codes


def find_leaf(
    model: nn.Module, layer: LinearLayer, architecture: str
) -> tuple[Tensor, LoadedWeight] | None:
    """What computes with a layer's rounded weight, and where the layer is in it.

    Args:
        model: To which a recipe was applied; an expert's matrix becomes a tensor of its own.
        layer: Of the checkpoint.
        architecture: ``ModelLayers.architecture``.

    Returns:
        None where the layer is not quantized.
    """
    at = find_loaded_weight(layer, architecture)
    path, _, parameter = at.name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, FakeQuantExperts) and at.expert is not None:
        return module.learnable(parameter)[at.expert], at
    if isinstance(module, FakeQuantLinear):  # has its outputs first, whatever it replaced
        return module.weight, _WHOLE
    return None


def learning_bytes(recipe: Recipe, layers: ModelLayers, *, experts: bool = True) -> int:
    """Memory that `learned_layers` take beside the model; arguments as there."""
    schemes = group_schemes(layers, recipe)
    total = 0
    for group in layers.groups:
        scheme = schemes[group.name].weight
        if scheme is None or not can_learn(scheme):
            continue
        codes = _FLOAT_BYTES if isinstance(scheme.element, FloatFormat) else _INT_BYTES
        learned = (layer for layer in group.layers if _is_learned(layer, experts=experts))
        weights = sum(layer.weights for layer in learned)
        total += (_LATENT_BYTES + codes) * weights
    return total


def _is_learned(layer: LinearLayer, *, experts: bool) -> bool:
    return layer.role == "linear" and (experts or not is_expert(layer))


def _encoded(latent_OI: Tensor, like: QuantizedWeight, scheme: TensorScheme) -> Tensor:
    return quantize_with_scales(
        latent_OI,
        scheme,
        scale=like.scale,
        zero_point=like.zero_point,
        global_scale=like.global_scale,
    )


def _distances(weight: QuantizedWeight, scheme: TensorScheme) -> Tensor:
    """From a code to the next, away from zero, in the units of the weight, [O, I]."""
    gaps_OI = torch.ones(weight.codes_OI.shape, device=weight.codes_OI.device)
    if isinstance(scheme.element, FloatFormat):
        _, exponent_OI = torch.frexp(weight.codes_OI.abs())
        lowest = scheme.element.min_exponent
        gaps_OI = torch.exp2((exponent_OI - 1).clamp(min=lowest) - scheme.element.mantissa_bits)
        gaps_OI = torch.where(
            weight.codes_OI == 0, 2.0 ** (lowest - scheme.element.mantissa_bits), gaps_OI
        )
    steps = replace(weight, codes_OI=gaps_OI, zero_point=None)
    return dequantize_weight(steps, scheme).abs()


def _in_cells(weight_OI: Tensor, rounded: QuantizedWeight, scheme: TensorScheme) -> Tensor:
    """What is nearest to a weight and rounds to its codes, but for the edges of the cells."""
    center_OI = dequantize_weight(rounded, scheme)
    reach_OI = _IN_CELL * _distances(rounded, scheme)
    found_OI = center_OI
    # Towards zero the cell of a power of two is half as wide.
    for reach in (0.5 * reach_OI, reach_OI):
        tried_OI = torch.clamp(weight_OI, center_OI - reach, center_OI + reach)
        fits_OI = _encoded(tried_OI, rounded, scheme) == rounded.codes_OI
        found_OI = torch.where(fits_OI, tried_OI, found_OI)
    return found_OI
