"""Scores of one layer against a slow account of the same sums, token by token in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import pytest
import torch
from number_cases import trained_like_weight
from rounding import apart
from torch import Tensor

from mofq.evidence.calibration.sequence_file import LayerSamples
from mofq.evidence.measure import layer_inputs as prepared
from mofq.evidence.measure import schedule
from mofq.evidence.measure import score as scoring
from mofq.evidence.measure.layer_inputs import PreparedLayer, prepare_layer
from mofq.evidence.measure.samples import arrange_samples
from mofq.evidence.measure.schedule import score_layers
from mofq.evidence.measure.score import BlockSums, LayerScore, layer_score, score_rows
from mofq.exceptions import SchemeError
from mofq.numbers.quantize import fake_quantize_activation, fake_quantize_weight
from mofq.numbers.schemes import Scheme, parse_scheme

OUT, IN, LENGTH = 40, 64, 100  # a sequence is a chunk of 64 tokens and one of 36
SCHEMES = tuple(
    parse_scheme(name)
    for name in (
        "bf16",
        "int4.channel",
        "int8.channel+int8.token",
        "int4.g32.asym",
        "bf16+fp8_e4m3.token",
        "int4.channel+int8.token",
        "fp8_e4m3.channel+fp8_e4m3.token",
        "bf16+int8.token",
        "nvfp4",
        "int4.block8@mse",
        "int8.tensor+int8.tensor",
    )
)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_samples(length: int = LENGTH, *, draws: int = 1, seed: int = 0) -> LayerSamples:
    """A sequence with a massive channel and a massive token."""
    x_TI = normal(length, IN, seed=seed)
    x_TI[:, 3] *= 30
    x_TI[0] *= 20
    grad_DTO = normal(draws, length, OUT, seed=seed + 1000) / 10
    return LayerSamples(x_TI.bfloat16(), grad_DTO.bfloat16(), None)


def routed(samples: LayerSamples, token_T: Sequence[int]) -> LayerSamples:
    """What an expert sees of a sequence."""
    index = torch.tensor(token_T)
    return LayerSamples(samples.x_TI[index], samples.grad_DTO[:, index], index)


@dataclass(frozen=True)
class Expected:
    error_NS: list[list[float]]
    output_mse_S: list[float]


def samples_of(sequences: Sequence[LayerSamples | None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and gradients of every sequence and draw, float64."""
    seen = next(one for one in sequences if one is not None)
    for one in sequences:
        for draw in range(len(seen.grad_DTO)):
            if one is None:
                yield torch.zeros(0, IN).double(), torch.zeros(0, OUT).double()
            else:
                yield one.x_TI.double(), one.grad_DTO[draw].double()


def expected_score(
    weight_OI: Tensor,
    sequences: Sequence[LayerSamples | None],
    schemes: Sequence[Scheme],
    *,
    static_amax: float,
    length: int = LENGTH,
) -> Expected:
    """The definitions, written out: rows for weights, tokens for inputs."""
    errors, outputs = [], []
    for x_TI, grad_TO in samples_of(sequences):
        of_schemes = [_sample(weight_OI, x_TI, grad_TO, scheme, static_amax) for scheme in schemes]
        errors.append([(rows + tokens) / (2 * length) for rows, tokens, _ in of_schemes])
        outputs.append([squares for _, _, squares in of_schemes])
    # An expert's error is averaged over all tokens, and is 0 at those that go elsewhere.
    is_routed = any(one is not None and one.token_T is not None for one in sequences)
    seen = sum(len(x_TI) for x_TI, _ in samples_of(sequences))
    tokens = length * len(errors) if is_routed else seen
    mse = [sum(one[s] for one in outputs) / tokens for s in range(len(schemes))]
    return Expected(errors, mse)


def _sample(
    weight_OI: Tensor,
    x_TI: Tensor,
    grad_TO: Tensor,
    scheme: Scheme,
    static_amax: float,
) -> tuple[float, float, float]:
    delta_OI = torch.zeros_like(weight_OI).double()
    if scheme.weight is not None:
        quantized = fake_quantize_weight(
            weight_OI, scheme.weight, tensor_amax=float(weight_OI.abs().max())
        )
        delta_OI = quantized.double() - weight_OI.double()
    changed_TI = x_TI
    if scheme.activation is not None:
        changed_TI = fake_quantize_activation(
            x_TI.float(), scheme.activation, static_amax=static_amax
        ).double()
    row_O = torch.zeros(OUT).double()
    tokens = squares = 0.0
    for x_I, changed_I, grad_O in zip(x_TI, changed_TI, grad_TO, strict=True):
        from_weight_O = grad_O * (delta_OI @ changed_I)
        from_input = float(grad_O @ (weight_OI.double() @ (changed_I - x_I)))
        row_O += from_weight_O
        tokens += from_input**2
        moved_O = (weight_OI.double() + delta_OI) @ changed_I - weight_OI.double() @ x_I
        squares += float(moved_O @ moved_O)
    return float(row_O @ row_O), tokens, squares


def prepare(
    weight_OI: Tensor,
    corpora: Mapping[str, Sequence[LayerSamples | None]],
    schemes: Sequence[Scheme] = SCHEMES,
    *,
    length: int = LENGTH,
    draws: int = 1,
) -> PreparedLayer:
    samples = {
        name: arrange_samples(sequences, draws=draws, sequence_length=length)
        for name, sequences in corpora.items()
    }
    return prepare_layer(
        lambda start, stop: weight_OI[start:stop].bfloat16(),
        (weight_OI.shape[0], weight_OI.shape[1]),
        schemes,
        samples={name: one for name, one in samples.items() if one is not None},
        tensor_amax=float(weight_OI.abs().max()),
        name="layer",
    )


def score_layer(layer: PreparedLayer) -> LayerScore:
    """One block after another, on this thread."""
    blocks = [
        score_rows(layer, layer.read_rows(start, stop), start=start) for start, stop in layer.blocks
    ]
    return layer_score(layer, reduce(add, blocks))


def assert_scores(found: LayerScore, corpus: str, expected: Expected) -> None:
    score = found.corpora[corpus]
    error_NS = torch.tensor(expected.error_NS, dtype=torch.float64)
    torch.testing.assert_close(score.error_NS, error_NS, rtol=2e-4, atol=0)
    output_S = torch.tensor(expected.output_mse_S, dtype=torch.float64)
    torch.testing.assert_close(score.output_mse_S, output_S, rtol=2e-4, atol=0)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, the last one of 8, and outer products of 3 rows and a chunk at a time."""
    monkeypatch.setattr(prepared, "_BLOCK_ELEMENTS", 16 * IN)
    monkeypatch.setattr(prepared, "_MOST_BLOCK_ELEMENTS", 16 * IN)
    monkeypatch.setattr(prepared, "_BLOCK_ROWS", 8)
    monkeypatch.setattr(scoring, "_RUN_BYTES", 1)
    monkeypatch.setattr(scoring, "_ROWS", 3)


WEIGHT = trained_like_weight(OUT, IN)


def largest_input(*sequences: LayerSamples) -> float:
    return max(float(one.x_TI.abs().max()) for one in sequences)


def test_every_number_equals_the_definition_summed_token_by_token() -> None:
    sequences = [some_samples(seed=1), some_samples(seed=2)]
    layer = prepare(WEIGHT, {"a": sequences})
    assert layer.static_amax == largest_input(*sequences)
    expected = expected_score(WEIGHT, sequences, SCHEMES, static_amax=largest_input(*sequences))
    assert_scores(score_layer(layer), "a", expected)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_rows_and_pieces_of_outer_products_add_up() -> None:
    sequences = [some_samples(seed=1), some_samples(seed=2)]
    layer = prepare(WEIGHT, {"a": sequences})
    assert layer.blocks == ((0, 16), (16, 32), (32, 40))
    expected = expected_score(WEIGHT, sequences, SCHEMES, static_amax=largest_input(*sequences))
    assert_scores(score_layer(layer), "a", expected)


def test_each_corpus_has_its_own_scores_and_all_share_the_static_scale() -> None:
    a = [some_samples(seed=1)]
    b = [some_samples(seed=2), some_samples(seed=3)]
    b[1].x_TI.mul_(3)
    found = score_layer(prepare(WEIGHT, {"a": a, "b": b}))
    amax = largest_input(*a, *b)
    assert found.static_amax == amax
    assert_scores(found, "a", expected_score(WEIGHT, a, SCHEMES, static_amax=amax))
    assert_scores(found, "b", expected_score(WEIGHT, b, SCHEMES, static_amax=amax))


def test_every_draw_of_labels_is_a_sample_of_its_own() -> None:
    sequences = [some_samples(draws=3, seed=1), some_samples(draws=3, seed=2)]
    found = score_layer(prepare(WEIGHT, {"a": sequences}, draws=3))
    assert found.corpora["a"].error_NS.shape == (6, len(SCHEMES))
    expected = expected_score(WEIGHT, sequences, SCHEMES, static_amax=largest_input(*sequences))
    assert_scores(found, "a", expected)


@pytest.mark.parametrize("length", [16, 64, 128])
def test_sequences_of_any_length_are_per_token(length: int) -> None:
    sequences = [some_samples(length, seed=1)]
    amax = largest_input(*sequences)
    found = score_layer(prepare(WEIGHT, {"a": sequences}, length=length))
    assert_scores(
        found, "a", expected_score(WEIGHT, sequences, SCHEMES, static_amax=amax, length=length)
    )


def test_an_expert_is_scored_by_its_own_tokens_over_the_length_of_the_sequence() -> None:
    sequences = [
        routed(some_samples(seed=1), [0, 3, 17, 63, 64, 65, 99]),
        None,
        routed(some_samples(seed=2), [70]),
    ]
    amax = largest_input(*(one for one in sequences if one is not None))
    found = score_layer(prepare(WEIGHT, {"a": sequences}))
    assert (found.corpora["a"].error_NS[1] == 0).all()
    assert_scores(found, "a", expected_score(WEIGHT, sequences, SCHEMES, static_amax=amax))


def test_a_layer_whose_inputs_are_all_zero_loses_nothing() -> None:
    dead = some_samples(seed=1)
    dead.x_TI.zero_()
    score = score_layer(prepare(WEIGHT, {"a": [dead]})).corpora["a"]
    assert (score.error_NS == 0).all()
    assert (score.output_mse_S == 0).all()


def test_the_output_error_is_taken_over_evenly_spaced_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepared, "_OUTPUT_TOKENS", 20)
    samples = some_samples(seed=1)
    kept = LayerSamples(samples.x_TI[::5], samples.grad_DTO[:, ::5], None)
    found = score_layer(prepare(WEIGHT, {"a": [samples]})).corpora["a"].output_mse_S
    expected = expected_score(
        WEIGHT, [kept], SCHEMES, static_amax=largest_input(samples)
    ).output_mse_S
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=2e-4, atol=0)


def test_the_unquantized_scheme_has_no_error_at_all() -> None:
    found = score_layer(prepare(WEIGHT, {"a": [some_samples()]}))
    score = found.corpora["a"]
    assert found.relative_weight_error_S[0] == 0
    assert found.error_energy_S[0] == 0
    assert (score.error_NS[:, 0] == 0).all()
    assert score.output_mse_S[0] == 0


def relative_errors(weight_OI: Tensor, *names: str) -> list[float]:
    schemes = [parse_scheme(name) for name in names]
    errors: list[float] = score_layer(
        prepare(weight_OI, {}, schemes)
    ).relative_weight_error_S.tolist()
    return errors


def test_the_relative_weight_error_is_the_mean_over_columns_and_a_zero_column_counts_0() -> None:
    # int4.channel: the largest magnitude is 7 and so the scale is 1 in every row.
    weight_OI = torch.tensor([[7.0, 0.25, 0.0, 2.5], [-7.0, 1.0, 0.0, 1.5]])
    # Rounded: 0.25 to 0, 2.5 to 2 and 1.5 to 2 (ties to even).
    columns = [0.0, 0.0625 / 1.0625, 0.0, 0.5 / 8.5]
    assert relative_errors(weight_OI, "int4.channel") == [pytest.approx(sum(columns) / 4)]


def test_powers_of_two_moved_into_the_norm_change_no_relative_weight_error() -> None:
    # Far from the subnormal and the largest numbers, where E5M2 is the same in every binade.
    weight_OI = normal(OUT, IN, seed=1).clamp(0.25, 4).bfloat16().float()
    moved_OI = weight_OI * torch.exp2(torch.arange(IN) % 5 - 2.0)
    names = ("fp8_e5m2.unscaled", "bf16")
    assert relative_errors(moved_OI, *names) == relative_errors(weight_OI, *names)
    assert relative_errors(weight_OI, *names)[0] > 1e-4


def test_energies_are_sums_of_squares_over_all_blocks(small_blocks: None) -> None:
    found = score_layer(prepare(WEIGHT, {}))
    assert found.static_amax is None
    rounded = apart(WEIGHT.shape[0])  # squares of a column are added in float32
    assert found.weight_energy == pytest.approx(float(WEIGHT.double().square().sum()), rel=rounded)
    for scheme, energy in zip(SCHEMES, found.error_energy_S.tolist(), strict=True):
        if scheme.weight is None:
            assert energy == 0
            continue
        quantized = fake_quantize_weight(
            WEIGHT, scheme.weight, tensor_amax=float(WEIGHT.abs().max())
        )
        expected = float((quantized.double() - WEIGHT.double()).square().sum())
        assert energy == pytest.approx(expected, rel=rounded)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(
    threads: int, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [prepare(WEIGHT, {"a": [some_samples(seed=seed)]}) for seed in range(4)]
    expected = [score_layer(layer) for layer in layers]
    seen: set[int] = set()

    def watched(layer: PreparedLayer, rows_RI: Tensor, *, start: int) -> BlockSums:
        seen.add(torch.get_num_threads())
        return score_rows(layer, rows_RI, start=start)

    monkeypatch.setattr(schedule, "score_rows", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = list(score_layers(layers))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == {1}  # an operation that is split over threads rounds its sums differently
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.corpora["a"].error_NS, other.corpora["a"].error_NS)
        assert torch.equal(one.relative_weight_error_S, other.relative_weight_error_S)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named_by_its_place_in_the_layer(
    value: float, small_blocks: None
) -> None:
    weight_OI = WEIGHT.clone()
    weight_OI[21, 5] = value
    for schemes in (SCHEMES, SCHEMES[:1]):
        layer = prepare(weight_OI, {}, schemes)
        with pytest.raises(SchemeError, match=rf"layer: needed finite.*{value} at \[21, 5\]"):
            score_layer(layer)
        with pytest.raises(SchemeError, match=r"at \[21, 5\]"):
            list(score_layers([prepare(WEIGHT, {}), layer, prepare(WEIGHT, {})]))


def test_blocks_hold_whole_tiles_and_a_bounded_number_of_elements() -> None:
    for shape in ((576, 576), (1536, 576), (28672, 8192), (8192, 28672), (100, 128)):
        layer = prepare_layer(lambda *_: torch.empty(0), shape, SCHEMES[:2], samples={})
        assert [start for start, _ in layer.blocks[1:]] == [stop for _, stop in layer.blocks[:-1]]
        assert layer.blocks[-1][1] == shape[0]
        for start, stop in layer.blocks:
            assert start % 64 == 0
            assert (stop - start) * shape[1] <= max(2**20, 64 * shape[1])
    tiled = prepare_layer(
        lambda *_: torch.empty(0), (512, 4096), [parse_scheme("fp8_e4m3.block128")], samples={}
    )
    assert all(start % 128 == 0 for start, _ in tiled.blocks)
