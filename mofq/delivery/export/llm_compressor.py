"""Writes a recipe for llm-compressor, which then quantizes by rules of its own.

The formats, granularities and layers are the recipe's. Scales and codes are
not: llm-compressor's integers reach from -2^(b-1) under a scale of twice the
maximum by 2^b - 1, so its results are near to, and not those that were
measured. ``export --to compressed-tensors`` writes the measured ones.

Source: llm-compressor 0.14.0.1, ``modifiers/quantization/quantization``.
"""

from __future__ import annotations

from typing import Any

import yaml

from mofq.decision.recipe import Recipe
from mofq.delivery.export.compressed_tensors.plan import plan_export
from mofq.delivery.export.compressed_tensors.quantization_config import quantization_config
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint

_HEADER = (
    "# A recipe for llm-compressor, made by mofq. The formats are those of the mofq recipe;\n"
    "# scales and codes will be llm-compressor's own.\n"
)


def llm_compressor_recipe(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """``recipe.yaml`` for ``llmcompressor.oneshot``.

    Args:
        checkpoint: The model.
        recipe: Of that model.

    Returns:
        The text of the file.

    Raises:
        BackendError: A scheme is not in compressed-tensors, or nothing is quantized.
        RecipeError: The recipe is not for this model.
    """
    plan = plan_export(checkpoint, recipe)
    config = quantization_config(plan, names_of_engines=False)
    if config is None:
        raise BackendError(
            f"{recipe.title}: quantizes nothing, so there is nothing to export. Search under a "
            f"smaller budget."
        )
    groups = {name: _scheme(group) for name, group in config["config_groups"].items()}
    modifier = {"config_groups": groups, "ignore": config["ignore"]}
    document = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}
    return _HEADER + yaml.safe_dump(document, sort_keys=False, width=100)


def _scheme(group: dict[str, Any]) -> dict[str, Any]:
    kept = {key: group[key] for key in ("targets", "weights")}
    if group["input_activations"] is not None:
        kept["input_activations"] = group["input_activations"]
    return kept
