"""Norms that are tuned after quantizing: what is found, tuned, carried by a recipe and refused."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import plan_of, some_tokens
from conftest import TinyCheckpoint
from emulated import recipe_of, validate
from exported import export
from families import copy_with_tensors
from safetensors.torch import load, save
from torch import Tensor, nn

from mofq.decision.recipe import RecipeResult, load_recipe, write_recipe
from mofq.delivery.apply.emulate import apply
from mofq.delivery.backends import find_exporter
from mofq.delivery.export.compressed_tensors import find_folder_deviations
from mofq.delivery.rewriting.remake import Base
from mofq.delivery.tuning.norms import find_norms
from mofq.delivery.tuning.tune import Tuned, split_sequences
from mofq.delivery.tuning.tune_recipe import TunedRecipe, tune_recipe
from mofq.delivery.validation import find_deviations
from mofq.evidence.corpora import load_text
from mofq.exceptions import BackendError, CorpusError, RecipeError, StatsError
from mofq.model.checkpoint.headers import open_checkpoint, open_stored
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import FakeQuantLinear
from mofq.numbers.schemes import parse_scheme

WINDOWS = {"a": some_tokens(12, 24)}
INPUTS = "int8.channel+int8.token"
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def original(tiny: TinyCheckpoint) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def model(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original with norms that are off by a few percent: as quantizing does it, and more."""

    def put_off(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                tensor[::2] *= 1.04

    return copy_with_tensors(original, tmp_path_factory.mktemp("model") / "m", put_off)


def tune(
    original: Path, model: Path, scheme: str = INPUTS, *, steps: int = 24, codes: bool = False
) -> TunedRecipe:
    checkpoint = open_checkpoint(str(model))
    return tune_recipe(
        open_checkpoint(str(original)),
        recipe_of(checkpoint, scheme),
        WINDOWS,
        base=Base(checkpoint, None),
        plan=plan_of(model, WINDOWS),
        steps=steps,
        codes=codes,
    )


@pytest.fixture(scope="module")
def found(original: Path, model: Path) -> TunedRecipe:
    return tune(original, model)


@pytest.fixture
def written(found: TunedRecipe, tmp_path: Path) -> Path:
    """The file of a recipe with tuned norms."""
    path = tmp_path / "recipe.yaml"
    write_recipe(found.recipe, path)
    return path


def test_tuned_norms_diverge_less_from_the_original_on_what_no_step_saw(
    found: TunedRecipe,
) -> None:
    tuning = found.tuning
    assert found.helps
    assert tuning.kl_after < 0.8 * tuning.kl_before
    assert (tuning.sequences, tuning.held_out, tuning.steps) == (9, 3, 24)
    assert tuning.tensors == len(load(found.recipe.tuned)) == 5  # two of each layer, and the last
    assert f"{tuning.kl_after:.3g}" in tuning.gain


def test_tuning_is_the_same_again(original: Path, model: Path, found: TunedRecipe) -> None:
    assert tune(original, model).recipe.tuned == found.recipe.tuned


def test_where_nothing_is_gained_it_says_so(original: Path) -> None:
    # Nothing is quantized and nothing is off: there is nothing to gain.
    assert not tune(original, original, "bf16").helps


def test_too_few_sequences_are_refused(model: Path) -> None:
    checkpoint, windows = open_checkpoint(str(model)), {"a": some_tokens(7, 24)}
    with pytest.raises(CorpusError, match="needed to judge, found 1"):
        tune_recipe(
            checkpoint,
            recipe_of(checkpoint, INPUTS),
            windows,
            base=Base(checkpoint, None),
            plan=plan_of(model, windows),
            steps=1,
        )


def test_what_fitted_schemes_need_is_asked_for_before_the_model_runs(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mofq.delivery.tuning.tune_recipe.load_model", None)
    with pytest.raises(StatsError, match="there are none here"):
        tune(model, model, "int4.g32@nats")


def test_a_divergence_of_nothing_is_written_where_its_sum_is_below_zero(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuned = Tuned({}, {}, torch.tensor([1e-9, 2e-9, 1e-9]).double(), torch.full((3,), -1e-9))
    monkeypatch.setattr("mofq.delivery.tuning.tune_recipe.tune_model", lambda *_, **__: tuned)
    found = tune(model, model, steps=1)
    assert found.tuning.kl_after == 0
    write_recipe(found.recipe, tmp_path / "recipe.yaml")


def test_every_corpus_is_split() -> None:
    windows = {"a": some_tokens(8, 4), "b": some_tokens(5, 4, seed=1)}
    split = split_sequences(windows, {}, most=10)
    held = [*some_tokens(8, 4)[3::4], *some_tokens(5, 4, seed=1)[3::4]]
    assert torch.equal(split.held_out_NT, torch.stack(held))
    assert len(split.stepped_NT) == 13 - 3
    # No more than the steps visit, of both.
    few = split_sequences(windows, {}, most=4)
    assert torch.equal(few.held_out_NT, split.held_out_NT)
    assert torch.equal(few.stepped_NT, split.stepped_NT[[0, 2, 5, 7]])
    # Where others judge, none is held out.
    others = {"a": some_tokens(2, 4, seed=2), "b": some_tokens(1, 4, seed=3)}
    whole = split_sequences(windows, others, most=0)
    assert torch.equal(whole.stepped_NT, torch.cat(list(windows.values())))
    assert torch.equal(whole.held_out_NT, torch.cat(list(others.values())))


def test_what_is_said_to_be_stepped_on_was(original: Path, model: Path) -> None:
    tuning = tune(original, model, steps=1).tuning
    assert (tuning.sequences, tuning.held_out) == (4, 3)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.BatchNorm2d(8)])
def test_norms_of_a_tower_that_take_no_hidden_states_are_found(
    norm: nn.Module, model: Path
) -> None:
    checkpoint = open_checkpoint(str(model))
    loaded = load_model(model)
    before = len(find_norms(loaded, checkpoint, find_layers(checkpoint).architecture))
    loaded.add_module("tower", norm.eval())
    assert len(find_norms(loaded, checkpoint, find_layers(checkpoint).architecture)) == before


@pytest.mark.parametrize(
    ("family", "count", "adds_one"),
    [("llama", 5, False), ("qwen3", 9, False), ("gemma3", 13, True), ("gpt2", 10, False)],
)
def test_the_norms_of_families_are_found_with_the_size_of_their_gains(
    tiny: TinyCheckpoint, family: str, count: int, adds_one: bool
) -> None:
    folder = tiny(family)
    checkpoint = open_checkpoint(str(folder))
    loaded = load_model(folder)
    norms = find_norms(loaded, checkpoint, find_layers(checkpoint).architecture)
    assert len(norms) == count
    state = {id(one) for one in loaded.parameters()}
    for norm in norms:
        (name,) = norm.names
        assert "norm" in name or ".ln_" in name
        assert id(norm.parameter) in state
        if name.endswith("weight"):
            stored = norm.parameter.detach().float()
            assert torch.equal(norm.size_C, (stored + adds_one).abs())


def test_a_recipe_is_read_with_its_norms_and_written_again_in_the_same_bytes(
    found: TunedRecipe, written: Path, tmp_path: Path
) -> None:
    loaded = load_recipe(written)
    assert loaded == found.recipe
    assert loaded.tuned == found.recipe.tuned
    again = tmp_path / "other" / "renamed.yaml"
    again.parent.mkdir()
    write_recipe(loaded, again)
    assert again.read_bytes() == written.read_bytes()
    assert (again.parent / found.tuning.file).read_bytes() == found.recipe.tuned


def test_a_recipe_without_its_norms_or_with_others_is_refused(
    found: TunedRecipe, written: Path
) -> None:
    file = written.parent / found.tuning.file
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\0" if content[-1] else content[:-1] + b"\1")
    with pytest.raises(RecipeError, match=r"was changed since .* Take the file as it was"):
        load_recipe(written)
    file.unlink()
    with pytest.raises(RecipeError, match="Copy it from where the recipe was, or remove `tuning`"):
        load_recipe(written)
    text = written.read_text()
    start, stop = text.index("tuning:"), text.index("groups:")
    written.write_text(text[:start] + text[stop:])
    assert load_recipe(written).tuning is None


def test_a_recipe_whose_schemes_were_edited_is_refused_until_its_norms_are_removed(
    written: Path,
) -> None:
    written.write_text(written.read_text().replace(INPUTS, "int8.channel", 1))
    with pytest.raises(RecipeError, match="tuned for other schemes than the recipe has now"):
        load_recipe(written)


@pytest.mark.parametrize(
    "name", ["../tuned-0123456789abcdef.norms", "recipe.yaml", "a.safetensors"]
)
def test_a_recipe_names_no_other_file_as_its_norms(
    found: TunedRecipe, written: Path, name: str
) -> None:
    written.write_text(written.read_text().replace(found.tuning.file, name))
    with pytest.raises(RecipeError, match=r"tuning.*file"):
        load_recipe(written)


def test_norms_of_a_model_are_not_put_into_another_training_of_it(
    found: TunedRecipe, written: Path, original: Path, tmp_path: Path
) -> None:
    # Same names and shapes: as a fine-tune has them, or the same model rewritten.
    text = load_text("demo-en")
    with pytest.raises(RecipeError, match="a fine-tune or another revision"):
        validate(str(original), found.recipe, text, tokens=32, sequence_length=16)
    with pytest.raises(RecipeError, match="a fine-tune or another revision"):
        export(original, found.recipe, tmp_path / "folder")
    named = f"weights_sha256: {found.recipe.weights_sha256}"
    assert named in written.read_text()
    written.write_text(re.sub(f", {named}", "", written.read_text()))
    with pytest.raises(RecipeError, match="Name them, or remove `tuning`"):
        load_recipe(written)


def test_what_is_predicted_stays_that_of_before(found: TunedRecipe, tmp_path: Path) -> None:
    result = RecipeResult(kl_nats_per_token=0.25)
    untuned = replace(found.recipe, result=result, tuning=None, tuned=b"")
    tuned = replace(untuned, tuning=found.tuning, tuned=found.recipe.tuned)
    write_recipe(tuned, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").result == untuned.result
    assert not tuned.is_edited


def test_norms_of_another_model_are_refused(
    found: TunedRecipe, tiny: TinyCheckpoint, model: Path
) -> None:
    recipe = found.recipe
    wrong = save({NORM: torch.ones(3, dtype=torch.bfloat16)})
    tuning = replace(found.tuning, sha256=hashlib.sha256(wrong).hexdigest())
    with pytest.raises(RecipeError, match="Tune again for this model"):
        apply(
            load_model(model),
            replace(recipe, tuning=tuning, tuned=wrong),
            checkpoint=open_checkpoint(str(model)),
        )
    with pytest.raises(RecipeError, match="Read the recipe from its file"):
        apply(load_model(model), replace(recipe, tuned=b""))


def test_a_recipe_is_applied_with_its_norms_and_proved(found: TunedRecipe, model: Path) -> None:
    checkpoint, recipe = open_checkpoint(str(model)), found.recipe
    tuned = load(recipe.tuned)
    applied = apply(load_model(model), recipe, checkpoint=checkpoint)
    assert torch.equal(applied.get_parameter(NORM), tuned[NORM].float())
    assert not find_deviations(applied, recipe, checkpoint=checkpoint)
    applied.get_parameter(NORM).copy_(load_model(model).get_parameter(NORM))
    (deviation,) = find_deviations(applied, recipe, checkpoint=checkpoint)
    assert (deviation.layer, deviation.reason) == (NORM, "is not what the recipe tuned it to")
    untuned = replace(recipe, tuning=None, tuned=b"")
    applied = apply(load_model(model), recipe, checkpoint=checkpoint)
    assert len(find_deviations(applied, untuned, checkpoint=checkpoint)) == 5


def test_an_exported_folder_has_the_norms_and_is_proved_by_its_own_recipe(
    found: TunedRecipe, model: Path, tmp_path: Path
) -> None:
    recipe, checkpoint = found.recipe, open_checkpoint(str(model))
    folder = export(model, recipe, tmp_path / "folder").folder
    tuned = load(recipe.tuned)
    stored = load((folder / "model.safetensors").read_bytes())
    assert all(torch.equal(stored[name], tensor) for name, tensor in tuned.items())
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert len(list(folder.glob("*.safetensors"))) == 1  # engines read every file of the name
    assert "5 norms tuned. KL divergence" in (folder / "README.md").read_text()
    assert not list(find_folder_deviations(checkpoint, recipe, open_stored(str(folder))))
    text = load_text("demo-en")
    measured = validate(str(model), folder, text, tokens=64, sequence_length=16)
    applied = validate(str(model), recipe, text, tokens=64, sequence_length=16)
    assert measured.enforced
    assert applied.enforced
    assert measured.windows == pytest.approx(applied.windows)
    assert measured.is_tuned
    assert measured.to_json()["is_tuned"]
    # Of another recipe the folder differs in just these tensors.
    untuned = replace(recipe, tuning=None, tuned=b"")
    found_names = {
        one.layer for one in find_folder_deviations(checkpoint, untuned, open_stored(str(folder)))
    }
    assert found_names == tuned.keys()


def test_what_cannot_carry_tuned_norms_refuses_them(
    found: TunedRecipe, model: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(BackendError, match="with codes and norms as it finds them"):
        find_exporter("llm-compressor")(checkpoint, found.recipe, tmp_path / "other.yaml")


def test_a_prediction_says_nothing_of_what_was_tuned(found: TunedRecipe, model: Path) -> None:
    predicted = RecipeResult(kl_nats_per_token=0.25, kl_low=0.2, kl_high=0.3)
    recipe = replace(found.recipe, result=predicted)
    one = validate(str(model), recipe, load_text("demo-en"), tokens=64, sequence_length=16)
    assert one.within_prediction is None
    assert one.to_json()["predicted_kl_high"] == 0.3


def test_rounded_inputs_let_gradients_pass() -> None:
    linear = torch.nn.Linear(32, 4, bias=False)
    rounded = FakeQuantLinear.from_linear(
        linear, parse_scheme("int8.channel+int8.token"), weight_OI=linear.weight.detach()
    )
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    followed = x.clone().requires_grad_(True)
    out = rounded(followed)
    assert torch.equal(out, rounded(x))
    out.sum().backward()
    assert torch.allclose(followed.grad, linear.weight.detach().sum(0).expand(3, 32))
