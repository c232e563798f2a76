"""What a recipe uses of each budget."""

from __future__ import annotations

from dataclasses import dataclass

from mofq.decision.solvers.problem import IntArray, Problem


@dataclass(frozen=True, slots=True)
class Usage:
    """Sizes and shares of a recipe."""

    bytes: int  #: of all groups
    checkpoint_bytes: int  #: with the tensors that are in no group
    bits_per_weight: float  #: over all groups
    finer_layers: tuple[str, ...]  #: whose scheme is not a base scheme, of those that have an offer
    finer_fraction: float  #: of the layers that have an offer
    finer_weight_fraction: float  #: of their weights


def usage(problem: Problem, choice_F: IntArray) -> Usage:
    """Sizes and shares of one option in each fusion group.

    Without base schemes no layer counts as finer.
    """
    size = int(problem.layer_bytes_P[choice_F].sum())
    pairs = list(zip(problem.groups, choice_F, strict=True))
    counted = [group for group, _ in pairs if group.counted]
    has_base = bool(problem.is_base_P.any())
    finer = [g for g, p in pairs if has_base and g.counted and not problem.is_base_P[p]]
    layers = tuple(name for group in finer for name in group.layers)
    all_layers = sum(len(group.layers) for group in counted)
    all_weights = sum(group.weights for group in counted)
    return Usage(
        bytes=size,
        checkpoint_bytes=problem.bytes_of(choice_F) + problem.other_bytes,
        bits_per_weight=8 * size / problem.weights,
        finer_layers=layers,
        finer_fraction=len(layers) / all_layers if all_layers else 0.0,
        finer_weight_fraction=sum(g.weights for g in finer) / all_weights if all_weights else 0.0,
    )
