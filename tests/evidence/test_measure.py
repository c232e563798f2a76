"""From stats and weights to the table: rows, resuming, refusing, every family."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, read_sequence, some_tokens, space_of
from conftest import TinyCheckpoint
from exported import quantize_layer, whole_weight
from families import TINY_FAMILIES, copy_with_tensors, long_but
from rounding import apart
from torch import Tensor

from mofq.evidence.calibration.stats import Stats, earlier_stats, read_stats
from mofq.evidence.measure import fill_table, kv_cache
from mofq.evidence.measure import score as rounded
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.measure.layer_inputs import PreparedLayer
from mofq.evidence.measure.samples import ChunkedSamples, SampleReader
from mofq.evidence.spaces import SearchSpace
from mofq.evidence.table import Row, Table, open_table, read_table
from mofq.exceptions import SchemeError, StatsError, TableError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FusionGroup, find_layers
from mofq.model.sizes import group_bytes
from mofq.numbers.quantize import dequantize_weight
from mofq.numbers.schemes import parse_scheme

CORPORA = {"a": some_tokens(2, 16), "b": some_tokens(2, 16, seed=1)}
SPACE = space_of("int4.g32", "int8.channel+int8.token")
NAMES = ("int4.g32", "int8.channel+int8.token", "bf16")
FIRST = "layers.0.attn.qkv"


@pytest.fixture(scope="module")
def stats(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return calibrate_folder(tiny("llama"), tmp_path_factory.mktemp("stats"), CORPORA)


def fill(
    model: Path, path: Path, stats: Stats | None, space: SearchSpace = SPACE, **options: Any
) -> Table:
    checkpoint = open_checkpoint(str(model))
    layers = find_layers(checkpoint)
    measure(checkpoint, layers, space, table_path=path, stats=stats, **options)
    return read_table(path)


def one_row(table: Table, group: str, scheme: str, unit: str, corpus: str | None = None) -> Row:
    (row,) = (r for r in table.rows_of(unit, corpus)[group] if r.scheme == scheme)
    return row


def groups_of(model: Path) -> tuple[FusionGroup, ...]:
    return find_layers(open_checkpoint(str(model))).groups


def test_every_group_scheme_unit_and_corpus_has_one_row(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    table = fill(tiny_llama, tmp_path / "table.jsonl", stats)
    keys = [row.key for row in table.rows]
    measures = [("relative_weight_error", None)]
    for corpus in ("a", "b"):
        measures += [("output_mse", corpus), ("kl_nats_per_token", corpus)]
    assert keys == [
        (group.name, scheme, unit, corpus)
        for group in groups_of(tiny_llama)
        for scheme in NAMES
        for unit, corpus in measures
    ]
    found = table.header.stats
    assert found is not None
    assert (found.sha256, found.seed, found.samples) == (stats.sha256, 0, 2)
    assert found.sequence_length == 16
    assert table.spaces[0].sha256 == SPACE.sha256


def test_without_stats_there_is_the_relative_weight_error_and_nothing_else(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    free = fill(tiny_llama, tmp_path / "free.jsonl", None)
    full = fill(tiny_llama, tmp_path / "full.jsonl", stats)
    assert free.header.stats is None
    assert free.measures == (("relative_weight_error", None),)
    assert free.rows_of("relative_weight_error") == full.rows_of("relative_weight_error")


def test_a_row_is_the_sum_over_the_layers_of_its_group(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    table = fill(tiny_llama, tmp_path / "table.jsonl", stats)
    row = one_row(table, FIRST, "int4.g32", "kl_nats_per_token", "a")
    group = groups_of(tiny_llama)[0]
    scheme = parse_scheme("int4.g32")
    assert row.bytes == group_bytes(group, scheme)
    samples = expected_errors(tiny_llama, group, stats, "a")
    assert row.sample_errors == pytest.approx(samples, rel=1e-4)
    assert row.error == pytest.approx(sum(samples) / 2, rel=1e-4)
    # Of two numbers, the standard deviation is their distance over the root of two.
    assert row.stderr == pytest.approx(abs(samples[0] - samples[1]) / 2, rel=1e-3)


def expected_errors(model: Path, group: FusionGroup, stats: Stats, corpus: str) -> list[float]:
    """int4.g32: sums over layers and rows of squared inner products, per token.

    What a change of size of all weights does is summed over rows and layers before it is squared.
    """
    scheme = parse_scheme("int4.g32")
    assert scheme.weight is not None
    checkpoint = open_checkpoint(str(model))
    samples = []
    for index in range(2):
        tensors = read_sequence(stats, index, corpus)
        squares = whole = 0.0
        for layer in group.layers:
            quantized = quantize_layer(checkpoint, group, layer, scheme)
            delta_OI = dequantize_weight(quantized, scheme.weight) - whole_weight(checkpoint, layer)
            # q, k and v read one input.
            x_TI = tensors[f"x/{group.layers[0].name}"].double()
            per_row_O = (
                tensors[f"grad/{layer.name}"][0].double() * (x_TI @ delta_OI.double().T)
            ).sum(0)
            weight_OI = whole_weight(checkpoint, layer).double()
            size_O = (tensors[f"grad/{layer.name}"][0].double() * (x_TI @ weight_OI.T)).sum(0)
            share = float((delta_OI.double() * weight_OI).sum() / weight_OI.square().sum())
            squares += float(per_row_O.square().sum() - share**2 * size_O.square().sum())
            whole += share * float(size_O.sum())
        samples.append((squares + whole**2) / (2 * 16))
    return samples


def test_the_relative_error_and_the_noise_weigh_layers_by_what_they_hold(
    tiny_llama: Path, tmp_path: Path
) -> None:
    table = fill(tiny_llama, tmp_path / "table.jsonl", None)
    row = one_row(table, FIRST, "int4.g32", "relative_weight_error")
    checkpoint = open_checkpoint(str(tiny_llama))
    group = groups_of(tiny_llama)[0]
    scheme = parse_scheme("int4.g32")
    assert scheme.weight is not None
    relative, weights, signal, noise = 0.0, 0, 0.0, 0.0
    for layer in group.layers:
        weight_OI = whole_weight(checkpoint, layer).double()
        quantized = quantize_layer(checkpoint, group, layer, scheme)
        delta_OI = dequantize_weight(quantized, scheme.weight).double() - weight_OI
        columns_I = delta_OI.square().sum(0) / weight_OI.square().sum(0)
        relative += float(columns_I.mean()) * weight_OI.numel()
        weights += weight_OI.numel()
        signal += float(weight_OI.square().sum())
        noise += float(delta_OI.square().sum())
    # Squares of a column are added in float32, block by block.
    rounded = apart(max(layer.out_features for layer in group.layers))
    assert row.error == pytest.approx(relative / weights, rel=2 * rounded)
    ratio = 10 ** (row.sqnr_db / 10)  # type: ignore[operator]
    assert ratio == pytest.approx(signal / noise, rel=2 * rounded)
    exact = one_row(table, FIRST, "bf16", "relative_weight_error")
    assert (exact.error, exact.sqnr_db) == (0.0, None)


def test_layers_that_an_engine_joins_share_their_scale_for_the_whole_tensor(
    tiny_llama: Path, tmp_path: Path
) -> None:
    table = fill(tiny_llama, tmp_path / "table.jsonl", None, space_of("int4.tensor"))
    row = one_row(table, FIRST, "int4.tensor", "relative_weight_error")
    checkpoint = open_checkpoint(str(tiny_llama))
    group = groups_of(tiny_llama)[0]
    whole_OI = torch.cat([whole_weight(checkpoint, la).double() for la in group.layers])
    step = float((whole_OI.abs().max() / 7).bfloat16())
    errors, weights = 0.0, 0
    for layer in group.layers:
        weight_OI = whole_weight(checkpoint, layer).double()
        delta_OI = step * (weight_OI / step).round().clamp(-7, 7) - weight_OI
        ratio_I = delta_OI.square().sum(0) / weight_OI.square().sum(0)
        errors += float(ratio_I.mean()) * weight_OI.numel()
        weights += weight_OI.numel()
    assert row.error == pytest.approx(errors / weights, rel=1e-4)


def test_static_activations_note_the_largest_input_over_all_corpora(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    name = "fp8_e4m3.channel+fp8_e4m3.tensor"
    table = fill(tiny_llama, tmp_path / "table.jsonl", stats, space_of(name))
    group = groups_of(tiny_llama)[2]
    inputs = [
        read_sequence(stats, index, corpus)[f"x/{group.layers[0].name}"]
        for index in range(2)
        for corpus in ("a", "b")
    ]
    largest = max(float(x.abs().max()) for x in inputs)
    row = one_row(table, group.name, name, "kl_nats_per_token", "b")
    assert row.static_amax == {layer.name: largest for layer in group.layers}
    assert one_row(table, group.name, "bf16", "kl_nats_per_token", "b").static_amax is None


def test_an_excluded_group_has_the_unquantized_row_and_its_reasons(
    tiny_llama: Path, tmp_path: Path
) -> None:
    space = space_of("int4.g32", exclude="['*.v_proj']")
    table = fill(tiny_llama, tmp_path / "table.jsonl", None, space)
    schemes = {
        g: [r.scheme for r in rows] for g, rows in table.rows_of("relative_weight_error").items()
    }
    assert schemes[FIRST] == ["bf16"]
    assert schemes["layers.0.attn.o"] == ["int4.g32", "bf16"]
    assert [(r.group, r.scheme) for r in table.rejections] == [
        (FIRST, "int4.g32"),
        ("layers.1.attn.qkv", "int4.g32"),
    ]


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "gpt2", "gemma3_text", "olmoe"))
def test_every_family_goes_from_its_checkpoint_to_a_table(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    found = calibrate_folder(tiny(family), tmp_path / "stats", {"a": CORPORA["a"]})
    table = fill(tiny(family), tmp_path / "table.jsonl", found)
    for unit in ("output_mse", "kl_nats_per_token"):
        by_group = table.rows_of(unit, "a")
        assert by_group.keys() == {group.name for group in groups_of(tiny(family))}
        for rows in by_group.values():
            assert [row.scheme for row in rows] == list(NAMES)
            int4, int8, exact = (row.error for row in rows)
            assert int4 > 0 < int8
            assert exact == 0
    # Random routers may leave an expert of the tiniest mixtures out; then it is named.
    assert set(found.unseen.get("a", ())) < {
        layer.name for group in groups_of(tiny(family)) for layer in group.layers
    }


class Killed(Exception):
    pass


@pytest.mark.parametrize("groups", [0, 1, 3, 7])
def test_a_run_killed_after_any_group_is_resumed_to_the_same_bytes(
    groups: int, tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    fill(tiny_llama, tmp_path / "whole.jsonl", stats)

    def kill(stage: str, done: int, _: int) -> None:
        if done > groups:
            raise Killed

    path = tmp_path / "table.jsonl"
    with pytest.raises(Killed):
        fill(tiny_llama, path, stats, progress=kill)
    with path.open("ab") as file:
        file.write(b'{"kind":"row","group":"layers.1.mlp')  # what a killed write leaves
    progress: list[tuple[str, int, int]] = []
    fill(tiny_llama, path, stats, progress=lambda *at: progress.append(at))
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert progress == [("measure", done, 8) for done in range(9)]


@pytest.mark.parametrize("share", [0.2, 0.45, 0.7, 0.95])
def test_a_table_cut_inside_a_fusion_group_is_resumed_to_the_same_bytes(
    share: float, tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    fill(tiny_llama, path, stats)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    fill(tiny_llama, path, stats)
    assert path.read_bytes() == whole


def test_a_new_scheme_adds_rows_and_scores_nothing_again(
    tiny_llama: Path, stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.jsonl"
    fill(tiny_llama, path, stats)
    before = path.read_bytes()
    scored: list[Any] = []
    quantize_block = rounded.quantize_block

    def note(layer: PreparedLayer, block_RI: Tensor) -> Tensor:
        scored.extend(layer.weights)
        return quantize_block(layer, block_RI)

    monkeypatch.setattr(rounded, "quantize_block", note)
    more = replace(space_of("int4.g32", "nf4.g64", "int8.channel+int8.token"), name="more")
    table = fill(tiny_llama, path, stats, more)
    assert path.read_bytes().startswith(before)
    assert set(scored) == {parse_scheme("nf4.g64").weight}
    assert len(scored) == sum(len(group.layers) for group in groups_of(tiny_llama))
    assert len(table.rows) == 8 * 4 * 5
    assert len(table.spaces) == 2
    scored.clear()
    size = path.stat().st_size
    fill(tiny_llama, path, stats)
    assert (scored, path.stat().st_size) == ([], size)


FITTED, STATIC = "int4.g32@nats", "fp8_e4m3.tensor+fp8_e4m3.tensor"


def with_corpora(model: Path, folder: Path, *names: str) -> Stats:
    return calibrate_folder(model, folder, {name: CORPORA[name] for name in names})


def test_a_corpus_that_is_added_is_measured_alone(
    tiny_llama: Path, stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "table.jsonl", tmp_path / "stats"
    first = fill(tiny_llama, path, with_corpora(tiny_llama, folder, "a"))
    before = path.read_bytes()
    both = with_corpora(tiny_llama, folder, "a", "b")
    assert both.sha256 == stats.sha256
    read = SampleReader.read
    asked: list[str] = []

    def note(reader: SampleReader, corpus: str, layer: str) -> ChunkedSamples | None:
        asked.append(corpus)
        return read(reader, corpus, layer)

    monkeypatch.setattr(SampleReader, "read", note)
    table = fill(tiny_llama, path, both)
    assert set(asked) == {"b"}
    assert path.read_bytes().startswith(before)
    at_once = fill(tiny_llama, tmp_path / "once.jsonl", stats)
    assert table.header.stats == at_once.header.stats
    assert first.header.stats != at_once.header.stats
    by_key = {row.key: row for row in at_once.rows}
    assert {row.key: row for row in table.rows} == by_key
    profiles = {profile.key: profile for profile in at_once.profiles}
    assert {profile.key: profile for profile in table.profiles} == profiles
    asked.clear()
    size = path.stat().st_size
    fill(tiny_llama, path, both)
    assert (asked, path.stat().st_size) == ([], size)


def test_rows_that_rest_on_all_corpora_are_measured_again_with_one_that_is_added(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    space = space_of("int4.g32", FITTED, STATIC)
    path, folder = tmp_path / "table.jsonl", tmp_path / "stats"
    first = fill(tiny_llama, path, with_corpora(tiny_llama, folder, "a"), space)
    table = fill(tiny_llama, path, with_corpora(tiny_llama, folder, "a", "b"), space)
    at_once = fill(tiny_llama, tmp_path / "once.jsonl", stats, space)
    expected = {row.key: row for row in at_once.rows}
    assert {row.key for row in table.rows} == expected.keys()
    assert len(table.rows) == len(expected)
    for row in table.rows:
        assert row.error == pytest.approx(expected[row.key].error, rel=1e-6, abs=1e-12)
        assert row.static_amax == expected[row.key].static_amax
    plain = [row for row in first.rows if row.scheme in ("int4.g32", "bf16")]
    assert len(plain) == 8 * 2 * 3
    assert all(row in table.rows for row in plain)
    fitted = one_row(first, FIRST, FITTED, "kl_nats_per_token", "a")
    assert fitted != one_row(table, FIRST, FITTED, "kl_nats_per_token", "a")


def test_formats_of_the_cache_are_measured_on_a_corpus_that_is_added(
    tiny_llama: Path, tmp_path: Path
) -> None:
    dynamic, static = "kv:int8.token", "kv:fp8_e4m3.tensor"
    space = space_of("int8.channel", kv_cache=f'["{dynamic}", "{static}"]')
    paths = [tmp_path / "added.jsonl", tmp_path / "once.jsonl"]
    stats = [
        calibrate_folder(tiny_llama, tmp_path / "stats", corpora, kv_cache=True)
        for corpora in ({"a": CORPORA["a"]}, CORPORA)
    ]
    fill(tiny_llama, paths[0], earlier_stats(stats[1])[0], space)
    before = paths[0].read_bytes()
    added, once = (fill(tiny_llama, path, stats[1], space) for path in paths)
    assert paths[0].read_bytes().startswith(before)
    assert {row.key: row for row in added.rows} == {row.key: row for row in once.rows}
    new = [json.loads(line) for line in paths[0].read_bytes()[len(before) :].splitlines()]
    cached = [(one["scheme"], one["corpus"]) for one in new if "kv_cache" in one.get("group", "")]
    assert set(cached) == {(dynamic, "b"), ("bf16", "b"), (static, "a"), (static, "b")}


def test_the_statistics_are_closed_when_the_last_cache_is_measured(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    opened: set[int] = set()

    class Watched(SampleReader):
        def __enter__(self) -> Watched:
            opened.add(id(self))
            return self

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            opened.remove(id(self))

    monkeypatch.setattr(kv_cache, "SampleReader", Watched)
    monkeypatch.setattr(fill_table, "corpus_flips", lambda *_, **__: left.append(len(opened)) or [])
    stats = calibrate_folder(tiny_llama, tmp_path / "stats", CORPORA, kv_cache=True)
    space = space_of("int8.channel", kv_cache='["kv:int8.token"]')
    assert len(fill(tiny_llama, tmp_path / "table.jsonl", stats, space).caches) > 1
    assert left == [0]


def test_stats_that_do_not_continue_those_of_a_table_are_refused(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    other = calibrate_folder(tiny_llama, tmp_path / "stats", {"a": CORPORA["a"]}, seed=1)
    fill(tiny_llama, path, other)
    with pytest.raises(TableError, match="differs in stats"):
        fill(tiny_llama, path, stats)


def test_stats_of_another_model_are_refused(
    tiny: TinyCheckpoint, stats: Stats, tmp_path: Path
) -> None:
    with pytest.raises(StatsError, match=r"calibrated on llama \(.{8}\), but the model is qwen3"):
        fill(tiny("qwen3"), tmp_path / "table.jsonl", stats)
    assert not (tmp_path / "table.jsonl").exists()


def test_stats_that_changed_since_are_refused_before_anything_is_measured(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(stats.folder, tmp_path / "stats"))
    path = copy / "b" / "sequence-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    with pytest.raises(StatsError, match=r"sequence-00001\.safetensors: changed since"):
        fill(tiny_llama, tmp_path / "table.jsonl", read_stats(copy))
    assert read_table(tmp_path / "table.jsonl").rows == ()


def test_a_table_of_other_stats_or_in_use_is_refused(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    table = fill(tiny_llama, path, stats)
    with pytest.raises(TableError, match="differs in stats"):
        fill(tiny_llama, path, None)
    with (
        open_table(path, table.header),
        pytest.raises(TableError, match=r"another process \(pid .* writes to this table"),
    ):
        fill(tiny_llama, path, stats)


def test_a_weight_that_is_not_finite_stops_the_run_after_the_groups_before_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def break_weight(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][200, 7] = torch.nan

    folder = copy_with_tensors(tiny_llama, tmp_path / "model", break_weight)
    path = tmp_path / "table.jsonl"
    with pytest.raises(SchemeError, match=r"layers\.0\.mlp\.up_proj: .* found nan at \[200, 7\]"):
        fill(folder, path, None)
    measured = {row.group for row in read_table(path).rows}
    assert measured == {FIRST, "layers.0.attn.o"}
