"""Codes and scales that are learned after a recipe was found, and that they are what is served."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import plan_of, some_tokens
from conftest import TinyCheckpoint
from emulated import recipe_of, validate
from exported import export
from safetensors.torch import load, save
from torch import Tensor

from mofq.decision import recipe_from_layers
from mofq.decision.recipe import Recipe, load_recipe, write_recipe
from mofq.delivery.apply.emulate import apply
from mofq.delivery.export.compressed_tensors import find_folder_deviations
from mofq.delivery.recipe_layers import find_recipe_layers
from mofq.delivery.rewriting.remake import Base
from mofq.delivery.tuning.codes import LearnedCodes, learning_bytes
from mofq.delivery.tuning.even_steps import EvenSteps
from mofq.delivery.tuning.tensors import learned_codes
from mofq.delivery.tuning.tune_recipe import TunedRecipe, tune_recipe
from mofq.delivery.validation import find_deviations
from mofq.delivery.validation.enforcement import enforcement
from mofq.evidence.code_changes import CodeChanges, can_learn, from_tensors, to_tensors
from mofq.evidence.corpora import load_text
from mofq.evidence.layer_codes import LayerCodes
from mofq.exceptions import RecipeError
from mofq.files.progress import Tell
from mofq.model.checkpoint.headers import open_checkpoint, open_stored
from mofq.model.layers import LinearLayer, find_layers, is_expert
from mofq.model.loading import load_model
from mofq.model.streaming.execution import model_bytes
from mofq.numbers.quantize import FakeQuantLinear, dequantize_weight
from mofq.numbers.schemes import TensorScheme, parse_scheme

SCHEMES = (
    *("int4.g32@mse", "int4.g32.asym", "int3.g32@mse", "int8.channel", "int4.tensor"),
    *("fp4_e2m1.g32", "fp8_e4m3.channel", "fp8_e4m3.block128", "nvfp4", "mxfp4", "mxfp6_e2m3"),
)
WINDOWS = {"a": some_tokens(16, 24)}
LAYER = "model.layers.1.mlp.down_proj"


def weight_scheme(name: str) -> TensorScheme:
    found = parse_scheme(name).weight
    assert found is not None
    return found


def layer_like(weight_OI: Tensor) -> LinearLayer:
    rows, columns = weight_OI.shape
    return LinearLayer("x", "x.weight", rows, columns, "BF16", "x", "x")


def learning(name: str, weight_OI: Tensor) -> LearnedCodes:
    scheme = parse_scheme(name)
    layer = layer_like(weight_OI)
    codes = LayerCodes(
        layer, weight_scheme(name), lambda a, b: weight_OI[a:b], weight_OI.abs().amax()
    )
    rounded_OI = codes.decoded(0, len(weight_OI))
    module = FakeQuantLinear(rounded_OI, None, scheme=replace(scheme, activation=None))
    return LearnedCodes.of("x", module.weight, codes)


@pytest.fixture
def weight_OI() -> Tensor:
    return torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("name", SCHEMES)
def test_learning_begins_with_the_codes_of_the_scheme(name: str, weight_OI: Tensor) -> None:
    one = learning(name, weight_OI)
    assert torch.equal(one.learned().codes_OI.float(), one.before.codes_OI.float())
    changes = one.changes()
    assert not len(changes.at_N)
    assert changes.scale is None
    # As near to the weight as the cell allows, most often at it.
    assert (one.latent_OI - weight_OI).abs().median() < 1e-6
    before_OI = one.weight.clone()
    one.put()
    assert torch.equal(one.weight, before_OI)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_follow_the_gradient_and_no_further_than_the_next(
    name: str, weight_OI: Tensor
) -> None:
    one = learning(name, weight_OI)
    before_OI = one.weight.detach().clone()
    sign_OI = torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0).expand(128, 256)
    for _ in range(6):
        one.begin_step()
        one.weight.grad = 1e-9 * sign_OI  # its size does not matter
        one.step_codes(0.1)
    one.put()
    moved_OI = one.weight.detach() - before_OI
    assert not bool((moved_OI * sign_OI > 0).any())
    share = float((moved_OI != 0).float().mean())
    assert 0.3 < share < 0.95
    # A code away, at most: of floating-point codes one away from zero is up to twice as far.
    reach_OI = (2 if "fp" in name else 1) * _distance(one)
    assert bool((moved_OI.abs() <= 1.01 * reach_OI + 1e-7).all())


def _distance(one: LearnedCodes) -> Tensor:
    from mofq.delivery.tuning.codes import _distances

    return _distances(one.before, one.scheme)


def test_scales_follow_the_gradient_of_their_factor(weight_OI: Tensor) -> None:
    one = learning("int4.g32", weight_OI)
    assert one.factor_AG is not None
    target_OI = one.weight.detach() * 1.03
    for _ in range(60):
        one.begin_step()
        loss = (one.weight - target_OI).square().sum()
        loss.backward()
        one.step_codes(0.0)
        one.end_step()
        assert one.factor_AG.grad is not None
        with torch.no_grad():
            one.factor_AG -= 2e-3 * one.factor_AG.grad.sign()
        one.put()
    assert one.factor_AG.detach().mean() == pytest.approx(0.03, abs=3e-3)
    changes = one.changes()
    assert not len(changes.at_N)
    assert changes.scale is not None
    assert changes.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int8.tensor", "fp8_e4m3.tensor.s-f32"])
def test_scales_stay_that_have_few_steps_or_that_fused_layers_share(
    name: str, weight_OI: Tensor
) -> None:
    assert learning(name, weight_OI).factor_AG is None


@pytest.mark.parametrize("name", ["nf4.g64", "fp8_e4m3.unscaled"])
def test_what_is_not_learned(name: str) -> None:
    assert not can_learn(weight_scheme(name))


@pytest.mark.parametrize(
    "name", ["int4.g32@mse", "fp8_e4m3.block32x128", "int8.channel", "int4.tensor"]
)
def test_changes_are_the_same_in_blocks_of_rows(name: str, weight_OI: Tensor) -> None:
    one = learning(name, weight_OI)
    generator = torch.Generator().manual_seed(1)
    one.latent_OI += 0.02 * torch.randn(weight_OI.shape, generator=generator)
    if one.factor_AG is not None:
        one.factor_AG += 0.01 * torch.randn(one.factor_AG.shape, generator=generator)
    whole = one.learned()
    layer = layer_like(weight_OI)
    codes = LayerCodes(
        layer,
        one.scheme,
        lambda a, b: weight_OI[a:b],
        weight_OI.abs().amax(),
        changes=from_tensors(to_tensors({"x": one.changes()}))["x"],
    )
    assert len(one.changes().at_N) > 1000
    blocks = [codes.rows(start, start + 32) for start in range(0, 128, 32)]
    assert torch.equal(torch.cat([block.codes_OI for block in blocks]), whole.codes_OI)
    decoded_OI = torch.cat([dequantize_weight(block, one.scheme) for block in blocks])
    assert torch.equal(decoded_OI, dequantize_weight(whole, one.scheme))


ONE = torch.tensor([1], dtype=torch.int8)
TWO = torch.tensor([1, 1], dtype=torch.int8)
SCALE = torch.ones(128, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("at", "codes_N", "scale", "reason"),
    [
        ([3, 2], TWO, None, "not in order"),
        ([0, 128 * 256], TWO, None, "not within"),
        ([-1], ONE, None, "not within"),
        ([2**62], ONE, None, "not within"),
        ([0], TWO, None, "do not belong together"),
        ([0], 99 * ONE, None, "none of int4"),
        ([0], 8 * ONE, None, "none of int4"),
        ([0], ONE.float() / 2, None, "codes in torch.int8, and has them in torch.float32"),
        ([0], ONE.to(torch.uint8), None, "codes in torch.int8, and has them in torch.uint8"),
        ([0], ONE, SCALE / 0, "not finite"),
        ([0], ONE, SCALE * 0, "or 0"),
        ([0], ONE, SCALE[:, 1:], "scales of shape [128, 8], and has [128, 7]"),
        ([0], ONE, SCALE.float(), "scales in torch.bfloat16, and has them in torch.float32"),
    ],
)
def test_what_is_no_change_is_refused(
    at: list[int], codes_N: Tensor, scale: Tensor | None, reason: str
) -> None:
    fault = CodeChanges(torch.tensor(at), codes_N, scale).fault(
        weight_scheme("int4.g32"), (128, 256)
    )
    assert fault is not None
    assert reason in fault


@pytest.mark.parametrize("code", [0.3, 7.0, torch.nan, torch.inf])
def test_what_no_float_format_holds_is_no_code(code: float) -> None:
    changes = CodeChanges(torch.tensor([0]), torch.tensor([code]), None)
    assert changes.fault(weight_scheme("nvfp4"), (128, 256)) == "codes are none of fp4_e2m1"


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        ("nf4.g64", None, "codes of its scheme are not learned"),
        ("int4.g32@stored", None, "codes of its scheme are not learned"),
        ("nvfp4", (128, 16), "scales are none of E4M3"),
        ("mxfp4", (128, 8), "scales are no powers of two"),
        ("int8.tensor", (1, 1), "scales of its scheme are not learned"),
    ],
)
def test_changes_to_what_no_tuning_changes_are_refused(
    scheme: str, shape: tuple[int, int] | None, reason: str
) -> None:
    scale = None if shape is None else torch.full(shape, 0.3)
    codes_N = ONE if "int" in scheme else ONE.float()
    changes = CodeChanges(torch.tensor([0]), codes_N, scale)
    assert changes.fault(weight_scheme(scheme), (128, 256)) == reason


@pytest.mark.parametrize(
    ("scheme", "scale", "dtype"),
    [
        ("nvfp4", 0.3125, torch.float8_e4m3fn),
        ("mxfp4", 2.0**-20, torch.uint8),
        ("int4.g32.s-f32", 0.3, torch.float32),
    ],
)
def test_scales_of_one_byte_are_one_byte_in_a_file(
    scheme: str, scale: float, dtype: torch.dtype
) -> None:
    columns = 16 if scheme == "nvfp4" else 8
    codes_N = ONE if "int" in scheme else ONE.float()
    one = CodeChanges(torch.tensor([0]), codes_N, torch.full((128, columns), scale))
    assert one.fault(weight_scheme(scheme), (128, 256)) is None
    tensors = to_tensors({"x": one})
    assert tensors["codes/x/scale"].dtype == dtype
    found = from_tensors(load(save(tensors)))["x"]
    assert found.scale is not None
    assert one.scale is not None
    assert found.scale.dtype == torch.float32
    assert torch.equal(found.scale, one.scale)


def tune(
    model: Path, scheme: str = "int4.g32", *, steps: int = 40, tell: Tell | None = None
) -> TunedRecipe:
    checkpoint = open_checkpoint(str(model))
    return tune_recipe(
        checkpoint,
        recipe_of(checkpoint, scheme),
        WINDOWS,
        base=Base(checkpoint, None),
        plan=plan_of(model, WINDOWS),
        steps=steps,
        tell=tell,
    )


@pytest.fixture(scope="module")
def model(tiny: TinyCheckpoint) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def found(model: Path) -> TunedRecipe:
    return tune(model)


def with_tensors(recipe: Recipe, tensors: dict[str, Tensor]) -> Recipe:
    return with_content(recipe, save(tensors))


def with_content(recipe: Recipe, content: bytes) -> Recipe:
    assert recipe.tuning is not None
    sha256 = hashlib.sha256(content).hexdigest()
    return replace(recipe, tuned=content, tuning=replace(recipe.tuning, sha256=sha256))


def test_learned_codes_diverge_less_on_what_no_step_saw(found: TunedRecipe) -> None:
    tuning = found.tuning
    assert found.helps
    assert tuning.kl_after < 0.9 * tuning.kl_before
    assert tuning.layers == 14
    assert tuning.what == "codes and scales of 14 layers learned, 5 norms tuned"


def test_learning_is_the_same_again(model: Path, found: TunedRecipe) -> None:
    assert tune(model).recipe.tuned == found.recipe.tuned


def test_a_recipe_is_applied_with_its_codes_and_proved(found: TunedRecipe, model: Path) -> None:
    checkpoint, recipe = open_checkpoint(str(model)), found.recipe
    layers = find_recipe_layers(checkpoint, recipe)
    applied = apply(load_model(model), recipe, checkpoint=checkpoint)
    assert not find_deviations(applied, recipe, checkpoint=checkpoint)
    weight_OI = applied.get_parameter(f"{LAYER}.weight")
    untuned = apply(
        load_model(model), replace(recipe, tuning=None, tuned=b""), checkpoint=checkpoint
    )
    changes = learned_codes(recipe, layers)[LAYER]
    assert len(changes.at_N)
    assert not torch.equal(untuned.get_parameter(f"{LAYER}.weight"), weight_OI)
    # One code is put back.
    place = int(changes.at_N[0])
    flat = weight_OI.view(-1)
    flat[place] = untuned.get_parameter(f"{LAYER}.weight").view(-1)[place]
    (deviation,) = find_deviations(applied, recipe, checkpoint=checkpoint)
    assert deviation.layer == LAYER


@pytest.mark.parametrize("scheme", ["int4.g32", "nvfp4"])
def test_a_folder_has_the_codes_and_is_proved(scheme: str, model: Path, tmp_path: Path) -> None:
    recipe, checkpoint = tune(model, scheme, steps=40).recipe, open_checkpoint(str(model))
    folder = export(model, recipe, tmp_path / "folder").folder
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert not list(find_folder_deviations(checkpoint, recipe, open_stored(str(folder))))
    untuned = replace(recipe, tuning=None, tuned=b"")
    changed = {
        one.layer.rpartition(".")[0]
        for one in find_folder_deviations(checkpoint, untuned, open_stored(str(folder)))
    }
    assert changed >= {
        name
        for name, one in learned_codes(recipe, find_recipe_layers(checkpoint, recipe)).items()
        if len(one.at_N)
    }
    text = load_text("demo-en")
    arguments = {"tokens": 64, "sequence_length": 16}
    measured = [
        validate(str(model), recipe, text, **arguments),
        validate(str(model), folder, text, **arguments),
        validate(str(model), recipe, text, **arguments, execution="streamed"),
    ]
    assert all(one.enforced and one.is_tuned for one in measured)
    assert measured[0].windows == measured[2].windows
    assert measured[1].windows == pytest.approx(measured[0].windows, rel=1e-3)


def test_two_recipes_that_differ_in_codes_alone_are_told_apart_streamed(
    found: TunedRecipe, model: Path
) -> None:
    from mofq.delivery.validation import validate_many

    untuned = replace(found.recipe, tuning=None, tuned=b"")
    both = validate_many(
        str(model),
        [found.recipe, untuned, found.recipe],
        load_text("demo-en"),
        tokens=64,
        sequence_length=16,
        execution="streamed",
    )
    assert all(one.enforced for one in both)
    assert both[0].windows == both[2].windows
    assert both[0].windows != both[1].windows


def test_enforcement_reads_what_was_tuned_once_for_all_units(
    found: TunedRecipe, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has a seventh of a byte for each weight, and is hashed when it is read."""
    checkpoint, reads = open_checkpoint(str(model)), []

    def loaded(content: bytes) -> dict[str, Tensor]:
        reads.append(len(content))
        return load(content)

    monkeypatch.setattr("mofq.delivery.tuning.tensors.load", loaded)
    wanted = enforcement(found.recipe, checkpoint, fits=None, decoded=False)
    before = len(reads)
    norms = [name for name in checkpoint.tensors if "norm" in name]
    state = load_model(model).state_dict()
    deviations = [list(wanted.of_others({name: state[name]})) for name in norms]
    assert all(len(one) == 1 for one in deviations)
    assert len(reads) == before


def test_codes_of_another_model_are_refused(
    found: TunedRecipe, model: Path, tmp_path: Path
) -> None:
    tensors, checkpoint = load(found.recipe.tuned), open_checkpoint(str(model))
    write_recipe(found.recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == found.recipe
    other = {name.replace("layers.1.", "layers.7."): one for name, one in tensors.items()}
    lost = {name: one for name, one in tensors.items() if name != f"codes/{LAYER}/gaps"}
    at_N = from_tensors(tensors)[LAYER].at_N
    for wrong, reason in (
        ({k: v for k, v in other.items() if "codes/" in k}, "no weight of 'model.layers.7"),
        (lost, f"has no 'codes/{LAYER}/gaps'"),
        (lost | {f"codes/{LAYER}/at": at_N.flip(0)}, "not in order"),
        (lost | {f"codes/{LAYER}/gaps": at_N.float()}, "places and codes do not belong together"),
        (tensors | {f"codes/{LAYER}/point": torch.ones(1)}, "point', of which this mofq knows"),
    ):
        with pytest.raises(RecipeError, match=reason):
            apply(load_model(model), with_tensors(found.recipe, wrong), checkpoint=checkpoint)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0"])
def test_a_file_of_unknown_dtypes_is_refused(dtype: str, found: TunedRecipe, model: Path) -> None:
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, 1 if dtype == "F4" else 2]}
    header = json.dumps({"codes/x/at": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(entry["data_offsets"][1])
    recipe = with_content(found.recipe, content)
    with pytest.raises(RecipeError, match="holds no tensors"):
        learned_codes(recipe, find_recipe_layers(open_checkpoint(str(model)), recipe))


@pytest.mark.parametrize(("kind", "found"), [("free_bytes", 1000), ("pass_bytes", 10**15)])
def test_without_memory_for_codes_beside_a_pass_norms_alone_are_tuned(
    kind: str, found: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"mofq.delivery.tuning.tune_recipe.{kind}", lambda *_: found)
    told: list[str] = []
    assert tune(model, steps=1, tell=told.append).tuning.layers == 0
    assert "GB of memory beside the model" in told[-1]


def test_codes_are_learned_where_layers_have_other_names_in_memory(tiny: TinyCheckpoint) -> None:
    """The loaded model has another prefix than the checkpoint."""
    folder = tiny("gemma3")
    recipe, checkpoint = tune(folder, steps=2).recipe, open_checkpoint(str(folder))
    assert recipe.tuning is not None
    assert recipe.tuning.layers == 14
    applied = apply(load_model(folder), recipe, checkpoint=checkpoint)
    assert not find_deviations(applied, recipe, checkpoint=checkpoint)


def test_codes_may_be_all_that_is_tuned(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mofq.delivery.tuning.resident.find_norms", lambda *_: ())
    tuning = tune(model, "mxfp4").tuning
    assert (tuning.tensors, tuning.layers) == (0, 14)
    assert tuning.kl_after < tuning.kl_before


@pytest.mark.parametrize(("scheme", "each"), [("int4.g32", 9), ("nvfp4", 12), ("nf4.g64", 0)])
def test_memory_for_learning_is_of_the_layers_that_are_learned(
    scheme: str, each: int, tiny: TinyCheckpoint
) -> None:
    checkpoint = open_checkpoint(str(tiny("llama", tie_word_embeddings=True)))
    layers = find_layers(checkpoint, include_embeddings=True)
    schemes = dict.fromkeys((group.name for group in layers.groups), scheme)
    recipe = recipe_from_layers(layers, schemes, checkpoint=checkpoint)
    linear = [one for one in layers.grouped_layers if one.role == "linear"]
    assert learning_bytes(recipe, layers) == each * sum(one.weights for one in linear)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_learned(family: str, tiny: TinyCheckpoint, tmp_path: Path) -> None:
    """Each in a tensor of its own; gate and up, and what is transposed, in a part of one."""
    folder = tiny(family)
    found = tune(folder)
    recipe, checkpoint = found.recipe, open_checkpoint(str(folder))
    changes = from_tensors(load(recipe.tuned))
    experts = [name for name in changes if "experts" in name]
    layers = find_recipe_layers(checkpoint, recipe)
    assert len(experts) == sum(is_expert(one) for one in layers.grouped_layers) > 0
    assert any(len(changes[name].at_N) for name in experts)
    assert found.tuning.kl_after < found.tuning.kl_before
    # What is applied to another model of it is what was learned.
    applied = apply(load_model(folder), recipe, checkpoint=checkpoint)
    assert not find_deviations(applied, recipe, checkpoint=checkpoint)


@pytest.mark.parametrize("flags", ["fpu", "fpu avx512_bf16"])
def test_experts_are_left_as_they_are_where_only_they_do_not_fit(
    flags: str, tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("qwen3_moe")
    checkpoint = open_checkpoint(str(folder))
    layers = find_layers(checkpoint)
    weights = sum(one.weights for one in layers.grouped_layers if not is_expert(one))
    copies = model_bytes(checkpoint, "bfloat16") if "bf16" in flags else 0
    monkeypatch.setattr("mofq.delivery.tuning.tune_recipe.pass_bytes", lambda *_: 0)
    monkeypatch.setattr("mofq.numbers.processor.processor_flags", lambda: flags)
    monkeypatch.setattr(
        "mofq.delivery.tuning.tune_recipe.free_bytes", lambda _: int((9 * weights + copies) / 0.79)
    )
    told: list[str] = []
    found = tune(folder, steps=2, tell=told.append)
    assert told[-1].startswith("No codes of experts are learned: that takes ")
    names = from_tensors(load(found.recipe.tuned))
    assert names
    assert not any("experts." in name for name in names)


def test_what_answers_to_most_moves_least() -> None:
    few, many = torch.zeros(1), torch.zeros(5)
    steps = EvenSteps([few, many])
    for number in range(4):
        few.grad = torch.full((1,), 1e-3)
        many.grad = 1e-6 * torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0]) * (-1) ** (number // 2)
        steps.step(0.01)
        if not number:
            # As far as the median where gradients are no larger, and less where they are.
            assert many.tolist() == pytest.approx([-0.01, 0.01, -0.01, -0.01, 0.0])
            assert few.item() == pytest.approx(-1e-5)
    assert many.abs().max() < 1e-6  # what changes its sign comes back
    assert few.item() == pytest.approx(-4e-5)
