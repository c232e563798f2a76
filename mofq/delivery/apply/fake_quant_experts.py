"""The experts of a mixture, which transformers keeps as one module, under their schemes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from mofq.exceptions import BackendError
from mofq.model.modules import (
    OUTPUT_NORM,
    experts_problem,
    find_bias,
    find_kind,
    multiply,
    run_experts,
)
from mofq.numbers.quantize import fake_quantize_activation
from mofq.numbers.quantize.straight_through import straight_through
from mofq.numbers.schemes import Scheme


class FakeQuantExperts(nn.Module):
    """All experts of one decoder layer; the inputs of each are fake-quantized on the fly.

    It keeps the parameters of the module that it replaces, as `ExpertsKind` describes them; whoever
    applies a scheme rounds the weights in place, and tells of it with `set_scheme`.
    """

    def __init__(self, experts: nn.Module, *, name: str = "experts") -> None:
        """Take the place of transformers' module, with no scheme yet.

        Args:
            experts: Of transformers.
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
        self.kind = find_kind(experts)
        for parameter in (self.kind.first, "down_proj"):
            self.register_parameter(parameter, experts.get_parameter(parameter))
            if find_bias(experts, parameter, 0) is not None:
                bias = f"{parameter}_bias"
                self.register_parameter(bias, experts.get_parameter(bias))
        if self.kind.norm is not None:
            self.register_module(OUTPUT_NORM, experts.get_submodule(OUTPUT_NORM))
        self.num_experts = self.kind.count

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

    def learnable(self, parameter: str) -> Sequence[Tensor]:
        """The matrices of a parameter, one an expert, each a leaf of its own from now on.

        They are views of it. The gradient of one is no larger than it, and that of an expert that
        no token chose is None.
        """
        whole = self._parameters.pop(parameter, None)
        if whole is not None:
            setattr(self, parameter, [whole.detach()[expert] for expert in range(len(whole))])
        parts: Sequence[Tensor] = getattr(self, parameter)
        return parts

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
        scheme = self.schemes.get((parameter, expert))
        if scheme is None or scheme.activation is None:
            return x_TI
        round_to = partial(
            fake_quantize_activation,
            scheme=scheme.activation,
            static_amax=self.static_amax.get((parameter, expert)),
            name=f"{self.layer_name}.{expert}",
        )
        return straight_through(round_to, x_TI)

    def extra_repr(self) -> str:
        """Number of experts and schemes, for ``print(model)``."""
        names = sorted({scheme.name for scheme in self.schemes.values()})
        return f"num_experts={self.num_experts}, schemes={names}"
