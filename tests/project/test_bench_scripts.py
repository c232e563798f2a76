"""The parts of the bench scripts that a number rests on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from calibrated import calibrate_folder, some_tokens
from command_line import Measured
from conftest import TinyCheckpoint
from families import write_byte_tokenizer, write_family

from mofq.delivery.backends import apply_recipe
from mofq.demo import demo_model_folder
from mofq.evidence.calibration.stats import Stats
from mofq.evidence.corpora import load_text
from mofq.evidence.metrics import kl_divergence
from mofq.evidence.spaces import offer_schemes, parse_search_space
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import ModelLayers, find_layers
from mofq.model.loading import load_model, load_tokenizer
from scripts.bench.inspecting import inspect
from scripts.bench.interval import Compared
from scripts.bench.interval_fit import Run, fitted_rows
from scripts.bench.interval_recipes import searched_recipes
from scripts.bench.large_table import write_sparse
from scripts.bench.prediction_recipes import choose_pairs
from scripts.bench.sample_plan import BASE, PARTS, SamplePlan, part_of
from scripts.bench.whole_run import operations
from scripts.make.split_articles import article_halves
from scripts.make.synthetic_checkpoint import COMMON, CONFIGS
from scripts.shared.kl_truth import (
    Version,
    measure_truths,
    recipe_of,
    run_original,
    spread_order,
    text_windows,
    true_kl,
    windows_between,
)
from scripts.shared.prediction_scores import fit, rank_correlation

SPACE = (
    "version: 1\nschemes: [int8.channel, int4.channel, bf16+int8.token, int8.channel+int8.token]\n"
)


@pytest.fixture
def model(tiny: TinyCheckpoint) -> tuple[Checkpoint, ModelLayers]:
    checkpoint = open_checkpoint(str(tiny("llama")))
    return checkpoint, find_layers(checkpoint)


def windows(checkpoint: Checkpoint, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(checkpoint.config["vocab_size"])
    return torch.randint(vocabulary, (count, 16), generator=generator)


def last_group(layers: ModelLayers, scheme: str) -> Version:
    return Version("last", {layers.groups[-1].name: scheme})


@pytest.mark.parametrize("scheme", ["int4.channel", "bf16+int8.token", "int4.channel+int8.token"])
def test_a_run_from_the_middle_is_a_run_of_the_whole_recipe(
    model: tuple[Checkpoint, ModelLayers], scheme: str
) -> None:
    checkpoint, layers = model
    version = last_group(layers, scheme)
    windows_NT = windows(checkpoint)
    found = true_kl(
        run_original(load_model(checkpoint.folder), layers=layers, windows_NT=windows_NT),
        version,
        [0, 1],
    )
    original, whole = load_model(checkpoint.folder), load_model(checkpoint.folder)
    apply_recipe(whole, recipe_of(layers, version))
    with torch.inference_mode():
        expected = [
            float(kl_divergence(original(w[None]).logits[0], whole(w[None]).logits[0]).mean())
            for w in windows_NT
        ]
    assert layers.groups[-1].layers[0].decoder_layer != 0
    assert found == expected
    assert min(expected) > 0


def test_a_measured_model_is_the_original_again(model: tuple[Checkpoint, ModelLayers]) -> None:
    checkpoint, layers = model
    original = run_original(
        load_model(checkpoint.folder), layers=layers, windows_NT=windows(checkpoint)
    )
    true_kl(original, Version("all", {group.name: "int4.channel" for group in layers.groups}), [0])
    assert true_kl(original, Version("none", {}), [0, 1]) == [0.0, 0.0]


def test_a_killed_measurement_continues_with_what_is_missing(
    model: tuple[Checkpoint, ModelLayers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, layers = model
    path = tmp_path / "truth.jsonl"
    version = last_group(layers, "int4.channel")

    def measure(count: int) -> list[float]:
        windows_NT = windows(checkpoint)[:count]
        truths = measure_truths(
            windows_NT, [version], checkpoint=checkpoint, layers=layers, path=path
        )
        return truths.of(version)

    both = measure(2)
    first = path.read_bytes().index(b"\n") + 1
    path.write_bytes(path.read_bytes()[: first + 9])
    assert measure(2) == both
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line)["window"] for line in lines] == [0, 1]
    monkeypatch.setattr("scripts.shared.kl_truth.load_model", None)  # nothing is left to run
    assert measure(2) == both
    assert measure(1) == both[:1]


def test_windows_are_taken_in_van_der_corputs_order() -> None:
    assert spread_order(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert sorted(spread_order(11)) == list(range(11))


def test_more_pairs_begin_with_the_same_and_none_stands_twice(
    model: tuple[Checkpoint, ModelLayers],
) -> None:
    space = parse_search_space(SPACE, name="s", where="s")
    offers = offer_schemes(space, model[1].groups, has_stats=True)
    few, all_pairs = choose_pairs(offers, 5, seed=3), choose_pairs(offers, 10_000, seed=3)
    assert all_pairs[:5] == few
    assert len(set(all_pairs)) == len(all_pairs) == 4 * len(model[1].groups)
    assert [pair.kind for pair in few] == ["W", "A", "W", "both", "W"]


def test_a_fit_is_that_of_logarithms() -> None:
    found = fit([1.0, 2.0, 8.0], [1.0, 1.0, 4.0])
    assert found.median_ratio == pytest.approx(2.0)
    assert found.median_error == pytest.approx(1.0)
    assert found.worst_error == pytest.approx(1.0)
    # Log ratios are 0, ln 2, ln 2: standard deviation ln 2 / sqrt(3).
    assert found.spread == pytest.approx(2 ** (1 / math.sqrt(3)))
    # Deviations from the mean in units of ln 2 are -4/3, -1/3, 5/3 and -2/3, -2/3, 4/3.
    assert found.log_correlation == pytest.approx((10 / 3) / math.sqrt(14 / 3 * 8 / 3))


def test_ranks_that_agree_correlate_fully_and_equal_scores_not_at_all() -> None:
    assert rank_correlation([1e-6, 3.0, 2.0], [1.0, 9.0, 8.0]) == pytest.approx(1.0)
    assert rank_correlation([0.0, 0.0, 0.0], [1.0, 9.0, 8.0]) is None


@pytest.mark.parametrize("plan", [*PARTS, BASE], ids=lambda plan: plan.name)
def test_a_part_of_the_stats_is_that_of_a_smaller_plan(
    plan: SamplePlan, base: Stats, tmp_path: Path
) -> None:
    part = part_of(base, plan, tmp_path / "part")
    kept, all_kept = part.sequence_files("a"), base.sequence_files("a")
    assert len(kept) == plan.keep
    found = [next(n for n, other in enumerate(all_kept) if other.samefile(one)) for one in kept]
    assert found == sorted(set(found))
    gains = [file.stat().st_ino for file in part.gains_files("a")]
    assert len(set(gains)) == plan.sequences
    if gains:  # a kept sequence's own gains stand at its place
        for n, place in zip(found, part.plan.corpora[0].kept_indices, strict=True):
            own = base.gains_files("a")[base.plan.corpora[0].kept_indices[n]]
            assert gains[place] == own.stat().st_ino


@pytest.fixture(scope="module")
def base(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    folder = tmp_path_factory.mktemp("base") / "stats"
    return calibrate_folder(tiny("llama"), folder, {"a": some_tokens(32, 4)}, kept=8)


def test_windows_between_lie_in_the_middle_of_the_gaps() -> None:
    checkpoint = open_checkpoint(str(demo_model_folder()))
    text = load_text("demo-en")
    tokenizer = load_tokenizer(checkpoint.folder)
    ids = tokenizer(text.text, add_special_tokens=False)["input_ids"]
    found = windows_between(checkpoint, text, sequences=9, windows=2, sequence_length=128)
    spacing = (len(ids) - 128) / 8
    starts = [round(2.5 * spacing), round(6.5 * spacing)]
    assert found.tolist() == [ids[start : start + 128] for start in starts]


def test_windows_begin_with_bos_where_the_tokenizer_puts_it_first(tmp_path: Path) -> None:
    folder = write_family("llama", tmp_path / "model")
    write_byte_tokenizer(folder, bos=True)
    checkpoint = open_checkpoint(str(folder))
    text = load_text("demo-en")
    spread_NT = text_windows(checkpoint, text, windows=3, sequence_length=64)
    between_NT = windows_between(checkpoint, text, sequences=9, windows=2, sequence_length=64)
    for windows_NT in (spread_NT, between_NT):
        assert windows_NT.shape[1] == 64
        assert (windows_NT[:, 0] == 256).all()
        assert (windows_NT[:, 1:] != 256).all()


def test_a_space_of_weights_alone_has_recipes_too(measured: Measured, tmp_path: Path) -> None:
    table = read_table(measured.table)
    found = searched_recipes(table, path=tmp_path / "recipes.json", seed=0)
    assert "uniform int8.channel" in found
    assert "weights, 5.0 bits" in found
    assert not [label for label in found if label.startswith("inputs too")]


def test_articles_go_to_the_halves_in_turn() -> None:
    text = "left out\n = A = \na\n = = Part = = \nb\n = B = \nc\n = C = \nd\n"
    assert article_halves(text) == (
        " = A = \na\n = = Part = = \nb\n = C = \nd\n",
        " = B = \nc\n",
    )


def test_the_spread_of_rows_is_what_is_left_of_their_ratios_beside_all_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    own, sampling, measuring = 0.15, 0.05, 0.04
    ratios = (math.hypot(own, sampling, measuring) * torch.randn(300, generator=generator)).exp()
    rows = tuple(
        Compared("row", 1e-4, sampling * 1e-4, 1e-4 * ratio, measuring * 1e-4 * ratio, False)
        for ratio in ratios.tolist()
    )
    found = fitted_rows([Run("model", "a", "b", 4096, (), rows)], growth=0.5)
    assert found.spread == pytest.approx(own, rel=0.1)
    assert (found.curvature, found.growth, found.recipes) == (0.0, 0.5, 300)


def test_the_arithmetic_of_a_run_counts_the_weights_that_a_token_meets() -> None:
    config = {**COMMON, **CONFIGS["qwen3-235b-a22b"], "num_hidden_layers": 2}
    head, attention = 4096 * 151936, 2 * 4096 * 64 * 128 + 2 * 4096 * 4 * 128
    layers = 2 * (attention + 128 * 4096 + 8 * 3 * 4096 * 1536)  # of 128 experts each token meets 8
    assert operations(config, calibrated=10, validated=1) == {
        "calibrate": 20 * (3 * layers + 2 * head),
        "measure": 20 * 2 * layers,
        "validate": 2 * 2 * (layers + head),
    }


@pytest.mark.parametrize("said", [False, True], ids=["by rules", "inferred"])
def test_a_mixture_of_the_true_width_is_inspected_from_its_headers(
    said: bool, tmp_path: Path
) -> None:
    config = {**COMMON, **CONFIGS["qwen3-235b-a22b"], "num_hidden_layers": 2}
    write_sparse(config, tmp_path / "model")
    (tmp_path / "layers.yaml").write_text("version: 1\n")
    options = ("--layers", str(tmp_path / "layers.yaml")) if said else ()
    found = inspect(tmp_path / "model", *options)
    assert found["linear_layers"] == 2 * (4 + 3 * 128)
    experts = [group for group in found["groups"] if group["name"].endswith(".moe.experts")]
    assert [len(group["layers"]) for group in experts] == [384, 384]
    of_layer = 4096 * (2 * 8192 + 2 * 512) + 128 * 3 * 4096 * 1536
    assert found["weights"] == 2 * of_layer
    assert "a router" in found["left_out"]["model.layers.1.mlp.gate.weight"]
