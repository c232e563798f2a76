"""Recipes for tiny checkpoints, and reading exports with compressed-tensors' own decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors import safe_open
from torch import Tensor

from mofq.decision import recipe_from_layers
from mofq.decision.recipe import Recipe
from mofq.delivery.export.compressed_tensors import Export, export_compressed_tensors
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import FusionGroup, LinearLayer, find_layers
from mofq.numbers.quantize import QuantizedWeight, quantize_weight
from mofq.numbers.schemes import Scheme

#: Every kind of storage, each scale rule that changes codes, and the static ones.
STORABLE = (
    "int8.channel+int8.token",
    "int8.channel.s-f32@fullrange+int8.token",
    "int8.tensor+int8.token",
    "int8.channel.asym+int8.token",
    "int8.channel+int8.tensor",
    "int8.channel",
    "int8.g32@mse",
    "int8.g64.asym",
    "int4.channel",
    "int4.g32",
    "int4.g32@fullrange",
    "int4.g128@mse",
    "int4.g64.asym",
    "int4.channel.asym.s-f32",
    "int4.g64+int8.token",
    "int2.g32",
    "int3.g32@fullrange",
    "int5.channel",
    "int6.g64.asym",
    "int7.channel.asym",
    "int7.g32@mse",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "fp8_e4m3.tensor+fp8_e4m3.tensor",
    "fp8_e4m3.channel@mse",
    "fp8_e4m3.block64.s-f32+fp8_e4m3.g128",
    "fp8_e4m3.block64x32",
    "nvfp4",
    "nvfp4@fouroversix",
    "nvfp4+nvfp4",
    "mxfp4",
    "fp4_e2m1.g32.s-e8m0ceil",
    "mxfp4+mxfp4",
    "mxfp8+mxfp8",
)


#: Each kind of storage beside an unquantized layer.
MIXED = (
    "int8.channel+int8.token",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "int4.g32@fullrange",
    "int8.g64",
    "bf16",
    "int4.g128.asym",
)


def make_recipe(
    checkpoint: Checkpoint,
    choose: Callable[[int, FusionGroup], str],
    *,
    lm_head: bool = False,
) -> Recipe:
    """A recipe that gives each fusion group what a function of its number and itself says.

    Args:
        checkpoint: Of the model.
        choose: Called with the number of a group and the group.
        lm_head: Whether it is a group too.
    """
    layers = find_layers(checkpoint, include_lm_head=lm_head)
    schemes = {group.name: choose(number, group) for number, group in enumerate(layers.groups)}
    static = dict.fromkeys((layer.name for layer in layers.grouped_layers), 3.5)
    return recipe_from_layers(layers, schemes, checkpoint=checkpoint, static_amax=static)


def uniform_recipe(checkpoint: Checkpoint, scheme: str) -> Recipe:
    """A recipe of one scheme."""
    return make_recipe(checkpoint, lambda number, group: scheme)


def mixed_recipe(folder: Path) -> Recipe:
    """Six schemes in turn."""
    return make_recipe(open_checkpoint(str(folder)), lambda number, group: MIXED[number % 6])


def export(model: Path, recipe: Recipe, out: Path, **options: object) -> Exported:
    """Export a recipe of a model folder."""
    export_compressed_tensors(open_checkpoint(str(model)), recipe, out, **options)  # type: ignore[arg-type]
    return Exported(out)


def quantize_layer(
    checkpoint: Checkpoint, group: FusionGroup, layer: LinearLayer, scheme: Scheme
) -> QuantizedWeight:
    """What was measured: the whole weight of one layer, quantized at once."""
    assert scheme.weight is not None
    amax = None
    if scheme.weight.needs_tensor_amax:
        sharing = [other for other in group.layers if other.shares_scale == layer.shares_scale]
        amax = max(float(whole_weight(checkpoint, other).abs().max()) for other in sharing)
    return quantize_weight(whole_weight(checkpoint, layer), scheme.weight, tensor_amax=amax)


def whole_weight(checkpoint: Checkpoint, layer: LinearLayer) -> Tensor:
    """The original weight."""
    return read_layer_rows(checkpoint, layer, 0, layer.out_features)


@dataclass(frozen=True)
class Exported:
    """An exported folder, read with safetensors and compressed-tensors alone."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text("utf-8"))
        return config

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of every shard."""
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        return found

    def scheme_of(self, layer: str) -> QuantizationScheme:
        """What compressed-tensors understands of a layer's config group."""
        config = QuantizationConfig.model_validate(self.config["quantization_config"])
        groups = [g for g in config.config_groups.values() if layer in g.targets]
        assert len(groups) == 1, layer
        return groups[0]

    def parts(self, layer: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one layer."""
        prefix = f"{layer}."
        words = {
            key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)
        }
        return {word: tensor for word, tensor in words.items() if "." not in word}

    def decode(self, layer: str, tensors: dict[str, Tensor]) -> Tensor:
        """The weight as compressed-tensors' decompressor returns it."""
        scheme = self.scheme_of(layer)
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weight: Tensor = compressor.decompress(self.parts(layer, tensors), scheme)["weight"]
        return weight


@dataclass(frozen=True)
class Stored:
    """A checkpoint, the recipe of one scheme for it, and the folder that it was exported to."""

    checkpoint: Checkpoint
    recipe: Recipe
    result: Export
    exported: Exported


def store(model: Path, scheme: str, out: Path) -> Stored:
    """Export a model folder under one scheme."""
    checkpoint = open_checkpoint(str(model))
    recipe = uniform_recipe(checkpoint, scheme)
    result = export_compressed_tensors(checkpoint, recipe, out)
    return Stored(checkpoint, recipe, result, Exported(out))


def read_codes(parts: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Codes as ``QuantizedWeight`` holds them, by compressed-tensors' own unpacking."""
    weight = scheme.weight
    assert weight is not None
    bits = weight.element.bits
    if "weight_shape" in parts:
        shape = torch.Size(parts["weight_shape"].tolist())
        signed = unpack_from_int32(parts["weight_packed"], bits, shape)
        return signed if weight.symmetric else _unsigned(signed, bits)
    if "weight_packed" in parts:
        rows, half = parts["weight_packed"].shape
        return unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * half, dtype=torch.float32)
    if parts["weight"].dtype == torch.int8:
        return parts["weight"] if weight.symmetric else _unsigned(parts["weight"], bits)
    return parts["weight"].to(torch.float32)


def read_scale(parts: dict[str, Tensor], scheme: Scheme, like: Tensor) -> Tensor:
    """Scales as ``QuantizedWeight`` holds them."""
    assert scheme.weight is not None
    stored = parts["weight_scale"]
    if stored.dtype == torch.uint8:
        stored = torch.ldexp(torch.ones(stored.shape), stored.to(torch.int32) - 127)
    return stored.to(like.dtype).reshape(like.shape)


def read_zero_point(parts: dict[str, Tensor], scheme: Scheme, like: Tensor) -> Tensor:
    """Zero points as ``QuantizedWeight`` holds them."""
    assert scheme.weight is not None
    bits = scheme.weight.element.bits
    stored = parts["weight_zero_point"]
    if stored.dtype == torch.int32:
        stored = unpack_from_int32(stored, bits, like.shape, packed_dim=0)
    return _unsigned(stored, bits).reshape(like.shape)


def _unsigned(signed: Tensor, bits: int) -> Tensor:
    return (signed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
