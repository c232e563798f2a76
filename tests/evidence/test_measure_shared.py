"""Layers that read the very same inputs: what rounding those does to all of them together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_measure_score import (
    IN,
    LENGTH,
    OUT,
    SCHEMES,
    WEIGHT,
    normal,
    prepare,
    routed,
    score_layer,
    some_samples,
)

from mofq.evidence.calibration.sequence_file import LayerSamples
from mofq.evidence.measure.score import LayerScore, with_shared_inputs
from mofq.model.layers import LinearLayer
from mofq.numbers.quantize import fake_quantize_activation

OTHER = (normal(OUT, IN, seed=9) / 10).bfloat16().float()
AMAX = max(float(some_samples(seed=seed).x_TI.abs().max()) for seed in (1, 2))


def pair_of(*, shared: bool, tokens: list[int] | None = None) -> dict[str, LayerScore]:
    """Two layers over two sequences, with gradients of their own."""
    scores = {}
    for name, weight_OI in (("gate", WEIGHT), ("up", OTHER)):
        sequences = [samples(name, seed, shared=shared, tokens=tokens) for seed in (1, 2)]
        scores[name] = score_layer(prepare(weight_OI, {"a": sequences}))
    return scores


def samples(name: str, seed: int, *, shared: bool, tokens: list[int] | None = None) -> LayerSamples:
    one = some_samples(seed=seed)
    if name == "up":
        grad_DTO = some_samples(seed=seed + 50).grad_DTO + one.grad_DTO
        one = LayerSamples(one.x_TI, grad_DTO, None)
    if tokens is not None:
        one = routed(one, tokens)
    return replace(one, source="gate" if shared else name)


def together(scheme: int, seed: int, tokens: list[int]) -> float:
    """The definition: the change of both outputs at a token, then its square."""
    activation = SCHEMES[scheme].activation
    assert activation is not None
    total = 0.0
    gate, up = (samples(name, seed, shared=True, tokens=tokens) for name in ("gate", "up"))
    x_TI = gate.x_TI.float()
    delta_TI = fake_quantize_activation(x_TI, activation, static_amax=AMAX) - x_TI
    for t in range(len(tokens)):
        change = 0.0
        for one, weight_OI in ((gate, WEIGHT), (up, OTHER)):
            move_O = weight_OI.double() @ delta_TI[t].double()
            change += float(one.grad_DTO[0, t].double() @ move_O)
        total += change**2
    return total / (2 * LENGTH)


def error_of(scores: dict[str, LayerScore], scheme: int) -> torch.Tensor:
    return torch.stack([one.corpora["a"].error_NS[:, scheme] for one in scores.values()]).sum(0)


@pytest.mark.parametrize("tokens", [list(range(LENGTH)), [0, 5, 63, 64, 99]])
def test_rounded_inputs_move_all_layers_that_share_them_at_once(tokens: list[int]) -> None:
    found = with_shared_inputs(pair_of(shared=True, tokens=tokens), ())
    for scheme, one in enumerate(SCHEMES):
        if one.weight is None and one.activation is not None:
            expected_N = [together(scheme, seed, tokens) for seed in (1, 2)]
            assert error_of(found, scheme).tolist() == pytest.approx(expected_N, rel=2e-4)


def test_the_weights_part_is_that_of_each_layer_by_itself() -> None:
    alone = pair_of(shared=True)
    found = with_shared_inputs(alone, ())
    names = [one.name for one in SCHEMES]
    inputs_only = names.index("bf16+int8.token")
    added_N = error_of(found, inputs_only) - error_of(alone, inputs_only)
    assert (added_N.abs() > 0.01 * error_of(alone, inputs_only)).all()
    for scheme, one in enumerate(SCHEMES):
        expected_N = error_of(alone, scheme)
        if one.activation == SCHEMES[inputs_only].activation:
            expected_N = expected_N + added_N
        if one.activation is None or one.activation == SCHEMES[inputs_only].activation:
            torch.testing.assert_close(error_of(found, scheme), expected_N)


def expert_layer(name: str, half: str) -> LinearLayer:
    return LinearLayer(
        name=name,
        tensor="",
        out_features=OUT,
        in_features=IN,
        dtype="BF16",
        module=f"experts.{name}",
        shares_scale=f"experts.{name}.{half}",
    )


def experts_of(tokens: dict[str, list[int]]) -> dict[str, LayerScore]:
    """Layers that each see some tokens of the same two sequences, by inputs of their own."""
    scores = {}
    for name, weight_OI in (("gate", WEIGHT), ("up", OTHER)):
        sequences = [
            replace(routed(samples(name, seed, shared=True), tokens[name]), source=name)
            for seed in (1, 2)
        ]
        scores[name] = score_layer(prepare(weight_OI, {"a": sequences}))
    return scores


def test_experts_of_a_token_are_moved_by_one_rounding_of_it() -> None:
    tokens = {"gate": [0, 5, 63, 64, 99], "up": [1, 5, 64, 70]}
    both, alone = [5, 64], {"gate": [0, 63, 99], "up": [1, 70]}
    layers = [expert_layer(name, "gate_up") for name in tokens]
    found = with_shared_inputs(experts_of(tokens), layers)
    apart = with_shared_inputs(experts_of(tokens), [expert_layer(name, "down") for name in tokens])
    by_itself = experts_of({name: alone[name] for name in tokens})
    for scheme, one in enumerate(SCHEMES):
        if one.weight is None and one.activation is not None:
            of_both_N = torch.tensor([together(scheme, seed, both) for seed in (1, 2)])
            expected_N = (error_of(by_itself, scheme) + of_both_N).tolist()
            assert error_of(found, scheme).tolist() == pytest.approx(expected_N, rel=2e-4)
            assert error_of(apart, scheme).tolist() != pytest.approx(expected_N, rel=1e-2)


def test_layers_with_inputs_of_their_own_are_left_as_they_are() -> None:
    alone = pair_of(shared=False)
    found = with_shared_inputs(alone, ())
    for name, score in alone.items():
        assert torch.equal(found[name].corpora["a"].error_NS, score.corpora["a"].error_NS)
