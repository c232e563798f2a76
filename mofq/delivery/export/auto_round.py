"""Writes the ``layer_config`` of Intel's AutoRound, which then rounds by rules of its own.

Source: AutoRound 0.15.1, ``schemes.py``; ``AutoRound(model, …, layer_config=…)``.
"""

from __future__ import annotations

import json
from typing import Any

from mofq.decision.recipe import Recipe
from mofq.delivery.recipe_layers import checked_layers
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.numbers.formats import FP4_E2M1, FP8_E4M3, FloatFormat, IntFormat
from mofq.numbers.schemes import Scheme, TensorScheme, parse_scheme

_STATIC_NVFP4 = "nv_fp4_with_static_gs"
_UNQUANTIZED = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}


def auto_round_config(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The layer config as JSON: ``AutoRound(model, layer_config=json.load(file))``.

    Args:
        checkpoint: The model.
        recipe: Of that model.

    Returns:
        The text of the file.

    Raises:
        BackendError: AutoRound has no words for a scheme; the message names the layer.
        RecipeError: The recipe is not for this model.
    """
    layers = checked_layers(checkpoint, recipe)
    schemes = recipe.schemes
    config = {}
    for layer in layers.linear_layers:
        scheme = parse_scheme(schemes[layer.name])
        if layer.role == "linear":
            config[layer.name] = _layer_config(scheme, layer.name)
        elif not scheme.is_unquantized:
            raise BackendError(
                f"{layer.name}: AutoRound quantizes linear layers alone. Take bf16 for the "
                f"embedding."
            )
    return json.dumps(config, indent=2) + "\n"


def _layer_config(scheme: Scheme, where: str) -> dict[str, Any]:
    if scheme.is_unquantized:
        return dict(_UNQUANTIZED)
    if scheme.weight is None:
        raise _cannot(where, scheme)
    weight = _operand(scheme.weight, scheme, where)
    config = {
        "bits": scheme.weight.element.bits,
        "group_size": weight[1],
        "sym": scheme.weight.symmetric,
        "data_type": weight[0],
        "act_bits": 16,
    }
    if scheme.activation is not None:
        data_type, group_size = _operand(scheme.activation, scheme, where)
        # NVFP4's inputs have a static scale for the tensor and dynamic ones for groups.
        is_static = scheme.activation.granularity.kind == "tensor"
        config |= {
            "act_bits": scheme.activation.element.bits,
            "act_group_size": group_size,
            "act_sym": scheme.activation.symmetric,
            "act_data_type": _STATIC_NVFP4 if data_type == "nv_fp" else data_type,
            "act_dynamic": not is_static,
        }
    return config


def _operand(operand: TensorScheme, scheme: Scheme, where: str) -> tuple[str, int]:
    """AutoRound's data type and group size: -1 a channel or token, 0 the tensor."""
    kind, scale = operand.granularity.kind, operand.scale.name
    sizes = {"channel": -1, "token": -1, "tensor": 0, "group": operand.granularity.columns}
    if kind not in sizes or operand.outliers or operand.scale_rule == "fouroversix":
        raise _cannot(where, scheme)
    if scale.startswith("e8m0") and sizes[kind] == 32 and isinstance(operand.element, FloatFormat):
        return "mx_fp", 32
    if operand.element is FP4_E2M1 and scale == "e4m3" and sizes[kind] == 16:
        return "nv_fp", 16
    if scale in ("bf16", "f32") and isinstance(operand.element, IntFormat):
        return "int", sizes[kind]
    if scale in ("bf16", "f32") and operand.element is FP8_E4M3:
        return "fp", sizes[kind]
    raise _cannot(where, scheme)


def _cannot(where: str, scheme: Scheme) -> BackendError:
    return BackendError(
        f"{where}: AutoRound has no words for {scheme.name}. Take INT or FP8 per channel, group, "
        f"tensor or token, nvfp4, mxfp4 or mxfp8."
    )
