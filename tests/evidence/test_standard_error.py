"""How far the mean of samples may be from the mean of all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mofq.evidence.standard_error import standard_error, standard_errors


def test_it_is_the_deviation_of_the_samples_over_the_root_of_their_number() -> None:
    # Their mean is 3, and the squares around it add up to 10.
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    expected = math.sqrt(10 / 4 / 5)
    assert standard_error(np.array(values)) == pytest.approx(expected)
    assert standard_error(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected)


def test_means_over_the_last_axis_have_one_each() -> None:
    found_P = standard_errors(np.array([[1.0, 3.0], [2.0, 2.0]]))
    assert found_P.tolist() == [1.0, 0.0]


def test_one_sample_says_nothing_of_its_noise() -> None:
    assert standard_error(np.array([1.0])) is None
    assert standard_errors(np.ones((2, 1))).tolist() == [math.inf, math.inf]
