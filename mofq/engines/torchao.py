"""TorchAO's tensors and kernels, version 0.18.0: what the backend ``torchao`` builds.

The first word of a rule's kernel is the tensor class that ``mofq.delivery.apply.torchao``
makes from measured codes and scales. TorchAO concatenates nothing: sizes are of each layer.
"""

from __future__ import annotations

from dataclasses import replace

from mofq.engines.rules import Engine, Rule, TransposedRule

_AO = "torchao 0.18.0"
_EXPERTS = Rule(
    r".*",
    layers="experts",
    refused="experts are one tensor in transformers and not nn.Linear modules; take bf16",
    source=f"{_AO} quantization/quant_api.py:168-182",
)
_INT8_WEIGHTS = (
    Rule(
        r"int8\.(channel|tensor)",
        kernel="Int8Tensor, codes in the model's dtype, scales on the product",
        source=f"{_AO} w/int8/int8_tensor.py:347-354; run on CPU",
    ),
    Rule(
        r"int8\.g\d+(\.s-f32)?",
        kernel="Int8Tensor, dequantized into the matrix product",
        source=f"{_AO} w/int8/int8_tensor.py:337-346; run on CPU",
    ),
)
_INTX_WEIGHTS = Rule(
    r"int[2-8]\.(channel|tensor|g\d+|block\d+(x\d+)?)(\.asym)?(\.s-f32)?",
    kernel="IntxUnpackedToInt8Tensor, dequantized into the matrix product",
    source=f"{_AO} w/intx/intx_unpacked_to_int8_tensor.py:308-338; run on CPU",
    note="one byte in memory for every code, whatever its bits",
)
_FP8_WEIGHTS = Rule(
    r"fp8_e4m3\.(channel|tensor|g\d+|block\d+(x\d+)?)(\.s-f32)?",
    kernel="Float8Tensor, dequantized into the matrix product",
    source=f"{_AO} w/float8/float8_tensor.py:461-469; run on CPU",
)
_NVFP4_WEIGHTS = Rule(
    r"nvfp4",
    kernel="NVFP4Tensor, dequantized into the matrix product",
    in_features_multiple=16,
    out_features_multiple=16,
    shard_rows_multiple=16,
    source=f"{_AO} mx/inference_workflow.py:357-397; run on CPU",
)
_GROUP_W8A8 = Rule(
    r"int8\.(g|block)\d+.*\+int8\..*",
    refused="no kernel multiplies INT8 group weights with INT8 activations; take int8.gN, "
    "int8.channel+int8.token or bf16",
    source=f"{_AO} quantization/quant_api.py:808-831",
)
_MX_WEIGHTS = Rule(
    r"(mxfp4|mxfp8)",
    refused="microscaling weights are multiplied with microscaling inputs alone; take "
    "mxfp4+mxfp4 or mxfp8+mxfp8",
    source=f"{_AO} mx/mx_tensor.py:770; run on CPU",
)
_INT8_PRODUCT = r"int8\.(channel|tensor)(\.s-f32)?\+int8\.(token|tensor)"
_FP8_PRODUCT = r"fp8_e4m3\.channel(\.s-f32)?\+fp8_e4m3\.token"
_MX_PRODUCT = r"(mxfp8\+mxfp8|mxfp4\+mxfp4)"

_CPU_RULES: tuple[Rule, ...] = (
    _EXPERTS,
    Rule(
        _INT8_PRODUCT,
        kernel="Int8Tensor, int_scaled_matmul (torch._int_mm)",
        source=f"{_AO} kernel/intmm.py:113-145; run",
    ),
    _GROUP_W8A8,
    *_INT8_WEIGHTS,
    Rule(
        r"int4\.g(32|64|128)",
        kernel="Int4OpaqueTensor, torch._weight_int4pack_mm_for_cpu",
        out_features_multiple=16,
        shard_rows_multiple=16,
        source=f"{_AO} prototype/quantization/int4/int4_opaque_tensor.py:398-433; run",
    ),
    _INTX_WEIGHTS,
    Rule(
        _FP8_PRODUCT,
        kernel="Float8Tensor, torch._scaled_mm",
        in_features_multiple=16,
        out_features_multiple=16,
        shard_rows_multiple=16,
        source=f"{_AO} w/float8/float8_tensor.py:410-460; run",
    ),
    _FP8_WEIGHTS,
    _NVFP4_WEIGHTS,
    Rule(
        r"nvfp4\+nvfp4",
        refused="the product of two NVFP4 matrices needs a GPU of compute capability 10.0; "
        "take nvfp4",
        source=f"{_AO} mx/inference_workflow.py:301-303",
    ),
    Rule(
        _MX_PRODUCT,
        kernel="MXTensor, KernelPreference.EMULATED",
        in_features_multiple=32,
        source=f"{_AO} mx/mx_tensor.py:830-846; run",
        note="both operands are dequantized into the matrix product",
    ),
    _MX_WEIGHTS,
)

_GPU_RULES: tuple[Rule, ...] = (
    _EXPERTS,
    Rule(
        _INT8_PRODUCT,
        kernel="Int8Tensor, torch._int_mm",
        in_features_multiple=8,
        out_features_multiple=8,
        shard_rows_multiple=8,
        min_capability=(7, 5),
        source=f"{_AO} kernel/intmm.py:35-91, 148-183",
    ),
    _GROUP_W8A8,
    *_INT8_WEIGHTS,
    _INTX_WEIGHTS,
    Rule(
        _FP8_PRODUCT,
        kernel="Float8Tensor, torch._scaled_mm",
        in_features_multiple=16,
        out_features_multiple=16,
        shard_rows_multiple=16,
        min_capability=(8, 9),
        source=f"{_AO} quantization/quant_api.py:1334-1337; w/float8/float8_tensor.py:410-460",
        note="the model must be in bfloat16",
    ),
    Rule(
        r"fp8_e4m3\..*\+fp8_e4m3\..*",
        max_capability=(8, 8),
        refused="FP8 products need compute capability 8.9; take fp8_e4m3.channel",
        source=f"{_AO} quantization/quant_api.py:1334-1337",
    ),
    _FP8_WEIGHTS,
    _NVFP4_WEIGHTS,
    Rule(
        r"nvfp4\+nvfp4",
        kernel="NVFP4Tensor, torch._scaled_mm",
        in_features_multiple=16,
        out_features_multiple=16,
        shard_rows_multiple=16,
        min_capability=(10, 0),
        source=f"{_AO} mx/inference_workflow.py:257-303",
    ),
    Rule(
        _MX_PRODUCT,
        kernel="MXTensor, torch._scaled_mm",
        in_features_multiple=32,
        min_capability=(10, 0),
        source=f"{_AO} mx/inference_workflow.py:87-88",
    ),
    Rule(
        r"(nvfp4|mxfp4|mxfp8)\+.*",
        max_capability=(9, 9),
        refused="FP4 and microscaling products need compute capability 10.0; take nvfp4 or "
        "fp8_e4m3.channel+fp8_e4m3.token",
        source=f"{_AO} mx/inference_workflow.py:87-88, 301-303",
    ),
    _MX_WEIGHTS,
)

TORCHAO_GPU = Engine(
    "torchao",
    "0.18.0",
    reads="torchao",
    rules=_GPU_RULES,
    transposed=TransposedRule(
        refused="the product of a Conv1D (aten.addmm) is not there for its weights",
        source="torchao 0.18.0; run",
    ),
    can_cut=False,
    paths="Paths are below `torchao/`; `w` is `quantization/quantize_/workflows/`, `mx` is "
    "`prototype/mx_formats/`. CPU: run. GPUs: what `quantize_` checks and makes was executed; the "
    "products were read. Rules are of kernels, which the backend `torchao` takes in memory; "
    "`--engine` offers those that the export has a config for.",
)
TORCHAO_CPU = replace(TORCHAO_GPU, name="torchao-cpu", rules=_CPU_RULES)
