"""Finds the linear layers of a checkpoint and joins them into fusion groups.

Coverage is total: a matrix in a decoder layer that no rule knows is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mofq.exceptions import CheckpointError, option
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint, TensorInfo
from mofq.model.layers.families import FUSION_RULES, Experts, Family, Rules, family_of, read_sizes
from mofq.model.layers.infer_layers import infer_layers
from mofq.model.layers.left_out import explain_outside, kept_reason, no_linear_reason
from mofq.model.layers.linear import FusionGroup, LinearLayer, ModelLayers, Role, layers_of
from mofq.model.layers.make_layers import (
    cache_layer,
    check_source_dtype,
    check_tied,
    config_path,
    few,
    linear_layer,
    read_architecture,
    refuse_quantized,
    short_names,
    text_config,
    vocabulary_layer,
)
from mofq.model.layers.model_class import check_class, computes_hidden_states
from mofq.model.layers.stated_layers import StatedLayers, layers_of_config
from mofq.model.layers.vocabulary import EMBEDDINGS, LM_HEAD, vocabulary_groups

#: Of what may be linear layers: a matrix, or one for each expert.
_MOST_DIMENSIONS = 3


@dataclass(frozen=True, slots=True)
class _Declared:
    """A checkpoint, and what its config says that it holds."""

    checkpoint: Checkpoint
    architecture: str
    family: Family
    config: Mapping[str, Any]  #: of the language model
    sizes: Mapping[str, int]
    body: str  #: prefix on disk


def find_layers(
    checkpoint: Checkpoint,
    *,
    include_lm_head: bool = False,
    include_embeddings: bool = False,
    stated: StatedLayers | None = None,
) -> ModelLayers:
    """Find every linear layer of the language model in a checkpoint.

    Args:
        checkpoint: From ``open_checkpoint``.
        include_lm_head: Make the lm_head a fusion group, or the embedding that it is tied to.
        include_embeddings: Make the embedding one; both come last.
        stated: What the user says of the layers; what is inferred otherwise, and what rules say,
            gives way to it. By default what an exported folder says of itself.

    Returns:
        Fusion groups in order of decoder layers, and what stays unquantized. The
        other towers of a multimodal model, and layers after the last that predict further
        tokens, count as ``other_bytes`` only.

    Raises:
        CheckpointError: The family is unknown, the checkpoint is quantized already (and is
            no FP8 source), its class predicts no tokens, config and tensors disagree, a matrix
            is covered by no rule, the embedding is tied to an lm_head that is stored and differs,
            or the lm_head is asked for and there is none.
    """
    stated = stated or layers_of_config(checkpoint.config, config_path(checkpoint))
    if stated is not None or read_architecture(checkpoint) not in FUSION_RULES:
        return infer_layers(
            checkpoint,
            include_lm_head=include_lm_head,
            include_embeddings=include_embeddings,
            stated=stated,
        )
    model = _read_model(checkpoint)
    _check_decoder_layers(model)
    groups: list[FusionGroup] = []
    unquantized: list[LinearLayer] = []
    for index in range(model.sizes["decoder_layers"]):
        family, experts = model.family, model.family.experts
        if experts is not None and _expects_experts(model, index):
            attention = {k: rule for k, rule in family.rules.items() if not k.startswith("mlp.")}
            groups += _join_rules(model, index, {**attention, **family.shared})
            groups.append(_join_experts(model, experts, index))
            unquantized.append(_find_router(model, experts, index))
            unquantized += _find_gates(model, index)
        else:
            groups += _join_rules(model, index, family.rules)
    unquantized += _find_outside(model)
    is_tied = _is_tied(model)
    head = None if is_tied else _find_lm_head(model)
    groups += vocabulary_groups(
        head,
        partial(_embedding_layer, model),
        is_tied=is_tied,
        include_lm_head=include_lm_head,
        include_embeddings=include_embeddings,
        where=str(checkpoint.folder),
    )
    if head is not None and not include_lm_head:
        unquantized.append(head)
    grouped = {layer.tensor for layer in layers_of(groups)}
    _refuse_uncovered(model, grouped | {layer.tensor for layer in unquantized})
    return ModelLayers(
        architecture=model.architecture,
        groups=tuple(groups),
        unquantized=tuple(unquantized),
        tied_lm_head=is_tied,
        other_bytes=sum(
            info.kept_bytes for name, info in checkpoint.tensors.items() if name not in grouped
        ),
        caches=tuple(
            cache_layer(
                group,
                kv_heads=model.sizes["kv"] // model.sizes["head"],
                head_size=model.sizes["head"],
            )
            for group in groups
            if group.name.endswith(".attn.qkv")
        ),
        body=model.body,
        left_out={
            name: why for name, why in _left_out(model, unquantized).items() if name not in grouped
        },
    )


def _left_out(model: _Declared, unquantized: Iterable[LinearLayer]) -> dict[str, str]:
    """Why each tensor of two or more dimensions that may be in no fusion group is in none."""
    stack, count = f"{model.body}{model.family.decoder}", model.sizes["decoder_layers"]
    reasons = explain_outside(model.checkpoint, stack, count)
    for layer in unquantized:
        path = layer.name.partition(f".{layer.decoder_layer}.")[2]
        if (why := kept_reason(f"{path}.weight")) is not None:
            reasons[layer.tensor] = why
    for index, info in _decoder_tensors(model):
        if index < count and len(info.shape) > _MOST_DIMENSIONS:
            path = info.name.removeprefix(f"{stack}.{index}.")
            reasons[info.name] = no_linear_reason(path) or "no matrix"
    return reasons


def _join_rules(model: _Declared, index: int, rules: Rules) -> list[FusionGroup]:
    """The fusion groups that have one tensor per layer, of one decoder layer."""
    family = model.family
    short = short_names(path for rule in (*family.rules.values(), *rules.values()) for path in rule)
    groups = []
    for rule_name, rule in rules.items():
        layers = []
        for path, (out_size, in_size) in rule.items():
            layer = _find_layer(
                model,
                f"{family.decoder}.{index}.{path}",
                (model.sizes[out_size], model.sizes[in_size]),
                decoder_layer=index,
                module=short[path],
                shares_scale=rule_name.rpartition(".")[2],
                transposed=family.transposed,
            )
            layers.append(layer)
        groups.append(FusionGroup(f"layers.{index}.{rule_name}", tuple(layers)))
    return groups


def _expects_experts(model: _Declared, index: int) -> bool:
    """Whether this decoder layer of a mixture is one, by the config, as transformers decides."""
    if index < model.sizes.get("dense_first", 0):
        return False
    dense, step = model.config.get("mlp_only_layers"), model.config.get("decoder_sparse_step")
    if not isinstance(dense, list | None) or type(step) not in (int, type(None)) or step == 0:
        raise CheckpointError(
            f"{config_path(model.checkpoint)}: needed 'mlp_only_layers' as a list and"
            f" 'decoder_sparse_step' as a positive integer, found {dense!r} and {step!r}."
        )
    return index not in (dense or []) and (index + 1) % (step or 1) == 0


def _join_experts(model: _Declared, experts: Experts, index: int) -> FusionGroup:
    """All experts of one decoder layer, stored one by one or fused."""
    at = f"{model.family.decoder}.{index}"
    fused = f"{model.body}{at}.{experts.fused_module}.experts"
    is_fused = f"{fused}.gate_up_proj" in model.checkpoint.tensors
    count, out, hidden = (model.sizes[size] for size in ("experts", experts.out, "hidden"))
    shapes = {
        experts.gate: ("gate_up", (out, hidden)),
        experts.up: ("gate_up", (out, hidden)),
        experts.down: ("down", (hidden, out)),
    }
    stored = {"gate_up": (count, 2 * out, hidden), "down": (count, hidden, out)}
    layers = []
    for expert in range(count):
        for word, (half, shape) in shapes.items():
            path = f"{at}.{experts.module}.experts.{expert}.{word}"
            key = f"{fused}.{half}_proj" if is_fused else f"{model.body}{path}.weight"
            info = _require_tensor(model, key, stored[half] if is_fused else shape)
            layer = linear_layer(
                info,
                model.family.body + path,
                shape=shape,
                module=f"experts.{word}",
                shares_scale=f"experts.{expert}.{half}",
                decoder_layer=index,
                expert=expert if is_fused else None,
                row_start=out if is_fused and word == experts.up else 0,
            )
            layers.append(layer)
    return FusionGroup(f"layers.{index}.moe.experts", tuple(layers))


def _find_router(model: _Declared, experts: Experts, index: int) -> LinearLayer:
    at = f"{model.family.decoder}.{index}"
    other = f"{model.body}{at}.{experts.fused_module}.gate.weight"
    return _find_layer(
        model,
        f"{at}.{experts.module}.gate",
        (model.sizes["experts"], model.sizes["hidden"]),
        decoder_layer=index,
        module="gate",
        shares_scale="router",
        tensor=other if other in model.checkpoint.tensors else None,
    )


def _find_gates(model: _Declared, index: int) -> list[LinearLayer]:
    """What a decoder layer with experts has besides the router, and stays unquantized."""
    return [
        _find_layer(
            model,
            f"{model.family.decoder}.{index}.{path}",
            (model.sizes[out_size], model.sizes[in_size]),
            decoder_layer=index,
            module=path.rpartition(".")[2],
            shares_scale="router",
        )
        for path, (out_size, in_size) in model.family.gates.items()
    ]


def _find_outside(model: _Declared) -> list[LinearLayer]:
    """Projections between embedding and decoder, which only some sizes of a family have."""
    return [
        _find_layer(
            model,
            path,
            (model.sizes[out_size], model.sizes[in_size]),
            module=path,
            shares_scale=path,
        )
        for path, (out_size, in_size) in model.family.outside.items()
        if f"{model.body}{path}.weight" in model.checkpoint.tensors
    ]


def _is_tied(model: _Declared) -> bool:
    """Whether the embedding is the lm_head, as the config or else transformers says.

    Raises:
        CheckpointError: It is, and an lm_head is stored that differs: engines tie it all the
            same, and transformers takes the stored one, so that something else than what was
            measured would be served.
    """
    stated = [
        config.get("tie_word_embeddings") for config in (model.checkpoint.config, model.config)
    ]
    if not next((bool(value) for value in stated if value is not None), model.family.tied):
        return False
    check_tied(model.checkpoint, _stored_lm_heads(model), _find_embedding(model))
    return True


def _find_lm_head(model: _Declared) -> LinearLayer | None:
    """The lm_head of its own, or None where the model is stored without a head."""
    embedding, stored = _find_embedding(model), _stored_lm_heads(model)
    stored_as_base = model.body == model.family.headless_body
    if not stored and (stored_as_base or computes_hidden_states(model.checkpoint.config)):
        return None
    name = stored[0].name if stored else f"{model.family.lm_heads[0]}.weight"
    info = _require_tensor(model, name, embedding.shape)
    return vocabulary_layer(info, model.family.lm_heads[0], LM_HEAD)


def _stored_lm_heads(model: _Declared) -> list[TensorInfo]:
    names = (f"{name}.weight" for name in model.family.lm_heads)
    return [model.checkpoint.tensors[name] for name in names if name in model.checkpoint.tensors]


def _find_embedding(model: _Declared) -> TensorInfo:
    tensors = model.checkpoint.tensors
    name = f"{model.body}{model.family.embedding}.weight"
    # Composite configs may leave the size of the vocabulary to transformers' defaults.
    rows = tensors[name].shape[0] if name in tensors and tensors[name].shape else 0
    shape = (model.sizes.get("vocabulary", rows), model.sizes["embedding"])
    return _require_tensor(model, name, shape)


def _embedding_layer(model: _Declared, role: Role) -> LinearLayer:
    """The embedding, as one whose rows get a scheme."""
    name = model.family.body + model.family.embedding
    return vocabulary_layer(_find_embedding(model), name, EMBEDDINGS, role=role)


def _find_layer(
    model: _Declared,
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
    info = _require_tensor(model, key, shape[::-1] if transposed else shape)
    if transposed and info.scaling is not None:
        raise CheckpointError(
            f"{info.file}: {key!r} is stored transposed and has FP8 scales, for which there is no"
            " convention. Give the checkpoint before it was quantized."
        )
    return linear_layer(
        info,
        model.family.body + path,
        shape=shape,
        module=module,
        shares_scale=shares_scale,
        decoder_layer=decoder_layer,
        transposed=transposed,
    )


def _read_model(checkpoint: Checkpoint) -> _Declared:
    """Read what the config declares, and find where the decoder's tensors are.

    Raises:
        CheckpointError: The checkpoint is quantized already.
    """
    where = config_path(checkpoint)
    architecture = read_architecture(checkpoint)
    check_class(checkpoint.config, where=where)
    refuse_quantized(checkpoint)
    config = text_config(checkpoint)
    family = family_of(architecture, config)
    sizes = read_sizes(config, family, where=where)
    for body in family.bodies:
        if any(name.startswith(f"{body}{family.decoder}.") for name in checkpoint.tensors):
            return _Declared(checkpoint, architecture, family, config, sizes, body)
    raise CheckpointError(
        f"{checkpoint.folder}: model_type {architecture!r} needs tensors named"
        f" {' or '.join(f'{body}{family.decoder}.0.…' for body in family.bodies)}, found"
        f" {few(checkpoint.tensors)}. Config and weights are of different models."
    )


def _check_decoder_layers(model: _Declared) -> None:
    """See that the tensors have as many decoder layers as the config.

    Layers that predict further tokens may follow them; transformers leaves those out.

    Raises:
        CheckpointError: There are others.
    """
    found = {index for index, _ in _decoder_tensors(model)}
    needed = model.sizes["decoder_layers"]
    ahead = range(needed, needed + model.sizes.get("ahead", 0))
    decoder = [index for index in found if index not in ahead]
    if len(decoder) != needed or max(decoder) != needed - 1:
        raise CheckpointError(
            f"{config_path(model.checkpoint)}: needed {needed} decoder layers as the config says,"
            f" found {len(found)} in the tensors (highest index {max(found, default=None)})."
            " Config and weights are of different models, or a shard is missing."
        )


def _decoder_tensors(model: _Declared) -> Iterator[tuple[int, TensorInfo]]:
    """Every tensor of a decoder layer, with the layer's index."""
    prefix = f"{model.body}{model.family.decoder}."
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,9})\..+", re.DOTALL)
    for name, info in model.checkpoint.tensors.items():
        if match := pattern.fullmatch(name):
            yield int(match[1]), info


def _require_tensor(model: _Declared, key: str, shape: tuple[int, ...]) -> TensorInfo:
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
            " models. If layers were pruned to sizes of their own, a file of `version: 1` alone for"
            f" {option('layers')} has them found by names and shapes."
        )
    check_source_dtype(info)
    return info


def _refuse_uncovered(model: _Declared, covered: set[str]) -> None:
    uncovered = [
        info.name
        for index, info in _decoder_tensors(model)
        if index < model.sizes["decoder_layers"]
        and 2 <= len(info.shape) <= _MOST_DIMENSIONS
        and info.name not in covered
    ]
    if uncovered:
        raise CheckpointError(
            f"{model.checkpoint.folder}: {few(uncovered)}: no rule of family"
            f" {model.architecture!r} covers it, so it would be left out silently. Its config is"
            f" of another model; or say in a file for {option('layers')} what it is."
        )
