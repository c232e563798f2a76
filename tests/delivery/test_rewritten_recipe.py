"""Recipes that rewrite the model: the same model, statistics and folder from the recipe's file."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, read_sequence, some_tokens
from conftest import TinyCheckpoint
from exported import uniform_recipe
from families import copy_with_tensors
from torch import Tensor

from mofq.api import export
from mofq.decision.recipe import (
    EDITED,
    Recipe,
    RecipeResult,
    load_recipe,
    write_recipe,
)
from mofq.decision.rewriting import SiteRewriting
from mofq.delivery.backends import apply_recipe
from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.delivery.rewriting import remake
from mofq.delivery.rewriting.choose_scales import Choice, choose_best, choose_scales, scales_of
from mofq.delivery.rewriting.for_recipe import choose_for_recipe, rounds_inputs
from mofq.delivery.rewriting.moved_stats import write_moved_stats
from mofq.delivery.rewriting.remake import Base, base_of, make_base, rewriting_of
from mofq.delivery.rewriting.rotate import plan_rotation, rotated_model
from mofq.delivery.rewriting.sites import find_sites
from mofq.delivery.validation import find_deviations, validate_many
from mofq.evidence.calibration.sequence_file import SequenceFile
from mofq.evidence.calibration.stats import Stats, read_stats
from mofq.evidence.corpora import load_text
from mofq.exceptions import MofqError, RecipeError, RewriteError, StatsError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.schemes import parse_scheme

INT8, FITTED = "int8.channel+int8.token", "int8.channel@nats~gptq+int8.token"


@pytest.fixture
def model(tiny: TinyCheckpoint, tmp_path: Path) -> Path:
    """A tiny model whose inputs have channels that stand out, as large models have."""

    def stand_out(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[3::31] *= 40
            if name.endswith("up_proj.weight"):
                tensor[5::67] *= 20

    return copy_with_tensors(tiny("llama", dtype=torch.float32), tmp_path / "model", stand_out)


@pytest.fixture
def stats(model: Path, tmp_path: Path) -> Stats:
    windows = {"a": some_tokens(4, 24)}
    return calibrate_folder(model, tmp_path / "stats", windows, kept=2, inputs=True)


def make(model: Path, stats: Stats, folder: Path, scheme: str = FITTED) -> tuple[Recipe, Base]:
    """A uniform recipe of the model rewritten for INT8, and that model."""
    checkpoint = open_checkpoint(str(model))
    layers = find_layers(checkpoint)
    names = [group.name for group in layers.groups]
    choices = choose_for_recipe(
        checkpoint,
        layers,
        stats=stats,
        schemes=dict.fromkeys(names, INT8),
        offered=dict.fromkeys(names, (INT8, "bf16")),
    )
    rewriting = rewriting_of(checkpoint, stats, choices)
    assert rewriting.sites
    base = make_base(rewriting, checkpoint, stats, folders=(folder / "base", folder / "base.stats"))
    recipe = replace(
        uniform_recipe(base.checkpoint, scheme),
        weights_sha256=hash_weights(base.checkpoint),
        rewriting=rewriting,
    )
    return recipe, base


def test_moved_statistics_are_those_of_a_calibration_of_the_rewritten_model(
    model: Path, stats: Stats, tmp_path: Path
) -> None:
    _, base = make(model, stats, tmp_path)
    assert base.stats is not None
    moved = read_stats(base.stats)
    again = calibrate_folder(
        base.checkpoint.folder, tmp_path / "again", {"a": some_tokens(4, 24)}, kept=2, inputs=True
    )
    assert moved.plan == replace(again.plan, weights_sha256=hash_weights(base.checkpoint))
    needed, found, before = (read_sequence(one, 1) for one in (again, moved, stats))
    assert found.keys() == needed.keys()
    for name, tensor in needed.items():
        scale = float(tensor.abs().float().max())
        assert float((found[name].float() - tensor.float()).abs().max()) < 0.02 * scale, name
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert any(name.startswith("x/") for name in changed)
    assert any(name.startswith("grad/") and name.endswith("up_proj") for name in changed)
    needed, found, before = (inputs_of(one) for one in (again, moved, stats))
    assert found.keys() == needed.keys()
    scaled = {name for name in found if not torch.equal(found[name], before[name])}
    norms = {name for name in scaled if name.startswith("norm/")}
    assert norms
    assert all(name.endswith(("v_proj", "up_proj")) for name in norms)
    assert any(name.startswith("x/") for name in scaled)
    for name, tensor in needed.items():
        if name in norms:
            # The norms of the original say how tokens compare, and those of others how they grew.
            ratio_T = found[name].double() / before[name].double()
            assert float(ratio_T.amax() / ratio_T.amin()) < 1.001
            assert float(found[name].square().mean().sqrt()) == pytest.approx(
                float(tensor.square().mean().sqrt()), rel=0.1
            )
            continue
        scale = float(tensor.abs().float().max())
        assert float((found[name].float() - tensor.float()).abs().max()) < 0.02 * scale, name


def inputs_of(stats: Stats) -> dict[str, Tensor]:
    """Of a sequence of which no samples are kept."""
    with SequenceFile(stats.inputs_files("a")[0]) as file:
        return {name: file.tensor(name) for name in file.described()}


def test_a_recipe_of_a_version_before_is_fitted_to_what_it_was_fitted_to(
    model: Path, stats: Stats, tmp_path: Path
) -> None:
    """It has no ``inputs`` in its rewriting: to the sequences of which samples are kept."""
    recipe, base = make(model, stats, tmp_path)
    assert recipe.rewriting is not None
    assert recipe.rewriting.inputs == "all"
    path = tmp_path / "recipe.yaml"
    write_recipe(recipe, path)
    text = path.read_text()
    assert text.count("  inputs: all\n") == 1
    path.write_text(text.replace("  inputs: all\n", ""))
    former = load_recipe(path)
    assert former.rewriting == replace(recipe.rewriting, inputs="kept")
    with base_of(former, open_checkpoint(str(model)), stats.folder) as again:
        assert again.checkpoint.folder != base.checkpoint.folder
        assert again.stats is not None
        assert base.stats is not None
        assert read_stats(again.stats).plan.inputs is None
        assert read_stats(base.stats).plan.inputs
        # Scales do not depend on it.
        assert hash_weights(again.checkpoint) == hash_weights(base.checkpoint)
    path.write_text(text.replace("  inputs: all\n", "  inputs: some\n"))
    with pytest.raises(RecipeError, match="'all' or 'kept'"):
        load_recipe(path)


def test_an_exported_folder_is_made_again_from_the_recipe_bit_for_bit(
    model: Path, stats: Stats, tmp_path: Path
) -> None:
    recipe, base = make(model, stats, tmp_path)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert loaded == recipe
    export_compressed_tensors(base.checkpoint, recipe, tmp_path / "first" / "m", stats=base.stats)
    original = open_checkpoint(str(model))
    with base_of(loaded, original, stats.folder) as again:
        assert hash_weights(again.checkpoint) == recipe.weights_sha256
        folder = again.checkpoint.folder
        export_compressed_tensors(again.checkpoint, loaded, tmp_path / "b" / "m", stats=again.stats)
    assert not folder.exists()
    files = [path for path in (tmp_path / "first" / "m").iterdir() if path.name != "README.md"]
    assert len(files) > 3
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / "m" / path.name).read_bytes(), path.name
    # A corpus that was added to the statistics since changes nothing.
    texts = {"a": some_tokens(4, 24), "b": some_tokens(4, 24)}
    more = calibrate_folder(model, stats.folder, texts, kept=2, inputs=True)
    assert more.sha256 != stats.sha256
    with base_of(loaded, original, stats.folder) as grown:
        assert read_stats(str(grown.stats)).sha256 == read_stats(str(base.stats)).sha256
    with base_of(loaded, base.checkpoint, base.stats) as same:  # the rewritten model itself
        assert same.checkpoint is base.checkpoint


def test_what_a_recipe_does_not_rewrite_is_refused(
    model: Path, stats: Stats, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    recipe, _ = make(model, stats, tmp_path)
    rewriting = recipe.rewriting
    assert rewriting is not None
    original = open_checkpoint(str(model))

    def refused(
        error: type[MofqError],
        words: str,
        *,
        of: Checkpoint = original,
        by: Path | None = stats.folder,
        recipe: Recipe = recipe,
    ) -> None:
        with pytest.raises(error, match=words), base_of(recipe, of, by):
            pass

    other = open_checkpoint(str(tiny("llama", dtype=torch.float32)))
    others = calibrate_folder(model, tmp_path / "others", {"a": some_tokens(2, 24)})
    refused(RecipeError, "Give the model that was measured", of=other)
    refused(StatsError, "Give the folder that was measured with", by=None)
    refused(RecipeError, "rewrites by stats_sha256", by=others.folder)
    site, one = next(iter(rewriting.sites.items()))
    for changed, words in (
        ({"layers.9.attn.o": one}, "no scale can move there"),
        ({site: replace(one, method="smooth")}, "unknown method 'smooth'"),
        ({site: replace(one, alpha=0.123)}, "proposes no scales with alpha 0.123"),
    ):
        bad = replace(recipe, rewriting=replace(rewriting, sites=changed))
        refused(RewriteError, words, recipe=bad)
    fewer = {name: one for name, one in rewriting.sites.items() if name != site}
    bad = replace(recipe, rewriting=replace(rewriting, sites=fewer))
    refused(RecipeError, "gives other weights here", recipe=bad)


def test_a_disk_without_room_for_the_rewritten_model_is_refused_before_it_is_written(
    model: Path, stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, base = make(model, stats, tmp_path)
    assert base.stats is not None
    folders = (base.checkpoint.folder, Path(base.stats))
    files = [path for folder in folders for path in folder.rglob("*.safetensors")]
    free = sum(path.stat().st_size for path in files) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(remake, "make_base", None)
    with (
        pytest.raises(RewriteError, match=r"the rewritten model needs about .* Set TMPDIR"),
        base_of(recipe, open_checkpoint(str(model)), stats.folder),
    ):
        pass


def test_a_recipe_that_rewrites_is_not_applied_to_a_model_that_may_be_another(
    model: Path, stats: Stats, tmp_path: Path
) -> None:
    recipe, base = make(model, stats, tmp_path, INT8)
    with pytest.raises(RecipeError, match=r"is for the model that it rewrites .* to\. Export it"):
        apply_recipe(load_model(model), recipe)
    with pytest.raises(RecipeError, match="weights_sha256"):
        apply_recipe(load_model(model), recipe, checkpoint=open_checkpoint(str(model)))
    found = apply_recipe(load_model(base.checkpoint.folder), recipe, checkpoint=base.checkpoint)
    assert find_deviations(found, recipe, checkpoint=base.checkpoint) == ()


def test_a_rewriting_is_a_decision_that_shows_where_it_is_edited(
    model: Path, stats: Stats, tmp_path: Path
) -> None:
    recipe, _ = make(model, stats, tmp_path)
    path = tmp_path / "recipe.yaml"
    write_recipe(replace(recipe, result=RecipeResult(bits_per_weight=8.0)), path)
    assert not load_recipe(path).is_edited
    assert recipe.rewriting is not None
    group, site = next(iter(recipe.rewriting.sites.items()))
    assert isinstance(site, SiteRewriting)
    text = path.read_text("utf-8")
    line = next(one for one in text.splitlines() if one.startswith(f"    {group}: {{method"))
    path.write_text(text.replace(line, line.replace("alpha: ", "alpha: 1")))
    assert load_recipe(path).made_by["solver"] == EDITED


def test_of_several_methods_and_schemes_the_one_that_is_best_afterwards_is_chosen(
    model: Path, stats: Stats
) -> None:
    checkpoint = open_checkpoint(str(model))
    for site in find_sites(checkpoint, find_layers(checkpoint))[:2]:
        schemes = [parse_scheme(name) for name in (INT8, "int8.channel+fp8_e4m3.token")]
        methods = ("smoothquant", "bismooth")
        every = [
            choose_scales(checkpoint, site, scheme, stats=stats, method=method)
            for scheme in schemes
            for method in methods
        ]
        best = choose_best(checkpoint, site, schemes, stats=stats, methods=methods)
        assert best.nats_after == min(one.nats_after for one in every)
        assert best.nats_before == min(one.nats_before for one in every)
        assert best.strength is not None
        scale_P = scales_of(checkpoint, site, best.strength, stats=stats, method=best.method)
        assert torch.equal(scale_P, best.scale_P)


def test_a_recipe_rounds_inputs_where_most_weights_meet_rounded_ones(model: Path) -> None:
    layers = find_layers(open_checkpoint(str(model)))
    largest = max(layers.groups, key=lambda group: sum(one.weights for one in group.layers)).name
    every = {group.name: FITTED for group in layers.groups}
    assert rounds_inputs(every, layers)
    assert rounds_inputs(every | {largest: "int4.g16"}, layers)
    assert not rounds_inputs({largest: FITTED}, layers)
    assert not rounds_inputs(dict.fromkeys(every, "int4.g16"), layers)


def test_scales_move_for_schemes_that_round_inputs_and_on_demand_for_others(
    model: Path, stats: Stats
) -> None:
    checkpoint = open_checkpoint(str(model))
    layers = find_layers(checkpoint)
    names = [group.name for group in layers.groups]
    first, *others = names
    schemes = {**dict.fromkeys(others, "int4.g16~gptq"), first: FITTED}

    def chosen(for_weights: bool) -> dict[str, str]:
        choices = choose_for_recipe(
            checkpoint,
            layers,
            stats=stats,
            schemes=schemes,
            offered={**dict.fromkeys(names, ("int4.g16~gptq",)), first: (FITTED, INT8)},
            for_weights=for_weights,
        )
        return {one.site.group: one.scheme for one in choices}

    assert chosen(for_weights=False) == {first: INT8}
    assert set(chosen(for_weights=True).values()) == {INT8, "int4.g16"}


@pytest.mark.parametrize(
    ("scheme", "is_fitted"),
    [("int4.g32@nats", False), ("int4.g32~gptq", True), ("int4.g32@nats~descent", True)],
)
def test_errors_are_passed_on_where_codes_are_fitted_and_not_scales_alone(
    model: Path, stats: Stats, monkeypatch: pytest.MonkeyPatch, scheme: str, is_fitted: bool
) -> None:
    checkpoint = open_checkpoint(str(model))
    layers = find_layers(checkpoint)
    names = [group.name for group in layers.groups]
    found = []

    def choose(*args: Any, fitted: set[str], **options: Any) -> Choice:
        found.append(fitted)
        return choose_best(*args, fitted=fitted, **options)

    monkeypatch.setattr("mofq.delivery.rewriting.for_recipe.choose_best", choose)
    name = f"{scheme}+int8.token"
    choose_for_recipe(
        checkpoint,
        layers,
        stats=stats,
        schemes=dict.fromkeys(names, name),
        offered=dict.fromkeys(names, (name,)),
    )
    assert found
    assert all(one == ({"int4.g32+int8.token"} if is_fitted else set()) for one in found)


def test_statistics_with_a_kv_cache_are_not_moved(model: Path, tmp_path: Path) -> None:
    stats = calibrate_folder(model, tmp_path / "cached", {"a": some_tokens(2, 24)}, kv_cache=True)
    with pytest.raises(RewriteError, match="samples of the KV cache"):
        write_moved_stats(stats, open_checkpoint(str(model)), (), tmp_path / "out")


def test_a_validation_against_the_original_goes_with_the_model_that_was_rotated(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    """A rotated lm_head is no longer tied, so that the two models have other tensors."""
    folder = tiny("llama", tie_word_embeddings=True)
    original = open_checkpoint(str(folder))
    stats = calibrate_folder(folder, tmp_path / "stats", {"a": some_tokens(4, 24)}, inputs=True)
    rotation = rotated_model(plan_rotation(original, 3), 3)
    rewriting = rewriting_of(original, stats, (), rotation=rotation)
    base = make_base(rewriting, original, stats, folders=(tmp_path / "b", tmp_path / "b.stats"))
    assert base.checkpoint.index_sha256 != original.index_sha256
    recipe = replace(
        uniform_recipe(base.checkpoint, INT8),
        weights_sha256=hash_weights(base.checkpoint),
        rewriting=rewriting,
    )
    (validation,) = validate_many(
        str(folder),
        [recipe],
        load_text("demo-en"),
        tokens=48,
        sequence_length=24,
        stats=stats.folder,
    )
    for model, by in ((base.checkpoint.folder, base.stats), (folder, stats.folder)):
        done = export(
            str(model),
            recipe,
            tmp_path / f"of-{Path(model).name}",
            to="compressed-tensors",
            stats=by,
            validations=[validation],
        )
        assert done.checkpoint is not None
        card = (done.checkpoint.folder / "README.md").read_text("utf-8")
        assert "demo-en" in card
    other = replace(validation.lineage, index_sha256="0" * 64)
    with pytest.raises(MofqError, match="is a validation of another model"):
        export(
            str(folder),
            recipe,
            tmp_path / "other",
            to="compressed-tensors",
            stats=stats.folder,
            validations=[replace(validation, lineage=other)],
        )
