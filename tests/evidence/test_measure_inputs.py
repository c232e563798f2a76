"""Inputs that are kept as codes are those that a scheme quantizes to, and are made once."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from mofq.evidence.calibration.sequence_file import LayerSamples
from mofq.evidence.measure import stored_inputs
from mofq.evidence.measure.layer_inputs import PreparedLayer, prepare_layer
from mofq.evidence.measure.magnitudes import ExtentSums, _crests, tokens_extent
from mofq.evidence.measure.samples import ChunkedSamples, arrange_samples
from mofq.evidence.measure.score import layer_score, score_rows
from mofq.evidence.measure.stored_inputs import SharedInputs
from mofq.evidence.measure.worker_threads import Workers
from mofq.numbers.quantize import fake_quantize_activation
from mofq.numbers.schemes import TensorScheme, parse_scheme

TOKENS, IN, OUT = 100, 64, 24
ACTIVATIONS = (
    "int8.token",
    "int8.token.asym",
    "int8.tensor",
    "int4.g16",
    "int8.peg4",
    "int8.token.out6",
    "fp8_e4m3.token",
    "fp8_e5m2.tensor",
    "fp8_e4m3.g32",
    "fp8_e4m3.unscaled",
    "nvfp4",
    "mxfp4",
    "nf4.token",
    "mx6",
)


def activation(name: str) -> TensorScheme:
    found = parse_scheme(f"bf16+{name}").activation
    assert found is not None
    return found


def samples(seed: int = 0) -> ChunkedSamples:
    """Two sequences of a whole chunk and a part of one, with a massive channel."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        x_TI = torch.randn(TOKENS, IN, generator=generator)
        x_TI[:, 3] *= 30
        grad_DTO = torch.randn(1, TOKENS, OUT, generator=generator)
        found.append(LayerSamples(x_TI.bfloat16(), grad_DTO.bfloat16(), None))
    arranged = arrange_samples(found, draws=1, sequence_length=TOKENS)
    assert arranged is not None
    return arranged


def prepare(
    one: ChunkedSamples, *names: str, shared: SharedInputs | None = None, threads: int = 0
) -> PreparedLayer:
    weight_OI = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9)).bfloat16()
    with ThreadPoolExecutor(max(1, threads)) as executor:
        return prepare_layer(
            lambda start, stop: weight_OI[start:stop],
            (OUT, IN),
            [parse_scheme(f"int8.channel+{name}") for name in names],
            samples={"a": one},
            shared=shared,
            workers=Workers(executor, threads) if threads else None,
        )


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_kept_is_what_the_scheme_quantizes_to(
    name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_inputs, "_ELEMENTS", 64 * IN)  # one chunk
    one = samples()
    layer = prepare(one, name, threads=threads)
    stored = layer.inputs["a"].x[activation(name)]
    x_NTI = one.x_MCI.float().reshape(2, -1, IN)
    expected_NTI = fake_quantize_activation(
        x_NTI, activation(name), static_amax=float(x_NTI.abs().max())
    )
    expected_MCI = expected_NTI.reshape(one.x_MCI.shape)
    assert torch.equal(stored.chunks(0, 4), expected_MCI)
    buffer = torch.empty(3, *expected_MCI.shape[1:])
    assert torch.equal(stored.chunks(1, 3, out=buffer), expected_MCI[1:3])
    index_T = torch.tensor([3, 64, 130])
    assert torch.equal(stored.tokens(index_T), expected_MCI.flatten(0, 1)[index_T])


def test_codes_of_8_bits_are_kept_in_a_byte_or_two() -> None:
    one = samples()
    x = prepare(one, "int8.token", "fp8_e4m3.token").inputs["a"].x
    assert x[None].values_MCI.data_ptr() == one.x_MCI.data_ptr()
    sizes = [stored.values_MCI.element_size() for stored in x.values()]
    assert sizes == [2, 1, 2]


def test_layers_that_read_one_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    store = stored_inputs._store

    def counted(
        plain: stored_inputs.StoredInputs, scheme: TensorScheme, **options: object
    ) -> stored_inputs.StoredInputs:
        made.append(scheme.element.name)
        return store(plain, scheme, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_inputs, "_store", counted)
    first, other = samples(), samples(seed=1)
    same = dataclasses.replace(first, grad_MCO=first.grad_MCO * 2)
    shared = SharedInputs()
    names = ("int8.token", "fp8_e4m3.tensor")
    layers = [prepare(one, *names, shared=shared) for one in (first, same, other)]
    assert made == ["int8", "fp8_e4m3"] * 2
    memory = [set(layer.memory) for layer in layers]
    assert len(memory[0] & memory[1]) == 5  # the inputs, and codes and scales of both schemes
    assert not memory[0] & memory[2]
    for one, layer in zip((first, same, other), layers, strict=True):
        rows_RI = layer.read_rows(0, OUT)
        alone = prepare(one, *names)
        [found, expected] = [
            layer_score(each, score_rows(each, rows_RI, start=0)) for each in (layer, alone)
        ]
        assert torch.equal(found.corpora["a"].error_NS, expected.corpora["a"].error_NS)


def test_the_extent_of_many_tokens_is_that_of_all_at_once() -> None:
    x_TI = torch.randn(300, 1280, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole_TI = x_TI.float()
    amax_I, square_I = whole_TI.abs().amax(0), whole_TI.square().sum(0, dtype=torch.float64)

    def numbers(extent: object) -> list[Tensor]:
        return [value for value in vars_of(extent) if isinstance(value, Tensor)]

    def vars_of(extent: object) -> list[object]:
        return [getattr(extent, name) for name in extent.__dataclass_fields__]  # type: ignore[attr-defined]

    expected = numbers(ExtentSums(300, amax_I, square_I, *_crests(whole_TI)))
    with ThreadPoolExecutor(2) as executor:
        for workers in (None, Workers(executor, 2)):
            found = numbers(tokens_extent(x_TI, workers=workers))
            assert all(map(torch.equal, found, expected))
            assert len(found) == 4
