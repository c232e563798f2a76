"""What changes of experts cost: margins, exchanges, and what moves the margins."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, scores_of, some_tokens
from conftest import TinyCheckpoint
from tiny_types import write_type
from torch import Tensor
from torch.nn import functional

from mofq.evidence.calibration.calibrate import run_sequence, score_seed
from mofq.evidence.calibration.capture import capture_layers
from mofq.evidence.calibration.routing import (
    Routing,
    flip_rate,
    flip_stderr,
    read_routing,
    run_margins,
)
from mofq.evidence.calibration.stats import read_stats
from mofq.exceptions import StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model

TOKENS = some_tokens(3, 24)
SEED = score_seed(0, "a", 0, 0)


def watched(folder: Path, **options: Any) -> Any:
    model = load_model(folder)
    layers = find_layers(open_checkpoint(str(folder)))
    return model, capture_layers(model, layers, routing=True, **options)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_exchange_is_the_output_with_the_next_expert_in_the_place_of_the_last(
    family: str, tiny: TinyCheckpoint
) -> None:
    model, watching = watched(tiny(family))
    block = model.get_submodule("model.layers.0.mlp")
    seen: list[Any] = []
    block.experts.register_forward_hook(lambda _m, inputs, output: seen.append((inputs, output)))
    with watching as captured:
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        exchange = captured.routers.exchanges[0]
    x_TI, index_TK, weight_TK = seen[-1][0]
    scores_TE = functional.linear(x_TI.detach(), block.gate.weight)
    ordered_TE = scores_TE.argsort(dim=-1, descending=True)
    count = index_TK.shape[-1]
    exchanged_TK = torch.where(
        index_TK == ordered_TE[:, [count - 1]], ordered_TE[:, [count]], index_TK
    )
    with torch.no_grad():
        after = type(block.experts).forward(block.experts, x_TI, exchanged_TK, weight_TK)
    expected = after - seen[-1][1].detach()
    torch.testing.assert_close(exchange.difference_TI, expected, atol=1e-5, rtol=1e-3)
    top = scores_TE.sort(dim=-1, descending=True).values
    torch.testing.assert_close(exchange.margin_T, top[:, count - 1] - top[:, count])


def test_an_exchange_costs_half_the_square_of_what_the_scores_see_of_it(
    tiny: TinyCheckpoint,
) -> None:
    folder = tiny("mixtral")
    model, watching = watched(folder)
    with watching as captured:
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        exchange = captured.routers.exchanges[-1]
    plain = load_model(folder)
    seen: list[Any] = []
    experts = plain.get_submodule("model.layers.1.mlp.experts")
    experts.register_forward_hook(lambda _m, _i, output: seen.append(output.requires_grad_()))
    logits_TV = plain(TOKENS[:1]).logits[0]
    (grad_TI,) = torch.autograd.grad((logits_TV * scores_of(logits_TV, sequence=0)).sum(), seen)
    expected_T = (grad_TI * exchange.difference_TI).sum(-1).square() / 2
    torch.testing.assert_close(exchange.cost_T, expected_T, rtol=1e-3, atol=1e-9)


def test_gains_are_squares_of_gradients_of_the_margins_by_the_weights(
    tiny: TinyCheckpoint,
) -> None:
    model, watching = watched(tiny("mixtral"))
    name = "model.layers.0.self_attn.o_proj"
    weight = model.get_submodule(name).weight
    with watching as captured:
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        routing = run_margins(captured, seed=7)
        of_scores = len(captured.grads[name])
        captured.clear()
        weight.requires_grad_(True)
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        (grad_OI,) = torch.autograd.grad(captured.routers.objective(seed=7), [weight])
    assert routing.gains[name] == pytest.approx(float(grad_OI.square().sum()), rel=0.02)
    assert of_scores == 1
    experts = [one for one in routing.gains if ".experts." in one]
    # Behind the experts of the last decoder layer there is no router.
    assert {one.partition(".block_sparse_moe")[0] for one in experts} == {"model.layers.0"}


def test_every_sequence_has_its_routing_and_a_stopped_run_makes_what_is_missing(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny("mixtral")
    stats = calibrate_folder(folder, tmp_path / "a", {"a": TOKENS}, kept=1, routing=True)
    files = stats.routing_files("a")
    assert [path.name for path in files] == [f"routing-0000{n}.json" for n in range(3)]
    assert all(read_routing(path).cost > 0 for path in files)
    before = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(StatsError, match="found no file"):
        read_stats(stats.folder)
    (stats.folder / "stats.json").unlink()
    again = calibrate_folder(folder, tmp_path / "a", {"a": TOKENS}, kept=1, routing=True)
    assert again.routing_files("a")[1].read_bytes() == before


def test_watching_routers_changes_nothing_else(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    stats = [
        calibrate_folder(tiny("mixtral"), tmp_path / str(on), {"a": TOKENS}, routing=on or None)
        for on in (True, False)
    ]
    for of in ("sequence_files", "gains_files"):
        watched_files, plain = (getattr(one, of)("a") for one in stats)
        assert [p.read_bytes() for p in watched_files] == [p.read_bytes() for p in plain]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_routers_that_choose_by_the_scores_that_they_return_are_known(
    family: str, tiny: TinyCheckpoint
) -> None:
    model, watching = watched(tiny(family))
    with watching as captured:
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
        assert len(captured.routers.exchanges) == len(routers) > 0
        routing = run_margins(captured, seed=0)
    assert routing.cost > 0
    assert any(routing.gains.values())


#: Sixteen experts in four groups, of which two are chosen from.
GROUPED = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_hidden_layers": 2}


def chosen_by_hand(scores_TE: Tensor, bias_E: Tensor, swap: str) -> tuple[Tensor, Tensor, Tensor]:
    """Experts, weights and the margin of what is swapped, as DeepSeek-V3 defines them."""
    experts, weights, margins = [], [], []
    for score_E in scores_TE:
        biased = (score_E + bias_E).tolist()
        groups = [range(4 * g, 4 * g + 4) for g in range(4)]
        best_two = [sum(sorted(biased[e] for e in group)[-2:]) for group in groups]
        order = sorted(range(4), key=lambda g: -best_two[g])
        if swap == "group":
            order[1], order[2] = order[2], order[1]
            margins.append(best_two[order[2]] - best_two[order[1]])
        allowed = [e for g in order[:2] for e in groups[g]]
        ranked = sorted(allowed, key=lambda e: -biased[e])
        if swap == "expert":
            ranked[1], ranked[2] = ranked[2], ranked[1]
            margins.append(biased[ranked[2]] - biased[ranked[1]])
        experts.append(ranked[:2])
        weights.append((score_E[ranked[:2]] / score_E[ranked[:2]].sum()).tolist())
    return torch.tensor(experts), torch.tensor(weights), torch.tensor(margins)


@pytest.mark.parametrize(("swap", "number"), [("group", 0), ("expert", 1)])
def test_a_biased_router_with_groups_exchanges_groups_and_experts_as_by_hand(
    swap: str, number: int, tiny: TinyCheckpoint
) -> None:
    model, watching = watched(tiny("deepseek_v3", routed_scaling_factor=1.0, **GROUPED))
    block = model.get_submodule("model.layers.1.mlp")
    assert block.gate.e_score_correction_bias.abs().min() > 0
    seen: list[Any] = []
    block.experts.register_forward_hook(lambda _m, inputs, output: seen.append((inputs, output)))
    with watching as captured:
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        exchange = captured.routers.exchanges[number]
    x_TI = seen[-1][0][0].detach()
    scores_TE = functional.linear(x_TI, block.gate.weight.float()).sigmoid()
    index_TK, weight_TK, margin_T = chosen_by_hand(
        scores_TE, block.gate.e_score_correction_bias, swap
    )
    torch.testing.assert_close(exchange.margin_T, margin_T, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        after = type(block.experts).forward(block.experts, x_TI, index_TK, weight_TK)
    expected = after - seen[-1][1].detach()
    torch.testing.assert_close(exchange.difference_TI, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_router_that_adds_biases_is_known_by_what_it_chooses_by(
    family: str, tiny: TinyCheckpoint
) -> None:
    model, watching = watched(tiny(family))
    with watching as captured:
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        (exchange,) = captured.routers.exchanges  # of one group no other may be chosen
        routing = run_margins(captured, seed=0)
    assert (exchange.margin_T >= 0).all()
    assert routing.cost > 0
    assert any(routing.gains.values())


def test_a_token_without_another_candidate_has_no_exchange(tiny: TinyCheckpoint) -> None:
    """Two groups of two experts, one of them chosen, and both of its experts."""
    model, watching = watched(tiny("deepseek_v3", n_group=2, topk_group=1))
    with watching as captured:
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        of_groups, of_experts = captured.routers.exchanges
        routing = run_margins(captured, seed=0)
    assert (of_experts.density_cost_T == 0).all()
    assert routing.cost == pytest.approx(float(of_groups.density_cost_T.mean())) != 0
    assert all(map(math.isfinite, routing.gains.values()))


def test_of_a_router_that_takes_no_largest_scores_nothing_is_known(tmp_path: Path) -> None:
    """One of Phi-3.5's takes an expert, and the next among those that are left."""
    model, watching = watched(write_type("phimoe", tmp_path / "model"))
    with watching as captured:
        run_sequence(model, TOKENS[0], [SEED], keep_graph=True)
        assert captured.routers.exchanges == []
        assert run_margins(captured, seed=0) == Routing(cost=0.0, gains={})


def test_the_forwards_of_routers_are_put_back(tiny: TinyCheckpoint) -> None:
    model, watching = watched(tiny("glm4_moe"))
    with watching:
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_rate_is_the_cost_of_exchanges_times_what_moves_margins_over_nats() -> None:
    routing = [Routing(0.2, {"a": 3.0}), Routing(0.4, {"a": 1.0, "b": 2.0})]
    assert flip_rate(routing, [5.0, 3.0], ["a", "b"]) == pytest.approx(0.3 * 6 / 8 / math.pi)
    assert flip_rate(routing, [5.0, 3.0], ["c"]) == 0.0
    assert flip_rate(routing, [0.0, 0.0], ["a"]) == 0.0


def test_the_noise_of_changes_is_what_leaving_out_one_sequence_moves() -> None:
    routing = [Routing(1.0, {"a": 1.0}), Routing(3.0, {"a": 1.0})]
    # The root of the mean cost is √2; without one of them √3 and √1, half as far from their mean
    # as from one another.
    expected = (math.sqrt(3) - 1) / 2 / math.sqrt(2)
    assert flip_stderr(routing, [1.0, 1.0], ["a"]) == pytest.approx(expected)
    assert flip_stderr([Routing(1.0, {"a": 2.0})] * 3, [1.0] * 3, ["a"]) == pytest.approx(0.0)
    assert flip_stderr(routing[:1], [1.0], ["a"]) is None
    assert flip_stderr(routing, [1.0, 1.0], ["b"]) is None


def test_a_damaged_routing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "routing-00000.json"
    path.write_text(json.dumps({"cost": -1.0, "gains": {}}))
    with pytest.raises(StatsError, match="cost"):
        read_routing(path)
