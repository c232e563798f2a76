"""What calibration says of the inputs, for the `reproduce_*.py` scripts."""

from __future__ import annotations

from pathlib import Path

from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.measure.samples import SampleReader
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers


def input_amax(model: str, stats: str | Path, *, saturated: float = 0.0) -> dict[str, float]:
    """Static scales of every layer from its calibration inputs.

    Args:
        model: Folder.
        stats: From `mofq calibrate`.
        saturated: Share of the inputs that may saturate. Where it is not 0, the largest
            magnitude is halved for as long as no larger share exceeds it.

    Returns:
        Layer -> the magnitude that the largest code stands for.
    """
    found = read_stats(Path(stats))
    groups = find_layers(open_checkpoint(model)).groups
    layers = [layer.name for group in groups for layer in group.layers]
    amax = {}
    with SampleReader(found) as reader:
        for layer in layers:
            samples = [reader.read(corpus.name, layer) for corpus in found.plan.corpora]
            inputs = [one.x_MCI.abs() for one in samples if one is not None]
            limit = float(max(x.max() for x in inputs))
            count = sum(one.is_token_MC.sum().item() * one.x_MCI.shape[2] for one in samples if one)
            while saturated and limit > 0:
                if sum(int((x > limit / 2).sum()) for x in inputs) > saturated * count:
                    break
                limit /= 2
            amax[layer] = limit
    return amax
