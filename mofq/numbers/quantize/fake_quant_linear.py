"""The module that emulates a scheme in the place of a linear layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from mofq.exceptions import SchemeError
from mofq.numbers.quantize.activations import fake_quantize_activation
from mofq.numbers.quantize.straight_through import straight_through
from mofq.numbers.schemes import Scheme


class FakeQuantLinear(torch.nn.Module):
    """A linear layer whose weight is fake-quantized already, and whose input is on the fly."""

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        *,
        scheme: Scheme,
        static_amax: float | None = None,
        name: str = "linear",
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.static_amax = static_amax
        self.layer_name = name
        self.out_features, self.in_features = weight_OI.shape
        self.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
        bias = None if bias_O is None else torch.nn.Parameter(bias_O, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Module,
        scheme: Scheme,
        *,
        weight_OI: Tensor,
        static_amax: float | None = None,
        name: str = "linear",
    ) -> FakeQuantLinear:
        """Put a scheme in the place of a linear layer.

        Args:
            linear: ``torch.nn.Linear``, or another module with ``weight`` and
                ``bias`` that computes the same (the ``Conv1D`` of GPT-2).
            scheme: Of the layer.
            weight_OI: Already fake-quantized, [out_features, in_features]; kept
                in the dtype of ``linear.weight``.
            static_amax: Largest magnitude of the input in calibration; needed
                by schemes with static activations.
            name: Of the layer, for messages.

        Returns:
            A module with the original's bias, dtype and device.

        Raises:
            SchemeError: The scheme needs ``static_amax``.
        """
        if scheme.has_static_inputs and static_amax is None:
            raise SchemeError(
                f"{name}: scheme {scheme.name!r} has static activations and needs their "
                f"`static_amax`; found none. Run `mofq calibrate` and search again, so that the "
                f"recipe holds it."
            )
        weight = linear.get_parameter("weight")
        bias = linear.bias if isinstance(linear.bias, Tensor) else None
        weight_OI = weight_OI.to(device=weight.device, dtype=weight.dtype)
        bias_O = None if bias is None else bias.detach()
        return cls(weight_OI, bias_O, scheme=scheme, static_amax=static_amax, name=name)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` [..., in_features] and apply the layer, to [..., out_features]."""
        bias = self.bias if isinstance(self.bias, Tensor) else None
        return functional.linear(self.rounded(x), self.weight, bias)

    def rounded(self, x: Tensor) -> Tensor:
        """What the weight is multiplied by: ``x`` [..., in_features], rounded by the scheme."""
        if self.scheme.activation is None:
            return x
        round_to = partial(
            fake_quantize_activation,
            scheme=self.scheme.activation,
            static_amax=self.static_amax,
            name=self.layer_name,
        )
        return straight_through(round_to, x)

    def extra_repr(self) -> str:
        """Sizes and scheme, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme.name!r}"
        )
