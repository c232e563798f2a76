"""Finds the linear layers of a checkpoint and joins them into fusion groups.

Coverage is total: a matrix in a decoder layer that no rule knows is an error.
"""

from __future__ import annotations

from collections.abc import Iterable

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers.declared import (
    Promised,
    check_decoder_layers,
    config_path,
    decoder_tensors,
    few,
    find_layer,
    read_model,
    require_tensor,
    scale_bytes,
)
from mofq.model.layers.families import Experts, Rules
from mofq.model.layers.kv_cache import CacheLayer
from mofq.model.layers.linear import FusionGroup, LinearLayer, ModelLayers, layers_of


def find_layers(checkpoint: Checkpoint, *, include_lm_head: bool = False) -> ModelLayers:
    """Find every linear layer of the language model in a checkpoint.

    Args:
        checkpoint: From ``open_checkpoint``.
        include_lm_head: Make the lm_head a fusion group, the last one.

    Returns:
        Fusion groups in order of decoder layers, and what stays unquantized. The
        other towers of a multimodal model, and layers after the last that predict further
        tokens, count as ``other_bytes`` only.

    Raises:
        CheckpointError: The family is unknown, the checkpoint is quantized already (and is
            no FP8 source), config and tensors disagree, a matrix is covered by no rule, or
            the lm_head is asked for and is tied.
    """
    model = read_model(checkpoint)
    check_decoder_layers(model)
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
    head = _find_lm_head(model)
    if head is not None and include_lm_head:
        groups.append(FusionGroup("lm_head", (head,)))
    elif head is not None:
        unquantized.append(head)
    elif include_lm_head:
        raise CheckpointError(
            f"{checkpoint.folder}: the lm_head is tied to the embedding"
            f" {model.body + model.family.embedding!r} and has no weight of its own to quantize."
            " Leave it out."
        )
    grouped = {layer.tensor for layer in layers_of(groups)}
    _refuse_uncovered(model, grouped | {layer.tensor for layer in unquantized})
    return ModelLayers(
        architecture=model.architecture,
        groups=tuple(groups),
        unquantized=tuple(unquantized),
        tied_lm_head=head is None,
        other_bytes=sum(
            info.kept_bytes for name, info in checkpoint.tensors.items() if name not in grouped
        ),
        caches=_find_caches(model, groups),
    )


def _find_caches(model: Promised, groups: Iterable[FusionGroup]) -> tuple[CacheLayer, ...]:
    """What the attention of every decoder layer caches."""
    found = []
    for group in groups:
        decoder, is_attention, rest = group.name.partition(".attn.qkv")
        if is_attention and not rest:
            first = group.layers[0]
            assert first.decoder_layer is not None
            cache = CacheLayer(
                name=f"{decoder}.attn.kv_cache",
                module=first.name.rpartition(".")[0],
                kv_heads=model.sizes["kv"] // model.sizes["head"],
                head_size=model.sizes["head"],
                decoder_layer=first.decoder_layer,
            )
            found.append(cache)
    return tuple(found)


def _join_rules(model: Promised, index: int, rules: Rules) -> list[FusionGroup]:
    """The fusion groups that have one tensor per layer, of one decoder layer."""
    family = model.family
    words = [path.rpartition(".")[2] for rule in family.rules.values() for path in rule]
    groups = []
    for rule_name, rule in rules.items():
        layers = []
        for path, (out_size, in_size) in rule.items():
            layer = find_layer(
                model,
                f"{family.decoder}.{index}.{path}",
                (model.sizes[out_size], model.sizes[in_size]),
                decoder_layer=index,
                module=_short_name(path, words),
                shares_scale=rule_name.rpartition(".")[2],
                transposed=family.transposed,
            )
            layers.append(layer)
        groups.append(FusionGroup(f"layers.{index}.{rule_name}", tuple(layers)))
    return groups


def _short_name(path: str, words: list[str]) -> str:
    """``q_proj``; ``attn.c_proj`` where a decoder layer has two; ``shared_expert.up_proj``."""
    above, _, word = path.rpartition(".")
    if "." in above:
        return path.partition(".")[2]
    return path if words.count(word) > 1 else word


def _expects_experts(model: Promised, index: int) -> bool:
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


def _join_experts(model: Promised, experts: Experts, index: int) -> FusionGroup:
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
            info = require_tensor(model, key, stored[half] if is_fused else shape)
            layer = LinearLayer(
                name=model.family.body + path,
                tensor=key,
                out_features=shape[0],
                in_features=shape[1],
                dtype=info.dtype,
                transposed=False,
                expert=expert if is_fused else None,
                row_start=out if is_fused and word == experts.up else 0,
                decoder_layer=index,
                module=f"experts.{word}",
                shares_scale=f"experts.{expert}.{half}",
                scale_bytes=scale_bytes(info, shape),
            )
            layers.append(layer)
    return FusionGroup(f"layers.{index}.moe.experts", tuple(layers))


def _find_router(model: Promised, experts: Experts, index: int) -> LinearLayer:
    at = f"{model.family.decoder}.{index}"
    other = f"{model.body}{at}.{experts.fused_module}.gate.weight"
    return find_layer(
        model,
        f"{at}.{experts.module}.gate",
        (model.sizes["experts"], model.sizes["hidden"]),
        decoder_layer=index,
        module="gate",
        shares_scale="router",
        tensor=other if other in model.checkpoint.tensors else None,
    )


def _find_gates(model: Promised, index: int) -> list[LinearLayer]:
    """What a decoder layer with experts has besides the router, and stays unquantized."""
    return [
        find_layer(
            model,
            f"{model.family.decoder}.{index}.{path}",
            (model.sizes[out_size], model.sizes[in_size]),
            decoder_layer=index,
            module=path.rpartition(".")[2],
            shares_scale="router",
        )
        for path, (out_size, in_size) in model.family.gates.items()
    ]


def _find_outside(model: Promised) -> list[LinearLayer]:
    """Projections between embedding and decoder, which only some sizes of a family have."""
    return [
        find_layer(
            model,
            path,
            (model.sizes[out_size], model.sizes[in_size]),
            module=path,
            shares_scale=path,
        )
        for path, (out_size, in_size) in model.family.outside.items()
        if f"{model.body}{path}.weight" in model.checkpoint.tensors
    ]


def _find_lm_head(model: Promised) -> LinearLayer | None:
    """The lm_head, or None where it is tied to the embedding."""
    tensors, family = model.checkpoint.tensors, model.family
    embedding = f"{model.body}{family.embedding}.weight"
    # Composite configs may leave the size of the vocabulary to transformers' defaults.
    rows = tensors[embedding].shape[0] if embedding in tensors and tensors[embedding].shape else 0
    shape = (model.sizes.get("vocabulary", rows), model.sizes["embedding"])
    require_tensor(model, embedding, shape)
    stated = [
        config.get("tie_word_embeddings") for config in (model.checkpoint.config, model.config)
    ]
    if next((bool(value) for value in stated if value is not None), family.tied):
        return None
    names = [name for name in family.lm_heads if f"{name}.weight" in tensors]
    info = require_tensor(model, f"{(names or family.lm_heads)[0]}.weight", shape)
    return LinearLayer(
        name=family.lm_heads[0],
        tensor=info.name,
        out_features=shape[0],
        in_features=shape[1],
        dtype=info.dtype,
        transposed=False,
        expert=None,
        row_start=0,
        decoder_layer=None,
        module="lm_head",
        shares_scale="lm_head",
        scale_bytes=scale_bytes(info, shape),
    )


def _refuse_uncovered(model: Promised, covered: set[str]) -> None:
    uncovered = [
        info.name
        for index, info in decoder_tensors(model)
        if index < model.sizes["decoder_layers"]
        and len(info.shape) in (2, 3)
        and info.name not in covered
    ]
    if uncovered:
        raise CheckpointError(
            f"{model.checkpoint.folder}: {few(uncovered)}: no rule of family"
            f" {model.architecture!r} covers it, so it would be left out silently. Its config is"
            " of another model, or the family needs another row in FUSION_RULES."
        )
