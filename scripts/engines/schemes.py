"""What engines are asked: schemes, layers and devices."""

from __future__ import annotations

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

#: Layers by name: kind, input features, and output features of each layer that is concatenated.
#: SmolLM2-135M has 576 and 1,536; 256 divides neither.
LAYERS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "4096x4096": ("dense", 4096, (4096, 4096)),
    "576x576": ("dense", 576, (576, 576)),
    "1536x576": ("dense", 576, (1536, 1536)),
    "experts": ("experts", 1024, (512,)),
}

#: CUDA compute capabilities, and CPUs without and with AMX tiles.
GPUS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
CPUS = ("cpu", "cpu-amx")


def fusion_group(layer: str) -> FusionGroup:
    """The fusion group of a key of ``LAYERS``, as a checkpoint of Llama or Qwen3 MoE has it."""
    kind, size, outputs = LAYERS[layer]
    if kind == "dense":
        shapes = {"gate_proj": (outputs[0], size), "up_proj": (outputs[1], size)}
        return FusionGroup(
            "layers.0.mlp.gate_up", tuple(_linear(name, shape) for name, shape in shapes.items())
        )
    shapes = {
        "gate_proj": (outputs[0], size),
        "up_proj": (outputs[0], size),
        "down_proj": (size, outputs[0]),
    }
    return FusionGroup(
        "layers.0.moe.experts",
        tuple(
            _linear(name, shape, expert=f"experts.{number}.")
            for number in range(2)
            for name, shape in shapes.items()
        ),
    )


def _linear(word: str, shape: tuple[int, int], *, expert: str = "") -> LinearLayer:
    name = f"model.layers.0.mlp.{expert}{word}"
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
        module=f"experts.{word}" if expert else word,
        shares_scale=name,
    )
