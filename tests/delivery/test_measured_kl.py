from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from emulated import recipe_of, validate
from families import TINY_FAMILIES, long_but
from packed_sources import write_packed

from mofq.decision import uniform_recipe
from mofq.delivery.validation.measured_kl import MeasuredKl
from mofq.demo import demo_model_folder
from mofq.evidence.corpora import Corpus, load_text
from mofq.exceptions import CorpusError, MofqError, RecipeError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import find_layers

MIXED = {"layers_0_attn_qkv": "bf16", "layers_3_mlp_down": "int8.channel+int8.token"}


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(str(demo_model_folder()))


@pytest.fixture(scope="module")
def objective(demo: Checkpoint) -> Iterator[MeasuredKl]:
    text = load_text("demo-en")
    with MeasuredKl(str(demo.folder), text, tokens=512, sequence_length=128) as one:
        yield one


def tiny_text(folder: Path) -> Corpus:
    path = folder / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and sleeps well. " * 3)
    return load_text(str(path))


def test_going_to_another_recipe_and_back_gives_the_bits_of_validate(
    demo: Checkpoint, objective: MeasuredKl
) -> None:
    first = recipe_of(demo, "int4.g32", **MIXED)
    second = recipe_of(demo, "fp4_e2m1.g32", layers_1_attn_o="bf16")
    windows = list(objective.evaluate(first))
    expected = validate(
        str(demo.folder), first, load_text("demo-en"), tokens=512, sequence_length=128
    )
    assert expected.enforced
    assert tuple(windows) == expected.windows
    others = list(objective.evaluate(second))
    assert others != windows
    assert list(objective.evaluate(first)) == windows
    assert list(objective.evaluate(second)) == others


def test_a_tied_embedding_goes_and_comes_back(demo: Checkpoint, objective: MeasuredKl) -> None:
    layers = find_layers(demo, include_embeddings=True)
    rounded = uniform_recipe(demo, layers, "int4.g32")
    windows = list(objective.evaluate(rounded))
    expected = validate(
        str(demo.folder), rounded, load_text("demo-en"), tokens=512, sequence_length=128
    )
    assert expected.enforced
    assert tuple(windows) == expected.windows
    left = uniform_recipe(demo, layers, "bf16")
    assert list(objective.evaluate(left)) == [0.0] * len(windows)
    assert list(objective.evaluate(rounded)) == windows  # from the cache
    with_linear = recipe_of(demo, "int4.g32")
    assert max(objective.evaluate(with_linear)) < max(windows)


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "gpt2", "gemma3_text", "olmoe"))
def test_every_family_comes_back_to_itself(
    tiny: TinyCheckpoint, family: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    recipe, text = recipe_of(checkpoint, "int4.g32+int8.token"), tiny_text(tmp_path)
    expected = validate(str(checkpoint.folder), recipe, text, tokens=32, sequence_length=16)
    with MeasuredKl(
        str(checkpoint.folder), text, tokens=32, sequence_length=16, cache_bytes=0
    ) as one:
        for scheme in ("int8.channel", "bf16"):
            list(one.evaluate(recipe_of(checkpoint, scheme)))
        assert set(one.evaluate(recipe_of(checkpoint, "bf16"))) == {0.0}
        assert tuple(one.evaluate(recipe)) == expected.windows


def test_what_an_nvfp4_source_keeps_has_its_own_global_scales(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    write_packed(tiny("llama", hidden_size=96, intermediate_size=160), tmp_path / "m", "nvfp4")
    checkpoint, text = open_checkpoint(str(tmp_path / "m")), tiny_text(tmp_path)
    stored = {f"layers_{n}_{of}": "nvfp4@stored" for n in (0, 1) for of in ("attn_o", "mlp_down")}
    recipe = recipe_of(checkpoint, "bf16", **stored)
    expected = validate(str(checkpoint.folder), recipe, text, tokens=32, sequence_length=16)
    assert expected.enforced
    with MeasuredKl(str(checkpoint.folder), text, tokens=32, sequence_length=16) as one:
        list(one.evaluate(recipe_of(checkpoint, "int8.channel")))
        assert tuple(one.evaluate(recipe)) == expected.windows


def test_static_scales_are_those_of_each_recipe(demo: Checkpoint, objective: MeasuredKl) -> None:
    recipe = recipe_of(demo, "fp8_e4m3.tensor+fp8_e4m3.tensor")
    kl = {}
    for amax in (20.0, 0.5):
        groups = tuple(
            replace(group, static_amax=dict.fromkeys(group.layers, amax)) for group in recipe.groups
        )
        kl[amax] = sum(objective.evaluate(replace(recipe, groups=groups)))
    assert kl[0.5] > 2 * kl[20.0]
    with pytest.raises(RecipeError, match="static_amax"):
        objective.evaluate(recipe)


def test_a_caller_may_stop_early_but_not_go_on_after_another_began(
    demo: Checkpoint, objective: MeasuredKl
) -> None:
    recipe = recipe_of(demo, "int4.g32")
    expected = list(objective.evaluate(recipe))
    begun = objective.evaluate(recipe)
    assert next(begun) == expected[0]
    assert list(objective.evaluate(recipe)) == expected
    with pytest.raises(MofqError, match="another recipe was begun"):
        next(begun)


def test_a_recipe_of_another_model_is_refused_and_harms_nothing(
    demo: Checkpoint, objective: MeasuredKl
) -> None:
    recipe = recipe_of(demo, "int4.g32")
    expected = list(objective.evaluate(recipe))
    with pytest.raises(RecipeError, match="index_sha256"):
        objective.evaluate(replace(recipe, index_sha256="0" * 64))
    assert list(objective.evaluate(recipe)) == expected


def test_windows_longer_than_the_context_are_refused(demo: Checkpoint) -> None:
    with pytest.raises(CorpusError, match="context"):
        MeasuredKl(str(demo.folder), load_text("demo-en"), tokens=4096, sequence_length=1024)
