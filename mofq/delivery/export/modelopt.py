"""Writes the mixed-precision config of NVIDIA's ModelOpt, which vLLM and TensorRT-LLM read.

It names the algorithm of each layer, as in ``hf_quant_config.json`` of a
checkpoint that ModelOpt quantizes; it holds no weights.

Source: ModelOpt's unified checkpoints as vLLM 0.32.0
(``layers/quantization/modelopt.py``) and TensorRT-LLM
(``tensorrt_llm/quantization/modelopt_config.py``) read them.
"""

from __future__ import annotations

import json
from typing import Any

from mofq import __version__
from mofq.decision.recipe import Recipe
from mofq.delivery.recipe_layers import checked_layers
from mofq.engines import format_name
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.numbers.schemes import parse_scheme

#: Scheme, without scale rule and rounding -> what ModelOpt calls it.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fp8_e4m3.tensor+fp8_e4m3.tensor": {"quant_algo": "FP8"},
    "fp8_e4m3.tensor.s-f32+fp8_e4m3.tensor": {"quant_algo": "FP8"},
    "fp8_e4m3.channel+fp8_e4m3.token": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "fp8_e4m3.channel.s-f32+fp8_e4m3.token": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "fp8_e4m3.block128": {"quant_algo": "FP8_PB_WO", "group_size": 128},
    "fp8_e4m3.block128.s-f32": {"quant_algo": "FP8_PB_WO", "group_size": 128},
    "nvfp4+nvfp4": {"quant_algo": "NVFP4", "group_size": 16},
    "nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "mxfp8+mxfp8": {"quant_algo": "MXFP8", "group_size": 32},
    "int4.g64": {"quant_algo": "W4A16_AWQ", "group_size": 64},
    "int4.g128": {"quant_algo": "W4A16_AWQ", "group_size": 128},
}


def modelopt_config(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """``hf_quant_config.json``.

    Args:
        checkpoint: The model.
        recipe: Of that model.

    Returns:
        The text of the file.

    Raises:
        BackendError: ModelOpt has no algorithm for a scheme; the message names the layer.
        RecipeError: The recipe is not for this model.
    """
    layers = checked_layers(checkpoint, recipe)
    schemes = recipe.schemes
    quantized: dict[str, dict[str, Any]] = {}
    excluded = [layer.name for layer in layers.unquantized]
    for layer in layers.grouped_layers:
        scheme = parse_scheme(schemes[layer.name])
        if scheme.is_unquantized:
            excluded.append(layer.name)
            continue
        name = format_name(scheme)
        if name not in ALGORITHMS:
            raise BackendError(
                f"{layer.name}: ModelOpt has no algorithm for {scheme.name}. It has: "
                f"{', '.join(ALGORITHMS)}."
            )
        quantized[layer.name] = ALGORITHMS[name]
    document = {
        "producer": {"name": "modelopt", "version": f"mofq {__version__}"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "quantized_layers": quantized,
            "exclude_modules": excluded,
        },
    }
    return json.dumps(document, indent=2) + "\n"
