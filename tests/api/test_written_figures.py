"""Figures as people read them."""

from __future__ import annotations

import pytest

from mofq.api.formatting import with_interval


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.0412, 0.0351, 0.0473, "0.0412 (0.0351 to 0.0473)"),
        (0.2041, 0.1502, 0.258, "0.204 (0.150 to 0.258)"),
        (0.00004321, 0.000035, 0.000051, "4.3e-05 (3.5e-05 to 5.1e-05)"),
        (0.0, 0.0, 0.0, "0"),
        (None, None, None, "–"),
    ],
)
def test_a_prediction_stands_beside_the_ends_of_its_interval(
    value: float | None, low: float | None, high: float | None, shown: str
) -> None:
    assert with_interval(value, low, high) == shown


def test_a_recipe_of_before_has_its_standard_error() -> None:
    assert with_interval(0.0412, None, None, stderr=0.0031) == "0.0412 ± 0.0031"
