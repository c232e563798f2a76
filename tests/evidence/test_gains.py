"""Few sequences kept, many run: the two numbers of each layer, and what they correct."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from calibrated import calibrate_folder, read_sequence, some_tokens, space_of
from conftest import TinyCheckpoint
from pretend_gpu import pretend_gpu

from mofq.evidence.calibration.capture import Captured, LookedUp
from mofq.evidence.calibration.gains import Gains, gains_of, gains_path, numbers_of, read_gains
from mofq.evidence.calibration.sequence_file import SequenceFile
from mofq.evidence.calibration.stats import CorpusPlan, Stats, read_stats, verify_sequences
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.measure.gain_correction import (
    SampleGains,
    corrected,
    layer_gains,
    not_negative,
)
from mofq.evidence.table import Table, read_table
from mofq.exceptions import StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model

TOKENS = some_tokens(6, 16)
SHARING = {
    "self_attn.q_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "a").iterdir())}


def test_gains_are_the_squares_of_the_outer_products_and_of_the_inputs_gradients(
    tiny_llama: Path, tmp_path: Path
) -> None:
    stats = calibrate_folder(tiny_llama, tmp_path / "stats", {"a": TOKENS}, kept=2, draws=2)
    model = load_model(tiny_llama)
    for index in stats.plan.corpora[0].kept_indices:
        gains = read_gains(gains_path(stats.folder, "a", index))
        kept = stats.sequence_files("a")
        place = [file.name for file in kept].index(f"sequence-{index:05d}.safetensors")
        tensors = read_sequence(stats, place)
        for decoder_layer in (0, 1):
            for source, words in SHARING.items():
                prefix = f"model.layers.{decoder_layer}.{source.rpartition('.')[0]}"
                x_TI = tensors[f"x/model.layers.{decoder_layer}.{source}"].double()
                amax_T = x_TI.abs().amax(1)
                for draw in (0, 1):
                    gradient_TI = torch.zeros_like(x_TI)
                    for word in words:
                        name = f"{prefix}.{word}"
                        grad_TO = tensors[f"grad/{name}"][draw].double()
                        gradient_TI += grad_TO @ model.get_submodule(name).weight.double()
                        weight_OI = model.get_submodule(name).weight.double()
                        change = float((grad_TO.T @ x_TI * weight_OI).sum())
                        size = float((grad_TO * (x_TI @ weight_OI.T)).abs().sum())
                        assert gains[name].scaling[draw] == pytest.approx(change, abs=2**-8 * size)
                        product = float((grad_TO.T @ x_TI).square().sum())
                        assert gains[name].weight[draw] == pytest.approx(product, rel=1e-4)
                    expected = float((gradient_TI.square().sum(1) * amax_T.square()).sum())
                    for word in words:
                        # Stored inputs and gradients are rounded to bfloat16.
                        found = gains[f"{prefix}.{word}"].input[draw]
                        assert found == pytest.approx(expected, rel=2**-6)


def test_a_few_kept_sequences_are_the_same_bytes_as_those_of_all(
    tiny_llama: Path, tmp_path: Path
) -> None:
    calibrate_folder(tiny_llama, tmp_path / "all", {"a": TOKENS})
    calibrate_folder(tiny_llama, tmp_path / "few", {"a": TOKENS}, kept=2)
    whole, few = files_of(tmp_path / "all"), files_of(tmp_path / "few")
    kept = [name for name in few if name.startswith("sequence")]
    assert kept == ["sequence-00001.safetensors", "sequence-00004.safetensors"]
    assert all(few[name] == whole[name] for name in kept)
    assert sorted(set(few) - set(kept)) == [f"gains-{n:05d}.json" for n in range(6)]
    verify_sequences(read_stats(tmp_path / "few"))


def test_a_lost_file_of_gains_is_made_again(tiny_llama: Path, tmp_path: Path) -> None:
    calibrate_folder(tiny_llama, tmp_path / "stats", {"a": TOKENS}, kept=2)
    before = files_of(tmp_path / "stats")
    (tmp_path / "stats" / "a" / "gains-00003.json").unlink()
    with pytest.raises(StatsError, match=r"gains-00003\.json: needed \d+ bytes, found no file"):
        read_stats(tmp_path / "stats")
    calibrate_folder(tiny_llama, tmp_path / "stats", {"a": TOKENS}, kept=2)
    assert files_of(tmp_path / "stats") == before


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"layer": {"weight": [1.0]}}', "layer: .*input"),
        (
            '{"layer": {"weight": [-1.0], "input": [1.0]}}',
            "must be at least 0, found -1",
        ),
        ('{"layer": {"weight": [1e999], "input": [1.0]}}', "must be a finite number, found inf"),
        ("[", "is not valid JSON"),
    ],
)
def test_damaged_gains_are_refused(content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "gains-00000.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StatsError, match=why):
        read_gains(path)


def test_an_expert_without_a_token_has_gains_of_zero(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    # Two tokens choose two of four experts each.
    tokens = some_tokens(4, 2, seed=3)
    stats = calibrate_folder(tiny("mixtral"), tmp_path / "stats", {"a": tokens})
    few = calibrate_folder(tiny("mixtral"), tmp_path / "few", {"a": tokens}, kept=1)
    is_reached = set()
    for index, file in enumerate(stats.sequence_files("a")):
        gains = read_gains(gains_path(few.folder, "a", index))
        with SequenceFile(file) as sequence:
            for name, source in sequence.inputs.items():
                is_reached.add(source is not None)
                if source is None:
                    assert gains[name] == Gains((0.0,), (0.0,), (0.0,))
                else:
                    assert min(*gains[name].weight, *gains[name].input) > 0
    assert is_reached == {True, False}


@pytest.mark.parametrize(("sequences", "kept"), [(6, 2), (7, 3), (32, 8), (5, 4)])
def test_clusters_are_neighbours_and_hold_what_is_kept_of_them(sequences: int, kept: int) -> None:
    plan = CorpusPlan("a", "a.txt", "", sequences, kept)
    assert [n for cluster in plan.clusters for n in cluster] == list(range(sequences))
    sizes = [len(cluster) for cluster in plan.clusters]
    assert len(sizes) == kept
    assert max(sizes) - min(sizes) <= 1
    assert all(n in cluster for n, cluster in zip(plan.kept_indices, plan.clusters, strict=True))
    assert all(a < b for a, b in pairwise(plan.kept_indices))


def test_errors_are_moved_by_what_their_clusters_have_more() -> None:
    gains = SampleGains(torch.tensor([1.0, 3.0]).double(), torch.tensor([4.0, 2.0]).double())
    error_NS = torch.tensor([[2.0, 10.0], [6.0, 30.0]]).double()
    # R is 4 / 2 and 20 / 2; the first sample's cluster has 3 more, the second's 1 less.
    assert corrected(error_NS, gains).tolist() == [[8.0, 40.0], [4.0, 20.0]]
    assert corrected(error_NS, None) is error_NS
    nothing = SampleGains(torch.zeros(2).double(), torch.ones(2).double())
    assert corrected(error_NS, nothing) is error_NS


def test_clusters_of_unequal_size_keep_the_mean_over_sequences() -> None:
    plan = CorpusPlan("a", "a.txt", "", 3, 2)  # clusters of one sequence and of two
    values = [(2.0, 20.0), (4.0, 40.0), (9.0, 90.0)]
    found = layer_gains(plan, [{"layer": Gains((a,), (b,))} for a, b in values], "layer")
    for gains, factor in ((found.weight, 1), (found.input, 10)):
        assert gains.own_N.tolist() == [2.0 * factor, 4.0 * factor]
        assert float(gains.cluster_N.mean()) == pytest.approx(5.0 * factor)
        assert float(gains.cluster_N[1] - gains.cluster_N[0]) == pytest.approx(4.5 * factor)


def test_no_sample_is_corrected_below_zero_and_the_mean_stays() -> None:
    assert not_negative(torch.tensor([3.0, 0.0])).tolist() == [3.0, 0.0]
    assert not_negative(torch.tensor([-1.0, 1.0, 3.0])).tolist() == [0.0, 1.0, 2.0]


def table_of(folder: Path, stats: Stats, path: Path) -> Table:
    checkpoint = open_checkpoint(str(folder))
    space = space_of("int4.channel", "bf16+int8.token", "int4.channel+int8.token")
    measure(checkpoint, find_layers(checkpoint), space, table_path=path, stats=stats)
    return read_table(path)


def nats(table: Table, scheme: str) -> dict[str, tuple[float, ...]]:
    rows = table.rows_of("kl_nats_per_token", "a")
    found = {name: row for name, of in rows.items() for row in of if row.scheme == scheme}
    return {name: row.sample_errors or () for name, row in found.items()}


def answers(table: Table, scheme: str, group: str) -> torch.Tensor:
    """To the change of size of all six sequences; without a scheme of weights there is none."""
    rows = table.rows_of("kl_nats_per_token", "a")[group]
    found = next(row.answers for row in rows if row.scheme == scheme)
    flat = [0.0] * 6 if found is None else [one for sample in found for one in sample]
    return torch.tensor(flat, dtype=torch.float64)


def test_a_row_says_of_the_kept_sequences_what_their_clusters_say(
    tiny_llama: Path, tmp_path: Path
) -> None:
    whole_stats = calibrate_folder(tiny_llama, tmp_path / "all", {"a": TOKENS})
    whole = table_of(tiny_llama, whole_stats, tmp_path / "all.jsonl")
    few_stats = calibrate_folder(tiny_llama, tmp_path / "few", {"a": TOKENS}, kept=2)
    few = table_of(tiny_llama, few_stats, tmp_path / "few.jsonl")
    gains = [
        json.loads((few_stats.folder / "a" / f"gains-{n:05d}.json").read_text()) for n in range(6)
    ]
    group, layer = "layers.1.mlp.down", "model.layers.1.mlp.down_proj"
    parts = []
    for scheme, kind in (("int4.channel", "weight"), ("bf16+int8.token", "input")):
        gain_N = torch.tensor([one[layer][kind][0] for one in gains]).double()
        # A change of size of the whole group is known of all sequences.
        size_N = answers(few, scheme, group).square()
        answer_N = torch.tensor([one[layer]["scaling"][0] for one in gains]).double()
        share_N = answers(few, scheme, group) / (answer_N / (2 * 16) ** 0.5)
        if scheme == "int4.channel":
            torch.testing.assert_close(share_N, share_N[:1].expand(6), rtol=1e-5, atol=0)
            assert 0 < abs(float(share_N[0])) < 0.1
        assert answers(whole, scheme, group).tolist() == answers(few, scheme, group).tolist()
        kept_N = (torch.tensor(nats(whole, scheme)[group]).double() - size_N)[[1, 4]]
        ratio = kept_N.mean() / gain_N[[1, 4]].mean()
        expected_N = kept_N + ratio * (gain_N.reshape(2, 3).mean(1) - gain_N[[1, 4]])
        expected_N += size_N.reshape(2, 3).mean(1)
        found_N = torch.tensor(nats(few, scheme)[group]).double()
        torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=0)
        assert not torch.allclose(found_N, kept_N, rtol=1e-2)
        parts.append(float(found_N.mean()))
    both = torch.tensor(nats(few, "int4.channel+int8.token")[group]).double()
    assert float(both.mean()) == pytest.approx(sum(parts), rel=0.02)


def captured_of(layer: str, *, role: str) -> Captured:
    """What four tokens of eight channels leave of a layer, and of an embedding its lookup."""
    captured = Captured()
    captured.source[layer] = layer
    if role != "lookup":
        captured.x[layer] = torch.randn(4, 8).bfloat16()
        captured.y[layer] = torch.randn(4, 6).bfloat16()
        captured.grads[layer] = [torch.randn(4, 6).bfloat16()]
        captured.input_gains[layer] = [torch.ones((), dtype=torch.float64)]
    if role != "linear":
        scaling = [torch.ones((), dtype=torch.float64)]
        grads = [torch.randn(4, 8).bfloat16()]
        captured.looked_up[layer] = LookedUp(torch.arange(4), grads, scaling)
    return captured


@pytest.mark.parametrize("role", ["lookup", "tied"])
def test_an_embedding_whose_gradient_is_not_finite_is_named(role: str) -> None:
    captured = captured_of("embed", role=role)
    captured.looked_up["embed"].grads[0][0, 0] = torch.inf
    with pytest.raises(StatsError, match=r"embed: an output gradient is not finite in a\.json"):
        gains_of(captured, ["embed"], Path("a.json"), draws=1)


def test_gains_that_are_not_finite_of_gradients_that_are_name_the_layer() -> None:
    captured = captured_of("layer", role="linear")
    captured.x["layer"][0, 0] = torch.inf
    with pytest.raises(StatsError, match=r"layer: its gradients are finite in a\.json, and sums"):
        gains_of(captured, ["layer"], Path("a.json"), draws=1)


def test_sums_on_several_devices_keep_their_order_and_each_device_is_waited_for_once() -> None:
    with pretend_gpu() as gpu:
        sums = [torch.tensor(float(number), dtype=torch.float64) for number in range(6)]
        spread = [one.to("cuda") if place % 2 else one for place, one in enumerate(sums)]
        gpu.waits.clear()
        assert numbers_of(spread) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert gpu.waits == ["tolist"]
    assert numbers_of([]) == []
