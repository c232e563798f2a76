"""FP8 checkpoints as sources: which tensors are codes, and where their scales are.

A weight is its codes times its scales, in float32. How releases write that down:

- ``quant_method: fp8`` of DeepSeek-V3 and Qwen3-FP8: ``X.weight_scale_inv``, one multiplier
  (whatever the name says) for each tile of ``weight_block_size``; without a block size one
  ``X.weight_scale`` for the tensor.
- ``compressed-tensors``, as llm-compressor writes it: ``X.weight_scale`` for each tensor, row or
  block, as the config groups' ``strategy`` says.
- ``modelopt``, with ``quant_algo`` FP8 (a tensor), FP8_PER_CHANNEL_PER_TOKEN (a row) or
  FP8_PB_WO (a block of 128 x 128, as [rows, 1, columns, 1]); older ones say it in
  ``hf_quant_config.json``. ``fbgemm_fp8``: a row.
- FP8 tensors without any configuration: the codes are the values, if all tensors of a kind
  (``layers.*.mlp.up_proj.weight``) are such ones.

Scales of inputs and of the KV cache say how a source is served and are left out. Only headers
are read here; the scales themselves are checked when weights are read.

Source: transformers 5.23 ``integrations/finegrained_fp8.py`` and ``fbgemm_fp8.py``; vLLM 0.32
``quantization/fp8.py`` and ``modelopt.py``; compressed-tensors 0.20; ModelOpt
``torch/export/convert_hf_config.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mofq.exceptions import CheckpointError
from mofq.files.documents import shown
from mofq.model.checkpoint.safetensors_header import (
    AGAIN,
    FP8_DTYPES,
    Scaling,
    SourceTensors,
    TensorInfo,
    read_json,
)

#: What a source may be quantized as, for messages.
SUPPORTED = (
    "FP8 weights: quant_method 'fp8' or 'fbgemm_fp8', 'compressed-tensors' with 8-bit floats,"
    " 'modelopt' with FP8, or FP8 tensors without scales"
)

_CONFIG_KEY = "quantization_config"
#: What tools say of a quantization in; the second is MLX's.
_CONFIG_KEYS = (_CONFIG_KEY, "quantization")
_SOURCE_DTYPES = ("BF16", "F16", "F32", "F64")
#: Ends of names of tensors that only a quantized checkpoint has.
_QUANTIZED_SUFFIXES = (
    *(".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight"),
    *(".weight_scale_2", ".weight_zero_point", ".pre_quant_scale"),
)
_NUMBER = re.compile(r"\d+")
_MODELOPT_FILE = "hf_quant_config.json"
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_MODELOPT_BLOCK = (128, 128)
#: ``quant_algo`` of ModelOpt -> what has a scale.
_MODELOPT: dict[str, frozenset[str]] = {
    "FP8": frozenset({"tensor"}),
    "FP8_PER_CHANNEL_PER_TOKEN": frozenset({"channel"}),
    "FP8_PB_WO": frozenset({"block"}),
}
#: Last words of tensors that quantize inputs, outputs and the KV cache.
_OF_ACTIVATIONS = frozenset(
    (
        *("input_scale", "input_zero_point", "input_scale_ub", "activation_scale"),
        *("output_scale", "prob_output_scale", "q_scale", "k_scale", "v_scale", "kv_scale"),
    )
)


@dataclass(frozen=True, slots=True)
class _Convention:
    """What a quantization config says of weights."""

    name: str
    suffixes: tuple[str, ...]  #: of a scale, after the name of its weight
    kinds: frozenset[str]  #: what has a scale: tensor, channel, block; empty: nothing has
    block: tuple[int, int] | None = None


def read_fp8(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> SourceTensors | None:
    """Find the scales of a checkpoint's FP8 weights.

    Args:
        folder: Of the model, for ``hf_quant_config.json`` and for messages.
        config: Its ``config.json``.
        tensors: All that it stores.

    Returns:
        The tensors as they are read, or None where it is no FP8 checkpoint of a known kind.

    Raises:
        CheckpointError: It is one, and a scale is missing, twice there, or of a shape or dtype
            that does not fit its weight; or FP8 without scales stands among others.
    """
    codes = [info for info in tensors.values() if info.dtype in FP8_DTYPES and info.shape]
    convention = _read_convention(folder, config) if codes else None
    if convention is None:
        return None
    if not convention.kinds and any(_looks_scaled(info, tensors) for info in codes):
        return None
    if not convention.kinds:
        _check_one_dtype(codes, tensors)
    read: dict[str, TensorInfo] = {}
    for info in codes:
        scaling = _find_scaling(folder, info, tensors, convention) if convention.kinds else None
        read[info.name] = replace(info, decoded=True, scaling=scaling)
    consumed = {one.scaling.scale.name: one.scaling.scale for one in read.values() if one.scaling}
    if convention.kinds:
        consumed |= {name: tensors[name] for name in tensors if is_of_activations(name)}
    return SourceTensors(
        tensors={
            name: read.get(name, info) for name, info in tensors.items() if name not in consumed
        },
        consumed=consumed,
        description=convention.name,
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config as it was before the model was quantized."""
    plain = {key: value for key, value in config.items() if key not in _CONFIG_KEYS}
    inner = plain.get("text_config")
    if isinstance(inner, dict):
        plain["text_config"] = without_quantization(inner)
    return plain


def find_scales(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor that only a quantized checkpoint has beside its codes, or None."""
    return next((name for name in tensors if name.endswith(_QUANTIZED_SUFFIXES)), None)


def find_left_over(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """The key of a config that speaks of a quantization of which the tensors show nothing.

    Tools that decode a checkpoint leave it behind. Engines take such tensors for codes.

    Args:
        config: Of the checkpoint.
        tensors: All that it stores.

    Returns:
        ``quantization_config``, for example; None where there is none, or where it is true.
    """
    inner = config.get("text_config")
    stated = {**(inner if isinstance(inner, dict) else {}), **config}
    key = next((key for key in _CONFIG_KEYS if stated.get(key) is not None), None)
    has_codes = any(
        info.dtype not in _SOURCE_DTYPES
        and len(info.shape) > 1
        and name.endswith((".weight", "_proj"))
        for name, info in tensors.items()
    )
    if has_codes or find_scales(tensors) or any(map(is_of_activations, tensors)):
        return None
    return key


def stated_quantization(folder: Path, config: Mapping[str, Any]) -> tuple[Any, Path]:
    """What a checkpoint says of its quantization, and the file that says it; None: nothing.

    Args:
        folder: Of the model.
        config: Its ``config.json``.
    """
    stated = config.get(_CONFIG_KEY)
    inner = config.get("text_config")
    if stated is None and isinstance(inner, dict):
        stated = inner.get(_CONFIG_KEY)
    if stated is None and (folder / _MODELOPT_FILE).is_file():
        read = read_json(folder / _MODELOPT_FILE)
        inner = read.get("quantization")
        return {**read, **(inner if isinstance(inner, dict) else {}), "quant_method": "modelopt"}, (
            folder / _MODELOPT_FILE
        )
    return stated, folder / "config.json"


def _read_convention(folder: Path, config: Mapping[str, Any]) -> _Convention | None:
    stated, where = stated_quantization(folder, config)
    if stated is None:
        return _Convention("FP8 without scales", (), frozenset())
    if not isinstance(stated, dict):
        return None
    method = str(stated.get("quant_method", "")).replace("_", "-")
    if method == "fp8":
        return _read_fp8_method(stated, where)
    if method == "fbgemm-fp8":
        return _Convention("fbgemm_fp8, a scale for each row", ("_scale",), frozenset({"channel"}))
    if method == "compressed-tensors":
        return _read_compressed_tensors(stated, where)
    if method == "modelopt":
        return _read_modelopt(stated)
    return None


def _read_fp8_method(stated: Mapping[str, Any], where: Path) -> _Convention:
    block = stated.get("weight_block_size")
    suffixes = ("_scale_inv", "_scale")
    if block is None:
        return _Convention("fp8, a scale for each tensor", suffixes, frozenset({"tensor"}))
    size = _block_size(block, where, "weight_block_size")
    return _Convention(
        f"fp8, a scale for each block of {size[0]} x {size[1]}",
        suffixes,
        frozenset({"block"}),
        size,
    )


def _read_compressed_tensors(stated: Mapping[str, Any], where: Path) -> _Convention | None:
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return None
    kinds: set[str] = set()
    blocks: set[tuple[int, int]] = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            return None
        kind = weights.get("strategy") or "tensor"
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            continue  # whose codes are packed, or refused
        if kind not in ("tensor", "channel", "block"):
            return None
        if weights.get("symmetric") is False:
            return None
        kinds.add(kind)
        if kind == "block":
            blocks.add(_block_size(weights.get("block_structure"), where, "block_structure"))
    if any(stated.get(key) for key in ("transform_config", "sparsity_config")) or len(blocks) > 1:
        return None
    if not kinds:
        return None
    what = " or ".join("row" if kind == "channel" else kind for kind in sorted(kinds))
    return _Convention(
        f"compressed-tensors, FP8 with a scale for each {what}",
        ("_scale",),
        frozenset(kinds),
        next(iter(blocks), None),
    )


def _read_modelopt(stated: Mapping[str, Any]) -> _Convention | None:
    inner = stated.get("quantization")
    algorithm = (inner if isinstance(inner, dict) else stated).get("quant_algo")
    kinds = _MODELOPT.get(str(algorithm).upper())
    if kinds is None:
        return None
    return _Convention(f"modelopt {algorithm}", ("_scale",), kinds, _MODELOPT_BLOCK)


def _block_size(value: object, where: Path, key: str) -> tuple[int, int]:
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise CheckpointError(
            f"{where}: {key!r} needs two positive integers, found {shown(value)}. {AGAIN}"
        )
    return sizes[0], sizes[1]


def _scale_names(info: TensorInfo) -> Iterator[str]:
    yield from (f"{info.name}_scale_inv", f"{info.name}_scale")


def _looks_scaled(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor has scales beside it, of which no config says how they are meant."""
    return any(name in tensors for name in _scale_names(info))


def _check_one_dtype(codes: list[TensorInfo], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse FP8 without scales where the same tensor of another layer is not FP8."""
    others: dict[str, TensorInfo] = {}
    for info in tensors.values():
        if info.dtype not in FP8_DTYPES:
            others.setdefault(_NUMBER.sub("*", info.name), info)
    for info in codes:
        other = others.get(_NUMBER.sub("*", info.name))
        if other is not None:
            raise CheckpointError(
                f"{info.file}: {info.name!r} is {info.dtype} without a scale, and {other.name!r} is"
                f" {other.dtype}: needed one dtype in all layers, because nothing says whether its"
                " codes are its values or a scale is missing. Fetch the shards again, or give the"
                " checkpoint before it was quantized."
            )


def is_of_activations(name: str) -> bool:
    """Whether a tensor quantizes inputs, outputs or the KV cache, by its name."""
    word = name.rpartition(".")[2]
    # Fused experts have no module of their own: gate_up_proj_activation_scale.
    return word in _OF_ACTIVATIONS or word.endswith(("_proj_activation_scale", "_proj_input_scale"))


def _find_scaling(
    folder: Path,
    info: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    convention: _Convention,
) -> Scaling:
    names = [name for name in _scale_names(info) if name in tensors]
    names = [name for name in names if name.removeprefix(info.name) in convention.suffixes]
    needed = " or ".join(repr(info.name + suffix) for suffix in convention.suffixes)
    if len(names) != 1:
        found = "both" if names else "none"
        raise CheckpointError(
            f"{info.file}: {info.name!r} is {info.dtype} ({convention.name}) and needs its scale"
            f" {needed} in one of the shards of {folder}, found {found}. Fetch the shards again,"
            " or give the checkpoint before it was quantized."
        )
    scale = tensors[names[0]]
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.file}: {scale.name!r} needs dtype {', '.join(_SCALE_DTYPES)}, found"
            f" {scale.dtype}. Give the checkpoint before it was quantized."
        )
    scaling = _fit(info, scale, convention)
    if scaling is None:
        shapes = " or ".join(str(list(shape)) for shape in _shapes(info, convention))
        raise CheckpointError(
            f"{scale.file}: {scale.name!r} needs shape {shapes} ({convention.name}, weight"
            f" {list(info.shape)}), found {list(scale.shape)}. Weight and scale are of different"
            f" models, or the config is. {AGAIN}"
        )
    return scaling


def _fit(info: TensorInfo, scale: TensorInfo, convention: _Convention) -> Scaling | None:
    """How a scale lies over its weight, if it fits."""
    if len(info.shape) not in (2, 3) or 0 in info.shape:
        return None
    experts = info.shape[:-2]
    rows, columns = info.shape[-2:]
    found = scale.shape
    if len(found) == len(experts) + 4 and found[-1] == found[-3] == 1:  # ModelOpt's blocks
        found = (*found[:-3], found[-2])
    if found[: len(experts)] != experts:
        return None
    for kind, (tile_rows, tile_columns) in _tiles(info, convention).items():
        grid = (-(-rows // tile_rows), -(-columns // tile_columns))
        shapes = [(*experts, *grid)]
        if kind != "block":
            shapes += [(*experts, grid[0])]
        if kind == "tensor":
            shapes += [experts]
        if found in shapes:
            return Scaling(scale, *grid, tile_rows, tile_columns)
    return None


def _tiles(info: TensorInfo, convention: _Convention) -> dict[str, tuple[int, int]]:
    """What shares a scale, for every kind of scale that the convention knows."""
    rows, columns = info.shape[-2:]
    tiles = {"tensor": (rows, columns), "channel": (1, columns)}
    if convention.block is not None:
        tiles["block"] = convention.block
    return {kind: tile for kind, tile in tiles.items() if kind in convention.kinds}


def _shapes(info: TensorInfo, convention: _Convention) -> list[tuple[int, ...]]:
    """The shapes that a scale may have, one for each kind."""
    if len(info.shape) not in (2, 3):
        return []
    *experts, rows, columns = info.shape
    tiles = _tiles(info, convention).values()
    return [(*experts, math.ceil(rows / tile[0]), math.ceil(columns / tile[1])) for tile in tiles]
