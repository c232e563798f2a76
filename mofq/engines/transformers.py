"""Transformers 5.23.0, through compressed-tensors checkpoints.

It decompresses to the model's dtype (NVFP4 and MXFP4 to bfloat16, so that a model in float32 stops)
and emulates the activations: right numbers, no low-precision arithmetic.
"""

from __future__ import annotations

from mofq.engines.rules import Engine, Rule, TransposedRule

_CT = "compressed_tensors 0.20.0 compressors/"

_RULES: tuple[Rule, ...] = (
    Rule(
        r".*",
        layers="embeddings",
        refused="it stops where it gives an embedding without a weight its first values; take bf16",
        source="transformers 5.23.0 modeling_utils.py:2323; run",
    ),
    Rule(
        r".*",
        layers="experts",
        refused="experts are one tensor in transformers 5 and per-expert quantized ones are not "
        "loaded into it; take bf16",
        source="transformers 5.23.0 integrations/compressed_tensors.py",
    ),
    Rule(
        r"int8\.(channel|tensor)(\.s-f32)?\+int8\.token",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT}naive_quantized/base.py; run",
    ),
    Rule(
        r"int8\.channel(\.s-f32)?\+int8\.tensor",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT}naive_quantized/base.py",
    ),
    Rule(
        r"int(4|8)\.(channel|g\d+)(\.s-f32)?",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT}pack_quantized/base.py; run",
    ),
    Rule(
        r"int(4|8)\.(channel|g\d+)\.asym(\.s-f32)?",
        refused="packed zero points are refused as a size mismatch; take the symmetric scheme",
        source=f"{_CT}pack_quantized/base.py:83-91; run",
    ),
    Rule(
        r"fp8_e4m3\.(channel|tensor)(\.s-f32)?(\+fp8_e4m3\.token)?",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT}naive_quantized/base.py; run",
    ),
    Rule(
        r"fp8_e4m3\.block128(\.s-f32)?(\+fp8_e4m3\.g128)?",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT}naive_quantized/base.py",
    ),
    Rule(
        r"nvfp4|mxfp4",
        kernel="CompressedLinear, decompressed",
        source=f"{_CT}nvfp4/base.py, compressors/mxfp4/base.py",
    ),
)

TRANSFORMERS = Engine(
    "transformers",
    "5.23.0",
    reads="compressed-tensors",
    rules=_RULES,
    transposed=TransposedRule(
        refused="no module but torch.nn.Linear gets its codes decoded: a Conv1D takes codes for "
        "weights, or random ones where they are packed",
        source="compressed_tensors 0.20.0 compressors/base.py:35; run",
    ),
    load="transformers.AutoModelForCausalLM.from_pretrained",
    can_cut=False,
    paths="A scheme of every rule is run by a test, in bfloat16.",
)
