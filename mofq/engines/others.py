"""Transformers and TensorRT-LLM."""

from __future__ import annotations

from mofq.engines.rules import Rule

_CT = "compressed_tensors 0.20.0"
_TRT = "TensorRT-LLM 1.2.0 tensorrt_llm/"

#: Transformers decompresses to the model's dtype and emulates the activations:
#: right numbers, no low-precision arithmetic.
TRANSFORMERS: tuple[Rule, ...] = (
    Rule(
        r".*",
        kernel="",
        layers="experts",
        refused="experts are one tensor in transformers 5 and per-expert quantized ones are not "
        "loaded into it; take bf16",
        source="transformers 5.23.0 integrations/compressed_tensors.py",
    ),
    Rule(
        r"int8\.(channel|tensor)(\.s-f32)?\+int8\.token",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT} compressors/naive_quantized/base.py; run",
    ),
    Rule(
        r"int8\.channel(\.s-f32)?\+int8\.tensor",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT} compressors/naive_quantized/base.py",
    ),
    Rule(
        r"int(4|8)\.(channel|g\d+)(\.s-f32)?",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT} compressors/pack_quantized/base.py; run",
    ),
    Rule(
        r"int(4|8)\.(channel|g\d+)\.asym(\.s-f32)?",
        kernel="",
        refused="packed zero points are refused as a size mismatch; take the symmetric scheme",
        source=f"{_CT} compressors/pack_quantized/base.py:83-91; run",
    ),
    Rule(
        r"fp8_e4m3\.(channel|tensor)(\.s-f32)?(\+fp8_e4m3\.token)?",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT} compressors/naive_quantized/base.py; run",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?(\+fp8_e4m3\.g128)?",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT} compressors/naive_quantized/base.py",
    ),
    Rule(
        r"nvfp4|mxfp4",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT} compressors/nvfp4/base.py, compressors/mxfp4/base.py",
    ),
)

#: Through ModelOpt's mixed-precision config; the PyTorch backend's linear methods.
TENSORRT_LLM: tuple[Rule, ...] = (
    Rule(
        r"fp8_e4m3\.tensor(\.s-f32)?\+fp8_e4m3\.tensor",
        kernel="FP8QDQLinearMethod",
        min_capability=(8, 9),
        source=f"{_TRT}_torch/modules/linear.py, get_quant_method; quantization/mode.py, "
        "QuantAlgo.FP8",
    ),
    Rule(
        r"fp8_e4m3\.channel(\.s-f32)?\+fp8_e4m3\.token",
        kernel="FP8RowwiseLinearMethod",
        layers="dense",
        min_capability=(9, 0),
        source=f"{_TRT}_torch/modules/linear.py, get_quant_method; "
        "QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN",
    ),
    Rule(
        r"fp8_e4m3\.block128\.s-f32\+fp8_e4m3\.g128",
        kernel="FP8BlockScalesLinearMethod",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=128,
        shard_rows_multiple=128,
        source=f"{_TRT}_torch/modules/linear.py, get_quant_method; QuantAlgo.FP8_BLOCK_SCALES",
    ),
    Rule(
        r"nvfp4\+nvfp4",
        kernel="NVFP4LinearMethod",
        min_capability=(10, 0),
        in_features_multiple=16,
        source=f"{_TRT}_torch/modules/linear.py, get_quant_method; QuantAlgo.NVFP4",
    ),
    Rule(
        r"int(4|8)\.channel",
        kernel="WeightOnlyQuantLinearMethod",
        layers="dense",
        min_capability=(8, 0),
        max_capability=(9, 9),
        in_features_multiple=64,
        out_features_multiple=64,
        source=f"{_TRT}_torch/modules/linear.py, get_quant_method; QuantAlgo.W4A16, W8A16",
    ),
    Rule(
        r"int4\.g128",
        kernel="W4A16_AWQ_LinearMethod",
        layers="dense",
        min_capability=(8, 0),
        in_features_multiple=128,
        out_features_multiple=64,
        source=f"{_TRT}_torch/modules/linear.py, get_quant_method; QuantAlgo.W4A16_AWQ",
    ),
    Rule(
        r"int8\..*\+int8\..*",
        kernel="",
        refused="the PyTorch backend has no INT8 W8A8 method; take FP8",
        source=f"{_TRT}_torch/modules/linear.py, get_quant_method",
    ),
)
