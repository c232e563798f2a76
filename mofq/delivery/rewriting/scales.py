"""How much could move: the scales that each method proposes for a site.

With, over all tokens and all rows of the layers that read the input,

    a_i  the largest |x_i|        m_i  the mean |x_i|        w_i  the largest |W_:i|

a method proposes ``s`` for each of its strengths, and to leave the site as it is:

===============  ===========================================================================
``smoothquant``  ``s_i = a_i^alpha / w_i^(1 - alpha)``, alpha = 0.1, 0.2 … 0.9. The source has
                 one alpha for a model, 0.5; here each site has its own
``awq``          ``s_i = m_i^alpha``, alpha = 0.1, 0.2 … 0.9
``bismooth``     ``s_i = a_i^alpha / w_i^beta`` with alpha and beta chosen apart, each from
                 0, 0.25 … 1: what of the range is moved out of the inputs, and what out of the
                 weights. That weight and activation errors are balanced per input channel
                 while everything stays per channel is what the abstract of its source says;
                 its formula was not read, and this is ours
===============  ===========================================================================

All are divided by ``sqrt(max s * min s)``, as AWQ does: only ratios matter. A channel that is
always 0 keeps its scale. Channels that must share a scale share the largest of their statistics.

Source: SmoothQuant, arXiv:2211.10438, and its ``smooth.py``; AWQ, arXiv:2306.00978, and its
``auto_scale.py``; bi-smoothing: the abstract of arXiv:2408.15301 (version 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Scales are kept within this and its inverse, before they are centred.
_LARGEST = 2.0**16
_FINE = tuple(tenths / 10 for tenths in range(1, 10))
_COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)

METHODS = ("smoothquant", "awq", "bismooth")


@dataclass(frozen=True, slots=True)
class InputRanges:
    """What the proposals are made from, one number for each scale of a site, float64."""

    amax_P: Tensor  #: largest magnitude of the input
    mean_P: Tensor  #: its mean magnitude
    weight_P: Tensor  #: largest magnitude of the weights that read it


@dataclass(frozen=True, slots=True)
class Strength:
    """The exponents of a proposal."""

    alpha: float  #: of the input's range
    beta: float  #: of the weights' range


def propose_scales(
    method: str, ranges: InputRanges, *, powers_of_two: bool
) -> Iterator[tuple[Strength, Tensor]]:
    """What a method proposes for a site, the weakest first.

    Args:
        method: One of ``METHODS``.
        ranges: Of the site.
        powers_of_two: Round every scale to the nearest power of two.

    Yields:
        Strength and scales [P], float64, positive.
    """
    if method == "smoothquant":
        strengths = [Strength(alpha, 1 - alpha) for alpha in _FINE]
    elif method == "awq":
        strengths = [Strength(alpha, 0.0) for alpha in _FINE]
    else:
        strengths = [Strength(a, b) for a in _COARSE for b in _COARSE if a or b]
    inputs_P = ranges.mean_P if method == "awq" else ranges.amax_P
    is_dead_P = (inputs_P == 0) | (ranges.weight_P == 0)
    if bool(is_dead_P.all()):
        return
    for strength in strengths:
        scale_P = inputs_P**strength.alpha / ranges.weight_P**strength.beta
        alive_P = torch.clamp(scale_P[~is_dead_P], 1 / _LARGEST, _LARGEST)
        scale_P[~is_dead_P] = alive_P / (alive_P.max() * alive_P.min()).sqrt()
        scale_P[is_dead_P] = 1.0
        if powers_of_two:
            scale_P = torch.exp2(torch.round(torch.log2(scale_P)))
        yield strength, scale_P
