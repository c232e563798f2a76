"""What groups do together where rounding changes the size of their weights.

The rounding error of a row of a weight is ``a W_o + R_o``. The rest ``R_o`` is independent of that
of other rows, and its squares are added up. The change of size ``a`` is not: rounding to few bits
makes all weights smaller, in every layer, and what that does in one layer another may undo or
double. So a row of the table keeps what the model answers to the change of size of its group under
its scheme, with its sign, and the answers of a recipe's groups are added before they are squared:

    KL = sum_f rest_f + mean_r (sum_f s_fr)^2

over sequences and draws ``r``. An option's own error has the square of its own answer in it, and
what is computed here is the difference: the products of the groups with one another.

With 2 and 3 bits they are up to half of the error, of either sign, with 4 to 6 bits a few
hundredths (docs/sensitivity.md).
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
    """Of one corpus: P options, R sequences and draws, of which each of N samples has some."""

    value_PR: FloatArray  #: signed; squares are nats per token
    start_N: IntArray  #: the first of the R of each sample

    @property
    def weight_R(self) -> FloatArray:
        """What each counts in the mean over samples."""
        count_N = self._counts
        return np.repeat(1 / (len(count_N) * count_N), count_N)

    @property
    def _counts(self) -> IntArray:
        return np.diff([*self.start_N.tolist(), self.value_PR.shape[1]])

    def of_samples(self, samples: IntArray) -> SizeAnswers:
        """Of some of the samples."""
        ends = [*self.start_N.tolist(), self.value_PR.shape[1]]
        ranges = [range(ends[n], ends[n + 1]) for n in samples.tolist()]
        starts = np.cumsum([0, *(len(one) for one in ranges[:-1])]).astype(np.int64)
        return SizeAnswers(self.value_PR[:, [r for one in ranges for r in one]], starts)

    def products(self, choice_K: IntArray) -> FloatArray:
        """What some options do together beyond what each does alone.

        Args:
            choice_K: Options of different groups.

        Returns:
            Nats per token of each sample, [N]; negative where they undo one another.
        """
        chosen_KR = self.value_PR[choice_K]
        beyond_R = np.square(chosen_KR.sum(axis=0)) - np.square(chosen_KR).sum(axis=0)
        return np.asarray(np.add.reduceat(beyond_R, self.start_N) / self._counts)

    def squares(self, choice_K: IntArray) -> float:
        """What the changes of size of some options cost, each by itself [nats per token]."""
        return float((np.square(self.value_PR[choice_K]) @ self.weight_R).sum())

    def beside(self, choice_F: IntArray, group_P: IntArray) -> FloatArray:
        """Twice the products of each option with a choice's options of all other groups, [P].

        Args:
            choice_F: One option of each fusion group.
            group_P: The group of each option.
        """
        chosen_FR = self.value_PR[choice_F]
        others_FR = chosen_FR.sum(axis=0) - chosen_FR
        return np.asarray(2 * (self.value_PR * others_FR[group_P]) @ self.weight_R)


def size_answers(options: Sequence[Sequence[Sequence[float]] | None]) -> SizeAnswers | None:
    """From the answers of each option, sample by sample.

    Args:
        options: None where an option changes no size.

    Returns:
        None where no option does.
    """
    like = next((one for one in options if one is not None), None)
    if like is None:
        return None
    starts = np.cumsum([0, *map(len, like[:-1])]).astype(np.int64)
    zeros = [0.0] * sum(map(len, like))
    rows = [zeros if one is None else [v for sample in one for v in sample] for one in options]
    return SizeAnswers(np.array(rows, dtype=np.float64), starts)
