"""Published formats against references that are written here from their specifications."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from number_cases import activation_scheme, quantized, trained_like_weight, weight_scheme
from torch import Tensor

from mofq.exceptions import SchemeError
from mofq.numbers.quantize import fake_quantize_activation, fake_quantize_weight
from mofq.numbers.schemes import parse_scheme


def exponent(x: float) -> float:
    """Floor of the binary logarithm, minus infinity for 0."""
    return math.frexp(x)[1] - 1 if x else -math.inf


def round_half_even(x: float) -> int:
    return round(x)  # Python's own


def shared_microexponents(row: list[float], mantissa_bits: int) -> list[float]:
    """MX9/MX6/MX4 (arXiv:2302.08007): blocks of 16, pairs that may shift by one bit."""
    numbers = []
    for block in range(0, len(row), 16):
        largest = max(exponent(abs(x)) for x in row[block : block + 16])
        for pair in range(block, block + 16, 2):
            two = row[pair : pair + 2]
            shift = all(exponent(abs(x)) < largest for x in two)
            step = 2.0 ** (largest - shift - (mantissa_bits - 1)) if largest > -math.inf else 1.0
            limit = 2**mantissa_bits - 1
            codes = [max(-limit, min(limit, round_half_even(x / step))) for x in two]
            numbers += [code * step for code in codes]
    return numbers


@pytest.mark.parametrize(("name", "mantissa_bits"), [("mx9", 7), ("mx6", 4), ("mx4", 2)])
def test_shared_microexponents_are_those_of_the_paper(name: str, mantissa_bits: int) -> None:
    weight_OI = trained_like_weight(24, 64)
    weight_OI[0, :16] = 0
    weight_OI[1, 3] = 40.0
    weight_OI[2, :16] = torch.tensor([2.0**-k for k in range(16)])
    expected = [shared_microexponents(row, mantissa_bits) for row in weight_OI.tolist()]
    assert fake_quantize_weight(weight_OI, weight_scheme(name)).tolist() == expected
    x = weight_OI.reshape(2, 12, 64)
    assert fake_quantize_activation(x, activation_scheme(name)).reshape(24, 64).tolist() == expected


def test_a_pair_of_an_mx4_block_by_hand() -> None:
    # 3 has the exponent 1, so the step is 1, and 1/2 for pairs below 2.
    row = [3.0, 0.3, 1.3, 0.8, 2.0, 0.1, 0.24, 0.0] + [0.0] * 8
    fake = fake_quantize_weight(torch.tensor([row]), weight_scheme("mx4"))
    assert fake[0, :8].tolist() == [3.0, 0.0, 1.5, 1.0, 2.0, 0.0, 0.0, 0.0]
    q = quantized("mx4", torch.tensor([row]))
    assert q.scale is not None
    assert q.scale.tolist() == [[1.0, 0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize(("name", "bits"), [("mx9", 9), ("mx6", 6), ("mx4", 4)])
def test_shared_microexponents_have_the_bits_of_their_name(name: str, bits: int) -> None:
    scheme = weight_scheme(name)
    per_pair = scheme.scale.bits / scheme.granularity.columns
    shared = scheme.scale.shared_bits / scheme.scale.shared_columns
    assert scheme.element.bits + per_pair + shared == bits


def test_blocks_of_sixteen_must_divide_the_columns() -> None:
    with pytest.raises(SchemeError, match=r"down_proj: .*divisible by 16, got 40"):
        fake_quantize_weight(torch.ones(4, 40), weight_scheme("mx9"), name="down_proj")
    with pytest.raises(SchemeError, match=r"down_proj: .*divisible by 16, got 40"):
        fake_quantize_activation(torch.ones(4, 40), activation_scheme("mx9"), name="down_proj")


def microscaling(weight_OI: Tensor, element: str, *, ceiling: bool) -> np.ndarray:
    """OCP MX v1.0, section 6.3: blocks of 32, a power of two, saturating elements."""
    grids = {
        "fp8_e4m3": (ml_dtypes.float8_e4m3fn, 8, 448.0),
        "fp8_e5m2": (ml_dtypes.float8_e5m2, 15, 57344.0),
        "fp6_e3m2": (ml_dtypes.float6_e3m2fn, 4, 28.0),
        "fp6_e2m3": (ml_dtypes.float6_e2m3fn, 2, 7.5),
        "fp4_e2m1": (ml_dtypes.float4_e2m1fn, 2, 6.0),
        "int8": (None, 0, 127 / 64),
    }
    dtype, largest_exponent, largest = grids[element]
    blocks = weight_OI.numpy().astype(np.float64).reshape(-1, 32)
    numbers = np.empty_like(blocks)
    for n, block in enumerate(blocks):
        amax = float(np.abs(block).max())
        scale = 2.0 ** (exponent(amax) - largest_exponent)
        if ceiling and amax > scale * largest:
            scale *= 2
        scaled = np.clip(block / scale, -largest, largest)
        if dtype is None:
            numbers[n] = np.round(scaled * 64) / 64 * scale
        else:
            numbers[n] = scaled.astype(np.float32).astype(dtype).astype(np.float64) * scale
    return numbers.reshape(weight_OI.shape)


@pytest.mark.parametrize("ceiling", [False, True])
@pytest.mark.parametrize(
    "element", ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "int8"]
)
def test_microscaling_formats_are_those_of_the_standard(element: str, ceiling: bool) -> None:
    weight_OI = trained_like_weight(32, 128, seed=3)
    scale = "e8m0ceil" if ceiling else "e8m0"
    fake = fake_quantize_weight(weight_OI, weight_scheme(f"{element}.g32.s-{scale}"))
    assert fake.tolist() == microscaling(weight_OI, element, ceiling=ceiling).tolist()


@pytest.mark.parametrize(
    ("alias", "expansion"),
    [
        ("mxfp8", "fp8_e4m3.g32.s-e8m0"),
        ("mxfp8_e5m2", "fp8_e5m2.g32.s-e8m0"),
        ("mxfp6_e3m2", "fp6_e3m2.g32.s-e8m0"),
        ("mxfp6_e2m3", "fp6_e2m3.g32.s-e8m0"),
        ("mxfp4", "fp4_e2m1.g32.s-e8m0"),
        ("mxint8", "int8.g32.s-e8m0"),
    ],
)
def test_the_standard_formats_have_their_names(alias: str, expansion: str) -> None:
    assert parse_scheme(expansion).name == alias


def four_over_six(weight_OI: Tensor) -> np.ndarray:
    """arXiv:2512.02010: two E4M3 scales a block, the one of lower squared error."""
    tensor_amax = np.float32(weight_OI.abs().max())
    unit = tensor_amax / np.float32(256 * 6)
    rows = []
    for block in weight_OI.numpy().reshape(-1, 16):
        tries = []
        for expansion in (np.float32(1.0), np.float32(1.5)):
            wanted = np.abs(block).max() * expansion / (np.float32(6) * unit)
            scale = wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit
            codes = np.clip(block / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
            number = codes.astype(np.float32) * scale
            tries.append((float(((number.astype(np.float64) - block) ** 2).sum()), number))
        rows.append(tries[1][1] if tries[1][0] < tries[0][0] else tries[0][1])
    return np.concatenate(rows).reshape(weight_OI.shape)


def test_four_over_six_takes_the_better_of_two_scales_of_a_block() -> None:
    weight_OI = trained_like_weight(64, 128, seed=5)
    q = quantized("nvfp4@fouroversix", weight_OI)
    fake = fake_quantize_weight(
        weight_OI, weight_scheme("nvfp4@fouroversix"), tensor_amax=float(weight_OI.abs().max())
    )
    assert fake.tolist() == four_over_six(weight_OI).tolist()
    largest = q.codes_OI.abs().reshape(-1, 16).amax(dim=1)
    share = float((largest == 4).float().mean())
    assert 0.1 < share < 0.9
    plain = fake_quantize_weight(
        weight_OI, weight_scheme("nvfp4"), tensor_amax=float(weight_OI.abs().max())
    )
    assert float((fake - weight_OI).square().sum()) < float((plain - weight_OI).square().sum())


def test_four_over_six_of_activations_is_that_of_weights() -> None:
    x = trained_like_weight(16, 64, seed=6)
    amax = float(x.abs().max())
    name = "nvfp4@fouroversix"
    fake = fake_quantize_activation(x, activation_scheme(name), static_amax=amax)
    assert torch.equal(fake, fake_quantize_weight(x, weight_scheme(name), tensor_amax=amax))


def test_outlier_columns_of_a_sequence_stay_as_they_are() -> None:
    """LLM.int8(), arXiv:2208.07339: the rest is rounded under scales that do not see them."""
    x = torch.tensor([[1.27, 6.0, -0.5], [0.03, 0.25, 0.37]])
    fake = fake_quantize_activation(x, activation_scheme("int8.token.out6"))
    rest = fake_quantize_activation(x[:, [0, 2]], activation_scheme("int8.token"))
    assert torch.equal(fake[:, 1], x[:, 1])
    assert torch.equal(fake[:, [0, 2]], rest)
    # -6 counts as well, in another sequence it does not.
    other = torch.stack([-x, x / 2])
    fake = fake_quantize_activation(other, activation_scheme("int8.token.out6"))
    assert torch.equal(fake[0, :, 1], -x[:, 1])
    assert torch.equal(fake[1], fake_quantize_activation(x / 2, activation_scheme("int8.token")))
    assert not torch.equal(fake[1, :, 1], x[:, 1] / 2)


def test_outlier_columns_do_not_hide_a_nan() -> None:
    x = torch.full((2, 8), 7.0)
    x[1, 3] = torch.nan
    fake = fake_quantize_activation(x, activation_scheme("int8.token.out6"))
    assert fake[1, 3].isnan()
    assert torch.equal(fake[0], x[0])


def test_columns_of_like_range_share_a_scale_whatever_lies_between_them() -> None:
    # Two small columns and two large ones, in turn, and two sequences of other orders.
    x = torch.tensor([[[1.27, 127.0, 0.336, -50.4], [0.127, 0.0, -0.1, 12.7]]])
    x = torch.cat([x, x[:, :, [1, 0, 3, 2]]])
    fake = fake_quantize_activation(x, activation_scheme("int8.peg2"))
    # Steps of 0.01 and 1 for the first token, of 0.001 and 0.1 for the second.
    expected = torch.tensor([[1.27, 127.0, 0.34, -50.0], [0.127, 0.0, -0.1, 12.7]])
    torch.testing.assert_close(fake[0], expected)
    torch.testing.assert_close(fake[1], expected[:, [1, 0, 3, 2]])
    neighbours = fake_quantize_activation(x, activation_scheme("int8.g2"))
    assert neighbours[0, 0, 0] == 1.0  # beside 127, whose step is 1


def test_as_many_groups_as_columns_leave_a_column_its_own_scale() -> None:
    x = torch.tensor([[[0.3, 1e-6, 1000.0, 0.0], [7.0, 2.0, -1.0, 3.0]]])
    fake = fake_quantize_activation(x, activation_scheme("int8.peg4"))
    torch.testing.assert_close(fake, x)


def test_groups_that_do_not_divide_the_columns_are_refused() -> None:
    with pytest.raises(SchemeError, match="peg3 needs in_features divisible by 3, got 4"):
        fake_quantize_activation(torch.ones(2, 4), activation_scheme("int8.peg3"))
