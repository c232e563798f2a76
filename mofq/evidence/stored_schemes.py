"""The schemes under which a quantized source keeps its layers: the entry ``stored`` of a space.

Scales (and zero points) are found again from the values, so a scheme here has no error where
the source's scales are of its dtype and the largest code of a tile is the format's largest; the
table says what it costs, as of any scheme. Where an engine serves FP8 with activations alone, the
scheme with them is offered too: what they cost is the activations'.
"""

from __future__ import annotations

from collections.abc import Iterator

from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.safetensors_header import Packed, Scaling, TensorInfo
from mofq.model.layers import FusionGroup
from mofq.numbers.schemes import Scheme, parse_scheme

_FP8 = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
#: How a scheme says what dtype its scales are of.
_SCALE_WORDS = {"BF16": "", "F8_E8M0": ".s-e8m0", "F16": ".s-f32", "F32": ".s-f32"}
_ACTIVATIONS = {"channel": "fp8_e4m3.token", "tensor": "fp8_e4m3.token", "block": "fp8_e4m3.g"}


def stored_schemes(checkpoint: Checkpoint, group: FusionGroup) -> tuple[Scheme, ...]:
    """The schemes under which a source keeps all layers of a group; none where it is unquantized.

    Args:
        checkpoint: A source, quantized or not.
        group: Of its layers.

    Returns:
        From the exact one on. Nothing where layers of the group are kept in different ways, or in
        a way that no scheme has (columns that GPTQ has sorted).
    """
    infos = [checkpoint.tensors.get(layer.tensor) for layer in group.layers]
    if not all(info is not None and info.decoded for info in infos):
        return ()
    found = [tuple(_names(info)) for info in infos if info is not None]
    return tuple(map(parse_scheme, found[0])) if len(set(found)) == 1 else ()


def _names(info: TensorInfo) -> Iterator[str]:
    if info.packed is not None:
        yield from _packed_names(info, info.packed)
    elif info.scaling is not None:
        yield from _fp8_names(info, info.scaling)
    else:
        yield f"{_FP8[info.dtype]}.unscaled"


def _fp8_names(info: TensorInfo, scaling: Scaling) -> Iterator[str]:
    element, tile = _FP8[info.dtype], (scaling.tile_rows, scaling.tile_columns)
    columns = info.shape[-1]
    if (scaling.rows, scaling.columns) == (1, 1):
        kind = name = "tensor"
    elif tile[0] == 1 and tile[1] >= columns:
        kind = name = "channel"
    else:
        kind = "block"
        name = f"block{tile[0]}" if tile[0] == tile[1] else f"block{tile[0]}x{tile[1]}"
    inputs = _ACTIVATIONS[kind] + (str(tile[1]) if kind == "block" else "")
    word = _SCALE_WORDS[scaling.scale.dtype]
    yield f"{element}.{name}{word}"
    yield f"{element}.{name}{word}+{inputs}"


def _packed_names(info: TensorInfo, packed: Packed) -> Iterator[str]:
    if info.dtype == "FP4":
        yield from ("nvfp4", "nvfp4+nvfp4") if packed.group_size == 16 else ("mxfp4",)
        return
    if packed.is_sorted:
        return
    bits = info.dtype.removeprefix("INT")
    name = "channel" if packed.group_size == info.shape[-1] else f"g{packed.group_size}"
    name += "" if packed.is_symmetric else ".asym"
    # Engines compute with integers' scales in bf16.
    for word in dict.fromkeys([_SCALE_WORDS[packed.scale.dtype], ""]):
        yield f"int{bits}.{name}{word}@stored"
