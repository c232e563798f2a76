"""How large weights and inputs are along the input channels, as a page holds it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from mofq.evidence.table import Extent, Profile

#: Magnitudes are drawn on a logarithmic scale; less than this share of the largest is its foot.
_LEAST_SHARE = 1e-6
_STEPS = 255


def wall(extent: Extent) -> float:
    """How far the largest input channel stands above the typical one: 1 is none at all.

    The largest root mean square of a channel over the median one: a wall is a whole channel
    that is large, and not one large value in it.
    """
    typical = float(np.median(extent.rms))
    return max(extent.rms) / typical if typical > 0 else 1.0


def profile_data(profiles: list[Profile]) -> dict[str, Any]:
    """What a page holds of the profiles of one fusion group.

    Args:
        profiles: Of the group; may be empty.

    Returns:
        ``layers``: module, input channels, weights, and which of ``inputs`` it has; layers
        that an engine joins read the same inputs, which are kept once.
    """
    inputs: list[Mapping[str, Extent]] = []
    layers = []
    for one in profiles:
        if one.inputs not in inputs:
            inputs.append(one.inputs)
        layers.append([one.module, one.channels, _extent(one.weight), inputs.index(one.inputs)])
    return {
        "layers": layers,
        "inputs": [{name: _extent(one) for name, one in some.items()} for some in inputs],
    }


def _extent(extent: Extent) -> dict[str, Any]:
    """Largest and smallest magnitude, and every magnitude as one byte between them."""
    most = max(extent.amax)
    some = [value for value in (*extent.amax, *extent.rms) if value > most * _LEAST_SHARE]
    least = min(some, default=1.0)
    return {
        "most": _digits(most),
        "least": _digits(least),
        "amax": _steps(extent.amax, least, most),
        "rms": _steps(extent.rms, least, most),
        "wall": _digits(wall(extent)),
        "crest": {name: _digits(value) for name, value in extent.crest.items()},
    }


def _steps(values: tuple[float, ...], least: float, most: float) -> str:
    scale = np.log(most / least) if most > least else 1.0
    heights = np.log(np.maximum(values, least) / least) / scale
    return base64.b64encode((heights * _STEPS).round().astype(np.uint8).tobytes()).decode()


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
