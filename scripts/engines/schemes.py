"""What engines are asked: schemes, layers and devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mofq.model.layers import FusionGroup, LinearLayer

#: Every kind of scheme that the rules of ``mofq.engines`` tell apart, some in several sizes.
SCHEMES = (
    "int8.channel+int8.token",
    "int8.channel.s-f32+int8.token",
    "int8.channel+int8.tensor",
    "int8.channel.asym+int8.token",
    "int8.tensor+int8.token",
    "int8.tensor+int8.tensor",
    "int8.g128+int8.token",
    *(f"int{bits}.{tiles}" for bits in range(2, 9) for tiles in ("channel", "g32", "g64", "g128")),
    "int4.g16",
    "int4.g96",
    "int4.g256",
    "int8.g96",
    "int8.channel.asym",
    "int8.g64.asym",
    "int4.channel.asym",
    "int4.g32.asym",
    "int4.g64.asym",
    "int4.g128.asym",
    *("int6.g16", "int6.g256", "int8.g16", "int8.g256", "int8.g32.asym", "int4.g16.asym"),
    *("int5.channel.asym", "int3.g32.asym", "int6.g64.asym", "int7.g128.asym"),
    "int4.g128.s-f32",
    "int4.channel+int8.token",
    "int4.g128+int8.token",
    "int6.g128+int8.token",
    "int4.g128+fp8_e4m3.token",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "fp8_e4m3.channel.s-f32+fp8_e4m3.token",
    "fp8_e4m3.channel+fp8_e4m3.tensor",
    "fp8_e4m3.tensor+fp8_e4m3.token",
    "fp8_e4m3.tensor+fp8_e4m3.tensor",
    "fp8_e4m3.block128+fp8_e4m3.g128",
    "fp8_e4m3.block128.s-f32+fp8_e4m3.g128",
    "fp8_e4m3.channel+fp8_e4m3.g128",
    "fp8_e4m3.channel",
    "fp8_e4m3.channel.s-f32",
    "fp8_e4m3.tensor",
    "fp8_e4m3.block128",
    "nvfp4",
    "nvfp4+nvfp4",
    "mxfp4",
    "mxfp4+mxfp4",
    "mxfp8",
    "mxfp8+mxfp8",
)

#: What cutting a layer among devices can tell apart: bits, words, tiles, and what is not packed.
PARALLEL_SCHEMES = (
    "int8.channel+int8.token",
    "int8.tensor+int8.token",
    "int8.channel",
    "int8.g128",
    *("int4.channel", "int4.g16", "int4.g32", "int4.g64", "int4.g128", "int4.g256"),
    *("int4.channel.asym", "int4.g32.asym", "int4.g128.asym", "int8.g64.asym"),
    *("int3.channel", "int3.g32.asym", "int5.g64", "int6.g32", "int6.g64.asym"),
    "int4.g128+fp8_e4m3.token",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "fp8_e4m3.tensor+fp8_e4m3.tensor",
    "fp8_e4m3.block128+fp8_e4m3.g128",
    "fp8_e4m3.block128.s-f32+fp8_e4m3.g128",
    "fp8_e4m3.channel",
    *("nvfp4", "nvfp4+nvfp4", "mxfp4", "mxfp4+mxfp4", "mxfp8", "mxfp8+mxfp8"),
)


class AskedLayer(NamedTuple):
    """A layer, or layers that an engine concatenates."""

    kind: str  #: a key of ``KINDS``
    in_features: int
    out_features: tuple[int, ...]  #: of each layer that is concatenated; of experts, of the gate
    devices: int = 1  #: that share it


class Kind(NamedTuple):
    """What a model calls such layers."""

    architecture: str
    group: str  #: end of the fusion group's name
    module: str  #: of the engine's layer, below ``model.layers.0.``
    words: tuple[str, ...]  #: of its linear layers; of experts: gate, up, down
    is_experts: bool = False


_EXPERTS = ("gate_proj", "up_proj", "down_proj")
#: As Llama, Qwen3 MoE and Mixtral have them.
KINDS = {
    "gate_up": Kind("llama", "mlp.gate_up", "mlp.gate_up_proj", ("gate_proj", "up_proj")),
    "down": Kind("llama", "mlp.down", "mlp.down_proj", ("down_proj",)),
    "qkv": Kind("llama", "attn.qkv", "self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "experts": Kind("qwen3_moe", "moe.experts", "mlp.experts", _EXPERTS, is_experts=True),
    "mixtral": Kind(
        "mixtral", "moe.experts", "block_sparse_moe.experts", ("w1", "w3", "w2"), is_experts=True
    ),
}
#: SmolLM2-135M has 576 and 1,536; 256 divides neither.
LAYERS = {
    "4096x4096": AskedLayer("gate_up", 4096, (4096, 4096)),
    "576x576": AskedLayer("gate_up", 576, (576, 576)),
    "1536x576": AskedLayer("gate_up", 576, (1536, 1536)),
    "experts": AskedLayer("experts", 1024, (512,)),
}
#: Channels of a head of the layers that are cut by heads.
HEAD_SIZE = 64
#: Among devices. Qwen1.5-MoE has 1,408 = 11 * 128 and Qwen3-30B-A3B 768 = 6 * 128, which 4 or 8
#: devices do not share in whole groups of 128; 48 and 96 leave parts of a 32-bit word; keys of 2
#: heads are repeated on 4 and on 8. The first is not cut: its 100 zero points fill no whole words.
PARALLEL_LAYERS = {
    f"{name} tp={devices}": AskedLayer(kind, in_features, out_features, devices)
    for name, kind, in_features, out_features, numbers in (
        ("gate_up 100x512", "gate_up", 512, (100, 100), (1,)),
        ("gate_up 1408x512", "gate_up", 512, (1408, 1408), (2, 4, 8)),
        ("gate_up 96x512", "gate_up", 512, (96, 96), (2, 8)),
        ("down 512x1408", "down", 1408, (512,), (2, 4, 8)),
        ("down 64x96", "down", 96, (64,), (2, 8)),
        ("down 64x48", "down", 48, (64,), (2, 8)),
        ("down 512x4096", "down", 4096, (512,), (8,)),
        ("qkv 512+128+128x512", "qkv", 512, (512, 128, 128), (2, 4, 8)),
        ("experts 768x1024", "experts", 1024, (768,), (2, 4, 8)),
        ("experts 96x1024", "experts", 1024, (96,), (2, 8)),
        ("mixtral 1024x1024", "mixtral", 1024, (1024,), (1, 8)),
    )
    for devices in numbers
}

#: Formats of the KV cache that mofq writes.
CACHES = (
    "kv:fp8_e4m3.tensor",
    "kv:fp8_e4m3.unscaled",
    "kv:fp8_e4m3.head",
    "kv:fp8_e4m3.token_head",
    "kv:int8.token_head",
)


class AskedAttention(NamedTuple):
    """The attention of a layer."""

    heads: int
    kv_heads: int
    head_size: int
    devices: int = 1  #: that share it


#: Heads of usual sizes; 2 heads of keys are dealt out to 2 devices and repeated on 4.
ATTENTIONS = {
    "64": AskedAttention(8, 2, 64),
    "96": AskedAttention(8, 2, 96),
    "128": AskedAttention(8, 2, 128),
    "256": AskedAttention(8, 2, 256),
    "128 tp=2": AskedAttention(8, 2, 128, 2),
    "128 tp=4": AskedAttention(8, 2, 128, 4),
}

#: CPUs without and with AMX tiles.
CPUS = ("cpu", "cpu-amx")


class Matrix(NamedTuple):
    """What is asked for: every scheme for every layer on every device."""

    schemes: tuple[str, ...]
    layers: Mapping[str, AskedLayer | AskedAttention]
    gpus: tuple[tuple[int, int], ...]  #: CUDA compute capabilities, beside ``CPUS``


#: GPUs of every generation.
GPUS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
#: Folder of ``mofq/engines/facts`` -> what its files answer.
MATRICES = {
    "selection": Matrix(SCHEMES, LAYERS, GPUS),
    "kv_cache": Matrix(CACHES, ATTENTIONS, GPUS),
    "tensor_parallel": Matrix(PARALLEL_SCHEMES, PARALLEL_LAYERS, ((8, 0), (8, 9), (9, 0), (10, 0))),
}


def asked_layer(layer: str) -> AskedLayer:
    """The layer of a key of ``LAYERS`` or ``PARALLEL_LAYERS``."""
    return LAYERS[layer] if layer in LAYERS else PARALLEL_LAYERS[layer]


def fusion_group(layer: str) -> FusionGroup:
    """The fusion group of a key of ``LAYERS`` or ``PARALLEL_LAYERS``, two experts of a mixture."""
    kind_name, size, outputs, _ = asked_layer(layer)
    kind = KINDS[kind_name]
    name, parent = f"layers.0.{kind.group}", f"model.layers.0.{kind.module}"
    if kind.is_experts:
        shapes = [(outputs[0], size), (outputs[0], size), (size, outputs[0])]
        layers = [
            _linear(f"{parent}.{number}.{word}", f"experts.{word}", shape)
            for number in range(2)
            for word, shape in zip(kind.words, shapes, strict=True)
        ]
    else:
        block = parent.rpartition(".")[0]
        layers = [
            _linear(f"{block}.{word}", word, (rows, size))
            for word, rows in zip(kind.words, outputs, strict=True)
        ]
    return FusionGroup(name, tuple(layers))


def _linear(name: str, module: str, shape: tuple[int, int]) -> LinearLayer:
    return LinearLayer(
        name=name,
        tensor=f"{name}.weight",
        out_features=shape[0],
        in_features=shape[1],
        dtype="BF16",
        transposed=False,
        expert=None,
        row_start=0,
        decoder_layer=0,
        module=module,
        shares_scale=name,
    )
