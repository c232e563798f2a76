"""A model that is tuned layer by layer ends with the bytes of one that is tuned in memory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, plan_of, some_tokens
from conftest import TinyCheckpoint
from emulated import recipe_of
from families import copy_with_tensors
from fp8_sources import write_fp8
from stopped import stopped_at
from tiny_types import write_type
from torch import Tensor

from mofq.decision.recipe import Recipe, RecipeCache, RecipeGroup
from mofq.delivery.rewriting.remake import Base
from mofq.delivery.tuning.even_steps import median_of
from mofq.delivery.tuning.tune import send_divergence
from mofq.delivery.tuning.tune_recipe import TunedRecipe, tune_recipe
from mofq.exceptions import MofqError, StreamingError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.streaming import records
from mofq.model.streaming.weights import UnitWeights

WINDOWS = {"a": some_tokens(12, 16)}


def tune(folder: Path, recipe: Recipe | str = "int4.g32", **options: Any) -> TunedRecipe:
    checkpoint = open_checkpoint(str(folder))
    return tune_recipe(
        open_checkpoint(str(options.pop("original", folder))),
        recipe_of(checkpoint, recipe) if isinstance(recipe, str) else recipe,
        WINDOWS,
        base=Base(checkpoint, options.pop("stats", None)),
        plan=plan_of(folder, WINDOWS, dtype=options.pop("dtype", "float32")),
        **{"steps": 3, **options},
    )


def check_same(folder: Path, recipe: Recipe | str = "int4.g32", **options: Any) -> TunedRecipe:
    resident = tune(folder, recipe, **options)
    streamed = tune(folder, recipe, is_streamed=True, **options)
    assert streamed.recipe.tuned == resident.recipe.tuned
    assert streamed == resident
    return streamed


@pytest.mark.parametrize("scheme", ["int4.g32@mse", "nvfp4", "int4.channel.asym+int8.token"])
def test_schemes_are_tuned_streamed_as_resident(scheme: str, tiny: TinyCheckpoint) -> None:
    found = check_same(tiny("llama"), scheme)
    assert (found.tuning.layers, found.tuning.tensors) == (14, 5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3", "gpt2"])
def test_families_are_tuned_streamed_as_resident(family: str, tiny: TinyCheckpoint) -> None:
    check_same(tiny(family), "int4.g32+int8.token")


@pytest.mark.parametrize("flags", ["fpu avx512_bf16", "fpu"])
def test_products_of_steps_are_in_bfloat16_where_the_processor_has_them(
    flags: str, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mofq.numbers.processor.processor_flags", lambda: flags)
    seen = set()

    def send(logits_TV: Tensor, reference_TV: Tensor) -> None:
        seen.add(logits_TV.dtype)
        send_divergence(logits_TV, reference_TV)

    monkeypatch.setattr("mofq.delivery.tuning.resident.send_divergence", send)
    check_same(tiny("llama"))
    assert seen == {torch.bfloat16 if "bf16" in flags else torch.float32}


def test_norms_alone_are_tuned_streamed_as_resident(tiny: TinyCheckpoint) -> None:
    found = check_same(tiny("llama"), codes=False)
    assert (found.tuning.layers, found.tuning.tensors) == (0, 5)


def test_a_rewritten_model_is_compared_with_the_original_streamed_as_resident(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    def put_off(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                tensor[::2] *= 1.04

    original = tiny("llama")
    model = copy_with_tensors(original, tmp_path / "model", put_off)
    found = check_same(model, original=original)
    assert found.tuning.kl_before > tune(original, steps=1).tuning.kl_before


def test_a_head_that_is_learned_and_rounded_caches_are_the_same_streamed(
    tiny: TinyCheckpoint,
) -> None:
    checkpoint = open_checkpoint(str(tiny("llama")))
    plain, layers = recipe_of(checkpoint, "int4.g32"), find_layers(checkpoint, include_lm_head=True)
    head = RecipeGroup(layers.groups[-1].name, "int8.channel+int8.token", ("lm_head",))
    caches = tuple(RecipeCache(one.name, "kv:int4.token_head") for one in layers.caches)
    recipe = replace(plain, groups=(*plain.groups, head), unquantized=(), kv_cache=caches)
    assert check_same(tiny("llama"), recipe).tuning.layers == 15


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma3_text", "starcoder2"])
def test_an_embedding_with_a_scheme_is_the_same_streamed(name: str, tmp_path: Path) -> None:
    folder = write_type(name, tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    plain = recipe_of(checkpoint, "int4.g32")
    layers = find_layers(checkpoint, include_lm_head=True, include_embeddings=True)
    vocabulary = (
        RecipeGroup(group.name, "int8.channel", tuple(layer.name for layer in group.layers))
        for group in layers.groups
        if group.layers[0].decoder_layer is None
    )
    check_same(folder, replace(plain, groups=(*plain.groups, *vocabulary), unquantized=()))


@pytest.mark.long
def test_codes_that_were_fitted_are_the_same_streamed(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    calibrate_folder(tiny("llama"), tmp_path / "stats", WINDOWS)
    check_same(tiny("llama"), "int4.g32@nats~gptq", stats=tmp_path / "stats")


@pytest.mark.long
def test_an_fp8_source_is_the_same_streamed(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    folder = write_fp8(tiny("llama"), tmp_path / "fp8", "fp8 blocks")
    recipe = recipe_of(open_checkpoint(str(folder)), "int4.g32", **{"layers_1_mlp_down": "bf16"})
    check_same(folder, recipe)


@pytest.mark.long
def test_bfloat16_is_the_same_streamed(tiny: TinyCheckpoint) -> None:
    check_same(tiny("llama"), dtype="bfloat16")


#: Of the original, of the first turn of the layers, before any step, and in steps.
PLACES = (
    *("original/00002/step-00001", "before/00001/step-00002", "rounded-model.layers.1"),
    *("pass-00000/00002/step-00001", "pass-00000/00001/back-00003", "pass-00000/outside-00003"),
    *("learned-model.layers.1", "pass-00000/outside-00001", "learned-model.layers.0", "learned-"),
    *("pass-00001/outside-00003", "after/00000/step-00001"),
)


@pytest.mark.parametrize(
    "places", [PLACES, pytest.param((9,) * 15, marks=pytest.mark.long)], ids=["each", "ninth"]
)
def test_a_tuning_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    places: tuple[str | int, ...],
    tiny: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / ".recipe.yaml.streamed"
    work.symlink_to(tmp_path / "another disk")
    whole = tune(tiny("llama"), steps=2)
    for place in places:
        with stopped_at(place, monkeypatch):
            tune(tiny("llama"), steps=2, is_streamed=True, work=work)
    told: list[tuple[str, int, int]] = []
    again = tune(
        tiny("llama"), steps=2, is_streamed=True, work=work, progress=lambda *one: told.append(one)
    )
    stage, done, total = told[-1]
    assert (stage, done) == ("tune", total)
    assert again == whole
    assert again.recipe.tuned == whole.recipe.tuned
    # That alone is left, until whoever asked has written it.
    with monkeypatch.context() as patch:
        patch.setattr(UnitWeights, "loaded", None)
        assert tune(tiny("llama"), steps=2, is_streamed=True, work=work) == whole
    assert {path.name for path in work.glob("*/*")} == {"tuned.yaml", whole.tuning.file}


def test_a_file_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    records.write_tensors(path, [], [torch.ones(3)])
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(MofqError, match=r"was cut short\. Delete all that was kept"):
            records.read_content(path)


def test_what_the_disk_has_to_hold_is_said_and_no_more_is_kept(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, sizes, said = tmp_path / "work", list[int](), list[str]()
    written = records._written

    def watched(*given: Any) -> Any:
        sizes.append(sum(path.stat().st_size for path in work.rglob("*") if path.is_file()))
        return written(*given)

    monkeypatch.setattr(records, "_written", watched)
    tune(tiny("llama"), is_streamed=True, work=work, tell=said.append)
    line = said[-1]
    assert f"GB are kept in {work}." in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=max(sizes) // 4))
    monkeypatch.setattr(UnitWeights, "loaded", None)
    with pytest.raises(MofqError, match=r"between layers needs about [0-9,]+ bytes") as refused:
        tune(tiny("llama"), is_streamed=True)
    needed = int(str(refused.value).partition("about ")[2].partition(" ")[0].replace(",", ""))
    assert needed / 4 < max(sizes) <= needed


def test_weights_that_two_layers_share_are_refused(tmp_path: Path) -> None:
    folder = write_type("zamba2", tmp_path / "model")
    with pytest.raises(StreamingError, match="too, and is learned once for both"):
        tune(folder, is_streamed=True)


def test_a_layer_that_runs_twice_for_a_token_is_refused(
    tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.nn.ModuleList.__getitem__

    def twice(modules: Any, index: Any) -> Any:
        return [*modules] * 2 if isinstance(index, slice) else plain(modules, index)

    monkeypatch.setattr(torch.nn.ModuleList, "__getitem__", twice)
    with pytest.raises(StreamingError, match="runs more than once for a token"):
        tune(tiny("llama"), is_streamed=True)


@pytest.mark.parametrize("parts", [(1,), (4, 3), (2000, 1, 999)])
def test_the_median_is_found_by_counting(parts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(parts))
    numbers = [torch.randn(n, generator=generator).exp() ** 8 for n in parts]
    numbers.append(torch.zeros(5))
    every = torch.cat(numbers)
    assert median_of(lambda: numbers) == float(every[every > 0].median())
    assert median_of(lambda: [torch.zeros(3)]) == 0
