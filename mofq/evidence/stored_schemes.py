"""The schemes under which a quantized source keeps its layers: the entry ``stored`` of a space.

Scales (and zero points) are found again from the values, so a scheme here has no error where
the source's scales are of its dtype and the largest code of a tile is the format's largest; the
table says what it costs, as of any scheme. Where an engine serves FP8 or NVFP4 with activations
alone, the scheme with them is offered too: what they cost is the activations'.

NVFP4 keeps the global scale of its source where engines can: layers that they join have one. MXFP4
is NVFP4 too, with the same values: a block of 32 is two of 16 whose scales are powers of two under
a global one, where all of these are in the range of E4M3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.safetensors_header import Packed, Scaling, TensorInfo
from mofq.model.layers import FusionGroup
from mofq.numbers.schemes import Scheme, parse_scheme

_FP8 = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
#: How a scheme says what dtype its scales are of.
_SCALE_WORDS = {"BF16": "", "F8_E8M0": ".s-e8m0", "F16": ".s-f32", "F32": ".s-f32"}
_NVFP4 = "nvfp4@stored"
_MXFP4_GROUP = 32
#: Between the largest and the smallest power of two in E4M3, 2**8 and 2**-9.
_E4M3_OCTAVES = 17
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
    stored = [info for info in infos if info is not None]
    if {tuple(_names(info)) for info in stored} != {tuple(_names(stored[0]))}:
        return ()
    names = tuple(_names(stored[0]))
    if stored[0].dtype == "FP4" and not _has_exact_nvfp4(group, stored):
        names = ("mxfp4",) if "mxfp4" in names else ("nvfp4", "nvfp4+nvfp4")
    return tuple(map(parse_scheme, names))


def _has_exact_nvfp4(group: FusionGroup, stored: Sequence[TensorInfo]) -> bool:
    """Whether one global scale for each layers that engines join gives the values stored in FP4."""
    shared: dict[str, dict[tuple[str, int | None], TensorInfo]] = {}
    scales: dict[str, set[float | None]] = {}
    for layer, info in zip(group.layers, stored, strict=True):
        shared.setdefault(layer.shares_scale, {})[info.name, layer.expert] = info
        scales.setdefault(layer.shares_scale, set()).add(layer.global_scale)
    if any(info.packed is not None and info.packed.global_scale for info in stored):
        return all(len(some) == 1 and None not in some for some in scales.values())
    return all(
        _fits_e4m3([(info, expert) for (_, expert), info in infos.items()])
        for infos in shared.values()
    )


def _fits_e4m3(stored: Sequence[tuple[TensorInfo, int | None]]) -> bool:
    """Whether the scales of MXFP4 weights are powers of two in E4M3 under one global scale.

    Args:
        stored: Tensors; of one with all experts, which of them.
    """
    exponents = [
        _bytes(info.packed.scale, expert) for info, expert in stored if info.packed is not None
    ]
    least = max(int(some.max()) for some in exponents) - _E4M3_OCTAVES
    for (info, expert), some in zip(stored, exponents, strict=True):
        if some.min() >= least:
            continue
        # A code of zero, whose sign is the highest bit, is zero whatever its scale.
        if (_bytes(info, expert).reshape(len(some), -1)[some < least] & 0x77).any():
            return False
    return True


def _bytes(info: TensorInfo, expert: int | None) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Of a tensor, or of one expert in it."""
    start, size = info.start, info.stop - info.start
    if expert is not None:
        size //= info.shape[0]
        start += expert * size
    return np.memmap(info.file, np.uint8, "r", start, (size,))


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
        if packed.group_size == _MXFP4_GROUP:
            yield "mxfp4"
        yield from (_NVFP4, f"{_NVFP4}+nvfp4")
        return
    if packed.is_sorted:
        return
    bits = info.dtype.removeprefix("INT")
    name = "channel" if packed.group_size == info.shape[-1] else f"g{packed.group_size}"
    name += "" if packed.is_symmetric else ".asym"
    # Engines compute with integers' scales in bf16.
    for word in dict.fromkeys([_SCALE_WORDS[packed.scale.dtype], ""]):
        yield f"int{bits}.{name}{word}@stored"
