"""A linear layer made ready for scoring: its inputs under every scheme, its weight in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mofq.evidence.fits import NO_FIT, LayerFit
from mofq.evidence.measure.gain_correction import LayerGains
from mofq.evidence.measure.magnitudes import ExtentSums
from mofq.evidence.measure.samples import ChunkedSamples, LookedUpRows
from mofq.evidence.measure.stored_inputs import SharedInputs, StoredInputs
from mofq.evidence.measure.worker_threads import Workers
from mofq.model.checkpoint.tensors import RowReader
from mofq.numbers.quantize.compiled import Kind, eager_pass
from mofq.numbers.quantize.rounding_errors import Pass, is_candidate, tile_rows
from mofq.numbers.quantize.tiles import row_blocks
from mofq.numbers.schemes import Scheme, TensorScheme

#: Elements of a block of rows, unless those were fewer rows than `_BLOCK_ROWS`; or than
#: `_PRODUCT_ROWS`, as a product of fewer is slower for each, up to so many elements.
_BLOCK_ELEMENTS, _MOST_BLOCK_ELEMENTS = 2**18, 2**20
#: The same where a block's rounding errors themselves are not kept.
_SUMS_BLOCK_ELEMENTS = 2**20
#: The same on a GPU, which has less to do between two launches of a kernel.
_GPU_BLOCK_ELEMENTS = 2**24
_BLOCK_ROWS, _PRODUCT_ROWS = 64, 128
#: At least, where rounding goes column by column: one step costs about the same for any rows.
_FEEDBACK_ROWS = 1024
#: The same on a GPU: all rows of most layers.
_GPU_FEEDBACK_ROWS = 16384
#: Tokens that the output error is taken over, evenly spaced.
_OUTPUT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Inputs:
    """One corpus's samples of a layer, the inputs as each activation scheme leaves them."""

    x: Mapping[TensorScheme | None, StoredInputs]  #: under each activation scheme
    grad_MCO: Tensor  #: bfloat16
    offset_MC: Tensor  #: each token's place in its chunk, or -1; on the CPU
    sample_T: Tensor  #: those of the M * C tokens that the output error is taken over, int64
    sequences: int  #: N
    tokens: int  #: T of one sequence
    source: str  #: the layer whose inputs these are
    gains: LayerGains | None
    lookup: LookedUpRows | None = None  #: of an embedding


@dataclass(frozen=True, slots=True)
class PreparedLayer:
    """A layer, its inputs, and where its weight is read."""

    name: str
    part: str  #: which of the layer's schemes and samples: see `mofq.evidence.measure.crossfit`
    read_rows: RowReader
    blocks: tuple[tuple[int, int], ...]  #: first row and one past the last
    in_features: int
    schemes: tuple[Scheme, ...]
    weights: tuple[TensorScheme, ...]  #: the different weight schemes, W of them
    activations: tuple[TensorScheme, ...]  #: the different activation schemes, A of them
    needs_deltas: bool  #: whether rounding errors themselves are needed, and not just their squares
    inputs: Mapping[str, Inputs]  #: corpus -> inputs
    tensor_amax: float | None
    stored_amax: float | None  #: the same for a scheme that keeps the global scale of the source
    static_amax: float | None  #: largest magnitude of all inputs; None where there are none
    input_extents: Mapping[str, ExtentSums]  #: corpus -> of its inputs
    device: str
    block_pass: Pass  #: what rounds a block by all weight schemes that are candidates
    fit: LayerFit = NO_FIT  #: for the others, which are fitted to statistics

    @property
    def memory(self) -> dict[int, int]:
        """Where inputs and fit are in memory, and how large they are there [bytes]."""
        stored = [one for inputs in self.inputs.values() for one in inputs.x.values()]
        tensors = [tensor for one in stored for tensor in one.tensors]
        tensors += [inputs.grad_MCO for inputs in self.inputs.values()]
        lookups = [inputs.lookup for inputs in self.inputs.values() if inputs.lookup is not None]
        tensors += [one.grad_NTI for one in lookups]
        if self.fit.feedback is not None:
            tensors.append(self.fit.feedback.passed_II)
            if self.fit.feedback.hessian_II is not None:
                tensors.append(self.fit.feedback.hessian_II)
        return {tensor.data_ptr(): tensor.nbytes for tensor in tensors}


def prepare_layer(
    read_rows: RowReader,
    shape: tuple[int, int],
    schemes: Sequence[Scheme],
    *,
    samples: Mapping[str, ChunkedSamples],
    part: str = "",
    tensor_amax: float | None = None,
    stored_amax: float | None = None,
    static_amax: float | None = None,
    fit: LayerFit = NO_FIT,
    device: str = "cpu",
    name: str = "weight",
    make_pass: Callable[[Kind, Sequence[TensorScheme]], Pass] = eager_pass,
    shared: SharedInputs | None = None,
    workers: Workers | None = None,
) -> PreparedLayer:
    """Quantize a layer's inputs by every activation scheme and cut its rows into blocks.

    Args:
        read_rows: Gives rows ``start`` to ``stop`` of the weight, [rows, in_features].
        shape: out_features and in_features.
        schemes: Candidates; each fits the shape.
        samples: Corpus name -> samples of this layer; may be empty.
        part: What the layer's score is found by, where it is scored in parts.
        tensor_amax: Largest magnitude of the weight and of all that share its scale.
        stored_amax: What stands for it where a scheme keeps the global scale of the source.
        static_amax: Largest magnitude of all inputs; by default that of the samples.
        fit: What the schemes are fitted to, where some are.
        device: Where the arithmetic runs.
        name: Of the layer, for messages.
        make_pass: Gives the pass of some schemes over a block, compiled or not.
        shared: Inputs of the layers before, which this one may share.
        workers: What shares the work.

    Returns:
        The layer. The blocks depend on the shape, the schemes, the kind of device and on
        whether there are samples.

    Raises:
        SchemeError: A scheme does not fit the inputs.
    """
    shared = SharedInputs() if shared is None else shared
    prepared = {
        corpus: shared.of(corpus, part, one, device=device) for corpus, one in samples.items()
    }
    extents = {
        corpus: one.extent_of(samples[corpus], workers=workers)
        for corpus, one in prepared.items()
        if one.x_MCI.shape[1]  # an embedding that is looked up alone has none
    }
    if static_amax is None:
        static_amax = max((float(one.amax_I.max()) for one in extents.values()), default=None)
    activations = tuple(dict.fromkeys(s.activation for s in schemes if s.activation is not None))
    weights = tuple(dict.fromkeys(s.weight for s in schemes if s.weight is not None))
    candidates = [weight for weight in weights if is_candidate(weight)]
    needs_deltas = bool(samples) or len(candidates) < len(weights)
    return PreparedLayer(
        name=name,
        part=part,
        read_rows=read_rows,
        blocks=_blocks(shape, weights, device=device, needs_deltas=needs_deltas),
        in_features=shape[1],
        schemes=tuple(schemes),
        weights=weights,
        activations=activations,
        needs_deltas=needs_deltas,
        inputs={
            corpus: _inputs(
                one,
                prepared[corpus].under(
                    activations, one, static_amax=static_amax, name=name, workers=workers
                ),
                out_features=shape[0],
                device=device,
            )
            for corpus, one in samples.items()
        },
        tensor_amax=tensor_amax,
        stored_amax=stored_amax,
        static_amax=static_amax,
        input_extents=extents,
        device=device,
        block_pass=make_pass("deltas" if needs_deltas else "errors", candidates),
        fit=fit.to(device),
    )


def _block_elements(in_features: int, device: str, *, needs_deltas: bool) -> int:
    if device != "cpu":
        return _GPU_BLOCK_ELEMENTS
    if not needs_deltas:
        return _SUMS_BLOCK_ELEMENTS
    return max(_BLOCK_ELEMENTS, min(_PRODUCT_ROWS * in_features, _MOST_BLOCK_ELEMENTS))


def _blocks(
    shape: tuple[int, int], weights: Sequence[TensorScheme], *, device: str, needs_deltas: bool
) -> tuple[tuple[int, int], ...]:
    """Ranges of rows of a fixed size, in whole tiles of every scheme."""
    out_features, in_features = shape
    elements = _block_elements(in_features, device, needs_deltas=needs_deltas)
    if any(weight.rounds_by_hessian for weight in weights):
        rows = _FEEDBACK_ROWS if device == "cpu" else _GPU_FEEDBACK_ROWS
        elements = max(elements, rows * in_features)
    unit = math.lcm(_BLOCK_ROWS, tile_rows(weights))
    return tuple(row_blocks(out_features, in_features, elements=elements, tile_rows=unit))


def _inputs(
    samples: ChunkedSamples,
    x: Mapping[TensorScheme | None, StoredInputs],
    *,
    out_features: int,
    device: str,
) -> Inputs:
    lookup, (chunks, tokens) = samples.lookup, samples.offset_MC.shape
    grad_MCO = samples.grad_MCO
    if not tokens:
        grad_MCO = grad_MCO.new_empty((chunks, 0, out_features))
    token_T = samples.is_token_MC.flatten().nonzero()[:, 0]
    return Inputs(
        x=x,
        grad_MCO=grad_MCO.to(device=device),
        offset_MC=samples.offset_MC,
        sample_T=token_T[:: max(1, len(token_T) // _OUTPUT_TOKENS)].to(device),
        sequences=samples.sequences,
        tokens=samples.tokens,
        source=samples.source,
        gains=samples.gains,
        lookup=None
        if lookup is None
        else LookedUpRows(lookup.row_NT.to(device), lookup.grad_NTI.to(device)),
    )
