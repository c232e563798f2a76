"""What the config of a checkpoint promises, and the tensors that keep the promise."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.fp8 import SUPPORTED
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint, TensorInfo
from mofq.model.layers.families import FUSION_RULES, Family, read_sizes
from mofq.model.layers.linear import LinearLayer

_SOURCE_DTYPES = ("BF16", "F16", "F32")
_QUANTIZED_SUFFIXES = (
    *(".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight"),
    *(".weight_scale_2", ".weight_zero_point", ".pre_quant_scale"),
)


@dataclass(frozen=True, slots=True)
class Promised:
    """What the functions below share: the checkpoint, and what its config promises."""

    checkpoint: Checkpoint
    architecture: str
    family: Family
    config: Mapping[str, Any]  #: of the language model
    sizes: Mapping[str, int]
    body: str  #: prefix on disk


def read_model(checkpoint: Checkpoint) -> Promised:
    """What a checkpoint promises.

    Raises:
        CheckpointError: The family is unknown, or the checkpoint is quantized already.
    """
    where = config_path(checkpoint)
    architecture = checkpoint.config.get("model_type")
    if not isinstance(architecture, str) or architecture not in FUSION_RULES:
        raise CheckpointError(
            f"{where}: no rules for model_type {architecture!r}; known are"
            f" {', '.join(FUSION_RULES)}. A new family is a row of FUSION_RULES:"
            " docs/architecture.md."
        )
    _refuse_quantized(checkpoint)
    family = FUSION_RULES[architecture]
    config = checkpoint.config.get("text_config", checkpoint.config)
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: 'text_config' needs an object, found {config!r}.")
    sizes = read_sizes(config, family, where=where)
    bodies = (family.body, *family.other_bodies)
    for body in bodies:
        if any(name.startswith(f"{body}{family.decoder}.") for name in checkpoint.tensors):
            return Promised(checkpoint, architecture, family, config, sizes, body)
    raise CheckpointError(
        f"{checkpoint.folder}: model_type {architecture!r} needs tensors named"
        f" {' or '.join(f'{body}{family.decoder}.0.…' for body in bodies)}, found"
        f" {few(checkpoint.tensors)}. Config and weights are of different models."
    )


def config_path(checkpoint: Checkpoint) -> str:
    """For messages."""
    return str(checkpoint.folder / CONFIG_FILE)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("quantization_config")
    scales = [name for name in checkpoint.tensors if name.endswith(_QUANTIZED_SUFFIXES)]
    if config is None and not scales:
        return
    method = config.get("quant_method") if isinstance(config, dict) else config
    found = repr(scales[0]) if config is None else f"quantization_config {method!r}"
    own = (
        " `mofq recipe from` reads what was chosen there." if method == "compressed-tensors" else ""
    )
    raise CheckpointError(
        f"{checkpoint.folder}: found {found}: the checkpoint is quantized already. mofq measures"
        f" against the model before that. Give the original, in {', '.join(_SOURCE_DTYPES)}, or"
        f" {SUPPORTED}.{own}"
    )


def decoder_tensors(model: Promised) -> Iterator[tuple[int, TensorInfo]]:
    """Every tensor of a decoder layer, with the layer's index."""
    prefix = f"{model.body}{model.family.decoder}."
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,9})\..+", re.DOTALL)
    for name, info in model.checkpoint.tensors.items():
        if match := pattern.fullmatch(name):
            yield int(match[1]), info


def check_decoder_layers(model: Promised) -> None:
    """See that the tensors have as many decoder layers as the config.

    Layers that predict further tokens may follow them; transformers leaves those out.

    Raises:
        CheckpointError: There are others.
    """
    found = {index for index, _ in decoder_tensors(model)}
    needed = model.sizes["decoder_layers"]
    ahead = range(needed, needed + model.sizes.get("ahead", 0))
    decoder = [index for index in found if index not in ahead]
    if len(decoder) != needed or max(decoder) != needed - 1:
        raise CheckpointError(
            f"{config_path(model.checkpoint)}: needed {needed} decoder layers as the config says,"
            f" found {len(found)} in the tensors (highest index {max(found, default=None)})."
            " Config and weights are of different models, or a shard is missing."
        )


def find_layer(
    model: Promised,
    path: str,
    shape: tuple[int, int],
    *,
    module: str,
    shares_scale: str,
    decoder_layer: int | None = None,
    transposed: bool = False,
    tensor: str | None = None,
) -> LinearLayer:
    """The layer at ``path`` below the body, [out, in] = ``shape``, with a tensor of its own."""
    key = tensor or f"{model.body}{path}.weight"
    info = require_tensor(model, key, shape[::-1] if transposed else shape)
    if transposed and info.scaling is not None:
        raise CheckpointError(
            f"{info.file}: {key!r} is stored transposed and has FP8 scales, for which there is no"
            " convention. Give the checkpoint before it was quantized."
        )
    return LinearLayer(
        name=model.family.body + path,
        tensor=key,
        out_features=shape[0],
        in_features=shape[1],
        dtype=info.dtype,
        transposed=transposed,
        expert=None,
        row_start=0,
        decoder_layer=decoder_layer,
        module=module,
        shares_scale=shares_scale,
        scale_bytes=scale_bytes(info, shape),
    )


def scale_bytes(info: TensorInfo, shape: tuple[int, int]) -> int:
    """A layer's share of the scales of the tensor that it lies in."""
    return info.scale_bytes * shape[0] * shape[1] // max(1, math.prod(info.shape))


def require_tensor(model: Promised, key: str, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor, once it is there as the config promises."""
    info = model.checkpoint.tensors.get(key)
    needed = f"needed tensor {key!r} of shape {list(shape)} by {CONFIG_FILE}"
    if info is None:
        raise CheckpointError(
            f"{model.checkpoint.folder}: {needed}, found none. Config and weights are of different"
            " models, or a shard is missing."
        )
    if info.shape != shape:
        raise CheckpointError(
            f"{info.file}: {needed}, found {list(info.shape)}. Config and weights are of different"
            " models."
        )
    if info.dtype not in _SOURCE_DTYPES and not info.decoded:
        raise CheckpointError(
            f"{info.file}: tensor {key!r} needs dtype {', '.join(_SOURCE_DTYPES)}, found"
            f" {info.dtype}. Give the original checkpoint, or convert it."
        )
    return info


def few(names: Mapping[str, Any] | list[str]) -> str:
    """Some of many names, for messages."""
    first = [repr(name) for name in list(names)[:3]]
    return ", ".join(first or ["none"]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
