"""What vLLM holds of the KV cache.

Which backend vLLM 0.32.0 and 0.33.0 select for FP8 and INT8 was executed (``facts/kv_cache``); for
INT4 and NVFP4 it was read, as was what the kernels compute, in 0.32.0 where a line names no other
version. An engine keeps one quantized format for the whole model; layers may be left as they are
with ``--kv-cache-dtype-skip-layers`` (``layers/attention/attention.py:300-314``).
"""

from __future__ import annotations

from mofq.engines.rules import CacheRule

_CT = "vllm 0.32.0 layers/quantization/compressed_tensors/compressed_tensors.py"

_TRITON = "vllm 0.32.0 v1/attention/backends/triton_attn.py:284-297, 309-311"
_FLASHINFER = "vllm 0.32.0 v1/attention/backends/flashinfer.py"

_PAIRS = CacheRule(
    r"kv:.*/.*",
    refused="keys and values have one format; take one for both",
    source="vllm 0.32.0 config/cache.py:39-60",
)
#: attention.py:469-486: where the cache is FP8 under static scales, in every CUDA backend.
_QUERIES = "queries are rounded to FP8 too, which is not in what was measured (docs/kv-cache.md)"
_TENSOR = r"kv:fp8_e4m3\.(tensor|unscaled)"

VLLM_CPU_CACHE: tuple[CacheRule, ...] = (
    CacheRule(
        _TENSOR,
        refused="its kernel cuts codes off towards zero, with 3.4 times the squared error of "
        "rounding to nearest, which is what was measured; leave the cache bf16",
        source="vllm 0.32.0 _custom_ops.cpu_attn_reshape_and_cache; run",
    ),
    CacheRule(
        r"kv:fp8_e4m3\.head",
        refused="its attention takes one scale for all heads; leave the cache bf16",
        source="vllm 0.32.0 v1/attention/backend.py:183, 323; cpu_attn.py:425-458",
    ),
    CacheRule(
        r"kv:(int8|int4|fp8_e4m3)\.token_head.*",
        refused="scales of token and head are for the Triton backend; leave the cache bf16",
        source="vllm 0.32.0 v1/attention/backends/cpu_attn.py:57-62",
    ),
    CacheRule(
        r".*",
        refused="not known to hold the cache so; leave it bf16",
        source="vllm 0.32.0 v1/attention/backends/cpu_attn.py:57-62",
    ),
)
VLLM_GPU_CACHE: tuple[CacheRule, ...] = (
    _PAIRS,
    CacheRule(
        _TENSOR,
        source=f"{_CT}:1103-1145; v1/attention/backends/flash_attn.py:289-296",
        min_capability=(9, 0),
        note=_QUERIES,
    ),
    CacheRule(
        _TENSOR,
        source=f"{_CT}:1103-1145; vllm 0.33.0 v1/attention/backends/flashinfer.py:2079-2085",
        min_capability=(8, 9),
        note="FlashInfer for heads of 64, 128 and 256 channels; for others the Triton backend, "
        f"where {_QUERIES}",
    ),
    CacheRule(
        r"kv:fp8_e4m3\.head",
        source=f"{_CT}:1126-1130, 1157; v1/attention/backends/flash_attn.py:410-412",
        min_capability=(10, 0),
        max_head_size=128,
        note=f"FlashAttention 4 alone; {_QUERIES}",
    ),
    CacheRule(
        r"kv:fp8_e4m3\.head",
        source=f"{_CT}:1126-1130, 1157; v1/attention/backends/flash_attn.py:410-412",
        min_capability=(9, 0),
        note=f"FlashAttention 3 alone; {_QUERIES}",
    ),
    CacheRule(
        r"kv:fp8_e4m3\.head",
        refused="no backend before compute capability 9.0 takes scales of heads; take "
        "kv:int8.token_head, or leave it bf16",
        source="vllm 0.33.0 v1/attention/backends/flash_attn.py:387-390; executed",
    ),
    CacheRule(
        r"kv:fp8_e4m3\.token_head",
        source=f"{_TRITON}; v1/attention/ops/triton_reshape_and_cache_flash.py:154-261",
        min_capability=(8, 9),
        min_head_size=32,
        flag="--kv-cache-dtype",
        note="the Triton backend; a checkpoint cannot ask for it",
    ),
    CacheRule(
        r"kv:int8\.token_head",
        source=f"{_TRITON}; v1/attention/ops/triton_reshape_and_cache_flash.py:154-261",
        min_capability=(7, 5),
        min_head_size=32,
        flag="--kv-cache-dtype",
        note="the Triton backend; a checkpoint cannot ask for it",
    ),
    CacheRule(
        r"kv:fp8_e4m3\.(tensor|unscaled|token_head)",
        refused="before compute capability 8.9 vLLM calls E5M2 the only FP8 cache that is usable, "
        "and where it takes the Triton backend, that stops at E4M3; take kv:int8.token_head, or "
        "leave it bf16",
        source="vllm 0.33.0 v1/attention/backends/triton_attn.py:515-524, "
        "model_executor/layers/attention/attention.py:207-209",
    ),
    CacheRule(
        r"kv:int4\.token_head\.asym\.rht",
        source=f"{_TRITON}; v1/attention/ops/int4_per_token_head.py:64-255, 856-951",
        min_capability=(8, 0),
        min_head_size=32,
        flag="--kv-cache-dtype",
        note="the Triton backend; a checkpoint cannot ask for it; keys, queries and the output are "
        "rotated in bfloat16",
    ),
    CacheRule(
        r"kv:int4\.token_head.*",
        refused="its INT4 cache is rotated and has zero points; take kv:int4.token_head.asym.rht",
        source="vllm 0.32.0 v1/attention/ops/int4_per_token_head.py:64-255",
    ),
    CacheRule(
        r"kv:nvfp4\.unscaled.*",
        source=f"{_FLASHINFER}:531-539, 1028-1031; csrc/libtorch_stable/nvfp4_kv_cache_kernels.cu",
        min_capability=(10, 0),
        head_sizes=(64, 128, 256, 512),
        flag="--kv-cache-dtype",
        note="FlashInfer; a checkpoint cannot ask for it; queries and the output of attention are "
        "rounded to FP8 too, which is not in what was measured",
    ),
    CacheRule(
        r"kv:nvfp4\.unscaled",
        source=f"{_FLASHINFER}:109-110, 531-533, 554-563, 569-571; "
        "flashinfer 0.7.2.post1 include/flashinfer/page.cuh:287-346",
        min_capability=(8, 0),
        max_capability=(9, 9),
        head_sizes=(128, 256, 512),
        flag="--kv-cache-dtype",
        note="FlashInfer; a checkpoint cannot ask for it",
    ),
    CacheRule(
        r"kv:nvfp4\.unscaled@fouroversix",
        min_capability=(8, 0),
        max_capability=(9, 9),
        refused="what writes an NVFP4 cache here does not search for scales; take "
        "kv:nvfp4.unscaled",
        source=f"{_FLASHINFER}:531-533",
    ),
    CacheRule(
        r"kv:nvfp4.*",
        refused="nothing in the checkpoint asks for an NVFP4 cache, and the flag alone has no "
        "scale of the tensor; take kv:nvfp4.unscaled",
        source="vllm 0.32.0 model_executor/layers/quantization/compressed_tensors/"
        "compressed_tensors.py:1103-1145",
    ),
    CacheRule(
        r".*",
        refused="no such format of the cache; take kv:int8.token_head, or leave it bf16",
        source="vllm 0.32.0 config/cache.py:39-60",
    ),
)
