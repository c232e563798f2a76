"""What groups do together where rounding changes the size of their weights.

The rounding error of a row of a weight is ``a W_o + R_o``. The rest ``R_o`` is independent of that
of other rows, and its squares are added up. The change of size ``a`` is not: rounding to few bits
makes all weights smaller, in every layer, and what that does in one layer another may undo or
double. So the table keeps, for each fusion group, what the model answers to a change of size of
its weights, with its sign, and the answers of all groups are added up before they are squared:

    KL = sum_f rest_f + mean_r (sum_f a_f s_fr)^2

over sequences and draws ``r``. An option's own error has the square of its own answer in it, and
what is computed here is the difference: the products of the groups with one another.

From 4 bits on ``a`` is so small that the products are below a hundredth of the error; with 2 bits
they are up to half of it, of either sign (docs/sensitivity.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SizeAnswers:
    """Of one corpus: F fusion groups, R sequences and draws, of which N samples stand for some."""

    value_FR: FloatArray  #: signed; squares are nats per token for a change by the whole size
    start_N: IntArray  #: the first of the R of each sample

    @property
    def weight_R(self) -> FloatArray:
        """What each counts in the mean over samples."""
        count_N = np.diff([*self.start_N.tolist(), self.value_FR.shape[1]])
        return np.repeat(1 / (len(count_N) * count_N), count_N)

    def of_samples(self, samples: IntArray) -> SizeAnswers:
        """Of some of the samples."""
        ends = [*self.start_N.tolist(), self.value_FR.shape[1]]
        ranges = [range(ends[n], ends[n + 1]) for n in samples.tolist()]
        starts = np.cumsum([0, *(len(one) for one in ranges[:-1])]).astype(np.int64)
        columns = [r for one in ranges for r in one]
        return SizeAnswers(self.value_FR[:, columns], starts)

    def products(self, group_K: IntArray, scaling_K: FloatArray) -> FloatArray:
        """What some groups do together beyond what each does alone.

        Args:
            group_K: The groups.
            scaling_K: By what share the weights of each become larger.

        Returns:
            Nats per token of each sample, [N]; negative where they undo one another.
        """
        answer_KR = scaling_K[:, None] * self.value_FR[group_K]
        beyond_R = np.square(answer_KR.sum(axis=0)) - np.square(answer_KR).sum(axis=0)
        count_N = np.diff([*self.start_N.tolist(), len(beyond_R)])
        return np.asarray(np.add.reduceat(beyond_R, self.start_N) / count_N)

    def slopes(self, group_K: IntArray, scaling_K: FloatArray) -> FloatArray:
        """How the products grow with a group's share, the shares of the others held, [K].

        Args:
            group_K: The groups.
            scaling_K: By what share the weights of each become larger.
        """
        value_KR = self.value_FR[group_K]
        answer_KR = scaling_K[:, None] * value_KR
        others_KR = answer_KR.sum(axis=0) - answer_KR
        return np.asarray(2 * (value_KR * others_KR) @ self.weight_R)


def size_answers(values: Sequence[Sequence[Sequence[float]]]) -> SizeAnswers:
    """From the answers of each group, sample by sample."""
    counts = [len(sample) for sample in values[0]]
    starts = np.cumsum([0, *counts[:-1]]).astype(np.int64)
    rows = [[one for sample in group for one in sample] for group in values]
    return SizeAnswers(np.array(rows, dtype=np.float64), starts)
