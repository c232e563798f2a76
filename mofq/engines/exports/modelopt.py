"""What ModelOpt's mixed-precision config has a name for, and layers may be given one by one.

TensorRT-LLM also has ``FP8_BLOCK_SCALES``, ``W4A16`` and ``W8A16``, which ModelOpt makes of no
layer: its blocks are ``FP8_PB_WO``, which TensorRT-LLM knows as the algorithm of whole models only.

Source: ModelOpt's unified checkpoints as vLLM 0.32.0 (``layers/quantization/modelopt.py``) and
TensorRT-LLM (``tensorrt_llm/_torch/model_config.py``, ``load_modelopt_quant_config``) read them.
"""

from __future__ import annotations

from typing import Any

from mofq.engines.groups import embedding_role, transposed_layer
from mofq.engines.scheme_names import format_name
from mofq.model.layers import AnyGroup
from mofq.numbers.schemes import Scheme

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


def scheme_problem(scheme: Scheme, group: AnyGroup) -> str | None:
    """Why ModelOpt's config cannot name a quantized scheme of a fusion group, or None."""
    if embedding_role(group) is not None:
        return "has algorithms for linear layers alone; take bf16 for the embedding"
    if layer := transposed_layer(group):
        return (
            "is read by TensorRT-LLM, which has no class of a model whose weights are stored "
            f"transposed, as {layer} is; take bf16"
        )
    name = format_name(scheme)
    if name in ALGORITHMS:
        return None
    known = ", ".join(one for one in ALGORITHMS if ".s-f32" not in one)
    return f"has no algorithm for layers in {name}; take one of {known}"
