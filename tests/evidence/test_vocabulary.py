"""What errors of the lm_head and the embedding do, against the gradients of autograd."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from calibrated import plan_of, scores_of, some_tokens
from command_line import ok
from conftest import TinyCheckpoint
from torch import Tensor

from mofq.api import calibrate, inspect, measure
from mofq.api.options import Samples, Vocabulary
from mofq.delivery.apply.emulate import rows_of
from mofq.evidence.calibration.calibrate import calibrate as calibrate_here
from mofq.evidence.calibration.gains import read_gains
from mofq.evidence.calibration.routing import read_routing
from mofq.evidence.calibration.stats import Stats
from mofq.evidence.measure.layer_inputs import prepare_layer
from mofq.evidence.measure.samples import SampleReader
from mofq.evidence.measure.schedule import score_layers
from mofq.evidence.table import read_table
from mofq.exceptions import MofqError, StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import LinearLayer, find_layers, vocabulary_names
from mofq.model.loading import load_model
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.schemes import parse_scheme

SCHEMES = ("int4.g32", "int8.channel")
LENGTH = 80  #: more than one chunk, and tokens that come twice
#: Family, options, the roles that its matrices of the vocabulary then have.
CASES = [
    ("llama", {"tie_word_embeddings": True}, ("tied",)),
    ("gemma2", {}, ("tied",)),  # multiplies rows by a constant, and caps its logits
    ("llama", {}, ("linear", "lookup")),
]


@pytest.mark.parametrize(("family", "options", "roles"), CASES)
def test_the_score_of_a_row_is_the_square_of_all_that_autograd_finds_for_it(
    tiny: TinyCheckpoint,
    tmp_path: Path,
    family: str,
    options: dict[str, bool],
    roles: tuple[str, ...],
) -> None:
    folder, windows = tiny(family, **options), some_tokens(2, LENGTH)
    stats, layers = _calibrated(folder, tmp_path / "stats", windows)
    assert tuple(layer.role for layer in layers) == roles
    schemes = [parse_scheme(name) for name in SCHEMES]
    for layer in layers:
        weight_OI, gradient_NOI = _by_autograd(folder, layer, windows)
        expected_NS = torch.stack(
            [
                ((fake_quantize_weight(weight_OI, s.quantized_weight) - weight_OI) * gradient_NOI)
                .sum(2)
                .square()
                .sum(1, dtype=torch.float64)
                for s in schemes
            ],
            1,
        ) / (2 * LENGTH)
        with SampleReader(stats) as reader:
            samples = reader.read_all(layer.name, ["a"])
            answers = reader.scaling("a", layer.name)
        prepared = prepare_layer(
            partial(rows_of, weight_OI.bfloat16()),
            (layer.out_features, layer.in_features),
            schemes,
            samples=samples,
            name=layer.name,
        )
        (score,) = score_layers([prepared])
        # Inputs and gradients are kept in bfloat16.
        torch.testing.assert_close(score.corpora["a"].error_NS, expected_NS, rtol=0.02, atol=0)
        of_size_N = (weight_OI * gradient_NOI).sum((1, 2)).double() / (2 * LENGTH) ** 0.5
        assert answers is not None
        close = pytest.approx(of_size_N.tolist(), rel=0.02, abs=0.02 * float(of_size_N.abs().max()))
        assert [one for (one,) in answers] == close
        gains = [read_gains(file)[layer.name].weight for file in stats.gains_files("a")]
        square_N = gradient_NOI.square().sum((1, 2))
        assert [one for (one,) in gains] == pytest.approx(square_N.tolist(), rel=0.02)


def test_both_roles_of_a_tied_embedding_meet_before_they_are_squared(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder, windows = tiny("llama", tie_word_embeddings=True), some_tokens(1, LENGTH)
    _, (layer,) = _calibrated(folder, tmp_path / "stats", windows)
    weight_OI, (gradient_OI,) = _by_autograd(folder, layer, windows)
    alone = [_by_autograd(folder, layer, windows, apart=role)[1][0] for role in ("head", "lookup")]
    torch.testing.assert_close(gradient_OI, alone[0] + alone[1], rtol=1e-4, atol=1e-5)
    delta_OI = fake_quantize_weight(weight_OI, parse_scheme("int4.g32").quantized_weight)
    delta_OI -= weight_OI
    together, apart = (
        sum(float((delta_OI * g_OI).sum(1).square().sum()) for g_OI in some)
        for some in ([gradient_OI], alone)
    )
    assert abs(together - apart) > 0.02 * apart  # what a sum of two separate errors would miss


def test_a_table_has_them_where_they_are_asked_for_and_is_the_same_otherwise(
    tiny_llama: Path, tmp_path: Path
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("version: 1\nschemes: [int4.g32, int8.channel, int8.channel+int8.token]\n")
    text = tmp_path / "text.txt"
    text.write_text("Rows are looked up, and logits are products of them. " * 40)
    tables = {}
    for name, vocabulary in (("plain", Vocabulary()), ("both", _BOTH)):
        calibrate(
            tiny_llama,
            [f"a={text}"],
            tmp_path / f"stats-{name}",
            samples=Samples(sequences=2, sequence_length=32),
            vocabulary=vocabulary,
        )
        table = measure(
            tiny_llama,
            space,
            tmp_path / f"{name}.jsonl",
            stats=tmp_path / f"stats-{name}",
            vocabulary=vocabulary,
        ).output
        tables[name] = read_table(table)
    plain, both = tables["plain"], tables["both"]
    added = [group.name for group in both.header.groups[len(plain.header.groups) :]]
    assert added == ["lm_head", "embeddings"]
    same = [row for row in both.rows if row.group not in added]
    assert same == list(plain.rows)
    schemes = {row.scheme for row in both.rows if row.group in added}
    assert schemes == {"int4.g32", "int8.channel", "bf16"}
    assert all(
        row.error > 0
        for row in both.rows
        if row.group in added and row.scheme == "int4.g32" and row.unit == "kl_nats_per_token"
    )
    sizes = [
        one.header.other_bytes + sum(group.source_bytes for group in one.header.groups)
        for one in (plain, both)
    ]
    assert sizes[0] == sizes[1]
    assert '"role"' not in (tmp_path / "plain.jsonl").read_text("utf-8")
    with pytest.raises(StatsError, match=r"calibrated without embeddings and lm_head"):
        measure(
            tiny_llama,
            space,
            tmp_path / "none.jsonl",
            stats=tmp_path / "stats-plain",
            vocabulary=_BOTH,
        )
    with pytest.raises(StatsError, match=r"lm_head and embeddings not kept, asked for"):
        calibrate(
            tiny_llama,
            [f"a={text}"],
            tmp_path / "stats-plain",
            samples=Samples(sequences=2, sequence_length=32),
            vocabulary=_BOTH,
        )


@pytest.mark.parametrize("tied", [True, False])
def test_keys_of_a_space_ask_for_them_and_nothing_need_be_stored(
    tied: bool, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder, text = tiny("llama", tie_word_embeddings=tied), tmp_path / "text.txt"
    text.write_text("Rows are looked up, and logits are products of them. " * 40)
    plain, keyed = tmp_path / "plain.yaml", tmp_path / "keyed.yaml"
    plain.write_text("version: 1\nschemes: [int4.g32, int8.channel]\n")
    keyed.write_text(plain.read_text("utf-8") + "lm_head: true\nembeddings: true\n")
    corpora, samples = [f"a={text}"], Samples(sequences=2, sequence_length=32)
    calibrate(folder, corpora, tmp_path / "stats", samples=samples, vocabulary=_BOTH)
    stored = measure(
        folder, plain, tmp_path / "stored.jsonl", stats=tmp_path / "stats", vocabulary=_BOTH
    )
    passing = measure(folder, keyed, tmp_path / "table.jsonl", corpora=corpora, samples=samples)
    names = [group.name for group in inspect(folder, space=keyed).layers.groups]
    assert names[-1] == "embeddings"
    assert ("lm_head" in names) == (not tied)
    assert [group.name for group in passing.table.header.groups] == names
    assert passing.table.rows == stored.table.rows


def test_what_may_not_be_had_is_refused_before_anything_runs(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    tied, output = tiny("llama", tie_word_embeddings=True), tmp_path / "table.jsonl"
    space = tmp_path / "space.yaml"
    space.write_text("version: 1\nschemes: [int4.g32, int8.channel+int8.token]\n")
    with pytest.raises(MofqError, match=r"embeddings: may have no scheme .* tie an lm_head to a"):
        measure(tied, space, output, engine="vllm-hopper", vocabulary=Vocabulary(lm_head=True))
    looked_at = inspect(tied, engine="vllm-hopper", vocabulary=Vocabulary(lm_head=True))
    assert list(looked_at.left_alone) == ["embeddings"]
    ran = ok("inspect", tied, "--engine", "vllm-hopper", "--embeddings")
    (problem,) = (line for line in ran.err.splitlines() if "may have no scheme" in line)
    assert "tie an lm_head to a `weight` alone" in problem  # and not why fits and inputs cannot be
    assert "activations" not in problem
    assert "Leave --lm-head and --embeddings (or the space's keys of these names) out" in problem
    assert "--embeddings -o" not in ran.err  # calibrating with it would be in vain
    assert "--embeddings -o" in ok("inspect", tied, "--embeddings").err
    space.write_text("version: 1\nschemes: [int8.channel+int8.token]\n")
    with pytest.raises(MofqError, match=r"take a scheme without activations"):
        measure(tied, space, output, vocabulary=Vocabulary(embeddings=True))
    assert not output.exists()


_BOTH = Vocabulary(lm_head=True, embeddings=True)


def _calibrated(folder: Path, out: Path, windows: Tensor) -> tuple[Stats, tuple[LinearLayer, ...]]:
    """Statistics of everything, and the layers of the vocabulary."""
    checkpoint = open_checkpoint(str(folder))
    layers = find_layers(checkpoint, include_lm_head=True, include_embeddings=True)
    names = vocabulary_names(layers.groups)
    stats = calibrate_here(
        load_model(folder),
        layers,
        plan=plan_of(folder, {"a": windows}, vocabulary=names),
        windows={"a": windows},
        folder=out,
    )
    return stats, tuple(la for group in layers.groups if group.name in names for la in group.layers)


def _by_autograd(
    folder: Path, layer: LinearLayer, windows: Tensor, *, apart: str | None = None
) -> tuple[Tensor, Tensor]:
    """The weight, and its gradients in all sequences; of one role of a tied one if asked."""
    model = load_model(folder)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if apart is not None:  # the same numbers, in two parameters
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    module = head if layer.role == "linear" or apart == "head" else embedding
    weight = module.weight.requires_grad_(True)
    gradients = []
    for index, token_T in enumerate(windows):
        logits_TV = model(token_T[None]).logits[0]
        (gradient,) = torch.autograd.grad(logits_TV, weight, scores_of(logits_TV, sequence=index))
        gradients.append(gradient)
    return weight.detach(), torch.stack(gradients)


@pytest.mark.parametrize("tied", [True, False])
def test_the_margins_of_routers_are_no_draw_of_an_embedding_and_its_gain_is_there(
    tied: bool, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder, windows = tiny("qwen3_moe", tie_word_embeddings=tied), {"a": some_tokens(2, 32)}
    checkpoint = open_checkpoint(str(folder))
    layers = find_layers(checkpoint, include_lm_head=True, include_embeddings=True)
    names = vocabulary_names(layers.groups)
    plan = plan_of(folder, windows, vocabulary=names, routing=True)
    stats = calibrate_here(
        load_model(folder), layers, plan=plan, windows=windows, folder=tmp_path / "stats"
    )
    embedding = next(one for one in layers.grouped_layers if one.role != "linear").name
    gains = read_gains(stats.gains_files("a")[0])[embedding]
    assert len(gains.weight) == len(gains.scaling) == 1
    routing = read_routing(stats.routing_files("a")[0])
    assert routing.gains[embedding] > 0
