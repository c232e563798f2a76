"""Which layers share a pass over their blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from mofq.model.layers import FusionGroup, LinearLayer
from mofq.numbers.quantize.compiled import Kind, Tell, pass_maker
from mofq.numbers.quantize.rounding_errors import Pass, is_candidate
from mofq.numbers.schemes import Scheme, TensorScheme

#: Layer, what the pass gives, schemes that are all candidates -> the pass.
LayerPasses = Callable[[LinearLayer, Kind, Sequence[TensorScheme]], Pass]


def layer_passes(
    work: Sequence[tuple[FusionGroup, Sequence[Scheme]]],
    *,
    device: str,
    tell: Tell,
    elements: int = 0,
) -> LayerPasses:
    """What gives each layer its pass; layers with the same schemes share one.

    Args:
        work: Fusion groups and their schemes: how much there is to do for a pass.
        device: Where the arithmetic runs.
        tell: Gets a line about a compilation.
        elements: Of all weights, where the work is a part of more.

    Returns:
        The function. It compiles when it is first asked for a set of schemes.
    """
    counts: Counter[frozenset[TensorScheme]] = Counter()
    for group, schemes in work:
        counts[_candidates(schemes)] += sum(layer.weights for layer in group.layers)
    make = pass_maker(device=device, tell=tell)
    made: dict[tuple[Kind, tuple[TensorScheme, ...], torch.dtype], Pass] = {}

    def pass_of(layer: LinearLayer, kind: Kind, schemes: Sequence[TensorScheme]) -> Pass:
        dtype = torch.bfloat16 if layer.dtype == "BF16" else torch.float32
        key = (kind, tuple(schemes), dtype)
        if key not in made:
            made[key] = make(kind, schemes, dtype, max(elements, counts[frozenset(schemes)]))
        return made[key]

    return pass_of


def _candidates(schemes: Sequence[Scheme]) -> frozenset[TensorScheme]:
    return frozenset(s.weight for s in schemes if s.weight is not None and is_candidate(s.weight))
