"""The experts of a mixture, which transformers keeps as one module, under a scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mofq.exceptions import BackendError
from mofq.numbers.quantize import fake_quantize_activation
from mofq.numbers.schemes import Scheme


class FakeQuantExperts(nn.Module):
    """All experts of one decoder layer; the inputs of each are fake-quantized on the fly.

    It keeps the parameters of the module that it replaces, ``gate_up_proj``
    [E, 2 * intermediate, hidden], gate first, and ``down_proj`` [E, hidden,
    intermediate]; whoever applies a scheme rounds them in place.
    """

    def __init__(
        self,
        experts: nn.Module,
        scheme: Scheme,
        *,
        static_amax: Mapping[str, Mapping[int, float]] | None = None,
        name: str = "experts",
    ) -> None:
        """Take the place of transformers' module.

        Args:
            experts: With gates, without biases, not transposed.
            scheme: Of every expert.
            static_amax: Parameter (``gate_up_proj``, ``down_proj``) -> expert -> largest
                magnitude of its input in calibration; for static activations.
            name: For messages.

        Raises:
            BackendError: The experts are of another kind.
        """
        super().__init__()
        expected = {
            "has_gate": True,
            "has_bias": False,
            "has_post_expert_norm": False,
            "is_transposed": False,
            "is_concatenated": True,
        }
        for attribute, value in expected.items():
            if getattr(experts, attribute, None) is not value:
                raise BackendError(
                    f"{name}: experts of class {type(experts).__name__}, whose {attribute} is not "
                    f"{value}, cannot be emulated. Leave the fusion group unquantized."
                )
        self.scheme = scheme
        self.layer_name = name
        self.static_amax = static_amax or {}
        self.gate_up_proj = experts.get_parameter("gate_up_proj")
        self.down_proj = experts.get_parameter("down_proj")
        self.num_experts = self.gate_up_proj.shape[0]
        self.act_fn: Callable[[Tensor], Tensor] = experts.act_fn  # type: ignore[assignment]

    def forward(self, hidden_TI: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route each token through its experts, one expert after the other.

        Args:
            hidden_TI: Inputs, ``[T, hidden]``.
            top_k_index: The experts of each token, ``[T, top_k]``, int64.
            top_k_weights: What each of them counts, ``[T, top_k]``.

        Returns:
            ``[T, hidden]``.

        Source: the eager forward of ``MixtralExperts`` in transformers 5, in
        the same order of operations.
        """
        output_TI = torch.zeros_like(hidden_TI)
        for expert in torch.unique(top_k_index).tolist():
            # By rank among the token's experts, then by token, as in transformers.
            rank, token = torch.where((top_k_index == expert).T)
            x = self._quantize(hidden_TI[token], "gate_up_proj", expert)
            gate, up = functional.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
            x = self._quantize(self.act_fn(gate) * up, "down_proj", expert)
            y = functional.linear(x, self.down_proj[expert])
            y = y * top_k_weights[token, rank, None]
            output_TI.index_add_(0, token, y.to(output_TI.dtype))
        return output_TI

    def _quantize(self, x_TI: Tensor, parameter: str, expert: int) -> Tensor:
        if self.scheme.activation is None:
            return x_TI
        return fake_quantize_activation(
            x_TI,
            self.scheme.activation,
            static_amax=self.static_amax.get(parameter, {}).get(expert),
            name=f"{self.layer_name}.{expert}",
        )

    def extra_repr(self) -> str:
        """Number of experts and scheme, for ``print(model)``."""
        return f"num_experts={self.num_experts}, scheme={self.scheme.name!r}"
