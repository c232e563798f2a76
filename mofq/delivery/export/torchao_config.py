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
from mofq.engines.exports import export_problem
from mofq.engines.exports.torchao import config_class
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FusionGroup, find_loaded_weight
from mofq.numbers.formats import FP4_E2M1
from mofq.numbers.schemes import Scheme

#: transformers quantizes every parameter of a module that a key matches, unless an earlier key
#: names the parameter: a bias must stay as it is (``integrations/torchao.py``, ``convert``).
_BIASES = r"re:.*\.bias"
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
        BackendError: TorchAO has no config for a scheme or a kind of layer; the message names
            the layer.
        RecipeError: The recipe is not for this model.
    """
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    layers = checked_layers(checkpoint, recipe)
    configs: OrderedDict[str, Any] = OrderedDict({_BIASES: None})
    schemes = group_schemes(layers, recipe)
    for group in layers.groups:
        scheme = schemes[group.name]
        if problem := export_problem("torchao", scheme, group):
            raise BackendError(f"{group.layers[0].name}: TorchAO {problem}.")
        if not scheme.is_unquantized:
            configs[_pattern(group, layers.architecture)] = layer_config(scheme)
    document = TorchAoConfig(quant_type=FqnToConfig(configs)).to_dict()
    return json.dumps(document, indent=1) + "\n"


def layer_config(scheme: Scheme) -> Any:
    """TorchAO's ``AOBaseConfig`` for a scheme that `config_class` knows."""
    name = config_class(scheme)
    assert name is not None
    return _MAKERS[name](scheme)


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


#: Class of a config -> what makes it.
_MAKERS: dict[str, Callable[[Scheme], Any]] = {
    "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
    "Float8DynamicActivationFloat8WeightConfig": _float8_dynamic,
    "Int8WeightOnlyConfig": _int8_weights,
    "IntxWeightOnlyConfig": _integer_weights,
    "Float8WeightOnlyConfig": _float8_weights,
    "NVFP4WeightOnlyConfig": _nvfp4_weights,
    "MXDynamicActivationMXWeightConfig": _microscaling,
}


def _granularity(scheme: Scheme, whole_row: Any) -> Any:
    from torchao.quantization import PerGroup

    tiles = scheme.quantized_weight.granularity
    return PerGroup(tiles.columns) if tiles.kind == "group" else whole_row


def _pattern(group: FusionGroup, architecture: str) -> str:
    """A regular expression for the layers of a group and for what they are fused into."""
    names = [
        find_loaded_weight(layer, architecture).name.removesuffix(".weight")
        for layer in group.layers
    ]
    parent = names[0].rpartition(".")[0]
    words = [name.removeprefix(f"{parent}.") for name in names]
    if len(words) > 1:
        words.append(_FUSED.get(group.name.rpartition(".")[2], words[0]))
    return f"re:{re.escape(parent)}\\.({'|'.join(map(re.escape, dict.fromkeys(words)))})"
