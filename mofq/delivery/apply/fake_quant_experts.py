"""The experts of a mixture, which transformers keeps as one module, under their schemes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from mofq.exceptions import BackendError
from mofq.model.modules import experts_problem, find_activation, first_parameter, run_experts
from mofq.numbers.quantize import fake_quantize_activation
from mofq.numbers.schemes import Scheme


class FakeQuantExperts(nn.Module):
    """All experts of one decoder layer; the inputs of each are fake-quantized on the fly.

    It keeps the parameters of the module that it replaces, ``gate_up_proj``
    [E, 2 * intermediate, hidden], gate first, or ``up_proj`` where there is no gate,
    and ``down_proj`` [E, hidden, intermediate]; whoever applies a scheme rounds them
    in place, and tells of it with `set_scheme`.
    """

    def __init__(self, experts: nn.Module, *, name: str = "experts") -> None:
        """Take the place of transformers' module, with no scheme yet.

        Args:
            experts: With gates, without biases, not transposed.
            name: For messages.

        Raises:
            BackendError: The experts are of another kind.
        """
        super().__init__()
        if problem := experts_problem(experts):
            raise BackendError(
                f"{name}: {problem}, cannot be emulated. Leave the fusion group unquantized."
            )
        self.layer_name = name
        self.schemes: dict[tuple[str, int], Scheme] = {}
        self.static_amax: dict[tuple[str, int], float] = {}
        self.first = first_parameter(experts)
        for parameter in (self.first, "down_proj"):
            self.register_parameter(parameter, experts.get_parameter(parameter))
        self.num_experts = self.get_parameter(self.first).shape[0]
        self.activation = find_activation(experts)

    def set_scheme(
        self, parameter: str, expert: int, scheme: Scheme, *, static_amax: float | None = None
    ) -> None:
        """Quantize the inputs of one expert's part as a scheme says.

        Args:
            parameter: ``down_proj``, or the other.
            expert: Its number.
            scheme: Of the layers that the parameter holds of it.
            static_amax: Largest magnitude of its input in calibration; for static activations.
        """
        self.schemes[parameter, expert] = scheme
        if static_amax is not None:
            self.static_amax[parameter, expert] = static_amax

    def drop_scheme(self, parameter: str, expert: int) -> None:
        """Leave the inputs of one expert's part as they are."""
        self.schemes.pop((parameter, expert), None)
        self.static_amax.pop((parameter, expert), None)

    def forward(self, hidden_TI: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route each token through its experts, one expert after the other.

        Args:
            hidden_TI: Inputs, ``[T, hidden]``.
            top_k_index: The experts of each token, ``[T, top_k]``, int64.
            top_k_weights: What each of them counts, ``[T, top_k]``.

        Returns:
            ``[T, hidden]``.
        """
        return run_experts(
            hidden_TI,
            top_k_index,
            top_k_weights,
            first=self.first,
            activation=self.activation,
            linear=self._linear,
        )

    def _linear(self, parameter: str, expert: int, x_TI: Tensor, _token_T: Tensor) -> Tensor:
        x_TI = self._quantize(x_TI, parameter, expert)
        return functional.linear(x_TI, self.get_parameter(parameter)[expert])

    def _quantize(self, x_TI: Tensor, parameter: str, expert: int) -> Tensor:
        scheme = self.schemes.get((parameter, expert))
        if scheme is None or scheme.activation is None:
            return x_TI
        return fake_quantize_activation(
            x_TI,
            scheme.activation,
            static_amax=self.static_amax.get((parameter, expert)),
            name=f"{self.layer_name}.{expert}",
        )

    def extra_repr(self) -> str:
        """Number of experts and schemes, for ``print(model)``."""
        names = sorted({scheme.name for scheme in self.schemes.values()})
        return f"num_experts={self.num_experts}, schemes={names}"
