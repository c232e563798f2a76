"""Schemes that are fitted to statistics: measured honestly, then shipped as they were fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import calibrate_folder, read_sequence, some_tokens, space_of
from conftest import TinyCheckpoint
from emulated import recipe_of
from families import long_but
from rounding import apart
from torch import Tensor

from mofq.decision import uniform_recipe
from mofq.decision.recipe import Recipe
from mofq.delivery.apply import emulate
from mofq.delivery.backends import apply_recipe
from mofq.delivery.export.compressed_tensors import (
    check_compressed_tensors,
    export_compressed_tensors,
)
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.validation import find_deviations
from mofq.evidence.calibration.stats import Stats
from mofq.evidence.fits import Fits, LayerFit
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.table import Table, read_table
from mofq.exceptions import EnforcementError, RecipeError, SchemeError, StatsError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import LinearLayer, find_layers
from mofq.model.loading import load_model
from mofq.numbers.numerics import NUMERICS
from mofq.numbers.quantize import factorise_hessian, fake_quantize_weight
from mofq.numbers.schemes import parse_scheme

LENGTH, SEQUENCES = 96, 5
CORPORA = {"a": some_tokens(SEQUENCES, LENGTH), "b": some_tokens(3, LENGTH, seed=1)}
FITTED = (
    *("int4.g32@nats", "int4.g32~gptq", "int4.channel@nats~gptq+int8.token", "nvfp4@mse~gptq"),
    "int4.g32@nats~descent",
)
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def stats(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return calibrate_folder(tiny("llama"), tmp_path_factory.mktemp("stats"), CORPORA)


@pytest.fixture(scope="module")
def checkpoint(tiny: TinyCheckpoint) -> Checkpoint:
    return open_checkpoint(str(tiny("llama")))


def find_layer(checkpoint: Checkpoint, name: str = LAYER) -> LinearLayer:
    groups = find_layers(checkpoint).groups
    return next(layer for group in groups for layer in group.layers if layer.name == name)


def fill(model: Path | Checkpoint, path: Path, stats: Stats, *schemes: str) -> Table:
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(str(model))
    space = space_of(*schemes)
    measure(checkpoint, find_layers(checkpoint), space, table_path=path, stats=stats)
    return read_table(path)


@pytest.fixture(scope="module")
def fitted_table(
    checkpoint: Checkpoint, stats: Stats, tmp_path_factory: pytest.TempPathFactory
) -> Table:
    """The rows of every fitted scheme."""
    return fill(checkpoint, tmp_path_factory.mktemp("fitted") / "table.jsonl", stats, *FITTED)


def samples(stats: Stats, corpus: str, index: int) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of ``LAYER``, float64."""
    tensors = read_sequence(stats, index, corpus)
    return tensors[f"x/{LAYER}"].double(), tensors[f"grad/{LAYER}"][0].double()


def fit_by_hand(stats: Stats, sequences: dict[str, range]) -> tuple[Tensor, Tensor]:
    """Importance and Hessian, as the module's docstring defines them."""
    importance_I, hessian_II = torch.zeros(()), torch.zeros(())
    for corpus, chosen in sequences.items():
        for index in chosen:
            x_TI, grad_TO = samples(stats, corpus, index)
            gradient_OI = grad_TO.T @ x_TI
            importance_I = importance_I + gradient_OI.square().sum(0) / len(chosen)
            weighted_TI = x_TI * grad_TO.square().sum(1, keepdim=True).sqrt()
            hessian_II = hessian_II + weighted_TI.T @ weighted_TI / len(chosen)
    return importance_I, hessian_II


@pytest.mark.parametrize(
    ("part", "sequences"),
    [
        ("all", {"a": range(5), "b": range(3)}),
        ("first", {"a": range(3), "b": range(2)}),
        ("second", {"a": range(3, 5), "b": range(2, 3)}),
    ],
)
def test_a_layer_is_fitted_to_the_sequences_of_its_part(
    checkpoint: Checkpoint, stats: Stats, part: str, sequences: dict[str, range]
) -> None:
    importance_I, hessian_II = fit_by_hand(stats, sequences)
    weights = [parse_scheme(name).weight for name in FITTED]
    with Fits(stats) as fits:
        fit = fits.of(find_layer(checkpoint), weights, part=part)  # type: ignore[arg-type]
    assert fit.importance_I is not None
    assert fit.feedback is not None
    ratio_I = fit.importance_I / fit.importance_I.max() * importance_I.max() / importance_I
    assert float((ratio_I - 1).abs().max()) < 2**-7
    expected = factorise_hessian(hessian_II)
    assert torch.allclose(fit.feedback.passed_II, expected.passed_II, atol=2e-4)
    assert torch.allclose(fit.feedback.cost_I, expected.cost_I, rtol=1e-3)


@pytest.mark.parametrize(
    ("part", "sequences"), [("all", range(7)), ("first", range(4)), ("second", range(4, 7))]
)
def test_a_hessian_is_that_of_all_sequences_whose_inputs_are_kept(
    checkpoint: Checkpoint, part: str, sequences: range, tmp_path: Path
) -> None:
    windows = {"a": some_tokens(7, LENGTH)}
    model = checkpoint.folder
    every = calibrate_folder(model, tmp_path / "every", windows)
    # Three of seven are kept, the middle ones of 0-1, 2-3 and 4-6; two of them are the first half.
    some = calibrate_folder(model, tmp_path / "some", windows, kept=3, inputs=True)
    few = calibrate_folder(model, tmp_path / "few", windows, kept=3)
    assert [len(one.inputs_files("a")) for one in (every, some, few)] == [0, 4, 0]
    weights = [parse_scheme("int4.g32@nats~descent").weight]
    found = []
    for stats in (some, few):
        with Fits(stats) as fits:
            found.append(fits.of(find_layer(checkpoint), weights, part=part).feedback)  # type: ignore[arg-type]
    expected = factorise_hessian(fit_by_hand(every, {"a": sequences})[1], keep=True)
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].hessian_II is not None
    assert expected.hessian_II is not None
    assert torch.allclose(found[0].passed_II, expected.passed_II, atol=2e-4)
    assert torch.allclose(found[0].hessian_II, expected.hessian_II, rtol=0, atol=1e-5)
    assert not torch.allclose(found[1].passed_II, expected.passed_II, atol=2e-2)


def test_threads_change_no_bit_of_a_fit(checkpoint: Checkpoint, stats: Stats) -> None:
    up = find_layer(checkpoint, "model.layers.1.mlp.up_proj")
    weights = [parse_scheme(name).weight for name in FITTED]
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            with Fits(stats) as fits:
                found.append(fits.of(up, weights))
        finally:
            torch.set_num_threads(threads)
    for one, other in zip(_tensors(found[0]), _tensors(found[1]), strict=True):
        assert torch.equal(one, other)


def _tensors(fit: LayerFit) -> tuple[Tensor, ...]:
    assert fit.importance_I is not None
    assert fit.feedback is not None
    return fit.importance_I, fit.feedback.passed_II, fit.feedback.cost_I


@pytest.mark.long
def test_nats_are_predicted_from_codes_that_did_not_see_the_sequence(
    checkpoint: Checkpoint, stats: Stats, fitted_table: Table
) -> None:
    layer = find_layer(checkpoint)
    weight_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features).float()
    scheme = parse_scheme("int4.g32~gptq").weight
    assert scheme is not None
    expected = []
    for index in range(SEQUENCES):
        others = (
            {"a": range(3, 5), "b": range(2, 3)} if index < 3 else {"a": range(3), "b": range(2)}
        )
        feedback = factorise_hessian(fit_by_hand(stats, others)[1])
        delta_OI = fake_quantize_weight(weight_OI, scheme, feedback=feedback) - weight_OI
        x_TI, grad_TO = samples(stats, "a", index)
        row_O = (delta_OI.double() * (grad_TO.T @ x_TI)).sum(1)
        expected.append(float(row_O.square().sum()) / (2 * LENGTH))
    rows = fitted_table.rows_of("kl_nats_per_token", "a")["layers.1.mlp.down"]
    (row,) = (row for row in rows if row.scheme == "int4.g32~gptq")
    # Feedback of 22 bits against float64: one code at a tie may fall to the other side, which
    # moves one of 128 rows by about a quarter.
    assert row.sample_errors == pytest.approx(expected, rel=1e-2)


@pytest.mark.long
def test_the_weight_error_is_the_mean_of_those_of_the_fits_to_either_half(
    checkpoint: Checkpoint, stats: Stats, fitted_table: Table
) -> None:
    layer = find_layer(checkpoint)
    weight_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features).float()
    weights = [parse_scheme(name).weight for name in FITTED]
    with Fits(stats) as fits:
        halves = [fits.of(layer, weights, part=part) for part in ("first", "second")]
    for row in fitted_table.rows_of("relative_weight_error", None)["layers.1.mlp.down"]:
        weight = parse_scheme(row.scheme).weight
        if weight is None:
            continue
        amax = float(weight_OI.abs().max())
        ratios = []
        for fit in halves:
            quantized_OI = fake_quantize_weight(
                weight_OI, weight, tensor_amax=amax, **fit.arguments(weight)
            )
            delta_OI = (quantized_OI - weight_OI).double()
            ratio_I = delta_OI.square().sum(0) / weight_OI.double().square().sum(0)
            ratios.append(float(ratio_I.mean()))
        expected = sum(ratios) / len(ratios)
        assert row.error == pytest.approx(expected, rel=2 * apart(layer.out_features))


@pytest.mark.long
def test_other_schemes_have_the_rows_that_they_have_alone(
    checkpoint: Checkpoint, stats: Stats, tmp_path: Path
) -> None:
    alone = fill(checkpoint, tmp_path / "alone.jsonl", stats, "int4.g32", "int8.channel+int8.token")
    both = fill(
        checkpoint,
        tmp_path / "both.jsonl",
        stats,
        *(FITTED[0], "int4.g32", FITTED[2], "int8.channel+int8.token"),
    )
    kept = {row.key: row for row in both.rows}
    assert all(kept[row.key] == row for row in alone.rows)


@pytest.mark.long
@pytest.mark.parametrize(
    "family", long_but(("mixtral", "qwen3_moe", "gpt2", "gemma3_text"), "gpt2")
)
def test_every_family_is_fitted_applied_and_enforced(
    tiny: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    folder = tiny(family)
    stats = calibrate_folder(folder, tmp_path / "stats", {"a": some_tokens(2, 16)})
    table = fill(folder, tmp_path / "table.jsonl", stats, "int4.g32@nats~gptq", "int4.g16@nats")
    by_group = table.rows_of("relative_weight_error", None)
    assert by_group.keys() == {group.name for group in table.header.groups}
    for rows in by_group.values():
        assert all((row.error > 0) == (row.scheme != "bf16") for row in rows)
    checkpoint = open_checkpoint(str(folder))
    recipe = uniform(checkpoint, "int4.g16@nats~gptq", stats)
    with open_fits(recipe, stats.folder) as fits:
        model = emulate.apply(load_model(folder), recipe, checkpoint=checkpoint, fits=fits)
        assert find_deviations(model, recipe, checkpoint=checkpoint, fits=fits) == ()


def test_one_sequence_cannot_both_fit_and_judge(tiny_llama: Path, tmp_path: Path) -> None:
    stats = calibrate_folder(tiny_llama, tmp_path / "stats", {"a": some_tokens(1, 16)})
    with pytest.raises(StatsError, match=r"corpus 'a' has 1\. Calibrate with more"):
        fill(tiny_llama, tmp_path / "table.jsonl", stats, "int4.g32", "int4.g32~gptq")
    fill(tiny_llama, tmp_path / "table.jsonl", stats, "int4.g32")


def uniform(checkpoint: Checkpoint, scheme: str, stats: Stats) -> Recipe:
    layers = find_layers(checkpoint)
    return uniform_recipe(checkpoint, layers, scheme, stats_sha256=stats.sha256)


@pytest.mark.long
@pytest.mark.parametrize("scheme", FITTED)
def test_what_was_fitted_is_applied_and_enforced_bit_for_bit(
    checkpoint: Checkpoint, stats: Stats, scheme: str
) -> None:
    recipe = uniform(checkpoint, scheme, stats)
    model = load_model(checkpoint.folder)
    apply_recipe(model, recipe, checkpoint=checkpoint, stats=stats.folder)
    with open_fits(recipe, stats.folder, index_sha256=checkpoint.index_sha256) as fits:
        assert find_deviations(model, recipe, checkpoint=checkpoint, fits=fits) == ()
        weight_OI = model.get_parameter(f"{LAYER}.weight")
        weight_OI[3, 5] += 0.25
        (found,) = find_deviations(model, recipe, checkpoint=checkpoint, fits=fits)
    assert found.layer == LAYER
    assert found.reason.startswith("1 of ")


def test_codes_rounded_to_nearest_are_not_those_of_gptq(
    checkpoint: Checkpoint, stats: Stats
) -> None:
    recipe = uniform(checkpoint, "int4.g32~gptq", stats)
    model = load_model(checkpoint.folder)
    apply_recipe(model, recipe_of(checkpoint, "int4.g32"), checkpoint=checkpoint)
    with open_fits(recipe, stats.folder) as fits:
        found = find_deviations(model, recipe, checkpoint=checkpoint, fits=fits)
    assert len(found) == len([n for n, s in recipe.schemes.items() if s != "bf16"])


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["int4.g32@nats", "int4.g32@mse~gptq", "nvfp4@nats~descent"])
def test_fitted_codes_are_exported_and_read_back(
    checkpoint: Checkpoint, stats: Stats, tmp_path: Path, scheme: str
) -> None:
    recipe = uniform(checkpoint, scheme, stats)
    with pytest.raises(StatsError, match=r"^model\.layers\.0\..*there are none here"):
        export_compressed_tensors(checkpoint, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_compressed_tensors(checkpoint, recipe, tmp_path / "out", stats=stats.folder)
    with open_fits(recipe, stats.folder) as fits:
        check_compressed_tensors(checkpoint, recipe, tmp_path / "out", fits=fits)
        nearest = replace(recipe, groups=uniform(checkpoint, "int4.g32@fullrange", stats).groups)
        with pytest.raises(EnforcementError):
            check_compressed_tensors(checkpoint, nearest, tmp_path / "out", fits=fits)


def test_other_statistics_than_the_recipe_s_own_are_refused(
    tiny: TinyCheckpoint, checkpoint: Checkpoint, stats: Stats, tmp_path: Path
) -> None:
    recipe = uniform(checkpoint, "int4.g32~gptq", stats)
    model = load_model(checkpoint.folder)
    before = model.get_parameter(f"{LAYER}.weight").clone()
    with pytest.raises(StatsError, match=r"^model\.layers\.0.*as stats"):
        apply_recipe(model, recipe, checkpoint=checkpoint)
    other = calibrate_folder(checkpoint.folder, tmp_path / "other", {"a": some_tokens(2, 16)})
    with pytest.raises(RecipeError, match=rf"{stats.sha256[:8]}.*{other.sha256[:8]}"):
        apply_recipe(model, recipe, checkpoint=checkpoint, stats=other.folder)
    foreign = calibrate_folder(tiny("qwen3"), tmp_path / "qwen3", {"a": some_tokens(2, 16)})
    by_hand = replace(recipe, made_by={})
    with pytest.raises(StatsError, match="but the model is llama"):
        apply_recipe(model, by_hand, checkpoint=checkpoint, stats=foreign.folder)
    assert torch.equal(model.get_parameter(f"{LAYER}.weight"), before)
    apply_recipe(model, recipe_of(checkpoint, "int4.g32"), checkpoint=checkpoint)  # needs none


@pytest.mark.parametrize("older", [{}, {"numerics": 1}])
def test_codes_that_were_fitted_otherwise_are_refused(
    checkpoint: Checkpoint, stats: Stats, older: dict[str, int]
) -> None:
    recipe = uniform(checkpoint, "int4.g32~gptq", stats)
    kept = {key: value for key, value in recipe.made_by.items() if key != "numerics"}
    with (
        pytest.raises(RecipeError, match=rf"codes of int4\.g32~gptq .* numerics {NUMERICS}: they"),
        open_fits(replace(recipe, made_by=kept | older), stats.folder),
    ):
        pass
    for made in ({}, {**kept, "numerics": 2}):  # by hand, or by numerics whose codes are the same
        with open_fits(replace(recipe, made_by=made), stats.folder) as fits:
            assert fits is not None


def test_a_recipe_keeps_its_codes_when_a_corpus_is_added_to_its_statistics(
    tiny_llama: Path, tmp_path: Path
) -> None:
    a, b = some_tokens(2, 16), some_tokens(2, 16, seed=1)
    checkpoint = open_checkpoint(str(tiny_llama))
    layer = find_layers(checkpoint).groups[0].layers[0]

    def importance(fits: Fits) -> Tensor:
        found = fits.of(layer, [parse_scheme("int4.g32@nats").weight]).importance_I
        assert found is not None
        return found

    recipe = uniform(checkpoint, "int4.g32@nats", calibrate_folder(tiny_llama, tmp_path, {"a": a}))
    with open_fits(recipe, tmp_path) as fits:
        assert fits is not None
        before_I = importance(fits)
    both = calibrate_folder(tiny_llama, tmp_path, {"a": a, "b": b})
    with open_fits(recipe, tmp_path) as fits, Fits(both) as of_both:
        assert fits is not None
        after_I, other_I = importance(fits), importance(of_both)
    assert torch.equal(before_I, after_I)
    assert not torch.equal(before_I, other_I)


def test_a_uniform_recipe_of_a_fitted_scheme_needs_statistics(checkpoint: Checkpoint) -> None:
    for rounding in ("gptq", "descent"):
        with pytest.raises(SchemeError, match=f"{rounding} needs calibration statistics"):
            uniform_recipe(checkpoint, find_layers(checkpoint), f"int4.g32~{rounding}")
    with pytest.raises(SchemeError, match="a static scale"):
        uniform_recipe(
            checkpoint,
            find_layers(checkpoint),
            "int8.channel~gptq+int8.tensor",
            stats_sha256="0" * 64,
        )
