"""TensorRT-LLM 1.2.0, through ModelOpt's mixed-precision config: its PyTorch backend, not run."""

from __future__ import annotations

from mofq.engines.rules import Engine, Rule, TransposedRule

_LINEAR = "TensorRT-LLM 1.2.0 tensorrt_llm/_torch/modules/linear.py, get_quant_method"

_NO_NAME = "ModelOpt's config has no name for such layers, and nothing else is written for it"

_RULES: tuple[Rule, ...] = (
    Rule(
        r".*",
        layers="lm_head",
        refused="its lm_head takes no quantization; take bf16",
        source="TensorRT-LLM tensorrt_llm/_torch/models/modeling_utils.py, DecoderModelForCausalLM",
    ),
    Rule(
        r"fp8_e4m3\.tensor(\.s-f32)?\+fp8_e4m3\.tensor",
        kernel="FP8QDQLinearMethod",
        min_capability=(8, 9),
        source=f"{_LINEAR}; quantization/mode.py, QuantAlgo.FP8",
    ),
    Rule(
        r"fp8_e4m3\.channel(\.s-f32)?\+fp8_e4m3\.token",
        kernel="FP8RowwiseLinearMethod",
        layers="dense",
        min_capability=(9, 0),
        source=f"{_LINEAR}; QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?\+fp8_e4m3\.g128",
        refused=f"{_NO_NAME}; take fp8_e4m3.channel+fp8_e4m3.token",
        source=f"{_LINEAR}; QuantAlgo.FP8_BLOCK_SCALES",
    ),
    Rule(
        r"nvfp4\+nvfp4",
        kernel="NVFP4LinearMethod",
        min_capability=(10, 0),
        in_features_multiple=16,
        source=f"{_LINEAR}; QuantAlgo.NVFP4",
    ),
    Rule(
        r"int(4|8)\.channel",
        refused=f"{_NO_NAME}; take int4.g128 or FP8",
        source=f"{_LINEAR}; QuantAlgo.W4A16, W8A16",
    ),
    Rule(
        r"int4\.g128",
        kernel="W4A16_AWQ_LinearMethod",
        layers="dense",
        min_capability=(8, 0),
        in_features_multiple=128,
        out_features_multiple=64,
        source=f"{_LINEAR}; QuantAlgo.W4A16_AWQ",
    ),
    Rule(
        r"int8\..*\+int8\..*",
        refused="the PyTorch backend has no INT8 W8A8 method; take FP8",
        source=_LINEAR,
    ),
)

TENSORRT_LLM = Engine(
    "tensorrt-llm",
    "1.2.0",
    reads="modelopt",
    rules=_RULES,
    transposed=TransposedRule(
        refused="there is no class of such a model",
        source="tensorrt_llm 1.2.0 tensorrt_llm/_torch/models",
    ),
    paths="Read, not run.",
)
