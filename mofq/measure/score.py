"""Scores every scheme of one linear layer while its weight streams by, block by block.

For a perturbation ``e_t`` of the layer's output at token ``t`` of a sequence of ``T``
tokens, the KL divergence is to second order ``E[(sum_t g_t . e_t)^2] / 2`` nats, ``g_t``
the gradient of ``-sum log p(y)`` under labels ``y`` sampled from the model itself.

Its plain estimate, one square for each sequence, is unbiased and needs hundreds of
sequences. What rounding does has more structure, and this module uses it:

- **Weights.** ``e_t = dW x_t``, so the sum is ``<dW, G>`` with ``G = sum_t g_t x_t^T`` over
  the whole sequence. The rounding errors of different rows of a weight are independent, so
  the cross terms between rows vanish: ``sum_o (dW_o . G_o)^2`` has the same expectation and
  a hundred times less variance. Tokens are not independent (they share ``dW``), so ``G``
  is summed over the sequence before anything is squared.
- **Activations.** ``e_t = W dx_t``. The rounding errors of different tokens are independent
  and those of one token's channels are not (one scale; a massive channel zeroes the rest):
  ``sum_t (v_t . dx_t)^2`` with ``v_t = W^T g_t``.
- **Both.** ``e_t = (W + dW)(x_t + dx_t) - W x_t = dW xq_t + W dx_t``: the sum of the two,
  ``G`` taken with the quantized inputs.

How these were chosen is measured in ``scripts/bench_prediction.py``. Beside them the signed
sums over chunks of 64 tokens are kept: with them errors of different layers can be added
before they are squared.

Source: the second-order expansion of KL, S. Amari, "Natural gradient works efficiently in
learning", 1998, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mofq.measure.samples import ChunkedSamples
from mofq.quantize import fake_quantize_activation, fake_quantize_weight
from mofq.schemes import Scheme, TensorScheme

#: Weight rows held at once, as float32 [bytes].
_BLOCK_BYTES = 16_000_000
#: Outer products of gradients and inputs held at once [bytes].
_GRADIENT_BYTES = 128_000_000
#: Tokens that the output error is taken over, evenly spaced.
_OUTPUT_TOKENS = 512

RowReader = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class CorpusScore:
    """What one corpus says of one layer under each of S schemes."""

    error_NS: Tensor  #: nats per token of each sequence, float64
    projection_MS: Tensor  #: signed sum over each chunk, float64
    output_mse_S: Tensor  #: summed over outputs, averaged over tokens, float64


@dataclass(frozen=True, slots=True)
class LayerScore:
    """All that is measured of one layer under each of S schemes."""

    relative_weight_error_S: Tensor  #: float64
    weight_energy: float  #: sum of squares
    error_energy_S: Tensor  #: sum of squares of the rounding error, float64
    corpora: Mapping[str, CorpusScore]


def score_layer(
    read_rows: RowReader,
    shape: tuple[int, int],
    schemes: Sequence[Scheme],
    *,
    samples: Mapping[str, ChunkedSamples],
    tensor_amax: float | None = None,
    static_amax: float | None = None,
    device: str = "cpu",
    name: str = "weight",
) -> LayerScore:
    """Measure one layer under every scheme, reading its weight once.

    Args:
        read_rows: Gives rows ``start`` to ``stop`` of the weight, [rows, in_features].
        shape: out_features and in_features.
        schemes: Candidates; each fits the shape.
        samples: Corpus name -> samples of this layer; may be empty.
        tensor_amax: Largest magnitude of the weight and of all that share its scale.
        static_amax: Largest magnitude of the input, for static activations.
        device: Where the arithmetic runs.
        name: Of the layer, for messages.

    Returns:
        The measurements.

    Raises:
        SchemeError: A weight is not finite, or a scheme does not fit.
    """
    weights = list(dict.fromkeys(s.weight for s in schemes if s.weight is not None))
    sums = _WeightSums.zeros(shape[1], len(weights), device)
    inputs = {
        corpus: _Inputs.of(one, schemes, static_amax=static_amax, device=device, name=name)
        for corpus, one in samples.items()
    }
    scores = {c: _CorpusSums.zeros(one, len(schemes), device) for c, one in samples.items()}
    for start, stop in _blocks(shape, _tile_rows(weights)):
        weight_RI = read_rows(start, stop).to(device=device, dtype=torch.float32)
        quantized = [
            fake_quantize_weight(weight_RI, w, tensor_amax=tensor_amax, name=name) for w in weights
        ]
        sums.add(weight_RI, quantized)
        delta_SRI = {w: q - weight_RI for w, q in zip(weights, quantized, strict=True)}
        for corpus, one in inputs.items():
            one.add_weight_rows(scores[corpus], weight_RI, delta_SRI, (start, stop), schemes)
    for corpus, one in inputs.items():
        one.add_activations(scores[corpus], schemes)
    column = {w: i for i, w in enumerate(weights)}
    per_weight = sums.relative_error()
    energy = sums.error_SI.sum(1)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return LayerScore(
        relative_weight_error_S=_pick(per_weight, [s.weight for s in schemes], column, zero),
        weight_energy=float(sums.weight_I.sum()),
        error_energy_S=_pick(energy, [s.weight for s in schemes], column, zero),
        corpora={corpus: one.finished(samples[corpus]) for corpus, one in scores.items()},
    )


def _pick(
    values: Tensor,
    weights: Sequence[TensorScheme | None],
    column: Mapping[TensorScheme, int],
    zero: Tensor,
) -> Tensor:
    return torch.stack([zero if w is None else values[column[w]] for w in weights]).cpu()


def _tile_rows(weights: Sequence[TensorScheme]) -> int:
    rows = [w.granularity.rows for w in weights if w.granularity.kind == "block"]
    return max(rows, default=1)


def _blocks(shape: tuple[int, int], tile_rows: int) -> Iterator[tuple[int, int]]:
    out_features, in_features = shape
    step = max(1, _BLOCK_BYTES // (4 * in_features) // tile_rows) * tile_rows
    for start in range(0, out_features, step):
        yield start, min(start + step, out_features)


@dataclass(slots=True)
class _WeightSums:
    """Squares of the weight and of each rounding error, column by column, float64."""

    weight_I: Tensor
    error_SI: Tensor

    @classmethod
    def zeros(cls, in_features: int, schemes: int, device: str) -> _WeightSums:
        return cls(
            torch.zeros(in_features, dtype=torch.float64, device=device),
            torch.zeros(schemes, in_features, dtype=torch.float64, device=device),
        )

    def add(self, weight_RI: Tensor, quantized: Sequence[Tensor]) -> None:
        self.weight_I += weight_RI.square().sum(0, dtype=torch.float64)
        for i, quantized_RI in enumerate(quantized):
            error_RI = quantized_RI - weight_RI
            self.error_SI[i] += error_RI.square().sum(0, dtype=torch.float64)

    def relative_error(self) -> Tensor:
        """Mean over input columns; a zero column counts 0."""
        is_zero_I = self.weight_I == 0
        ratio_SI = self.error_SI / torch.where(is_zero_I, 1.0, self.weight_I)
        return torch.where(is_zero_I, 0.0, ratio_SI).mean(1)


@dataclass(slots=True)
class _CorpusSums:
    """What grows while blocks of rows go by."""

    row_NS: Tensor  #: sum over rows of squares, float64
    token_NS: Tensor  #: sum over tokens of squares, float64
    projection_MS: Tensor
    output_S: Tensor

    @classmethod
    def zeros(cls, samples: ChunkedSamples, schemes: int, device: str) -> _CorpusSums:
        def of(rows: int) -> Tensor:
            return torch.zeros(rows, schemes, dtype=torch.float64, device=device)

        n = samples.sequences
        return cls(of(n), of(n), of(samples.x_MCI.shape[0]), of(1)[0])

    def finished(self, samples: ChunkedSamples) -> CorpusScore:
        return CorpusScore(
            error_NS=((self.row_NS + self.token_NS) / (2 * samples.tokens)).cpu(),
            projection_MS=self.projection_MS.cpu(),
            output_mse_S=self.output_S.cpu(),
        )


@dataclass(slots=True)
class _Inputs:
    """Inputs of a layer as each activation scheme leaves them, and what they meet."""

    x: dict[TensorScheme | None, Tensor]  #: [M, C, in_features], float32
    grad_MCO: Tensor  #: float32
    backward_MCI: Tensor  #: W^T g, grows with the rows, float32
    sequences: int
    output_tokens: Tensor  #: which of the M * C tokens the output error is taken over

    @classmethod
    def of(
        cls,
        samples: ChunkedSamples,
        schemes: Sequence[Scheme],
        *,
        static_amax: float | None,
        device: str,
        name: str,
    ) -> _Inputs:
        x_MCI = samples.x_MCI.to(device=device, dtype=torch.float32)
        x: dict[TensorScheme | None, Tensor] = {None: x_MCI}
        for scheme in dict.fromkeys(s.activation for s in schemes):
            if scheme is not None:
                x[scheme] = fake_quantize_activation(
                    x_MCI, scheme, static_amax=static_amax, name=name
                )
        used = x_MCI.flatten(0, 1).abs().amax(1).nonzero()[:, 0]
        step = max(1, len(used) // _OUTPUT_TOKENS)
        return cls(
            x=x,
            grad_MCO=samples.grad_MCO.to(device=device, dtype=torch.float32),
            backward_MCI=torch.zeros_like(x_MCI),
            sequences=samples.sequences,
            output_tokens=used[::step],
        )

    def add_weight_rows(
        self,
        sums: _CorpusSums,
        weight_RI: Tensor,
        deltas: Mapping[TensorScheme, Tensor],
        rows: tuple[int, int],
        schemes: Sequence[Scheme],
    ) -> None:
        """Add what a block of rows contributes."""
        grad_MCR = self.grad_MCO[:, :, rows[0] : rows[1]]
        self.backward_MCI += grad_MCR @ weight_RI
        for activation, x_MCI in self.x.items():
            columns = [i for i, s in enumerate(schemes) if s.activation == activation and s.weight]
            if columns:
                delta_RIS = torch.stack([deltas[schemes[i].weight] for i in columns], -1)  # type: ignore[index]
                self._project(sums, columns, x_MCI, grad_MCR, delta_RIS)
        self._output_errors(sums, weight_RI, deltas, schemes)

    def _project(
        self,
        sums: _CorpusSums,
        columns: Sequence[int],
        x_MCI: Tensor,
        grad_MCR: Tensor,
        delta_RIS: Tensor,
    ) -> None:
        chunks, _, in_features = x_MCI.shape
        step = max(1, _GRADIENT_BYTES // (4 * chunks * in_features))
        for start in range(0, grad_MCR.shape[2], step):
            part_MRC = grad_MCR[:, :, start : start + step].transpose(1, 2)
            gradient_RMI = (part_MRC @ x_MCI).transpose(0, 1)
            projected_RMS = torch.bmm(gradient_RMI, delta_RIS[start : start + step])
            sums.projection_MS[:, columns] += projected_RMS.sum(0, dtype=torch.float64)
            whole_RNS = projected_RMS.unflatten(1, (self.sequences, -1)).sum(2)
            sums.row_NS[:, columns] += whole_RNS.square().sum(0, dtype=torch.float64)

    def _output_errors(
        self,
        sums: _CorpusSums,
        weight_RI: Tensor,
        deltas: Mapping[TensorScheme, Tensor],
        schemes: Sequence[Scheme],
    ) -> None:
        x = {a: x_MCI.flatten(0, 1)[self.output_tokens] for a, x_MCI in self.x.items()}
        change = {a: (x_TI - x[None]) @ weight_RI.T for a, x_TI in x.items() if a is not None}
        for i, scheme in enumerate(schemes):
            parts = [change[scheme.activation]] if scheme.activation is not None else []
            if scheme.weight is not None:
                parts.append(x[scheme.activation] @ deltas[scheme.weight].T)
            if parts:
                error_TR = torch.stack(parts).sum(0)
                sums.output_S[i] += error_TR.square().sum(dtype=torch.float64) / len(x[None])

    def add_activations(self, sums: _CorpusSums, schemes: Sequence[Scheme]) -> None:
        """Add the rounding errors of the inputs, when all rows have gone by."""
        for activation, x_MCI in self.x.items():
            if activation is None:
                continue
            columns = [i for i, s in enumerate(schemes) if s.activation == activation]
            token_MC = ((x_MCI - self.x[None]) * self.backward_MCI).sum(2, dtype=torch.float64)
            sums.projection_MS[:, columns] += token_MC.sum(1)[:, None]
            square_N = token_MC.square().reshape(self.sequences, -1).sum(1)
            sums.token_NS[:, columns] += square_N[:, None]
