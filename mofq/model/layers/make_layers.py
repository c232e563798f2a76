"""What finding layers by rules and inferring them have in common: checks, and making a layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.fp8 import SUPPORTED as FP8_KINDS
from mofq.model.checkpoint.fp8 import find_scales
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint, TensorInfo, have_same_values
from mofq.model.checkpoint.packed import SUPPORTED as PACKED_KINDS
from mofq.model.layers.kv_cache import CacheLayer, attention_of
from mofq.model.layers.linear import FusionGroup, LinearLayer, LoadedWeight, Role
from mofq.model.layers.names_in_memory import known_type

#: That weights are quantized from.
SOURCE_DTYPES = ("BF16", "F16", "F32")


def linear_layer(
    info: TensorInfo,
    name: str,
    *,
    shape: tuple[int, int],
    module: str,
    shares_scale: str,
    decoder_layer: int | None = None,
    transposed: bool = False,
    expert: int | None = None,
    row_start: int = 0,
    loaded: LoadedWeight | None = None,
    role: Role = "linear",
) -> LinearLayer:
    """The layer [out, in] = ``shape`` that lies in a tensor."""
    return LinearLayer(
        name=name,
        tensor=info.name,
        out_features=shape[0],
        in_features=shape[1],
        dtype=info.dtype,
        module=module,
        shares_scale=shares_scale,
        decoder_layer=decoder_layer,
        transposed=transposed,
        expert=expert,
        row_start=row_start,
        # Its share of the scales of the tensor.
        scale_bytes=info.scale_bytes * shape[0] * shape[1] // max(1, math.prod(info.shape)),
        global_scale=None if info.packed is None else info.packed.global_value,
        loaded=loaded,
        role=role,
    )


def vocabulary_layer(
    info: TensorInfo,
    name: str,
    module: str,
    *,
    role: Role = "linear",
    loaded: LoadedWeight | None = None,
) -> LinearLayer:
    """A matrix [vocabulary, hidden] as a layer: ``module`` is ``lm_head`` or ``embeddings``."""
    rows, columns = info.shape
    return linear_layer(
        info,
        name,
        shape=(rows, columns),
        module=module,
        shares_scale=module,
        loaded=loaded,
        role=role,
    )


def cache_layer(qkv: FusionGroup, *, kv_heads: int, head_size: int) -> CacheLayer:
    """What attention caches, by its fusion group ``….attn.qkv`` or ``….attn.qkvg``."""
    first = qkv.layers[0]
    assert first.decoder_layer is not None
    return CacheLayer(
        name=f"{attention_of(qkv.name)}.kv_cache",
        module=first.name.rpartition(".")[0],
        kv_heads=kv_heads,
        head_size=head_size,
        decoder_layer=first.decoder_layer,
    )


def check_source_dtype(info: TensorInfo) -> None:
    """Refuse a tensor that weights are not quantized from.

    Raises:
        CheckpointError: As said.
    """
    if info.dtype not in SOURCE_DTYPES and not info.decoded:
        raise CheckpointError(
            f"{info.file}: tensor {info.name!r} needs dtype {', '.join(SOURCE_DTYPES)}, found"
            f" {info.dtype}. Give the original checkpoint, or convert it."
        )


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """``q_proj``; ``attn.c_proj`` where a decoder layer has two; ``shared_expert.up_proj``."""
    every = list(dict.fromkeys(paths))
    words = Counter(path.rpartition(".")[2] for path in every if path.count(".") < 2)
    short = {}
    for path in every:
        word = path.rpartition(".")[2]
        is_inner = path.count(".") > 1
        short[path] = path.partition(".")[2] if is_inner else path if words[word] > 1 else word
    times = Counter(short.values())
    return {path: name if times[name] == 1 else path for path, name in short.items()}


def check_tied(checkpoint: Checkpoint, heads: Iterable[TensorInfo], embedding: TensorInfo) -> None:
    """Refuse stored heads that differ from the embedding to which the config ties them."""
    for head in heads:
        if not have_same_values(head, embedding):
            raise CheckpointError(
                f"{config_path(checkpoint)}: 'tie_word_embeddings' is true (or not stated,"
                f" and true for the family), and {head.file.name} holds {head.name!r}, which"
                f" differs from the embedding {embedding.name!r}; engines differ in which they"
                " use. Set it to false, or remove that tensor."
            )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is quantized already, in a way that is not decoded.

    Raises:
        CheckpointError: As said.
    """
    config = checkpoint.config.get("quantization_config")
    scales = find_scales(checkpoint.tensors)
    if config is None and scales is None:
        return
    method = config.get("quant_method") if isinstance(config, dict) else config
    found = repr(scales) if config is None else f"quantization_config {method!r}"
    own = (
        " `mofq recipe from` reads what was chosen there." if method == "compressed-tensors" else ""
    )
    raise CheckpointError(
        f"{checkpoint.folder}: found {found}: the checkpoint is quantized already. mofq measures"
        f" against the model before that. Give the original, in {', '.join(SOURCE_DTYPES)}, or"
        f" {FP8_KINDS}; or {PACKED_KINDS}.{own}"
    )


def read_architecture(checkpoint: Checkpoint) -> str:
    """The config's ``model_type``.

    Raises:
        CheckpointError: There is none.
    """
    architecture = checkpoint.config.get("model_type")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(
            f"{config_path(checkpoint)}: needed a 'model_type', which says what the tensors are,"
            f" found {architecture!r}."
        )
    return architecture


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the config says of the language model."""
    known = known_type(read_architecture(checkpoint))
    config: Mapping[str, Any] = checkpoint.config
    for key in ("text_config" if known is None else known.text).split("."):
        part = config.get(key)
        part = config if part is None else part
        if not isinstance(part, dict):
            raise CheckpointError(
                f"{config_path(checkpoint)}: {key!r} needs an object, found {part!r}."
            )
        config = part
    return config


def config_path(checkpoint: Checkpoint) -> str:
    """For messages."""
    return str(checkpoint.folder / CONFIG_FILE)


def few(names: Mapping[str, Any] | list[str]) -> str:
    """Some of many names, for messages."""
    first = [repr(name) for name in list(names)[:3]]
    return ", ".join(first or ["none"]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
