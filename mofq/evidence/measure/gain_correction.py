"""What a few kept sequences say, corrected by the gains of all that were run.

The error of a layer in a sequence, ``y_n``, and its gain there, ``p_n``, rise and fall together:
both hold the same text and the same random draws. So with ``R = mean(y) / mean(p)`` over the
kept sequences, each of which stands for a cluster of neighbours whose mean gain is ``q_n``,

    y_n + R (q_n - p_n)

has the mean ``mean(y) mean(q) / mean(p)``, and what is left of its variance is that of ``y``
around ``R p`` and, by the clusters, that of the mean gain: the standard error is the usual one.

Source: double sampling with a ratio estimate, W. G. Cochran, "Sampling Techniques", 3rd ed.,
1977, chapter 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.evidence.calibration.gains import Gains
from mofq.evidence.calibration.stats import CorpusPlan


@dataclass(frozen=True, slots=True)
class SampleGains:
    """Of the kept samples, a sequence's draws after one another, float64."""

    own_N: Tensor
    cluster_N: Tensor  #: of the cluster that each stands for; their mean is that of all


@dataclass(frozen=True, slots=True)
class LayerGains:
    """Of noise in the weights and in the inputs of one layer."""

    weight: SampleGains
    input: SampleGains

    def of(self, samples: slice) -> LayerGains:
        """Of some of the samples."""
        return LayerGains(
            SampleGains(self.weight.own_N[samples], self.weight.cluster_N[samples]),
            SampleGains(self.input.own_N[samples], self.input.cluster_N[samples]),
        )


def layer_gains(corpus: CorpusPlan, gains: Sequence[Mapping[str, Gains]], layer: str) -> LayerGains:
    """The gains of one layer, of the samples that are kept.

    Args:
        corpus: How many of its sequences are kept.
        gains: Of all its sequences, in order: layer -> gains.
        layer: Its name.
    """
    return LayerGains(
        weight=_sample_gains(corpus, [one[layer].weight for one in gains]),
        input=_sample_gains(corpus, [one[layer].input for one in gains]),
    )


def _sample_gains(corpus: CorpusPlan, values: Sequence[Sequence[float]]) -> SampleGains:
    all_ND = torch.tensor(values, dtype=torch.float64)
    cluster_KD = torch.stack([all_ND[list(cluster)].mean(0) for cluster in corpus.clusters])
    # Clusters may differ by one sequence; the mean is over sequences.
    cluster_KD += all_ND.mean() - cluster_KD.mean()
    return SampleGains(all_ND[list(corpus.kept_indices)].flatten(), cluster_KD.flatten())


def corrected(error_NS: Tensor, gains: SampleGains | None) -> Tensor:
    """Errors of the kept samples such that their mean is that of all sequences.

    Args:
        error_NS: Of each sample under each scheme.
        gains: None: all sequences are kept.

    Returns:
        [N, S]. A single one may be negative; their mean is not.
    """
    if gains is None or not float(gains.own_N.mean()) > 0:
        return error_NS
    change_N = (gains.cluster_N - gains.own_N) / gains.own_N.mean()
    return error_NS + error_NS.mean(0) * change_N[:, None].to(error_NS.device)


def cluster_shares(seen: SampleGains | None, all_of: SampleGains | None, own: slice) -> Tensor:
    """How strongly clusters answer, against the mean of others.

    Args:
        seen: The gains of the others; None: all sequences are kept.
        all_of: Of all samples, with these and the others; None as ``seen`` is.
        own: Which of them.

    Returns:
        [N], of the clusters of ``own``; zeros where nothing is known of them.
    """
    if seen is None or all_of is None:
        return torch.zeros(own.stop - own.start, dtype=torch.float64)
    mean = float(seen.cluster_N.mean())
    cluster_N = all_of.cluster_N[own]
    return cluster_N / mean if mean > 0 else torch.zeros_like(cluster_N)


def not_negative(error_N: Tensor) -> Tensor:
    """Corrected errors of one row, drawn towards their mean until none is negative.

    A kept sequence whose gain is far above its cluster's can be corrected below zero, which
    is no error that a sequence may have. The mean stays; the few rows that this happens to
    have a standard error that is somewhat too small.
    """
    mean, low = error_N.mean().clamp(min=0), error_N.min()
    if low >= 0:
        return error_N
    return ((error_N - low) * (mean / (mean - low))).clamp(min=0)
