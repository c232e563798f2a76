"""Edits for ``mutation_check.py`` in what decides on the KV cache and reads FP8 sources."""

from __future__ import annotations

from scripts.quality.mutation_fault import Fault

CACHE_AND_SOURCES = (
    Fault(
        "KV cache: values emulated as they are",
        "how = self.scheme.parts[part]",
        "how = self.scheme.parts[part] if part == PARTS[0] else None",
        "kv_cache_flow::test_the_cost_of_a_format_is_predicted",
    ),
    Fault(
        "KV cache: heads in the order of their names",
        "key=lambda key: (len(key), key)))",
        "key=lambda key: key))",
        "kv_cache::test_static_scales_keep_the_order_of_many_heads",
    ),
    Fault(
        "KV cache: the scales of tokens take no bits",
        "bits += scales * (scheme.scale.bits",
        "bits += 0 * scales * (scheme.scale.bits",
        "kv_cache::test_a_name_says_bits_and_static_scales",
    ),
    Fault(
        "KV cache: the zero point is left in the scale that codes are multiplied by",
        "stored_1 = (scale_1.view(torch.int32) & _SCALE_BITS).view(torch.float32)",
        "stored_1 = scale_1",
        "cache_kernels::test_a_cache_is_rounded_as_the_kernels_of_vllm_round_it",
    ),
    Fault(
        "KV cache: four over six takes the larger error",
        "is_better = finer_error_G1 < error_G1",
        "is_better = finer_error_G1 > error_G1",
        "cache_kernels::test_nvfp4_is_rounded_as_the_kernel_of_vllm_says",
    ),
    Fault(
        "KV cache: what values lose is not counted",
        "return torch.stack(errors).sum(0)",
        "return errors[0]",
        "kv_cache_flow::test_what_keys_and_values_cost_adds_up",
    ),
    Fault(
        "KV cache: static scales of the last corpus alone",
        "        .amax(0)\n        .float()",
        "        [-1]\n        .float()",
        "kv_cache::test_static_scales_are_the_largest_of_all_corpora",
    ),
    Fault(
        "KV cache: context takes no memory",
        "size_P=bytes_P + -(-kv_tokens * cache_bits_P // 8),",
        "size_P=bytes_P + 0 * cache_bits_P,",
        "kv_cache_flow::test_a_size_counts_the_cache_of_a_context",
    ),
    Fault(
        "FP8 source: the scales of the first expert for all",
        "(expert * scaling.rows + row for row in (start, stop))",
        "(start, stop)",
        "fp8_sources::test_experts_are_loaded_as_they_are_measured",
    ),
    Fault(
        "FP8 source: the first scales for any rows",
        "// scaling.tile_rows - first\n",
        "// scaling.tile_rows * 0\n",
        "fp8_sources",
    ),
    Fault(
        "FP8 source: kept layers emulated without their rounding",
        "    if checkpoint.source_format is None:\n        return",
        "    if checkpoint:\n        return",
        "fp8_flow::test_a_model_runs_with_what_an_export_writes",
    ),
    Fault(
        "weights hash: the scales of an FP8 source left out",
        "for info in (*checkpoint.tensors.values(), *checkpoint.consumed.values()):",
        "for info in checkpoint.tensors.values():",
        "fp8_sources::test_another_scale_is_another_model_of_the_same_shapes",
    ),
    Fault(
        "a lone FP8 tensor without a scale taken",
        "        if other is not None:\n            raise",
        "        if not info.name:\n            raise",
        "fp8_sources::test_a_lone_fp8_tensor_without_a_scale_is_refused",
    ),
)
