"""The formats of a KV cache that kernels of vLLM define."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mofq.exceptions import SchemeError
from mofq.model.kv_schemes import parse_cache_scheme
from mofq.numbers.quantize import fake_quantize_cache

#: What vLLM 0.33.0 gave: ``scripts/engines/vllm_cache_kernels.py``.
ENGINE = load_file(Path(__file__).parent / "vllm_cache.safetensors")
NVFP4 = ("nvfp4.unscaled", "nvfp4.unscaled@fouroversix")


def rounded(name: str, x: Tensor) -> Tensor:
    part = parse_cache_scheme(name).parts["k"]
    assert part is not None
    return fake_quantize_cache(x, part.scheme, by_head=part.by_head, kernel=part.kernel)


@pytest.mark.parametrize("size", [32, 64, 80])
@pytest.mark.parametrize(
    ("engines", "name"),
    [
        ("int8", "int8.token_head"),
        ("fp8_e4m3", "fp8_e4m3.token_head"),
        ("int4", "int4.token_head.asym.rht"),
    ],
)
def test_a_cache_is_rounded_as_the_kernels_of_vllm_round_it(
    engines: str, name: str, size: int
) -> None:
    x, wanted = ENGINE[f"x.{size}"], ENGINE[f"{engines}.{size}"]
    found = rounded(name, x)
    assert found.dtype == x.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_attention_reads_what_is_emulated() -> None:
    query, x = ENGINE["query"], ENGINE["x"]
    cached = rounded("int4.token_head.asym.rht", x)
    torch.testing.assert_close(attended(query, cached), ENGINE["attended"], rtol=1e-5, atol=1e-5)
    assert (attended(query, x) - ENGINE["attended"]).abs().max() > 0.01


def attended(query_T1D: Tensor, x_T1D: Tensor) -> Tensor:
    """Causal attention with the same keys and values."""
    query, x = query_T1D.transpose(0, 1), x_T1D.transpose(0, 1)
    return scaled_dot_product_attention(query, x, x, is_causal=True).transpose(0, 1)


def test_a_single_channel_is_lost_under_rotation() -> None:
    # As the engine does: its rotation is a constant, and the range of codes does not reach 0.
    x = torch.zeros(1, 1, 64)
    x[..., 0] = 1000.0
    assert rounded("int4.token_head.asym.rht", x).abs().max() < 1e-3
    torch.testing.assert_close(rounded("int4.token_head.asym", x), x)


def test_heads_of_no_token_stay_empty() -> None:
    assert rounded("int4.token_head.asym.rht", torch.zeros(0, 2, 64)).shape == (0, 2, 64)


def nearest_e2m1(x: float) -> float:
    """Source: vLLM ``nvfp4_kv_cache_kernels.cu``, ``round_to_nearest_e2m1``."""
    size = abs(x)
    for is_below, code in (
        (size <= 0.25, 0.0),
        (size < 0.75, 0.5),
        (size <= 1.25, 1.0),
        (size < 1.75, 1.5),
        (size <= 2.5, 2.0),
        (size < 3.5, 3.0),
        (size <= 5.0, 4.0),
    ):
        if is_below:
            return float(np.copysign(code, x))
    return float(np.copysign(6.0, x))


def nearest_e4m3(x: np.float32) -> np.float32:
    saturated = torch.tensor(float(min(x, np.float32(448.0))))
    return np.float32(saturated.to(torch.float8_e4m3fn).float().item())


def candidate(group: list[np.float32], largest: float) -> tuple[list[np.float32], np.float32]:
    """Source: the same file, ``nvfp4_candidate_scale`` and ``nvfp4_reconstruction_error``."""
    amax = np.float32(max(abs(value) for value in group))
    scale = nearest_e4m3(amax * (np.float32(1) / np.float32(largest)))
    if scale == 0:
        kept = searched = [np.float32(0)] * len(group)
    else:
        inverse = np.float32(1) / scale
        codes = [np.float32(nearest_e2m1(float(value * inverse))) for value in group]
        again = np.float32(1) / inverse  # not the scale itself, e.g. of 448
        kept, searched = [code * scale for code in codes], [code * again for code in codes]
    error = np.float32(0)
    for n in range(0, len(group), 2):
        first, second = searched[n] - group[n], searched[n + 1] - group[n + 1]
        error = error + (first * first + second * second)
    return kept, error


def nvfp4_rows() -> Tensor:
    """Heads of 32 channels in bfloat16, [tokens, 1, 32]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 32, generator=generator)
    x[20:40] *= torch.exp2(torch.arange(-12.0, 12.0, 1.2))[:, None, None]
    x[0] = 0.0
    x[1] *= 1e-4  # a scale of 0
    x[2] = 0.01 * x[2]  # one of the subnormal scales
    x[3, :, 5] = 1e5  # saturates
    x[4, :, 7] = 50.0
    # Codes that tie under a scale of 1, and scales that tie: 8.5 and 9.5 sixteenths.
    x[5] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)
    x[6] = -x[5]
    x[7], x[8] = 6 * 8.5 / 8, 6 * 9.5 / 8
    x[9] = torch.tensor([4.0, -4.0] * 16)  # 4 and 6 are alike
    return x.to(torch.bfloat16)


@pytest.mark.parametrize("name", NVFP4)
def test_nvfp4_is_rounded_as_the_kernel_of_vllm_says(name: str) -> None:
    x = nvfp4_rows()
    wanted, chosen = [], set()
    for group in x.float().reshape(-1, 16).numpy():
        kept, error = candidate(list(group), 6.0)
        if name.endswith("fouroversix"):
            finer, finer_error = candidate(list(group), 4.0)
            chosen.add(bool(finer_error < error))
            kept = finer if finer_error < error else kept
        wanted.append(kept)
    assert chosen in (set(), {True, False})
    assert torch.equal(rounded(name, x), torch.tensor(np.array(wanted)).reshape(x.shape).bfloat16())


def test_both_kernels_that_write_nvfp4_find_the_same_scale() -> None:
    # FlashInfer divides by 6 (``page.cuh:329``), vLLM multiplies by its reciprocal.
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float().clamp(max=1e4)
    divided = amax / 6
    multiplied = amax * torch.tensor(6.0).reciprocal()
    fp8 = torch.float8_e4m3fn
    assert torch.equal(divided.to(fp8).float(), multiplied.to(fp8).float())
    assert not torch.equal(divided, multiplied)


def test_two_candidates_are_never_worse_than_one() -> None:
    x = nvfp4_rows().float().reshape(-1, 1, 16)
    errors = [(rounded(name, x) - x).square().sum(-1) for name in NVFP4]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert (errors[1] < 0.8 * errors[0]).any()


@pytest.mark.parametrize(
    "name", ["int4.token_head.rht", "int8.token_head.asym.rht", "nvfp4.unscaled@mse"]
)
def test_parts_of_a_kernels_format_do_not_stand_elsewhere(name: str) -> None:
    with pytest.raises(SchemeError, match="are parts of one format each"):
        parse_cache_scheme(name)
