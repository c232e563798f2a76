"""Writes a recipe as TorchAO's ``FqnToConfig``, which then quantizes by rules of its own.

The file is the ``quantization_config`` of transformers:
``from_pretrained(MODEL, quantization_config=TorchAoConfig.from_dict(json.load(file)))``, and
``save_pretrained`` of that model makes a TorchAO checkpoint. Formats, granularities and layers
are the recipe's; scales are TorchAO's (over twice the maximum by 255 for INT8, for example), so
its codes are near to, and not those that were measured. ``apply_recipe(…, backend="torchao")``
puts the measured ones into a model in memory.

There is one key for each fusion group, a regular expression that also matches the name under
which vLLM keeps the fused layer: vLLM looks that name up, and exact names are not found there.

Source: torchao 0.18.0, ``quantization/quant_api.py``, ``FqnToConfig``; transformers 5.23.0,
``TorchAoConfig``.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from mofq.decision.recipe import Recipe
from mofq.delivery.recipe_layers import checked_layers, group_schemes
from mofq.engines import format_name
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FusionGroup, find_loaded_weight
from mofq.numbers.formats import FP4_E2M1
from mofq.numbers.schemes import Scheme

#: Last word of a fusion group's name -> what vLLM calls the fused layer.
_FUSED = {"qkv": "qkv_proj", "gate_up": "gate_up_proj"}


def torchao_config(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """``FqnToConfig`` as JSON, inside of transformers' ``TorchAoConfig``.

    Args:
        checkpoint: The model.
        recipe: Of that model.

    Returns:
        The text of the file.

    Raises:
        BackendError: TorchAO is not installed, or has no config for a scheme or a kind of
            layer; the message names the layer.
        RecipeError: The recipe is not for this model.
    """
    try:
        from torchao.quantization import FqnToConfig
        from transformers import TorchAoConfig
    except ImportError:
        raise BackendError(
            "exporting to torchao needs the package torchao, which is not installed. "
            "Run `pip install mofq[torchao]`."
        ) from None
    layers = checked_layers(checkpoint, recipe)
    configs: OrderedDict[str, Any] = OrderedDict()
    schemes = group_schemes(layers, recipe)
    for group in layers.groups:
        scheme = schemes[group.name]
        if not scheme.is_unquantized:
            configs[_pattern(group, layers.architecture)] = layer_config(
                scheme, where=group.layers[0].name
            )
    if not configs:
        raise BackendError(
            f"{recipe.model_name}: the recipe quantizes nothing, so there is nothing to export."
        )
    document = TorchAoConfig(quant_type=FqnToConfig(configs)).to_dict()
    return json.dumps(document, indent=1) + "\n"


def layer_config(scheme: Scheme, *, where: str) -> Any:
    """TorchAO's ``AOBaseConfig`` for a scheme.

    Args:
        scheme: Of a layer.
        where: Names the layer in the message.

    Raises:
        BackendError: TorchAO has none.
    """
    name = format_name(scheme).replace(".s-f32", "")
    for pattern, make in _CONFIGS.items():
        if re.fullmatch(pattern, name):
            return make(scheme)
    raise BackendError(
        f"{where}: TorchAO has no config for {scheme.name}. It has: int8 per channel with "
        f"int8.token, FP8 per channel with fp8_e4m3.token, mxfp8+mxfp8, mxfp4+mxfp4, and for "
        f"weights alone intN.channel, intN.gK, fp8_e4m3.channel, fp8_e4m3.gK and nvfp4."
    )


def _int8_dynamic(scheme: Scheme) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerRow

    return Int8DynamicActivationInt8WeightConfig(granularity=PerRow())


def _float8_dynamic(scheme: Scheme) -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def _int8_weights(scheme: Scheme) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, PerRow

    return Int8WeightOnlyConfig(granularity=_granularity(scheme, PerRow()))


def _float8_weights(scheme: Scheme) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, PerRow

    return Float8WeightOnlyConfig(granularity=_granularity(scheme, PerRow()))


def _integer_weights(scheme: Scheme) -> Any:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis

    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.quantized_weight.element.bits}"),
        granularity=_granularity(scheme, PerAxis(0)),
        mapping_type=MappingType.SYMMETRIC
        if scheme.quantized_weight.symmetric
        else MappingType.ASYMMETRIC,
    )


def _nvfp4_weights(scheme: Scheme) -> Any:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    return NVFP4WeightOnlyConfig()


def _microscaling(scheme: Scheme) -> Any:
    import torch
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.prototype.mx_formats.config import ScaleCalculationMode

    is_fp4 = scheme.quantized_weight.element is FP4_E2M1
    element = torch.float4_e2m1fn_x2 if is_fp4 else torch.float8_e4m3fn
    return MXDynamicActivationMXWeightConfig(
        activation_dtype=element, weight_dtype=element, scaling_mode=ScaleCalculationMode.FLOOR
    )


#: Scheme, without scale rule, rounding and f32 scales -> what makes its config; first match.
_CONFIGS: dict[str, Callable[[Scheme], Any]] = {
    r"int8\.channel\+int8\.token": _int8_dynamic,
    r"fp8_e4m3\.channel\+fp8_e4m3\.token": _float8_dynamic,
    r"int8\.(channel|g\d+)": _int8_weights,
    r"int[2-8]\.(channel|g\d+)(\.asym)?": _integer_weights,
    r"fp8_e4m3\.(channel|g\d+)": _float8_weights,
    r"nvfp4": _nvfp4_weights,
    r"mxfp8\+mxfp8|mxfp4\+mxfp4": _microscaling,
}


def _granularity(scheme: Scheme, whole_row: Any) -> Any:
    from torchao.quantization import PerGroup

    tiles = scheme.quantized_weight.granularity
    return PerGroup(tiles.columns) if tiles.kind == "group" else whole_row


def _pattern(group: FusionGroup, architecture: str) -> str:
    """A regular expression for the layers of a group and for what they are fused into."""
    loaded = [find_loaded_weight(layer, architecture) for layer in group.layers]
    names = [each.name.removesuffix(".weight") for each in loaded]
    if any(each.expert is not None for each in loaded) or ".experts." in names[0]:
        raise BackendError(
            f"{group.layers[0].name}: TorchAO's configs are for linear layers, and transformers "
            f"keeps experts as one tensor. Take bf16 for them."
        )
    parent = names[0].rpartition(".")[0]
    words = [name.removeprefix(f"{parent}.") for name in names]
    if len(words) > 1:
        words.append(_FUSED.get(group.name.rpartition(".")[2], words[0]))
    return f"re:{re.escape(parent)}\\.({'|'.join(map(re.escape, dict.fromkeys(words)))})"
