"""The experts of a decoder layer as one decision, or as several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Literal

from mofq.model.layers.linear import FusionGroup, LinearLayer, ModelLayers

#: What gets a scheme of its own: all experts of a decoder layer; of them gate and up, and down;
#: each expert; each of these by itself.
ExpertsBy = Literal["layer", "projection", "expert", "matrix"]
#: From few decisions to many.
EXPERTS_BY: tuple[ExpertsBy, ...] = ("layer", "projection", "expert", "matrix")


def is_expert(layer: LinearLayer) -> bool:
    """Whether a layer is a part of one of a mixture's experts, and not of those that all share."""
    return layer.shares_scale.startswith("experts.")


def split_experts(
    layers: ModelLayers, by: ExpertsBy, *, unseen: Collection[str] = ()
) -> ModelLayers:
    """The layers with other fusion groups of experts.

    Gate and up of an expert stay together, which engines make one matrix of.

    Args:
        layers: From ``find_layers``.
        by: What gets a scheme of its own.
        unseen: Names of layers that no token of calibration reached: nothing is known of them, so
            they are decided with the next expert of which something is.

    Returns:
        With groups named ``GROUP.down``, ``GROUP.3`` or ``GROUP.3.down``, GROUP the whole group.
    """
    if by == "layer":
        return layers
    groups = [part for group in layers.groups for part in _split(group, by, unseen)]
    return replace(layers, groups=tuple(groups))


def _split(group: FusionGroup, by: ExpertsBy, unseen: Collection[str]) -> tuple[FusionGroup, ...]:
    if not all(map(is_expert, group.layers)):
        return (group,)
    parts: dict[str, list[LinearLayer]] = {}
    for layer in group.layers:
        parts.setdefault(_PART_OF[by](*_expert_and_half(layer)), []).append(layer)
    parts = _joined(parts, unseen)
    if len(parts) == 1:
        return (group,)
    return tuple(FusionGroup(f"{group.name}.{part}", tuple(of)) for part, of in parts.items())


def _expert_and_half(layer: LinearLayer) -> tuple[str, str]:
    """The number of its expert, and whether it reads what the expert reads."""
    _, expert, half = layer.shares_scale.split(".", 2)
    return expert, half.rpartition(".")[2]


_PART_OF: Mapping[ExpertsBy, Callable[[str, str], str]] = {
    "projection": lambda expert, half: half,
    "expert": lambda expert, half: expert,
    "matrix": lambda expert, half: f"{expert}.{half}",
}


def _joined(
    parts: dict[str, list[LinearLayer]], unseen: Collection[str]
) -> dict[str, list[LinearLayer]]:
    """The parts, those of which nothing is known in that of the next expert of the same kind."""
    missed = [name for name, of in parts.items() if all(layer.name in unseen for layer in of)]
    seen = [name for name in parts if name not in missed]
    for name in missed:
        alike = [one for one in seen if _kind(parts[one]) == _kind(parts[name])]
        if alike:
            parts[min(alike, key=lambda one: _distance(one, name))] += parts.pop(name)
    return parts


def _kind(layers: list[LinearLayer]) -> frozenset[str]:
    return frozenset(layer.module for layer in layers)


def _distance(one: str, other: str) -> int:
    return abs(int(one.partition(".")[0]) - int(other.partition(".")[0]))
