"""The parts of the reproduction scripts that a number rests on."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import DEMO, ok

import scripts.shared.reproduction as reproduction
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.measure.samples import SampleReader
from mofq.evidence.spaces import load_search_space
from mofq.evidence.table import Table, read_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.numbers.quantize import round_to_format
from scripts.reproduce.calibration_sets import of_sequences, overlap
from scripts.reproduce.every_system import BUDGETS, SYSTEMS, choose
from scripts.reproduce.every_system import SPACE as ALL
from scripts.reproduce.lost_in_quantization import NEITHER, NOTHING_SATURATES, NOTHING_UNDERFLOWS
from scripts.reproduce.mofq_paper import Crest, crossing
from scripts.shared.reproduction import (
    Reference,
    input_amax,
    measure_recipes,
    predicted,
    table_of,
    true_bits,
    uniform_of,
)

SPACE = (
    "version: 1\nschemes: [int4.channel, fp4_e2m1.channel, int8.channel, "
    "int8.channel+int8.token, nvfp4@fouroversix]\n"
)


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats")
    ok(
        *("calibrate", DEMO, "--corpus", "en=demo-en-calibration", "--corpus"),
        *("pt=demo-pt-calibration", "--sequences", "4", "--sequence-length", "64"),
        *("-o", folder / "stats"),
    )
    return folder / "stats"


@pytest.fixture(scope="module")
def table(stats: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("table")
    (folder / "space.yaml").write_text(SPACE)
    arguments = ("--space", folder / "space.yaml", "--stats", stats, "-o", folder / "t.jsonl")
    ok("measure", DEMO, *arguments)
    return read_table(folder / "t.jsonl")


def test_a_measured_recipe_is_what_validate_measures_and_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction, "SEQUENCE_LENGTH", 64)
    recipes = {"a": uniform_of(DEMO, "int4.g32"), "b": uniform_of(DEMO, "int8.channel+int8.token")}
    reference = Reference(DEMO, "demo-en", tmp_path / "cache.jsonl", tokens=128)
    done = measure_recipes(reference, recipes)
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", tmp_path / "recipe.yaml")
    content = ok(
        *("validate", DEMO, tmp_path / "recipe.yaml", "--text", "demo-en", "--tokens", "128"),
        *("--sequence-length", "64", "--json"),
    ).json
    for ours, theirs in (
        ("kl", "kl_nats_per_token"),
        ("kl_stderr", "kl_stderr"),
        ("perplexity", "perplexity"),
        ("perplexity_original", "perplexity_original"),
        ("top1_agreement", "top1_agreement"),
        ("bits_per_weight", "bits_per_weight"),
    ):
        assert getattr(done["a"], ours) == content[theirs], ours
    lines = reference.cache.read_text()
    monkeypatch.setattr(reproduction, "load_model", None)  # nothing is run any more
    assert measure_recipes(reference, recipes) == done
    assert reference.cache.read_text() == lines


def test_a_group_size_that_does_not_fit_gives_way_to_the_next() -> None:
    recipe = uniform_of(DEMO, "int4.g320", "int4.g64")
    assert {group.scheme for group in recipe.groups} == {"int4.g64"}
    assert true_bits(open_checkpoint(DEMO), recipe) == pytest.approx(4.25, abs=0.02)


def test_static_scales_may_saturate_a_share_of_the_calibrations_inputs(stats: Path) -> None:
    whole = input_amax(DEMO, stats)
    share = 1e-3
    some = input_amax(DEMO, stats, saturated=share)
    found = read_stats(stats)
    with SampleReader(found) as reader:
        for layer, limit in whole.items():
            samples = [reader.read(corpus.name, layer) for corpus in found.plan.corpora]
            x = torch.cat([one.x_MCI.abs().flatten() for one in samples if one is not None])
            assert limit == float(x.max())
            assert (x > some[layer]).float().mean() <= share
            assert (x > some[layer] / 2).float().mean() > share
            assert (limit / some[layer]).is_integer()


def test_a_table_of_some_sequences_has_their_mean(table: Table) -> None:
    half = of_sequences(table, "pt", slice(2, 4))
    assert half.header.stats is not None
    assert (list(half.header.stats.corpora), half.header.stats.samples) == (["pt"], 2)
    whole = {row.key: row for row in table.rows}
    assert len(half.rows) == len(whole) // 5  # of three units, two of them in two corpora
    for row in half.rows:
        of = whole[row.key]
        assert of.sample_errors is not None
        assert row.sample_errors == of.sample_errors[2:]
        assert row.error == pytest.approx(sum(of.sample_errors[2:]) / 2)


def test_recipes_overlap_by_the_weights_of_the_groups_that_agree(table: Table) -> None:
    a, b = uniform_of(DEMO, "int4.channel"), uniform_of(DEMO, "int8.channel")
    weights = {group.name: group.weights for group in table.header.groups}
    mixed = replace(a, groups=(b.groups[0], *a.groups[1:]))
    assert overlap(a, a, weights) == 1
    assert overlap(a, b, weights) == 0
    assert overlap(a, mixed, weights) == pytest.approx(
        1 - table.header.groups[0].weights / table.header.weights
    )


def test_no_system_alone_is_predicted_better_than_the_search_over_all(table: Table) -> None:
    everything = SYSTEMS[-1]
    for budget in BUDGETS:
        best = choose(table, everything, budget)
        for system in SYSTEMS:
            recipe = choose(table, system, budget)
            if recipe is None:
                continue
            assert best is not None
            assert true_bits(open_checkpoint(DEMO), recipe) <= budget.max_bits
            ours, theirs = (
                sum(predicted(table, one, corpus=c) for c in ("en", "pt")) for one in (best, recipe)
            )
            assert ours <= theirs * (1 + 1e-9), (system.name, budget.label)


def test_tables_of_one_model_and_stats_are_joined_without_repeats(
    table: Table, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for number, scheme in enumerate(("int4.channel", "int8.channel")):
        space = tmp_path / f"{number}.yaml"
        space.write_text(f"version: 1\nschemes: [{scheme}]\n")
        paths.append(tmp_path / f"{number}.jsonl")
        ok("measure", DEMO, "--space", space, "--stats", stats, "-o", paths[-1])
    monkeypatch.setattr(reproduction, "mofq", lambda *_: None)
    joined = table_of(DEMO, "w8a8", stats=stats, path=tmp_path / "joined.jsonl", begun=paths)
    theirs = {row.key: row for row in table.rows}
    assert {row.scheme for row in joined.rows} == {"int4.channel", "int8.channel", "bf16"}
    assert len({row.key for row in joined.rows}) == len(joined.rows)
    # To rounding: a matrix product of other columns adds in another order.
    assert [row.error for row in joined.rows] == pytest.approx(
        [theirs[row.key].error for row in joined.rows], rel=1e-5
    )


def test_formats_without_an_end_round_as_e4m3_does_between_its_ends() -> None:
    x = torch.tensor([1.0625, -3.3, 100.0, 448.0])
    formats = (NOTHING_SATURATES, NOTHING_UNDERFLOWS, NEITHER)
    assert all(round_to_format(x, e).tolist() == [1.0, -3.25, 104.0 - 8, 448.0] for e in formats)
    large, small = torch.tensor([1000.0]), torch.tensor([2.0**-12 * 1.3])
    assert [round_to_format(large, e).item() for e in formats] == [1024.0, 448.0, 1024.0]
    assert [round_to_format(small, e).item() for e in formats] == [0.0, *[2.0**-12 * 1.25] * 2]


def test_the_crossing_has_the_fewest_layers_on_its_wrong_side() -> None:
    def layers(*ratios: float) -> list[Crest]:
        return [Crest("", 2.0**n, 1.0, ratio) for n, ratio in enumerate(ratios)]

    assert crossing(layers(9, 3, 2, 0.5, 0.1)) == pytest.approx(math.sqrt(4 * 8))
    assert crossing(layers(9, 0.9, 3, 2, 0.5, 0.1)) == pytest.approx(math.sqrt(8 * 16))
    assert crossing(layers(0.5, 0.1)) is None
    assert crossing(layers(9, 3)) is None


def test_the_search_space_of_all_systems_names_a_scheme_for_each() -> None:
    names = [scheme.name for scheme in load_search_space(ALL).schemes]
    without = [s.name for s in SYSTEMS if not any(re.fullmatch(s.schemes, n) for n in names)]
    assert without == []
