"""vLLM on NVIDIA GPUs, versions 0.32.0 and 0.33.0, through compressed-tensors checkpoints.

Which kernel is selected was executed (``facts/``, `scripts/engines/README.md`); what a kernel
computes was read, not run. What devices that share a layer need is in ``tensor_parallel.py``.
Marlin pads shapes that are no multiple of its tiles (``marlin_utils.py:171-197``).
"""

from __future__ import annotations

from mofq.engines.rules import Engine, Rule, TransposedRule
from mofq.engines.vllm_cache import VLLM_GPU_CACHE

_CT = "vllm 0.32.0 ct/compressed_tensors.py"
_KERNELS = "vllm 0.32.0 kernels/"
_UTILS = "vllm 0.32.0 layers/quantization/utils/"
_MOE = "vllm 0.32.0 ct/compressed_tensors_moe/"
_HUMMING = "vllm 0.33.0 kernels/mixed_precision/humming.py"
_FP8_EXPERTS = "vllm 0.32.0 layers/fused_moe/oracle/fp8.py"

#: Inputs under one scale that tiles of 16 or 64 inputs do not straddle.
_TILES = "g(16|32|64|128|256)"

#: Weight scales are ue8m0-rounded and codes rounded again unless DeepGEMM is off.
_NO_DEEP_GEMM = ("VLLM_USE_DEEP_GEMM=0",)

#: Types whose classes hand ``quant_config`` to their embedding.
#: Source: vLLM 0.32.0 ``models/*.py``, the calls of ``VocabParallelEmbedding``.
_LOOKS_UP_CODES = (
    *("llama", "mistral", "phi3", "qwen2", "qwen3", "granite", "gemma3", "gemma3_text"),
    *("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt2", "exaone4"),
    *("apertus", "stablelm", "minimax_m2"),
)
#: For types whose classes do not hand it to their lm_head.
PLAIN_HEADS = Rule(
    r".*",
    layers="lm_head",
    model_types=(
        *("opt", "bloom", "gpt_oss", "falcon_h1", "jamba", "mamba", "mamba2", "qwen3_next"),
        *("falcon_mamba", "phimoe", "zamba2", "deepseek_v4", "qwen4_exp", "qwen4_exp_text"),
    ),
    refused="its class reads the lm_head as it is; take bf16",
    source="vllm 0.32.0 models/*.py, the calls of ParallelLMHead",
)
#: For types whose classes do not hand it to their mixers.
PLAIN_MIXERS = Rule(
    r".*",
    layers="state space",
    model_types=("falcon_mamba", "jamba", "mamba"),
    refused="its class reads the layers of Mamba 1 as they are; take bf16",
    source="vllm 0.32.0 layers/mamba/mamba_mixer.py:91-159; run",
)
#: For layers that some classes build without it, join with layers that stay as they are, or look
#: for under other names.
PLAIN_LAYERS = (
    Rule(
        r".*",
        model_types=("deepseek_v4",),
        groups=r"attn\.compressor\..*",
        refused="its class reads the layers that compress the cache as they are; take bf16",
        source="vllm 0.33.0 vllm/models/deepseek_v4/compressor.py:271-279",
    ),
    Rule(
        r".*",
        model_types=("glm5_next",),
        groups=r"attn\..*",
        refused="its class reads all attention as it is; take bf16",
        source="vllm 0.33.0 vllm/models/glm5next/common/model.py:408, kda.py:210-216; executed",
    ),
    Rule(
        r"int[2-8]\.[^+]*|int4\..*\+.*|(nvfp4|mxfp4)(\+.*)?",
        layers="dense",
        model_types=("kimi_linear",),
        refused="its class looks for packed codes under another name, unless those of all experts "
        "are packed too, which no search decides; take int8.channel+int8.token, FP8 or bf16",
        source="vllm 0.33.0 vllm/models/kimi_k3/nvidia/model.py:1310-1323; executed",
    ),
    Rule(
        r".*",
        model_types=("minimax_m3_vl", "minimax_m3_vl_text"),
        groups=r"attn\.qkv",
        refused="its class joins it with index_q_proj and index_k_proj of the indexer, which stay "
        "as they are, where a layer has one; take bf16",
        source="vllm 0.33.0 vllm/models/minimax_m3/nvidia/model.py:445-455, 960-968",
    ),
    Rule(
        r".*",
        model_types=("qwen4_exp", "qwen4_exp_text"),
        groups=r"attn\.qkv",
        refused="its class joins it with index_qk_proj of the indexer, which stays as it is; "
        "take bf16",
        source="vllm 0.33.0 vllm/models/qwen4_exp/nvidia/qsa.py:509-515; executed",
    ),
)

_RULES: tuple[Rule, ...] = (
    PLAIN_HEADS,
    PLAIN_MIXERS,
    *PLAIN_LAYERS,
    Rule(
        r"mxfp4(\+mxfp4)?",
        layers="experts",
        model_types=("gpt_oss",),
        refused="MXFP4 experts with biases are read from OpenAI's layout alone, beside which it "
        "quantizes no other layer (in compressed-tensors they have no biases); serve the original",
        source="vllm 0.33.0 layers/quantization/mxfp4.py:91-110; models/gpt_oss.py:1326-1352; "
        "ct/compressed_tensors_moe/compressed_tensors_moe_w4a4_mxfp4.py:82-151",
    ),
    Rule(
        r".*",
        layers="experts",
        model_types=("gpt_oss",),
        refused="of exported experts with biases its loader knows no names of packed codes and of "
        "most scales; take bf16, or serve the original with its experts in MXFP4",
        source="vllm 0.33.0 models/gpt_oss.py:73-82, 1147-1260; executed",
    ),
    Rule(
        r"int(2|4|8)\.(channel|g\d+)",
        kernel="CompressedTensorsEmbeddingWNA16Int, Triton",
        layers="embeddings",
        model_types=_LOOKS_UP_CODES,
        source="vllm 0.32.0 ct/compressed_tensors_embedding.py:94-160",
    ),
    Rule(
        r".*",
        layers="embeddings",
        refused="looks up symmetric integers of 2, 4 and 8 bits alone, whose packed words hold "
        "whole codes, and in models that hand their embedding the quantization; take "
        "int8.channel or int4.gN where it does, or bf16",
        source="vllm 0.32.0 ct/compressed_tensors_embedding.py:51-57, 108, 122-130; "
        "ct/compressed_tensors.py:195-211",
    ),
    Rule(
        r".*\+.*",
        layers="latent",
        refused="decoding multiplies by its dequantized weight, so its inputs stay as they are; "
        "take a weight-only scheme",
        source="vllm 0.32.0 layers/attention/mla_attention.py:416, 1248; "
        "layers/quantization/utils/quant_utils.py:511-568",
    ),
    Rule(
        r"int8\.(channel|tensor)(\.s-f32)?\+int8\.(token|tensor)",
        kernel="CompressedTensorsW8A8Int8, CutlassInt8ScaledMMLinearKernel",
        layers="dense",
        min_capability=(7, 5),
        max_capability=(9, 9),
        source=f"{_CT}:922-934; _custom_ops.py:807 (Triton unless K % 16 == N % 16 == 0)",
        note="int8 codes in -128..127 and scales of either sign: the scale is a factor of the "
        "output",
    ),
    Rule(
        r"int8\.(channel|tensor)(\.s-f32)?\+int8\.(token|tensor)",
        kernel="CompressedTensorsW8A8Int8, TritonInt8ScaledMMLinearKernel",
        layers="dense",
        min_capability=(10, 0),
        settings=("--linear-backend triton",),
        source=f"{_KERNELS}__init__.py:366-370, 434-438",
        note="the Cutlass INT8 kernel, which is chosen by itself, raises at the first forward here",
    ),
    Rule(
        r"int8\.channel(\.s-f32)?\+int8\.token",
        kernel="CompressedTensorsW8A8Int8MoEMethod (Triton)",
        layers="experts",
        min_capability=(7, 5),
        source=f"{_MOE}compressed_tensors_moe_w8a8_int8.py:46-69",
    ),
    Rule(
        r"int8\.g\d+.*\+int8\..*",
        refused="no kernel multiplies INT8 group weights with INT8 activations: packed it is "
        "served as W8A16; take int8.gN, fp8_e4m3.block128.s-f32+fp8_e4m3.g128 or bf16",
        source=f"{_CT}:838-850, 946",
    ),
    # Weight-only integers of dense layers. Marlin and Machete come before Humming where they fit.
    Rule(
        r"int(4|8)\.(channel|g32|g64|g128)",
        kernel="CompressedTensorsWNA16, Machete (Humming: g32, or K % 64, N % 128 not 0)",
        layers="dense",
        min_capability=(9, 0),
        max_capability=(9, 9),
        source=f"{_CT}:865-874; {_UTILS}machete_utils.py:37-50; {_HUMMING}:30-39",
        note="scales of either sign: they are factors of the codes",
    ),
    Rule(
        r"int(4|8)\.(channel|g32|g64|g128)",
        kernel="CompressedTensorsWNA16, Marlin",
        layers="dense",
        min_capability=(7, 5),
        source=f"{_CT}:865-874; {_UTILS}marlin_utils.py:37, 81-90; "
        "kernels/mixed_precision/marlin.py:34",
        note="scales of either sign: Marlin permutes them and multiplies",
    ),
    Rule(
        r"int(4|8)\.(channel|g64|g128)\.asym",
        layers="dense",
        min_capability=(9, 0),
        max_capability=(9, 9),
        refused="Machete rounds scale times zero point to the model's dtype, which is not what "
        "was measured; take the symmetric scheme",
        source=f"{_KERNELS}mixed_precision/machete.py:74-82",
    ),
    Rule(
        r"int(4|8)\.g32\.asym",
        kernel="CompressedTensorsWNA16, Humming",
        layers="dense",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=32,
        shard_rows_multiple=8,
        source=f"{_HUMMING}:30-39",
    ),
    Rule(
        r"int4\.(channel|g32|g64|g128)\.asym",
        kernel="CompressedTensorsWNA16, Marlin",
        layers="dense",
        min_capability=(7, 5),
        shard_rows_multiple=8,
        source=f"{_UTILS}marlin_utils.py:81-83",
        note="zero points are packed down the rows: those of a layer fill whole 32-bit words",
    ),
    Rule(
        r"int4\.g256",
        kernel="CompressedTensorsWNA16, Humming",
        layers="dense",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=32,
        source=f"{_HUMMING}:30-39",
    ),
    Rule(
        r"int4\.g256",
        kernel="CompressedTensorsWNA16, Triton",
        layers="dense",
        min_capability=(8, 0),
        source="vllm 0.33.0 kernels/mixed_precision/triton_w4a16.py:237-243",
    ),
    Rule(
        rf"int[2-8]\.(channel|{_TILES})",
        kernel="CompressedTensorsWNA16, Humming",
        layers="dense",
        min_capability=(8, 0),
        in_features_multiple=32,
        source=f"{_HUMMING}:30-39; ct/schemes/compressed_tensors_wNa16.py:38-56",
        note="codes are packed without gaps, so that inputs by 32 fill whole words; with "
        "VLLM_BATCH_INVARIANT=1 they are read with the gaps of compressed-tensors 0.17",
    ),
    Rule(
        rf"int[2-8]\.(channel|{_TILES})\.asym",
        kernel="CompressedTensorsWNA16, Humming",
        layers="dense",
        min_capability=(8, 0),
        in_features_multiple=32,
        shard_rows_multiple=32,
        source=f"{_HUMMING}:30-39; humming-kernels 0.1.19 kernel/process.cuh:243-254",
        note="zero points are subtracted from the codes exactly, with 8 bits as well",
    ),
    # Weight-only integers of experts.
    Rule(
        r"int(4|8)\.channel",
        layers="experts",
        min_capability=(9, 0),
        max_capability=(9, 9),
        refused="on 9.0 experts are Humming's, which takes scales per group alone; take int4.g128",
        source=f"{_MOE}compressed_tensors_moe_wna16.py, assert weight_quant.strategy == 'group'",
    ),
    Rule(
        r"int(4|8)\.(g32|g64|g128)",
        kernel="CompressedTensorsWNA16MoEMethod (Humming)",
        layers="experts",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=32,
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        r"int(4|8)\.(channel|g32|g64|g128)",
        kernel="CompressedTensorsWNA16MoEMethod (Marlin)",
        layers="experts",
        min_capability=(7, 5),
        hidden_multiple=128,
        source=f"{_MOE}compressed_tensors_moe.py:78-92; "
        "layers/fused_moe/oracle/int_wna16.py:207-225; "
        "layers/quantization/utils/marlin_utils.py:377-387",
    ),
    Rule(
        r"int4\.g32\.asym",
        kernel="CompressedTensorsWNA16MoEMethod (Humming)",
        layers="experts",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=32,
        out_features_multiple=8,
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        r"int4\.(channel|g32|g64|g128)\.asym",
        kernel="CompressedTensorsWNA16MoEMethod (Marlin)",
        layers="experts",
        min_capability=(7, 5),
        hidden_multiple=128,
        out_features_multiple=8,
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        r"int8\..*\.asym",
        layers="experts",
        refused="no kernel for experts takes zero points with 8-bit codes; take the symmetric "
        "scheme",
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        r"int(4|8)\.(g16|g256)",
        kernel="CompressedTensorsWNA16MoEMethod (Humming)",
        layers="experts",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=32,
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        r"int(4|8)\.(g16|g256)",
        kernel="CompressedTensorsWNA16MoEMethod (Triton)",
        layers="experts",
        min_capability=(7, 5),
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        r"int4\.g16\.asym",
        kernel="CompressedTensorsWNA16MoEMethod (Triton)",
        layers="experts",
        min_capability=(7, 5),
        out_features_multiple=8,
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        rf"int[23567]\.({_TILES})",
        kernel="CompressedTensorsWNA16MoEMethod (Humming)",
        layers="experts",
        min_capability=(7, 5),
        in_features_multiple=32,
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        rf"int[23567]\.({_TILES})\.asym",
        kernel="CompressedTensorsWNA16MoEMethod (Humming)",
        layers="experts",
        min_capability=(7, 5),
        in_features_multiple=32,
        out_features_multiple=32,
        source="vllm 0.32.0 layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        r"int[23567]\.channel(\.asym)?",
        layers="experts",
        refused="experts in 2, 3, 5, 6 or 7 bits have scales per group alone; take int6.g128 or "
        "int4.channel",
        source=f"{_MOE}compressed_tensors_moe_wna16.py, assert weight_quant.strategy == 'group'",
    ),
    Rule(
        r"int[2-8]\.(channel|g\d+)(\.asym)?\.s-f32",
        refused="weight scales are loaded in the model's own dtype, which rounds f32 scales; "
        "take the scheme without .s-f32",
        source="vllm 0.32.0 ct/schemes/compressed_tensors_wNa16.py:190-197",
    ),
    Rule(
        r"int[2-8]\.g\d+(\.asym)?",
        refused="kernels read scales by tiles of inputs, so that a group has 16, 32, 64, 128 or "
        "256 of them; others would get the scale of a neighbour; take one of these",
        source=f"{_UTILS}marlin_utils.py:37; humming-kernels 0.1.19 memory/g2s_loader/"
        "loader_bs.cuh:27-36, 157-160; kernels/mixed_precision/triton_w4a16.py:126-127",
    ),
    Rule(
        r"int4\.g128\+fp8_e4m3\.token",
        min_capability=(9, 0),
        max_capability=(9, 9),
        refused="its W4A8 kernel rounds the group scales to FP8, which is not what was "
        "measured; take int4.g128 or FP8",
        source=f"{_KERNELS}mixed_precision/cutlass.py:85-99; {_UTILS}quant_utils.py:929-952",
    ),
    Rule(
        r"int4\.g128\+fp8_e4m3\.token",
        kernel="CompressedTensorsW4A8Fp8MoEMethod (Humming)",
        layers="experts",
        min_capability=(8, 9),
        in_features_multiple=256,
        source="vllm 0.33.0 layers/fused_moe/oracle/w4a8.py:124-141; "
        "ct/compressed_tensors_moe/compressed_tensors_moe_w4a8_fp8.py:70-74",
    ),
    Rule(
        r"int\d\..*\+int8\.token",
        refused="packed it is served weight-only, with activations as they are; "
        "take the weight-only scheme",
        source=f"{_CT}:838-850",
    ),
    Rule(
        r"fp8_e4m3\.tensor(\.s-f32)?\+fp8_e4m3\.tensor",
        kernel="CompressedTensorsW8A8Fp8, FlashInfer",
        layers="dense",
        min_capability=(10, 0),
        source=f"{_KERNELS}__init__.py; scaled_mm/flashinfer.py",
    ),
    Rule(
        r"fp8_e4m3\.(channel|tensor)(\.s-f32)?\+fp8_e4m3\.(token|tensor)",
        kernel="CompressedTensorsW8A8Fp8, Cutlass",
        layers="dense",
        min_capability=(8, 9),
        source=f"{_CT}:878-906; ct/schemes/compressed_tensors_w8a8_fp8.py:78-81",
    ),
    Rule(
        r"fp8_e4m3\.(channel(\.s-f32)?\+fp8_e4m3\.tensor|tensor(\.s-f32)?\+fp8_e4m3\.token)",
        layers="experts",
        min_capability=(8, 9),
        refused="experts take weights per channel with inputs per token, or both under one scale; "
        "take fp8_e4m3.channel+fp8_e4m3.token",
        source=f"{_MOE}compressed_tensors_moe_w8a8_fp8.py, an assertion",
    ),
    Rule(
        r"fp8_e4m3\.(channel(\.s-f32)?\+fp8_e4m3\.token|tensor(\.s-f32)?\+fp8_e4m3\.tensor)",
        kernel="CompressedTensorsW8A8Fp8MoEMethod, Triton",
        layers="experts",
        min_capability=(8, 9),
        max_capability=(8, 9),
        source=_FP8_EXPERTS,
    ),
    Rule(
        r"fp8_e4m3\.channel(\.s-f32)?\+fp8_e4m3\.token",
        kernel="CompressedTensorsW8A8Fp8MoEMethod, TritonOrCutlassExperts",
        layers="experts",
        min_capability=(9, 0),
        source=_FP8_EXPERTS,
    ),
    Rule(
        r"fp8_e4m3\.tensor(\.s-f32)?\+fp8_e4m3\.tensor",
        kernel="CompressedTensorsW8A8Fp8MoEMethod, FlashInfer",
        layers="experts",
        min_capability=(9, 0),
        max_capability=(9, 9),
        source=_FP8_EXPERTS,
    ),
    Rule(
        r"fp8_e4m3\.tensor(\.s-f32)?\+fp8_e4m3\.tensor",
        kernel="CompressedTensorsW8A8Fp8MoEMethod, TrtLlm (of FlashInfer)",
        layers="experts",
        min_capability=(10, 0),
        source=_FP8_EXPERTS,
    ),
    Rule(
        r"fp8_e4m3\.(channel|tensor|block128)(\.s-f32)?\+fp8_e4m3\..*",
        max_capability=(8, 8),
        refused="below compute capability 8.9 activations stay as they are; "
        "take the weight-only scheme, fp8_e4m3.channel",
        source=f"{_CT}:895-913",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?\+fp8_e4m3\.g128",
        layers="dense",
        min_capability=(8, 9),
        max_capability=(8, 9),
        refused="before 9.0 the block kernel is Marlin's, with activations as they are; "
        "take fp8_e4m3.channel+fp8_e4m3.token",
        source=f"{_KERNELS}__init__.py:476-488; scaled_mm/deep_gemm.py:47-53",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?\+fp8_e4m3\.g128",
        kernel="CompressedTensorsW8A8Fp8, CutlassFp8BlockScaledMMKernel",
        layers="dense",
        min_capability=(9, 0),
        in_features_multiple=128,
        shard_rows_multiple=128,
        settings=_NO_DEEP_GEMM,
        source=f"{_UTILS}fp8_utils.py:1296-1344, 1096-1155; kernels/scaled_mm/deep_gemm.py:83-104",
        note="with DeepGEMM weights are quantized again under power-of-two scales",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?\+fp8_e4m3\.g128",
        kernel="CompressedTensorsW8A8Fp8MoEMethod, Triton",
        layers="experts",
        min_capability=(8, 9),
        max_capability=(8, 9),
        in_features_multiple=128,
        shard_rows_multiple=128,
        source=_FP8_EXPERTS,
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?\+fp8_e4m3\.g128",
        kernel="CompressedTensorsW8A8Fp8MoEMethod, Triton",
        layers="experts",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=128,
        shard_rows_multiple=128,
        settings=_NO_DEEP_GEMM,
        source=_FP8_EXPERTS,
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?\+fp8_e4m3\.g128",
        kernel="CompressedTensorsW8A8Fp8MoEMethod, TrtLlm (of FlashInfer)",
        layers="experts",
        min_capability=(10, 0),
        in_features_multiple=128,
        shard_rows_multiple=128,
        settings=_NO_DEEP_GEMM,
        source=_FP8_EXPERTS,
    ),
    Rule(
        r"fp8_e4m3\.(channel|tensor)",
        kernel="CompressedTensorsW8A16Fp8, Humming",
        layers="dense",
        min_capability=(7, 5),
        in_features_multiple=4,
        source=f"{_CT}:915-920; kernels/scaled_mm/humming.py:22-82",
        note="codes are read as 32-bit words",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?",
        layers="dense",
        refused="blocks are loaded with quantized activations alone, and weight-only ones stop an "
        "assertion; take fp8_e4m3.channel",
        source="vllm 0.33.0 ct/schemes/compressed_tensors_w8a16_fp8.py:97-98",
    ),
    Rule(
        r"fp8_e4m3\.(channel|tensor)\.s-f32",
        refused="Humming rounds weight scales to the model's dtype; take the scheme without .s-f32",
        source="humming-kernels 0.1.19 schema/humming.py:371-374",
    ),
    Rule(
        r"fp8_e4m3\.channel.*\+fp8_e4m3\.g\d+",
        refused="channel weights are served with activations per token, not per group; "
        "take fp8_e4m3.channel+fp8_e4m3.token",
        source="vllm 0.32.0 ct/schemes/compressed_tensors_w8a8_fp8.py:62-75",
    ),
    Rule(
        r"fp8_e4m3\.(g\d+|block).*",
        refused="FP8 weights are served per channel or in 128 by 128 blocks; take one of these",
        source=f"{_CT}:621-650; ct/utils.py:35-39",
    ),
    Rule(
        r"nvfp4",
        kernel="CompressedTensorsW4A4Fp4(use_a16), Humming",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=16,
        source=f"{_CT}:795-797; kernels/nvfp4/humming.py",
    ),
    Rule(
        r"nvfp4",
        kernel="CompressedTensorsW4A4Fp4(use_a16), Marlin or FlashInfer CuTe-DSL",
        min_capability=(7, 5),
        in_features_multiple=16,
        source=f"{_CT}:795-797; kernels/nvfp4/marlin.py:20-29",
    ),
    Rule(
        r"nvfp4\+nvfp4",
        kernel="CompressedTensorsW4A4Fp4, FlashInfer or Cutlass",
        layers="dense",
        min_capability=(10, 0),
        in_features_multiple=16,
        source=f"{_CT}:799-804; kernels/__init__.py:579-606",
        note="the input's global scale is static: the recipe needs the input's absolute maximum",
    ),
    Rule(
        r"nvfp4\+nvfp4",
        kernel="CompressedTensorsW4A4Nvfp4MoEMethod, TrtLlm (of FlashInfer)",
        layers="experts",
        min_capability=(10, 0),
        in_features_multiple=16,
        source="vllm 0.32.0 layers/fused_moe/oracle/nvfp4.py",
        note="the input's global scale is static: the recipe needs the input's absolute maximum",
    ),
    Rule(
        r"mxfp4",
        layers="dense",
        min_capability=(9, 0),
        max_capability=(9, 9),
        refused="on 9.0 Humming quantizes the activations to FP8 per token, which is not what was "
        "measured; take nvfp4 or int4.g32",
        source="vllm 0.33.0 kernels/mxfp4/humming.py; its choice of input types was executed",
    ),
    Rule(
        r"mxfp4",
        kernel="CompressedTensorsW4A4Mxfp4, Marlin",
        min_capability=(8, 0),
        max_capability=(9, 9),
        in_features_multiple=32,
        source="vllm 0.32.0 ct/schemes/compressed_tensors_w4a4_mxfp4.py:24-38; "
        "kernels/mxfp4/marlin.py:31-38",
    ),
    Rule(
        r"mxfp4\+mxfp4",
        kernel="CompressedTensorsW4A4Mxfp4, FlashInfer",
        layers="dense",
        min_capability=(10, 0),
        in_features_multiple=32,
        source="vllm 0.32.0 ct/schemes/compressed_tensors_w4a4_mxfp4.py:24-38; "
        "kernels/mxfp4/flashinfer.py:24-36",
    ),
    Rule(
        r"mxfp4\+mxfp4",
        kernel="CompressedTensorsW4A4Mxfp4MoEMethod, Cutlass",
        layers="experts",
        min_capability=(10, 0),
        in_features_multiple=32,
        source="vllm 0.32.0 layers/fused_moe/oracle/mxfp4.py",
    ),
    Rule(
        r"mxfp8",
        kernel="CompressedTensorsW8A8Mxfp8, Humming",
        min_capability=(9, 0),
        max_capability=(9, 9),
        in_features_multiple=32,
        source="vllm 0.32.0 ct/schemes/compressed_tensors_w8a8_mxfp8.py; kernels/mxfp8/humming.py",
    ),
    Rule(
        r"mxfp8",
        kernel="CompressedTensorsW8A8Mxfp8, Marlin",
        min_capability=(7, 5),
        max_capability=(8, 9),
        in_features_multiple=32,
        source="vllm 0.32.0 ct/schemes/compressed_tensors_w8a8_mxfp8.py; "
        "kernels/mxfp8/marlin.py:15-44",
    ),
    Rule(
        r"mxfp8\+mxfp8",
        kernel="CompressedTensorsW8A8Mxfp8, FlashInfer",
        layers="dense",
        min_capability=(10, 0),
        in_features_multiple=32,
        least_features=128,
        source=f"{_KERNELS}__init__.py:555-563; mxfp8/flashinfer.py:28-37 (smaller: Marlin)",
    ),
    Rule(
        r"mxfp8\+mxfp8",
        kernel="CompressedTensorsW8A8Mxfp8MoEMethod, TrtLlm (of FlashInfer)",
        layers="experts",
        min_capability=(10, 0),
        in_features_multiple=32,
        source="vllm 0.32.0 layers/fused_moe/oracle/mxfp8.py",
    ),
    Rule(
        r"(nvfp4|mxfp4|mxfp8)\+.*",
        max_capability=(9, 9),
        refused="before 10.0 activations stay as they are; take the weight-only scheme",
        source=f"{_KERNELS}nvfp4/marlin.py:33-38; mxfp4/marlin.py:40-45; mxfp8/marlin.py:15-16",
    ),
    Rule(
        r"(mxfp4|mxfp8)",
        min_capability=(10, 0),
        refused="from 10.0 activations are quantized with the weights; take mxfp4+mxfp4 or "
        "mxfp8+mxfp8",
        source=f"{_KERNELS}mxfp4/flashinfer.py:24-36; __init__.py:555-563",
    ),
    Rule(
        r"fp4_e2m1\..*",
        refused="FP4 outside NVFP4 and MXFP4 would be read as INT4 codes; take nvfp4 or mxfp4",
        source=f"{_CT}:865-873",
    ),
)

_TRANSPOSED = TransposedRule(
    ("gpt2",),
    words=("c_attn", "c_proj", "c_fc"),
    refused="only the class of GPT-2 swaps dimensions while it loads",
    source="vllm 0.32.0 models/gpt2.py:249-260; executed; run",
)

VLLM_GPU = Engine(
    "vllm",
    "0.33.0",
    versions=("0.32.0", "0.33.0"),
    reads="compressed-tensors",
    rules=_RULES,
    caches=VLLM_GPU_CACHE,
    transposed=_TRANSPOSED,
    serve="vllm serve",
    devices_flag="--tensor-parallel-size",
    paths="Paths are below `vllm/model_executor/` or, for the cache and where they begin with it, "
    "`vllm/`, and lines are those "
    "of 0.32.0 where no version stands before them; `ct` is "
    "`layers/quantization/compressed_tensors/`, `kernels` is `kernels/linear/`. For linear layers "
    "and experts, the choice of the kernel was executed in both versions (`mofq/engines/facts`) "
    "and a rule that it contradicts fails a test, and so were the attention's backend for an FP8 "
    "or INT8 cache and what devices that share a layer load; exported mixtures of experts "
    "and GPT-2 were loaded by the model's own class (`mofq/engines/facts/loading`); "
    "what kernels compute was read. CPU: `run` marks what was run, with 0.32.0.",
)
