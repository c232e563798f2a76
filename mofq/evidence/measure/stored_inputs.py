"""The inputs of a layer under every activation scheme, in the bytes of their codes.

Float32 numbers of 4,096 tokens and 28,672 channels are 0.5 GB for each scheme. What is kept is
what a code is worth (a byte where it is an integer, else two) and the scales, and chunks of tokens
are multiplied out as they are needed: the numbers are those of `fake_quantize_activation`,
exactly (a zero has no sign). Layers that read the same inputs (q, k and v; gate and up) share what
is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mofq.evidence.measure.magnitudes import ExtentSums, tokens_extent
from mofq.evidence.measure.samples import ChunkedSamples
from mofq.evidence.measure.worker_threads import Workers, run_all
from mofq.numbers.formats import FloatFormat, IntFormat
from mofq.numbers.quantize import fake_quantize_activation
from mofq.numbers.quantize.activations import quantize_activation
from mofq.numbers.quantize.tiles import code_values
from mofq.numbers.schemes import TensorScheme

#: Elements that are quantized at once, about.
_ELEMENTS = 2**20
#: The same on a GPU.
_GPU_ELEMENTS = 2**26
#: Bits of the significand of bfloat16.
_BFLOAT16_BITS = 8


@dataclass(frozen=True, slots=True)
class StoredInputs:
    """Chunks of inputs as one activation scheme leaves them, or as they are."""

    values_MCI: Tensor  #: what the codes are worth: int8, bfloat16 or float32
    multiplier_MCG: Tensor | None  #: of each group of channels, float32; None: 1

    def chunks(self, start: int, stop: int, *, out: Tensor | None = None) -> Tensor:
        """Chunks ``start`` to ``stop``, [stop - start, C, in_features], float32.

        Args:
            start: First chunk.
            stop: One past the last.
            out: Where they are written, float32 of at least that many chunks.
        """
        values_MCI, multiplier = self.values_MCI[start:stop], self.multiplier_MCG
        found = torch.empty_like(values_MCI, dtype=torch.float32) if out is None else out
        found = found[: stop - start].copy_(values_MCI)
        return found if multiplier is None else _multiply(found, multiplier[start:stop])

    def tokens(self, index_T: Tensor) -> Tensor:
        """Some of the M * C tokens, [T, in_features], float32."""
        found = self.values_MCI.flatten(0, 1)[index_T].float()
        multiplier = self.multiplier_MCG
        return found if multiplier is None else _multiply(found, multiplier.flatten(0, 1)[index_T])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        multiplier = self.multiplier_MCG
        return (self.values_MCI,) if multiplier is None else (self.values_MCI, multiplier)


def _multiply(values: Tensor, multiplier: Tensor) -> Tensor:
    values.unflatten(-1, (multiplier.shape[-1], -1)).mul_(multiplier[..., None])
    return values


@dataclass(slots=True)
class SharedInputs:
    """The inputs that were prepared last of each corpus and part, for layers that share them."""

    _known: dict[tuple[str, str], _Prepared] = field(default_factory=dict)

    def of(self, corpus: str, part: str, samples: ChunkedSamples, *, device: str) -> _Prepared:
        """What is known of the inputs of a layer; what is missing can be added."""
        known = self._known.get((corpus, part))
        if known is None or not _is_same(known.x_MCI, samples.x_MCI):
            plain = StoredInputs(samples.x_MCI.to(device), None)
            known = self._known[corpus, part] = _Prepared(samples.x_MCI, {None: plain})
        return known


@dataclass(slots=True)
class _Prepared:
    x_MCI: Tensor  #: kept, so that its memory holds nothing else
    stored: dict[TensorScheme | None, StoredInputs]
    extent: ExtentSums | None = None
    static_amax: float | None = None

    def extent_of(self, samples: ChunkedSamples, *, workers: Workers | None) -> ExtentSums:
        """Extent of the inputs, taken once."""
        if self.extent is None:
            x_TI = self.stored[None].values_MCI.flatten(0, 1)
            is_token_T = samples.is_token_MC.flatten()
            if not bool(is_token_T.all()):
                x_TI = x_TI[is_token_T.to(x_TI.device)]
            self.extent = tokens_extent(x_TI, workers=workers)
        return self.extent

    def under(
        self,
        activations: Iterable[TensorScheme],
        samples: ChunkedSamples,
        *,
        static_amax: float | None,
        name: str,
        workers: Workers | None,
    ) -> Mapping[TensorScheme | None, StoredInputs]:
        """The inputs as they are and under some schemes; each is found once.

        Raises:
            SchemeError: A scheme does not fit the inputs.
        """
        if static_amax != self.static_amax:  # of other corpora too
            self.stored = {None: self.stored[None]}
            self.static_amax = static_amax
        asked = dict.fromkeys(activations)
        for scheme in asked:
            if scheme not in self.stored:
                self.stored[scheme] = _store(
                    self.stored[None],
                    scheme,
                    sequences=samples.sequences,
                    static_amax=static_amax,
                    name=name,
                    workers=workers,
                )
        return {scheme: self.stored[scheme] for scheme in (None, *asked)}


def _is_same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape


def _store(
    plain: StoredInputs,
    scheme: TensorScheme,
    *,
    sequences: int,
    static_amax: float | None,
    name: str,
    workers: Workers | None,
) -> StoredInputs:
    x_MCI = plain.values_MCI
    chunks, tokens, channels = x_MCI.shape
    is_by_token = not scheme.outliers and scheme.granularity.kind != "peg"
    values_MCI = torch.empty(
        x_MCI.shape, dtype=_dtype(scheme) if is_by_token else torch.float32, device=x_MCI.device
    )
    multiplier_MCG = None
    if is_by_token and scheme.granularity.kind != "unscaled":
        groups = channels // (scheme.granularity.columns or channels)
        multiplier_MCG = torch.empty((chunks, tokens, groups), device=x_MCI.device)
    stored = StoredInputs(values_MCI, multiplier_MCG)
    step = chunks // sequences  # whole sequences, as a model sees them
    if is_by_token:
        at_once = _ELEMENTS if x_MCI.device.type == "cpu" else _GPU_ELEMENTS
        step = max(1, at_once // max(1, tokens * channels))
    work = partial(_store_some, plain, stored, scheme, is_by_token, static_amax, name)
    ranges = ((start, min(start + step, chunks)) for start in range(0, chunks, step))
    run_all(workers, (partial(work, *some) for some in ranges))
    return stored


def _dtype(scheme: TensorScheme) -> torch.dtype:
    """The smallest that holds what every code of a scheme is worth."""
    element = scheme.element
    if isinstance(element, IntFormat) and element.bits <= _BFLOAT16_BITS:
        return torch.int8 if scheme.symmetric else torch.bfloat16
    is_short = isinstance(element, FloatFormat) and element.mantissa_bits < _BFLOAT16_BITS
    return torch.bfloat16 if is_short else torch.float32


def _store_some(
    plain: StoredInputs,
    stored: StoredInputs,
    scheme: TensorScheme,
    is_by_token: bool,
    static_amax: float | None,
    name: str,
    start: int,
    stop: int,
) -> None:
    x_MCI = plain.chunks(start, stop)
    into_MCI = stored.values_MCI[start:stop]
    x_TI = x_MCI.flatten(0, 1)
    if not is_by_token:
        rounded_TI = fake_quantize_activation(x_TI, scheme, static_amax=static_amax, name=name)
        into_MCI.copy_(rounded_TI.view(x_MCI.shape))
        return
    codes_TI, scales = quantize_activation(x_TI, scheme, static_amax=static_amax, name=name)
    multiplier_MCG = stored.multiplier_MCG
    groups = 1 if multiplier_MCG is None else multiplier_MCG.shape[-1]
    values_T1GK = code_values(codes_TI.view(len(x_TI), 1, groups, -1), scheme, scales)
    into_MCI.copy_(values_T1GK.view(x_MCI.shape))
    if multiplier_MCG is not None:
        assert scales is not None
        multiplier_TG = scales.multiplier[:, 0, :, 0]  # of a tensor, one for all
        multiplier_MCG[start:stop].copy_(
            multiplier_TG.expand(len(x_TI), -1).view(*x_MCI.shape[:2], -1)
        )
