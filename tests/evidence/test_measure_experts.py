"""Experts: what they saw, and what is said of those that saw nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import calibrate_folder, some_tokens, space_of
from conftest import TinyCheckpoint
from torch import Tensor, nn

from mofq.evidence.calibration.calibrate import sample_scores, score_seed
from mofq.evidence.calibration.sequence_file import SequenceFile
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.measure.magnitudes import tokens_extent
from mofq.evidence.measure.rows import group_rows
from mofq.evidence.measure.score import CorpusScore, LayerScore
from mofq.evidence.table import read_table
from mofq.exceptions import StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FusionGroup, LinearLayer, find_layers
from mofq.model.loading import load_model
from mofq.numbers.schemes import parse_scheme

TOKENS = some_tokens(2, 16)
#: Family -> (experts' prefix on disk, gate, up, down, decoder layers that have experts).
WORDS = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2", (0, 1)),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj", (0,)),
}


def routing(model: nn.Module, decoder_layer: int, token_T: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the experts of a decoder layer, and each token's experts."""
    seen: list[tuple[Tensor, ...]] = []
    experts = model.get_submodule(f"model.layers.{decoder_layer}.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.inference_mode():
        model(token_T[None])
    handle.remove()
    return seen[0][0].clone(), seen[0][1].clone()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", WORDS)
def test_experts_have_their_own_tokens_and_autograds_gradient_of_their_weights(
    family: str, fused: bool, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny(family, fused=fused)
    stats = calibrate_folder(folder, tmp_path, {"a": TOKENS}, draws=2)
    model = load_model(folder)
    prefix, gate, up, down, decoder_layers = WORDS[family]
    token_T = TOKENS[1]
    for index in decoder_layers:
        experts = model.get_submodule(f"model.layers.{index}.mlp.experts")
        parameters = [experts.gate_up_proj.requires_grad_(), experts.down_proj.requires_grad_()]
        hidden_TI, chosen_TK = routing(model, index, token_T)
        logits_TV = model(token_T[None]).logits[0]
        score_TV = sample_scores(logits_TV.detach(), seed=score_seed(0, "a", 1, 1))
        loss = (logits_TV * score_TV).sum()
        gate_up_EOI, down_EIO = torch.autograd.grad(loss, parameters)
        half = gate_up_EOI.shape[1] // 2
        with SequenceFile(stats.sequence_files("a")[1]) as file:
            for expert in range(4):
                routed_T = (chosen_TK == expert).any(1).nonzero()[:, 0]
                expected = {
                    gate: gate_up_EOI[expert, :half],
                    up: gate_up_EOI[expert, half:],
                    down: down_EIO[expert],
                }
                for word, gradient in expected.items():
                    found = file.read(f"model.layers.{index}.{prefix}.{expert}.{word}")
                    if not len(routed_T):
                        assert found is None
                        continue
                    assert found is not None
                    assert torch.equal(found.token_T, routed_T)
                    if word != down:
                        assert torch.equal(found.x_TI, hidden_TI[routed_T].bfloat16())
                    product = found.grad_DTO[1].double().T @ found.x_TI.double()
                    assert (product - gradient).norm() < 2**-7 * gradient.norm()


def test_experts_that_no_token_reached_are_named_for_each_corpus(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    # Two tokens choose two of four experts each.
    few, many = some_tokens(1, 2, seed=3), some_tokens(64, 2)
    folder = tiny("mixtral")
    stats = calibrate_folder(folder, tmp_path, {"few": few, "many": many})
    model = load_model(folder)
    unseen = []
    for index in (0, 1):
        _, chosen_TK = routing(model, index, few[0])
        missing = set(range(4)) - set(chosen_TK.flatten().tolist())
        prefix = f"model.layers.{index}.block_sparse_moe.experts"
        unseen += [f"{prefix}.{e}.{word}" for e in sorted(missing) for word in ("w1", "w3", "w2")]
    assert unseen
    assert stats.unseen == {"few": tuple(unseen)}
    assert read_stats(tmp_path).unseen == stats.unseen


def test_a_table_of_experts_without_tokens_has_no_false_zero(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny("mixtral")
    stats = calibrate_folder(folder, tmp_path / "stats", {"few": some_tokens(1, 2, seed=3)})
    checkpoint = open_checkpoint(str(folder))
    name = "int4.channel+fp8_e4m3.tensor"
    path = tmp_path / "table.jsonl"
    measure(checkpoint, find_layers(checkpoint), space_of(name), table_path=path, stats=stats)
    by_group = read_table(path).rows_of("kl_nats_per_token", "few")
    assert by_group.keys() == {group.name for group in find_layers(checkpoint).groups}
    for rows in by_group.values():
        row = next(row for row in rows if row.scheme == name)
        assert row.error > 0
        assert row.static_amax is not None
        # A static scale of zero would erase whatever reaches the expert in use.
        assert min(row.static_amax.values()) > 0


def expert(number: int, word: str, weights: int) -> LinearLayer:
    return LinearLayer(
        name=f"experts.{number}.{word}",
        tensor="",
        out_features=weights,
        in_features=1,
        dtype="BF16",
        transposed=False,
        expert=number,
        row_start=0,
        decoder_layer=0,
        module=f"experts.{word}",
        shares_scale=f"experts.{number}",
    )


def score(relative: float, errors: list[float] | None, *, mse: float = 0.0) -> LayerScore:
    """Of one scheme, over two sequences of one chunk each."""
    corpora = {}
    if errors is not None:
        error_NS = torch.tensor([[error] for error in errors], dtype=torch.float64)
        mse_S = torch.tensor([mse], dtype=torch.float64)
        corpora["a"] = CorpusScore(error_NS, torch.zeros_like(error_NS), mse_S)
    relative_S = torch.tensor([relative], dtype=torch.float64)
    amax = None if errors is None else 2.0
    extent = tokens_extent(torch.ones(1, 1))
    return LayerScore(
        name="experts",
        part="plain",
        relative_weight_error_S=relative_S,
        weight_energy=100.0,
        error_energy_S=torch.ones(1).double(),
        along_S=torch.zeros(1).double(),
        corpora=corpora,
        static_amax=amax,
        extent=extent,
        input_extents={},
    )


def test_an_unseen_expert_gets_the_mean_of_its_kind_scaled_by_its_own_weight_error() -> None:
    layers = (expert(0, "up", 64), expert(1, "up", 64), expert(2, "up", 64), expert(0, "down", 64))
    group = FusionGroup("layers.0.moe.experts", layers)
    scores = {
        "experts.0.up": score(0.25, [1.0, 3.0], mse=5.0),
        "experts.1.up": score(0.75, [5.0, 3.0], mse=7.0),
        "experts.2.up": score(1.0, None),
        "experts.0.down": score(0.5, [0.5, 0.25], mse=1.0),
    }
    rows = group_rows(group, [parse_scheme("int4.channel")], scores, corpora=["a"])
    _, mse, nats = rows
    # The mean of the two that are seen is 3, 3 and 6; its weight error is twice their mean.
    assert nats.sample_errors == (1 + 5 + 2 * 3 + 0.5, 3 + 3 + 2 * 3 + 0.25)
    assert nats.error == 12.375
    assert mse.error == 5 + 7 + 2 * 6 + 1


def test_under_schemes_that_leave_the_weights_alone_an_unseen_expert_gets_the_mean() -> None:
    group = FusionGroup("layers.0.moe.experts", (expert(0, "up", 64), expert(1, "up", 64)))
    scores = {"experts.0.up": score(0.0, [1.0, 3.0]), "experts.1.up": score(0.0, None)}
    *_, row = group_rows(group, [parse_scheme("bf16+int8.tensor")], scores, corpora=["a"])
    assert row.sample_errors == (2.0, 6.0)
    assert row.static_amax == {"experts.0.up": 2.0, "experts.1.up": 2.0}


@pytest.mark.parametrize(("of_size", "error"), [(1.0, 3.0 + 0.25), (3.0, 4.0)])
def test_a_change_of_size_is_taken_out_where_it_leaves_most_of_the_squares(
    of_size: float, error: float
) -> None:
    """Else the rows that cost most undo it, and what is left would be next to nothing."""
    group = FusionGroup("layers.0.attn.o", (expert(0, "up", 64),))
    one = score(0.5, [4.0, 4.0])
    size_NS = torch.full_like(one.corpora["a"].error_NS, 100 * of_size)
    one = replace(
        one,
        along_S=torch.tensor([-10.0], dtype=torch.float64),  # a tenth smaller
        corpora={"a": replace(one.corpora["a"], size_NS=size_NS)},
    )
    schemes, answers = [parse_scheme("int2.channel")], {"a": {"experts.0.up": ((5.0,), (5.0,))}}
    *_, row = group_rows(group, schemes, {"experts.0.up": one}, corpora=["a"], scaling=answers)
    assert row.error == error
    assert (row.answers is None) == (of_size == 3.0)


def test_draws_of_one_sequence_are_one_sample() -> None:
    group = FusionGroup("layers.0.moe.experts", (expert(0, "up", 64),))
    scores = {"experts.0.up": score(0.5, [1.0, 3.0, 8.0, 4.0])}
    schemes = [parse_scheme("int4.channel")]
    *_, row = group_rows(group, schemes, scores, corpora=["a"], draws=2)
    assert row.sample_errors == (2.0, 6.0)
    assert (row.error, row.stderr) == (4.0, 2.0)


def test_a_corpus_that_reached_no_expert_of_a_kind_is_refused() -> None:
    group = FusionGroup("layers.0.moe.experts", (expert(0, "up", 64), expert(1, "down", 64)))
    scores = {"experts.0.up": score(0.5, [1.0, 3.0]), "experts.1.down": score(0.5, None)}
    with pytest.raises(StatsError, match=r"no token of corpus 'a' reached experts\.1\.down.*more"):
        group_rows(group, [parse_scheme("int4.channel")], scores, corpora=["a"])
