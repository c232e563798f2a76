"""Which of TorchAO's configs stands for a scheme.

Source: torchao 0.18.0 ``quantization/quant_api.py`` and ``prototype/mx_formats``; transformers
5.23.0 ``quantizers/base.py``, ``get_modules_to_not_convert``.
"""

from __future__ import annotations

import re

from mofq.engines.groups import embedding_role, is_experts, transposed_layer
from mofq.engines.scheme_names import format_name
from mofq.model.layers import AnyGroup
from mofq.numbers.schemes import Scheme

#: Scheme, without scale rule, rounding and f32 scales -> class of its config; first match.
_CONFIGS: dict[str, str] = {
    r"int8\.channel\+int8\.token": "Int8DynamicActivationInt8WeightConfig",
    r"fp8_e4m3\.channel\+fp8_e4m3\.token": "Float8DynamicActivationFloat8WeightConfig",
    r"int8\.(channel|g\d+)": "Int8WeightOnlyConfig",
    r"int[2-8]\.(channel|g\d+)(\.asym)?": "IntxWeightOnlyConfig",
    r"fp8_e4m3\.(channel|g\d+)": "Float8WeightOnlyConfig",
    r"nvfp4": "NVFP4WeightOnlyConfig",
    r"mxfp8\+mxfp8|mxfp4\+mxfp4": "MXDynamicActivationMXWeightConfig",
}


def config_class(scheme: Scheme) -> str | None:
    """Name of the ``AOBaseConfig`` of a quantized scheme; None where TorchAO has none."""
    name = format_name(scheme).replace(".s-f32", "")
    return next((one for pattern, one in _CONFIGS.items() if re.fullmatch(pattern, name)), None)


def scheme_problem(scheme: Scheme, group: AnyGroup) -> str | None:
    """Why no config of TorchAO stands for a quantized scheme of a fusion group, or None."""
    if is_experts(group):
        return (
            "has configs for linear layers, and transformers keeps experts as one tensor; take "
            "bf16 for them"
        )
    if layer := transposed_layer(group):
        return (
            "has no product of a weight that is stored transposed (aten.addmm of a Conv1D), as "
            f"{layer} is; take bf16"
        )
    if embedding_role(group) is not None:
        return "has configs for linear layers alone; take bf16 for the embedding"
    if group.name == "lm_head":
        return "is told by transformers to leave the lm_head as it is; take bf16 for it"
    if config_class(scheme) is None:
        return (
            f"has no config for layers in {format_name(scheme)}; take int8.channel+int8.token, "
            f"fp8_e4m3.channel+fp8_e4m3.token, mxfp8+mxfp8, mxfp4+mxfp4, or weights alone in "
            f"intN.channel, intN.gK, fp8_e4m3.channel, fp8_e4m3.gK or nvfp4"
        )
    return None
