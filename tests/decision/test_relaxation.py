"""The price of one constraint, beside what a linear program says of the same one twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mofq.decision.problem import FloatArray
from mofq.decision.relaxation import Core, price


def random_core(places: np.random.Generator, *, is_whole: bool, share: float) -> Core:
    """A few groups of up to five options, and a limit of a share of all that they could use."""
    counts_F = places.integers(1, 6, size=places.integers(1, 12))
    group_P = np.repeat(np.arange(len(counts_F)), counts_F)
    start_F = np.flatnonzero(np.diff(group_P, prepend=-1))

    def from_minimum(largest: float) -> FloatArray:
        size = len(group_P)
        drawn_P = places.integers(0, 4, size).astype(float) if is_whole else places.random(size)
        least_F = np.minimum.reduceat(drawn_P, start_F)
        return (drawn_P - least_F[group_P]) * largest

    use_P = from_minimum(1.0 if is_whole else 10.0 ** places.integers(-6, 9))
    return Core(
        option_P=np.arange(len(group_P)),
        group_P=group_P,
        start_F=start_F,
        cost_PK=from_minimum(10.0 ** places.integers(-9, 3))[:, None],
        cost_K=np.zeros(1),
        row_PR=use_P[:, None],
        limit_R=np.array([share * float(use_P.sum())]),
        divisor_R=np.ones(1),
    )


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_one_constraint_has_the_bound_of_a_linear_program(is_whole: bool, share: float) -> None:
    places = np.random.default_rng(0)
    bounds = []
    for _ in range(40):
        core = random_core(places, is_whole=is_whole, share=share)
        found = price(core)
        twice = price(
            replace(
                core,
                row_PR=np.repeat(core.row_PR, 2, axis=1),
                limit_R=np.repeat(core.limit_R, 2),
                divisor_R=np.ones(2),
            )
        )
        assert found is not None
        assert twice is not None
        assert found.bound == pytest.approx(twice.bound, rel=1e-9, abs=1e-9 * core.cost_PK.max())
        assert (found.reduced_P >= 0).all()
        bounds.append(found.bound)
    # Nothing is to be paid for where there is room for all.
    assert (max(bounds) <= 0) == (share == 1.0)
