"""The experts of a mixture, which transformers keeps as one module, under a scheme."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mofq.exceptions import BackendError
from mofq.model.modules import experts_problem, find_bias, find_kind, multiply, run_experts
from mofq.numbers.quantize import fake_quantize_activation
from mofq.numbers.schemes import Scheme


class FakeQuantExperts(nn.Module):
    """All experts of one decoder layer; the inputs of each are fake-quantized on the fly.

    It keeps the parameters of the module that it replaces, as `ExpertsKind` describes them;
    whoever applies a scheme rounds the weights in place.
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
            experts: Of transformers.
            scheme: Of every expert.
            static_amax: Parameter (``down_proj``, the other) -> expert -> largest
                magnitude of its input in calibration; for static activations.
            name: For messages.

        Raises:
            BackendError: The experts are of another kind.
        """
        super().__init__()
        if problem := experts_problem(experts):
            raise BackendError(
                f"{name}: {problem}, cannot be emulated. Leave the fusion group unquantized."
            )
        self.scheme = scheme
        self.layer_name = name
        self.static_amax = static_amax or {}
        self.kind = find_kind(experts)
        for parameter in (self.kind.first, "down_proj"):
            self.register_parameter(parameter, experts.get_parameter(parameter))
            if find_bias(experts, parameter, 0) is not None:
                bias = f"{parameter}_bias"
                self.register_parameter(bias, experts.get_parameter(bias))
        self.num_experts = self.kind.count

    def forward(
        self,
        hidden_TI: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Route each token through its experts; arguments and result are those of `run_experts`."""
        return run_experts(self.kind, hidden_TI, top_k_index, top_k_weights, linear=self._linear)

    def _linear(self, parameter: str, expert: int, x_TI: Tensor, _token_T: Tensor) -> Tensor:
        x_TI = self._quantize(x_TI, parameter, expert)
        return multiply(self, self.kind, parameter, expert, x_TI)

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
