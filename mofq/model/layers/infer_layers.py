"""The linear layers of a checkpoint whose type has no rules, from its inferred structure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from mofq.exceptions import CheckpointError, option
from mofq.model.checkpoint.headers import Checkpoint, TensorInfo
from mofq.model.layers.families import ANY_HEADS
from mofq.model.layers.infer_structure import Structure, infer_structure
from mofq.model.layers.joining import Matrix
from mofq.model.layers.kv_cache import CacheLayer, attention_of, find_loaded_module
from mofq.model.layers.linear import (
    FusionGroup,
    LinearLayer,
    LoadedWeight,
    ModelLayers,
    Role,
    layers_of,
)
from mofq.model.layers.make_layers import (
    cache_layer,
    check_source_dtype,
    check_tied,
    config_path,
    linear_layer,
    read_architecture,
    refuse_quantized,
    short_names,
    text_config,
    vocabulary_layer,
)
from mofq.model.layers.model_class import check_class
from mofq.model.layers.names_in_memory import (
    as_pattern,
    find_in_memory,
    find_stored,
    find_stored_name,
    known_type,
)
from mofq.model.layers.stated_layers import StatedLayers
from mofq.model.layers.vocabulary import EMBEDDINGS, LM_HEAD, vocabulary_groups


def infer_layers(
    checkpoint: Checkpoint,
    *,
    include_lm_head: bool = False,
    include_embeddings: bool = False,
    stated: StatedLayers | None = None,
) -> ModelLayers:
    """As `find_layers`, whether or not the type has a row in ``FUSION_RULES``.

    Args:
        checkpoint: From ``open_checkpoint``.
        include_lm_head: Make the lm_head a fusion group, or the embedding that it is tied to.
        include_embeddings: Make the embedding one; both come last.
        stated: What the user says of it.

    Returns:
        As `find_layers`; KV caches of plain attention alone.

    Raises:
        CheckpointError: As `find_layers`, or something is not certain.
    """
    architecture, config = read_architecture(checkpoint), text_config(checkpoint)
    check_class(checkpoint.config, where=config_path(checkpoint))
    refuse_quantized(checkpoint)
    structure = infer_structure(checkpoint, architecture, config, stated)
    short = short_names(m.path for m in structure.matrices if m.of_expert is None)
    groups = [
        FusionGroup(name, tuple(_inferred_layer(m, short, name) for m in members))
        for of_layer in structure.groups
        for name, members in of_layer
    ]
    _check_names(groups)
    unquantized = [_inferred_layer(m, short, "router") for m in structure.unquantized]
    head, is_tied = _find_head(checkpoint, config, structure)
    groups += vocabulary_groups(
        head,
        partial(_embedding_layer, checkpoint, structure.embedding),
        is_tied=is_tied,
        include_lm_head=include_lm_head,
        include_embeddings=include_embeddings,
        where=str(checkpoint.folder),
    )
    if head is not None and not include_lm_head:
        unquantized.append(head)
    grouped = {layer.tensor for layer in layers_of(groups)}
    return ModelLayers(
        architecture=architecture,
        groups=tuple(groups),
        unquantized=tuple(unquantized),
        tied_lm_head=is_tied,
        other_bytes=sum(
            info.kept_bytes for name, info in checkpoint.tensors.items() if name not in grouped
        ),
        caches=tuple(_find_caches(groups, config, architecture)),
        body=structure.body,
        left_out={name: why for name, why in structure.reasons.items() if name not in grouped},
        stated=stated,
        has_stored_names=structure.has_stored_names,
    )


#: In a config: heads of the decoder's attention, and its hidden size.
_SIZES = (
    ("num_attention_heads", "decoder_attention_heads", "attention_heads"),
    ("hidden_size", "d_model", "embed_dim"),
)


def _find_caches(
    groups: Iterable[FusionGroup], config: Mapping[str, Any], architecture: str
) -> Iterator[CacheLayer]:
    """What attention of the plain kind caches, by the sizes that the config states."""
    known = known_type(architecture)
    heads, hidden = (next((config[k] for k in keys if k in config), None) for keys in _SIZES)
    size = config.get("head_dim")
    if size is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        size = hidden // heads
    if known is None or not isinstance(size, int) or not isinstance(heads, int) or size < 1:
        return
    for group in groups:
        if attention_of(group.name) is None:
            continue
        first, *others = group.layers[:3]
        rows = others[0].out_features if len(others) == 2 else first.out_features - heads * size
        kv_heads, left = divmod(rows, size if others else 2 * size)
        if len(others) in (0, 2) and kv_heads > 0 and not left:
            cache = cache_layer(group, kv_heads=kv_heads, head_size=size)
            if as_pattern(find_loaded_module(cache, architecture)) in known.caches:
                yield cache


def _check_names(groups: Sequence[FusionGroup]) -> None:
    """Refuse two groups of one name: of one of them it is not known what it is."""
    seen: dict[str, FusionGroup] = {}
    for group in groups:
        if group.name in seen:
            names = ", ".join(la.name for one in (seen[group.name], group) for la in one.layers)
            raise CheckpointError(
                f"{names}: names do not say which of them is {group.name}. Say it in a file for"
                f" {option('layers')}: `joined: {{{group.name.partition('.')[2].partition('.')[2]}:"
                " [paths in a decoder layer]}`."
            )
        seen[group.name] = group


#: Of an expert: what reads its input, and what makes its output.
_HALVES = {
    "gate_up": ("gate_proj", "up_proj", "w1", "w3", "gate_up_proj"),
    "down": ("down_proj", "w2"),
}
_IN_EXPERT = re.compile(r"\bexperts\.[0-9]+\.")


def _uncertain(info: TensorInfo, question: str) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: {info.name!r}: names do not say {question}. Leave it as it is, by"
        f" `left:` in a file for {option('layers')}."
    )


def _inferred_layer(matrix: Matrix, short: Mapping[str, str], group: str) -> LinearLayer:
    info, word = matrix.info, matrix.name.rpartition(".")[2]
    check_source_dtype(info)
    if matrix.of_expert is None:
        if _IN_EXPERT.search(matrix.name):
            raise _uncertain(info, "which expert's matrix it is")
        module, shares_scale = short[matrix.path], group.rpartition(".")[2]
    else:
        half = next((half for half, words in _HALVES.items() if word in words), None)
        if half is None:
            raise _uncertain(info, "whether it reads an expert's input or makes its output")
        module, shares_scale = f"experts.{word}", f"experts.{matrix.of_expert[1]}.{half}"
    return linear_layer(
        info,
        matrix.name,
        shape=(matrix.out_features, matrix.in_features),
        module=module,
        shares_scale=shares_scale,
        decoder_layer=matrix.layer,
        transposed=matrix.transposed,
        expert=matrix.expert,
        row_start=matrix.row_start,
        loaded=matrix.loaded,
    )


def _embedding_layer(checkpoint: Checkpoint, info: TensorInfo | None, role: Role) -> LinearLayer:
    """The embedding, as one whose rows get a scheme."""
    if info is None or len(info.shape) != 2:
        raise CheckpointError(
            f"{checkpoint.folder}: which tensor is the embedding is not known. Leave it as it is."
        )
    return _of_vocabulary(checkpoint, info, EMBEDDINGS, role)


def _of_vocabulary(
    checkpoint: Checkpoint, info: TensorInfo, module: str, role: Role = "linear"
) -> LinearLayer:
    """An lm_head or an embedding, under the names of engines and of the loaded model."""
    architecture = read_architecture(checkpoint)
    name = find_stored_name(info.name, architecture).removesuffix(".weight")
    loaded = LoadedWeight(find_in_memory(info.name, architecture).name)
    return vocabulary_layer(info, name, module, role=role, loaded=loaded)


def _find_head(
    checkpoint: Checkpoint, config: Mapping[str, Any], structure: Structure
) -> tuple[LinearLayer | None, bool]:
    """The lm_head of its own, or None; and whether it is tied to the embedding."""
    architecture = read_architecture(checkpoint)
    known = known_type(architecture)
    usual = [f"{name}.weight" for name in ANY_HEADS]
    names = [*usual, *(one.name for name in usual for one in find_stored(name, architecture))]
    stored = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
    stated = [one.get("tie_word_embeddings") for one in (checkpoint.config, config)]
    default = known.tied if known is not None else not stored
    is_tied = next((bool(value) for value in stated if value is not None), default)
    if is_tied and stored and structure.embedding is not None:
        check_tied(checkpoint, stored, structure.embedding)
    if is_tied or not stored:
        return None, is_tied
    info = stored[0]
    if len(info.shape) != 2:
        raise CheckpointError(f"{info.file}: tensor {info.name!r} needs two dimensions.")
    return _of_vocabulary(checkpoint, info, LM_HEAD), False
