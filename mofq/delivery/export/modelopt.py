"""Writes the mixed-precision config of NVIDIA's ModelOpt, which vLLM and TensorRT-LLM read.

It names the algorithm of each layer, as in ``hf_quant_config.json`` of a
checkpoint that ModelOpt quantizes; it holds no weights. Which algorithms there are, and who reads
them, is in ``mofq.engines.exports.modelopt``.
"""

from __future__ import annotations

import json
from typing import Any

from mofq import __version__
from mofq.decision.recipe import Recipe
from mofq.delivery.recipe_layers import checked_layers, group_schemes
from mofq.engines import format_name
from mofq.engines.exports import export_problem
from mofq.engines.exports.modelopt import ALGORITHMS
from mofq.engines.groups import is_experts
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint


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
    schemes = group_schemes(layers, recipe)
    quantized: dict[str, dict[str, Any]] = {}
    excluded = [layer.name for layer in layers.unquantized]
    for group in layers.groups:
        scheme, names = schemes[group.name], [layer.name for layer in group.layers]
        if problem := export_problem("modelopt", scheme, group):
            raise BackendError(f"{names[0]}: ModelOpt {problem}.")
        if scheme.is_unquantized:
            excluded += names
            if is_experts(group):  # engines look a mixture up under one name
                excluded.append(f"{names[0].rpartition('.experts.')[0]}.experts")
        else:
            quantized |= dict.fromkeys(names, ALGORITHMS[format_name(scheme)])
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
