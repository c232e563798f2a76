from __future__ import annotations

import math

import pytest
import torch

from mofq.evidence.metrics import cross_entropy, kl_divergence, top1_agreement


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Logits of given probabilities, each row shifted by another constant."""
    return torch.stack([torch.tensor(row).log() + 3.0 * i for i, row in enumerate(rows)])


def test_kl_is_the_definition_worked_by_hand() -> None:
    p = logits_of([0.5, 0.25, 0.25], [0.8, 0.1, 0.1])
    q = logits_of([0.25, 0.5, 0.25], [0.8, 0.1, 0.1])
    # 0.5 ln(0.5/0.25) + 0.25 ln(0.25/0.5) = 0.25 ln 2
    # Logits and logarithms of both, which are less than 2, are rounded to float32.
    assert kl_divergence(p, q).tolist() == pytest.approx(
        [0.25 * math.log(2), 0.0], abs=8 * torch.finfo(torch.float32).eps
    )


def test_kl_is_of_the_original_from_the_quantized_and_not_the_reverse() -> None:
    p, q = logits_of([0.9, 0.1]), logits_of([0.5, 0.5])
    assert kl_divergence(p, q).item() == pytest.approx(
        0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5
    )
    assert kl_divergence(q, p).item() == pytest.approx(-0.5 * math.log(4 * 0.9 * 0.1), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_agrees_with_torch_in_float64_over_more_rows_than_one_slice(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    p_TV = (4 * torch.randn(300, 50, generator=generator)).to(dtype)
    q_TV = (p_TV + 0.1 * torch.randn(300, 50, generator=generator)).to(dtype)
    expected_T = torch.nn.functional.kl_div(
        q_TV.double().log_softmax(-1),
        p_TV.double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    torch.testing.assert_close(kl_divergence(p_TV, q_TV), expected_T, rtol=1e-3, atol=1e-6)


def test_kl_of_a_distribution_from_itself_is_zero() -> None:
    p_TV = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(p_TV, p_TV).tolist() == [0.0] * 7


def test_cross_entropy_is_minus_the_log_probability_of_the_target() -> None:
    logits_TV = logits_of([0.5, 0.25, 0.25], [0.8, 0.1, 0.1])
    found_T = cross_entropy(logits_TV, torch.tensor([1, 0]))
    assert found_T.tolist() == pytest.approx([math.log(4), -math.log(0.8)], rel=1e-5)
    assert found_T.dtype == torch.float64


def test_top1_agreement_is_by_position() -> None:
    p, q = logits_of([0.6, 0.4], [0.6, 0.4]), logits_of([0.9, 0.1], [0.4, 0.6])
    assert top1_agreement(p, q).tolist() == [True, False]


def test_logits_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3\)"):
        top1_agreement(torch.zeros(2, 3), torch.zeros(3, 3))
