"""SGLang 0.5.23 on NVIDIA GPUs, through compressed-tensors checkpoints.

The choice of a scheme was executed (``facts/``, `scripts/engines/README.md`); kernels were read.
"""

from __future__ import annotations

from mofq.engines.rules import Engine, ModelRule, Rule, TransposedRule

_CT = "sglang 0.5.23 ct/compressed_tensors.py"

_RULES: tuple[Rule, ...] = (
    Rule(
        r".*",
        layers="embeddings",
        refused="embeddings are read as they are; take bf16",
        source=f"{_CT}:182-255",
    ),
    Rule(
        r".*",
        layers="experts",
        model_types=("gpt_oss",),
        refused="whether quantized experts with biases are read is not known; take bf16",
        source="sglang 0.5.23 srt/models/gpt_oss.py; not run",
    ),
    Rule(
        r"int[2-7]\..*|int8\.[^+]*|fp4_e2m1\..*|nvfp4.*|mxfp4.*",
        layers="shared",
        model_types=("glm4_moe",),
        refused="the model asks its shared experts for a weight, which packed ones have under "
        "another name, and stops; take fp8_e4m3.channel+fp8_e4m3.token, or bf16",
        source="sglang 0.5.23 srt/models/glm4_moe.py:503; executed",
    ),
    Rule(
        r"int[2-7]\..*|int8\.[^+]*|nvfp4.*|.*\.tensor.*",
        layers="joined latent",
        refused="the loader concatenates all that q_a_proj and kv_a_proj_with_mqa store, shapes "
        "and scales of a tensor too, and stops; take fp8_e4m3.channel+fp8_e4m3.token, or bf16",
        source="sglang 0.5.23 srt/models/deepseek_common/deepseek_weight_loader.py; executed",
    ),
    Rule(
        r"int8\.tensor(\.s-f32)?\+int8\..*",
        layers="dense",
        refused="codes under one scale are quantized again as FP8 while they are loaded, which is "
        "not what was measured; take int8.channel+int8.token",
        source="sglang 0.5.23 ct/schemes/compressed_tensors_w8a8_int8.py; executed",
    ),
    Rule(
        r"int8\.channel(\.s-f32)?\+int8\.(token|tensor)",
        kernel="CompressedTensorsW8A8Int8, int8_scaled_mm",
        layers="dense",
        min_capability=(8, 0),
        max_capability=(9, 0),
        in_features_multiple=16,
        out_features_multiple=16,
        source=f"{_CT}:834-860; ct/schemes/compressed_tensors_w8a8_int8.py:99",
    ),
    Rule(
        r"int8\..*\+int8\..*",
        layers="dense",
        min_capability=(10, 0),
        refused="int8_scaled_mm stops at compute capability 9.0; take FP8",
        source="sgl-kernel csrc/gemm/int8_gemm_kernel.cu, end of int8_scaled_mm",
    ),
    Rule(
        r"int8\..*\+int8\..*",
        layers="experts",
        refused="INT8 experts are served on NPUs alone; take FP8 or int8.gN",
        source=f"{_CT}:979-987",
    ),
    Rule(
        r"int8\.g\d+.*\+int8\..*",
        refused="no kernel multiplies INT8 group weights with INT8 activations; take int8.gN",
        source=f"{_CT}:862",
    ),
    Rule(
        r"int(4|8)\.(channel|g32|g64|g128)",
        kernel="CompressedTensorsWNA16, Marlin",
        layers="dense",
        min_capability=(8, 0),
        in_features_multiple=128,
        out_features_multiple=64,
        source=f"{_CT}:733-747; marlin_utils.py:44; ct/schemes/compressed_tensors_wNa16.py:221",
    ),
    Rule(
        r"int4\.(channel|g32|g64|g128)\.asym",
        kernel="CompressedTensorsWNA16, Marlin",
        layers="dense",
        min_capability=(8, 0),
        in_features_multiple=128,
        out_features_multiple=64,
        source=f"{_CT}:733-747; ct/schemes/compressed_tensors_wNa16.py:59",
    ),
    Rule(
        r"int(4|8)\.(channel|g32|g64|g128)",
        kernel="CompressedTensorsWNA16MoE, Marlin",
        layers="experts",
        min_capability=(8, 0),
        max_capability=(9, 0),
        in_features_multiple=128,
        out_features_multiple=64,
        source=f"{_CT}:912-951",
    ),
    Rule(
        r"int4\.(g32|g128)",
        kernel="CompressedTensorsWNA16TritonMoE",
        layers="experts",
        min_capability=(10, 0),
        source=f"{_CT}:653-661, 921-949",
    ),
    Rule(
        r"int[23567]\.(channel|g\d+)(\.asym)?(\.s-f32)?",
        refused="only 4 and 8 bits are served; take int4 or int8",
        source=f"{_CT}:733-747, 912-951; executed",
    ),
    Rule(
        r"int(4|8)\.(channel|g\d+)(\.asym)?\.s-f32",
        refused="weight scales are loaded in the model's own dtype, which rounds f32 scales; "
        "take the scheme without .s-f32",
        source="sglang 0.5.23 ct/schemes/compressed_tensors_wNa16.py:140-152",
    ),
    Rule(
        r"fp8_e4m3\.(channel(\.s-f32)?\+fp8_e4m3\.tensor|tensor(\.s-f32)?\+fp8_e4m3\.token)",
        layers="experts",
        min_capability=(8, 9),
        refused="experts take weights per channel with inputs per token, or both under one scale; "
        "take fp8_e4m3.channel+fp8_e4m3.token",
        source="sglang 0.5.23 ct/schemes/compressed_tensors_w8a8_fp8_moe.py, an assertion",
    ),
    Rule(
        r"fp8_e4m3\.(channel|tensor)(\.s-f32)?\+fp8_e4m3\.(token|tensor)",
        kernel="CompressedTensorsW8A8Fp8",
        min_capability=(8, 9),
        source=f"{_CT}:804-818; ct/schemes/compressed_tensors_w8a8_fp8.py:62",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?\+fp8_e4m3\.g128",
        kernel="CompressedTensorsW8A8Fp8, Triton block kernels",
        min_capability=(8, 9),
        max_capability=(8, 9),
        in_features_multiple=128,
        shard_rows_multiple=128,
        source="sglang 0.5.23 fp8_utils.py, _dispatch_auto_backend",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?\+fp8_e4m3\.g128",
        kernel="CompressedTensorsW8A8Fp8, block kernels",
        min_capability=(9, 0),
        in_features_multiple=128,
        shard_rows_multiple=128,
        settings=("SGLANG_ENABLE_JIT_DEEPGEMM=0",),
        source="sglang 0.5.23 ct/schemes/compressed_tensors_w8a8_fp8.py:55-57",
    ),
    Rule(
        r"fp8_e4m3\..*\+fp8_e4m3\..*",
        max_capability=(8, 8),
        refused="below compute capability 8.9 activations stay as they are; take fp8_e4m3.channel",
        source=f"{_CT}:819-824",
    ),
    Rule(
        r"fp8_e4m3\.(channel|tensor)",
        kernel="CompressedTensorsW8A16Fp8, Marlin",
        layers="dense",
        min_capability=(8, 0),
        source="sglang 0.5.23 ct/schemes/compressed_tensors_w8a16_fp8.py:26, 37",
    ),
    Rule(
        r"nvfp4",
        kernel="CompressedTensorsW4A16Fp4, Marlin",
        min_capability=(8, 0),
        in_features_multiple=128,
        out_features_multiple=64,
        source=f"{_CT}:754-755; ct/schemes/compressed_tensors_w4a16_nvfp4.py:137",
    ),
    Rule(
        r"nvfp4\+nvfp4",
        kernel="CompressedTensorsW4A4Fp4",
        min_capability=(10, 0),
        in_features_multiple=16,
        source=f"{_CT}:757-767; ct/schemes/compressed_tensors_w4a4_nvfp4.py:38",
    ),
    Rule(
        r"nvfp4\+nvfp4",
        max_capability=(9, 9),
        refused="before 10.0 activations stay as they are; take nvfp4",
        source=f"{_CT}:778-783",
    ),
    Rule(
        r"(mxfp4|mxfp8|fp4_e2m1\..*)(\+.*)?",
        refused="of FP4 and microscaling formats only NVFP4 is served; take nvfp4",
        source=f"{_CT}:789-802",
    ),
)

SGLANG = Engine(
    "sglang",
    "0.5.23",
    reads="compressed-tensors",
    rules=_RULES,
    models=(
        ModelRule(
            ("qwen2_moe", "qwen3_moe"),
            groups=r"layers\.\d+\.mlp\.(gate_up|down)",
            refused="takes every decoder layer for one of experts, whatever mlp_only_layers and "
            "decoder_sparse_step say, so that dense ones are not loaded",
            source="sglang 0.5.23 srt/models/qwen2_moe.py:1058, qwen3_moe.py:878; executed",
        ),
    ),
    transposed=TransposedRule(
        ("gpt2",),
        words=("c_attn", "c_proj", "c_fc"),
        refused="only the class of GPT-2 swaps dimensions while it loads",
        source="sglang 0.5.23 srt/models/gpt2.py:274-279; executed",
    ),
    serve="python -m sglang.launch_server --model-path",
    devices_flag="--tp",
    paths="Paths are below `sglang/srt/layers/quantization/`; `ct` is `compressed_tensors/`. The "
    "choice of a scheme, and what devices that share a layer load, was executed "
    "(`mofq/engines/facts`) and a rule that it contradicts fails a test; exported mixtures of "
    "experts and GPT-2 were loaded by the model's own class (`mofq/engines/facts/loading`); "
    "kernels, and what Marlin checks when it packs weights, were read.",
)
