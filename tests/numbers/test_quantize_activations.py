"""Fake-quantized activations, and the layer that emulates a scheme."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from number_cases import activation_scheme, trained_like_weight, weight_scheme
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mofq.exceptions import SchemeError
from mofq.numbers.quantize import (
    FakeQuantLinear,
    fake_quantize_activation,
    fake_quantize_weight,
)
from mofq.numbers.schemes import parse_scheme

DYNAMIC = ("int8.token", "int8.token.asym", "fp8_e4m3.token", "fp8_e4m3.g32", "int4.g32", "mxfp4")
STATIC = ("int8.tensor", "fp8_e4m3.tensor", "nvfp4")


def test_token_scales_by_hand() -> None:
    x = torch.tensor([[127.0, 2.5, -1.5], [12.7, 0.05, 0.0], [0.0, 0.0, 0.0]])
    fake = fake_quantize_activation(x, activation_scheme("int8.token"))
    assert fake[0].tolist() == [127.0, 2.0, -2.0]
    assert fake[1, 0].item() == pytest.approx(12.7)
    assert fake[2].tolist() == [0.0, 0.0, 0.0]


def test_a_static_scale_saturates_what_calibration_did_not_see() -> None:
    x = torch.tensor([[1.0, 100.0, -300.0]])
    fake = fake_quantize_activation(x, activation_scheme("int8.tensor"), static_amax=127.0)
    assert fake.tolist() == [[1.0, 100.0, -127.0]]
    # 200 is a tie of E4M3 between 192 and 208.
    fake = fake_quantize_activation(
        x, activation_scheme("fp8_e4m3.tensor"), static_amax=torch.tensor(224.0)
    )
    assert fake.tolist() == [[1.0, 96.0, -224.0]]


@pytest.mark.parametrize("name", [*DYNAMIC, *STATIC, "fp8_e4m3.unscaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_kept(name: str, dtype: torch.dtype) -> None:
    x = trained_like_weight(12, 64).to(dtype)
    scheme = activation_scheme(name)
    flat = fake_quantize_activation(x, scheme, static_amax=1.0)
    assert flat.dtype == dtype
    batched = fake_quantize_activation(x.reshape(2, 2, 3, 64), scheme, static_amax=1.0)
    assert torch.equal(batched.reshape(12, 64), flat)
    assert not torch.equal(flat, x)


@pytest.mark.parametrize("name", DYNAMIC)
def test_no_token_sees_another(name: str) -> None:
    x, scheme = trained_like_weight(8, 64), activation_scheme(name)
    alone = torch.cat([fake_quantize_activation(row[None], scheme) for row in x])
    assert torch.equal(fake_quantize_activation(x, scheme), alone)


@pytest.mark.parametrize("name", [*DYNAMIC, *STATIC])
def test_no_tokens_stay_no_tokens(name: str) -> None:
    x = torch.zeros(2, 0, 64, dtype=torch.bfloat16)
    fake = fake_quantize_activation(x, activation_scheme(name), static_amax=1.0)
    assert (fake.shape, fake.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("name", [*DYNAMIC, *STATIC, "nf4.g32"])
def test_a_nan_is_not_hidden(name: str) -> None:
    x = torch.ones(2, 64)
    x[1, 3] = torch.nan
    scheme = activation_scheme(name)
    fake = fake_quantize_activation(x, scheme, static_amax=1.0)
    assert fake[1, 3].isnan()
    assert fake[0].isfinite().all()


@pytest.mark.parametrize("name", STATIC)
def test_static_activations_without_calibration_are_refused_by_name(name: str) -> None:
    with pytest.raises(SchemeError, match=r"layers\.0\.q_proj: .*`static_amax`"):
        fake_quantize_activation(torch.ones(1, 64), activation_scheme(name), name="layers.0.q_proj")


def test_groups_that_do_not_divide_the_input_are_refused_by_name() -> None:
    with pytest.raises(SchemeError, match=r"down_proj: .*divisible by 32, got 48"):
        fake_quantize_activation(
            torch.ones(1, 48), activation_scheme("fp8_e4m3.g32"), name="down_proj"
        )


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("fp8_e4m3.token", {"num_bits": 8, "type": "float", "strategy": "token"}),
        ("int8.token.asym", {"num_bits": 8, "strategy": "token", "symmetric": False}),
        ("fp8_e4m3.g32", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
    ],
)
def test_dynamic_activations_are_those_of_compressed_tensors(
    name: str, args: dict[str, object]
) -> None:
    x = trained_like_weight(256, 64).reshape(4, 64, 64)
    theirs_args = QuantizationArgs(dynamic=True, **args)
    scale, point = compute_dynamic_scales_and_zp(x, theirs_args, torch.nn.Module())
    theirs = fake_quantize(x, scale, point, theirs_args)
    assert torch.equal(fake_quantize_activation(x, activation_scheme(name)), theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_fake_quantized_input_times_given_weight(
    bias: bool, dtype: torch.dtype
) -> None:
    scheme = parse_scheme("int8.channel+int8.token")
    assert scheme.weight is not None
    assert scheme.activation is not None
    linear = torch.nn.Linear(64, 16, bias=bias, dtype=dtype)
    weight_OI = fake_quantize_weight(linear.weight.detach(), scheme.weight)
    layer = FakeQuantLinear.from_linear(linear, scheme, weight_OI=weight_OI)
    x = trained_like_weight(6, 64).reshape(2, 3, 64).to(dtype)
    expected = functional.linear(
        fake_quantize_activation(x, scheme.activation), weight_OI.to(dtype), linear.bias
    )
    assert torch.equal(layer(x), expected)
    assert layer(x).dtype == dtype
    assert layer.scheme is scheme
    assert layer.weight.dtype == dtype
    assert (layer.bias is None) != bias
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_weight_only_layer_leaves_its_input_alone() -> None:
    linear = torch.nn.Linear(64, 16)
    scheme = parse_scheme("int4.g32")
    weight_OI = fake_quantize_weight(linear.weight.detach(), weight_scheme("int4.g32"))
    layer = FakeQuantLinear.from_linear(linear, scheme, weight_OI=weight_OI)
    x = trained_like_weight(3, 64)
    assert torch.equal(layer(x), functional.linear(x, weight_OI, linear.bias))


def test_a_layer_without_quantization_is_the_layer_itself() -> None:
    linear = torch.nn.Linear(64, 16)
    layer = FakeQuantLinear.from_linear(
        linear, parse_scheme("bf16"), weight_OI=linear.weight.detach()
    )
    x = trained_like_weight(3, 64)
    assert torch.equal(layer(x), linear(x))


def test_the_transposed_layer_of_gpt2_takes_its_weight_upright() -> None:
    conv = Conv1D(16, 64)
    weight_OI = conv.weight.detach().T.contiguous()
    layer = FakeQuantLinear.from_linear(conv, parse_scheme("bf16"), weight_OI=weight_OI)
    x = trained_like_weight(3, 64)
    torch.testing.assert_close(layer(x), conv(x))


def test_a_layer_with_static_activations_keeps_their_amax_or_is_refused() -> None:
    linear = torch.nn.Linear(64, 16)
    scheme = parse_scheme("bf16+int8.tensor")
    assert scheme.activation is not None
    with pytest.raises(SchemeError, match=r"o_proj: scheme 'bf16\+int8\.tensor'"):
        FakeQuantLinear.from_linear(linear, scheme, weight_OI=linear.weight.detach(), name="o_proj")
    layer = FakeQuantLinear.from_linear(
        linear, scheme, weight_OI=linear.weight.detach(), static_amax=0.05
    )
    x = trained_like_weight(3, 64)
    fake = fake_quantize_activation(x, scheme.activation, static_amax=0.05)
    assert torch.equal(layer(x), linear(fake))
    assert "scheme='bf16+int8.tensor'" in repr(layer)


def test_the_layer_moves_with_its_model_and_saves_like_a_linear() -> None:
    linear = torch.nn.Linear(64, 16)
    layer = FakeQuantLinear.from_linear(
        linear, parse_scheme("int8.channel+int8.token"), weight_OI=linear.weight.detach()
    )
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
