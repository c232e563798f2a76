"""The layer that holds a weight of TorchAO's and runs its kernel on inputs as measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mofq.delivery.apply.torchao.weights import Target
from mofq.delivery.export.compressed_tensors.encoding import encode_scale, pack_fp4
from mofq.numbers.formats import FP4_E2M1
from mofq.numbers.quantize.activations import quantize_activation
from mofq.numbers.quantize.scales import Scales
from mofq.numbers.schemes import Scheme, TensorScheme

#: The fewest that ``torch._int_mm`` takes on a GPU: more than 16, and a multiple of 8.
_INT_MM_TOKENS = 24


class TorchaoLinear(nn.Linear):
    """A linear layer whose ``weight`` is one of TorchAO's tensor classes."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, scheme: Scheme) -> None:
        """Hold a weight and a bias.

        Args:
            weight_OI: From ``make_weight``.
            bias_O: In the dtype of the inputs, or None.
            scheme: Of the layer.
        """
        with torch.device("meta"):
            super().__init__(weight_OI.shape[1], weight_OI.shape[0], bias=False)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        if bias_O is not None:
            self.bias = nn.Parameter(bias_O, requires_grad=False)
        self.scheme = scheme
        self.static_amax: float | None = None
        self.layer_name = "linear"

    @classmethod
    def from_linear(
        cls, linear: nn.Module, scheme: Scheme, *, weight_OI: Tensor, target: Target, name: str
    ) -> TorchaoLinear:
        """Put a weight of TorchAO's in the place of a linear layer's.

        Args:
            linear: ``torch.nn.Linear`` or GPT-2's ``Conv1D``, for its bias.
            scheme: Of the layer.
            weight_OI: From ``make_weight``.
            target: That it was made for; has the static scale of the inputs, if any.
            name: Of the layer, for messages.

        Returns:
            The layer.
        """
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        made = cls(weight_OI, None if bias is None else bias.detach(), scheme=scheme)
        made.static_amax = target.static_amax
        made.layer_name = name
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` [..., in_features] as measured, and multiply, to [..., out_features]."""
        activation = self.scheme.activation
        if activation is None or not x.numel():
            return functional.linear(x, self.weight, self.bias)
        codes_TI, scales = quantize_activation(
            x, activation, static_amax=self.static_amax, name=self.layer_name
        )
        assert scales is not None
        multiply = _PRODUCTS[type(self.weight.data).__name__]
        y_TO = multiply(codes_TI, scales, self.weight.data, activation, x.dtype)
        if self.bias is not None:
            y_TO = y_TO + self.bias
        return y_TO.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, scheme and tensor class, for ``print(model)``."""
        return (
            f"{super().extra_repr()}, scheme={self.scheme.name!r}, "
            f"weight={type(self.weight.data).__name__}"
        )


def _int8_product(
    codes_TI: Tensor, scales: Scales, weight: Any, activation: TensorScheme, dtype: torch.dtype
) -> Tensor:
    from torchao.kernel import int_scaled_matmul

    scale_T1 = scales.scale.reshape(-1, 1).contiguous()
    codes_TI = codes_TI.to(torch.int8).contiguous()
    if codes_TI.device.type == "cpu":
        y_TO: Tensor = int_scaled_matmul(codes_TI, weight.qdata.contiguous().t(), scale_T1)
    else:
        y_TO = integer_product(codes_TI, weight.qdata) * scale_T1
    scale_O: Tensor = weight.scale.flatten()
    return (y_TO * scale_O).to(dtype)


def integer_product(codes_TI: Tensor, codes_OI: Tensor) -> Tensor:
    """What TorchAO's ``int_scaled_matmul`` multiplies on a GPU, by the same kernel.

    Of 16 tokens and fewer, which the kernel refuses, TorchAO makes a product in float32, which
    does not hold such sums exactly; and for every product it prints its operand to look for a
    word in that, and copies the weight.

    Args:
        codes_TI: int8, contiguous.
        codes_OI: int8.

    Returns:
        [T, O], int32, exact.

    Source: torchao 0.18.0 kernel/intmm.py:51-91; torch ``aten/src/ATen/native/cuda/Blas.cpp``,
    ``_int_mm_out_cuda``.
    """
    tokens = len(codes_TI)
    missing = max(0, _INT_MM_TOKENS - tokens)
    product: Tensor = torch._int_mm(functional.pad(codes_TI, (0, 0, 0, missing)), codes_OI.t())
    return product[:tokens]


def _float8_product(
    codes_TI: Tensor, scales: Scales, weight: Any, activation: TensorScheme, dtype: torch.dtype
) -> Tensor:
    inputs = type(weight)(
        codes_TI.to(torch.float8_e4m3fn),
        scales.scale.reshape(-1, 1),
        block_size=[1, codes_TI.shape[1]],
        dtype=dtype,
    )
    return functional.linear(inputs, weight)


def _nvfp4_product(
    codes_TI: Tensor, scales: Scales, weight: Any, activation: TensorScheme, dtype: torch.dtype
) -> Tensor:
    assert scales.global_scale is not None
    inputs = type(weight)(
        pack_fp4(codes_TI),
        scales.scale[:, 0, :, 0].to(torch.float8_e4m3fn),
        16,
        dtype,
        per_tensor_scale=scales.global_scale.reshape(()),
    )
    return functional.linear(inputs, weight)


def _mx_product(
    codes_TI: Tensor, scales: Scales, weight: Any, activation: TensorScheme, dtype: torch.dtype
) -> Tensor:
    is_fp4 = activation.element is FP4_E2M1
    inputs = type(weight)(
        pack_fp4(codes_TI) if is_fp4 else codes_TI.to(torch.float8_e4m3fn),
        encode_scale(scales.scale[:, 0, :, 0], activation).view(torch.float8_e8m0fnu),
        weight.elem_dtype,
        32,
        dtype,
        weight.kernel_preference,
        None,
        False,
    )
    return torch.mm(inputs, weight.t()).to(dtype)


#: TorchAO's class of the weight -> how it is multiplied with quantized inputs.
_PRODUCTS: dict[str, Callable[[Tensor, Scales, Any, TensorScheme, torch.dtype], Tensor]] = {
    "Int8Tensor": _int8_product,
    "Float8Tensor": _float8_product,
    "NVFP4Tensor": _nvfp4_product,
    "MXTensor": _mx_product,
}
