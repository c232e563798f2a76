from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from families import TINY_FAMILIES
from test_emulate import recipe_of
from torch import nn

from mofq.backends import emulate
from mofq.checkpoint.headers import open_checkpoint
from mofq.checkpoint.model import load_model, load_tokenizer
from mofq.corpora import Corpus, load_text, tokenize
from mofq.exceptions import CheckpointError, CorpusError, MofqError, RecipeError
from mofq.quantize import FakeQuantLinear
from mofq.recipe import Recipe, RecipeGroup, write_recipe
from mofq.schemes import parse_scheme
from mofq.validate import (
    find_deviations,
    paired_difference,
    validate,
    validate_many,
    write_validation,
)

#: Tokens and sequence length of the tests: three windows of 16.
PLAN: dict[str, Any] = {"tokens": 50, "sequence_length": 16}

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def text(tmp_path: Path) -> Corpus:
    path = tmp_path / "held-out.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and sleeps well. " * 3)
    return load_text(str(path))


@pytest.fixture
def recipe_file(tiny_llama: Path, tmp_path: Path) -> Path:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "int4.g32+int8.token")
    result = {"kl_nats_per_token": 0.125, "kl_stderr": 0.5}
    path = tmp_path / "recipe.yaml"
    write_recipe(replace(recipe, result=result, budget={"kl_nats_per_token": 1e-9}), path)
    return path


def test_the_numbers_are_the_definitions_over_all_windows(
    tiny_llama: Path, recipe_file: Path, text: Corpus
) -> None:
    found = validate(str(tiny_llama), str(recipe_file), text, **PLAN)

    original, quantized = load_model(tiny_llama), load_model(tiny_llama)
    emulate.apply(quantized, recipe_of(open_checkpoint(str(tiny_llama)), "int4.g32+int8.token"))
    windows_NT = tokenize(text, load_tokenizer(tiny_llama), **PLAN)
    with torch.inference_mode():
        log_p = original(windows_NT).logits.double().log_softmax(-1)
        log_q = quantized(windows_NT).logits.double().log_softmax(-1)
    kl_NT = (log_p.exp() * (log_p - log_q)).sum(-1)
    targets = windows_NT[:, 1:, None]

    assert found.tokens == 48
    assert found.kl_nats_per_token == pytest.approx(kl_NT.mean().item(), rel=1e-3)
    assert found.windows == pytest.approx(kl_NT.mean(-1).tolist(), rel=1e-3)
    expected_stderr = kl_NT.mean(-1).std().item() / math.sqrt(3)
    assert found.kl_stderr == pytest.approx(expected_stderr, rel=1e-2)
    for log, perplexity in ((log_p, found.perplexity_original), (log_q, found.perplexity)):
        expected = (-log[:, :-1].gather(-1, targets).mean()).exp().item()
        assert perplexity == pytest.approx(expected, rel=1e-5)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert found.top1_agreement == pytest.approx(agreement)


def test_the_report_says_what_was_predicted_and_whether_the_budget_was_met(
    tiny_llama: Path, recipe_file: Path, text: Corpus
) -> None:
    found = validate(str(tiny_llama), str(recipe_file), text, **PLAN)
    assert found.predicted_kl_nats_per_token == 0.125
    assert found.predicted_kl_stderr == 0.5
    assert found.within_kl_budget is False
    # 4-bit codes, one 16-bit scale for 32 of them, and 16 bytes of shape for each matrix.
    per_layer = {"128x128": 2, "64x128": 2, "256x128": 2, "128x256": 1}
    weights = 2 * sum(n * math.prod(map(int, k.split("x"))) for k, n in per_layer.items())
    stored_bytes = weights / 2 + weights / 32 * 2 + 14 * 16
    assert found.bits_per_weight == pytest.approx(8 * stored_bytes / weights)
    assert found.enforced is True
    assert found.deviations == ()


def test_a_recipe_that_quantizes_nothing_diverges_by_exactly_nothing(
    tiny_llama: Path, text: Corpus
) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "bf16")
    found = validate(str(tiny_llama), recipe, text, **PLAN)
    assert (found.kl_nats_per_token, found.kl_stderr, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.perplexity_original
    assert found.predicted_kl_nats_per_token is None
    assert found.within_kl_budget is None
    assert found.bits_per_weight == 16.0
    assert found.enforced is True


def test_the_file_holds_every_promised_key_and_the_hashes_of_its_inputs(
    tiny_llama: Path, recipe_file: Path, text: Corpus, tmp_path: Path
) -> None:
    found = validate(str(tiny_llama), recipe_file, text, **PLAN)
    path = tmp_path / "validation.json"
    write_validation(found, path)
    content = json.loads(path.read_text())
    assert next(iter(content)) == "version"
    promised = {
        "kl_nats_per_token",
        "kl_stderr",
        "perplexity",
        "perplexity_original",
        "top1_agreement",
        "bits_per_weight",
        "predicted_kl_nats_per_token",
        "enforced",
        "windows",
    }
    assert promised <= content.keys()
    assert content["version"] == 1
    assert content["index_sha256"] == open_checkpoint(str(tiny_llama)).index_sha256
    assert content["text_sha256"] == text.sha256
    assert len(content["recipe_sha256"]) == 64
    assert (content["tokens"], content["sequence_length"]) == (48, 16)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_many_recipes_against_one_run_of_the_original_give_what_each_gives_alone(
    tiny_llama: Path, text: Corpus
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipes = [recipe_of(checkpoint, name) for name in ("int4.channel", "bf16+fp8_e4m3.token")]
    stages: list[str] = []
    together = validate_many(
        str(tiny_llama), recipes, text, **PLAN, progress=lambda stage, *_: stages.append(stage)
    )
    assert stages.count("original") == 3
    assert stages.count("validate") == 6
    for recipe, found in zip(recipes, together, strict=True):
        alone = validate(str(tiny_llama), recipe, text, **PLAN)
        assert (found.windows, found.perplexity) == (alone.windows, alone.perplexity)


def test_two_recipes_are_compared_window_by_window(tiny_llama: Path, text: Corpus) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipes = [recipe_of(checkpoint, name) for name in ("int4.channel", "int8.channel")]
    first, second = validate_many(str(tiny_llama), recipes, text, **PLAN)
    difference, stderr = paired_difference(
        replace(first, windows=(0.3, 0.5, 0.7)), replace(second, windows=(0.1, 0.4, 0.6))
    )
    # Differences 0.2, 0.1, 0.1: mean 0.4/3, sample variance 1/300.
    assert difference == pytest.approx(0.4 / 3)
    assert stderr == pytest.approx(1 / 30)
    assert paired_difference(first, first) == (0.0, 0.0)
    other_text = replace(second, lineage=replace(second.lineage, text_sha256="0"))
    with pytest.raises(MofqError, match="text_sha256 is"):
        paired_difference(first, other_text)
    with pytest.raises(MofqError, match="48 tokens and one of 32"):
        paired_difference(first, replace(second, tokens=32))


def test_an_unquantized_folder_is_compared_and_nothing_is_enforced(
    tiny: TinyCheckpoint, tiny_llama: Path, text: Corpus
) -> None:
    same = validate(str(tiny_llama), str(tiny_llama), text, **PLAN)
    assert (same.kl_nats_per_token, same.enforced, same.bits_per_weight) == (0.0, None, 16.0)
    other = validate(str(tiny_llama), tiny("llama", seed=1), text, **PLAN)
    assert other.kl_nats_per_token > 0


def test_a_folder_of_another_vocabulary_is_an_error(
    tiny: TinyCheckpoint, tiny_llama: Path, text: Corpus
) -> None:
    with pytest.raises(CheckpointError, match="predicts 256 tokens and the other model 512"):
        validate(str(tiny_llama), tiny("llama", vocab_size=512), text, **PLAN)


def test_a_sequence_longer_than_the_context_is_an_error(tiny_llama: Path, text: Corpus) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "bf16")
    with pytest.raises(CorpusError, match="129 is more than the model's context of 128"):
        validate(str(tiny_llama), recipe, text, tokens=129, sequence_length=129)


def test_a_recipe_of_another_model_is_refused_before_any_model_runs(
    tiny: TinyCheckpoint, tiny_llama: Path, text: Corpus
) -> None:
    other = recipe_of(open_checkpoint(str(tiny("llama", dtype=torch.float32))), "bf16")
    stages: list[str] = []
    with pytest.raises(RecipeError, match="made for"):
        validate(
            str(tiny_llama), other, text, **PLAN, progress=lambda stage, *_: stages.append(stage)
        )
    assert stages == []


def test_logits_that_are_not_finite_are_an_error(
    tiny: TinyCheckpoint, text: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama")

    def broken(*args: Any, **options: Any) -> Any:
        model = load_model(*args, **options)
        model.get_parameter("model.norm.weight").fill_(math.inf)
        return model

    monkeypatch.setattr("mofq.validate.run.load_model", broken)
    with pytest.raises(MofqError, match="the original model gives logits that are not finite"):
        validate(str(folder), recipe_of(open_checkpoint(str(folder)), "bf16"), text, **PLAN)


def test_a_full_disk_is_a_clear_error(
    tiny_llama: Path, text: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "bf16")
    # 3 windows of 16 positions, 256 tokens and 4 bytes.
    with pytest.raises(MofqError, match=r"need 49,152 bytes here.*Set TMPDIR"):
        validate(str(tiny_llama), recipe, text, **PLAN)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("scheme", ["int4.g32+fp8_e4m3.token", "int8.tensor", "nvfp4", "bf16"])
def test_a_recipe_as_applied_is_enforced_in_every_family(
    tiny: TinyCheckpoint, family: str, scheme: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    recipe = recipe_of(checkpoint, scheme, layers_1_attn_o="bf16")
    model = emulate.apply(load_model(checkpoint.folder), recipe, checkpoint=checkpoint)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


def test_a_recipe_in_bfloat16_of_a_float32_checkpoint_is_enforced(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("llama", dtype=torch.float32)))
    recipe = recipe_of(checkpoint, "int4.g32", layers_1_attn_o="bf16")
    model = load_model(checkpoint.folder, dtype="bfloat16")
    emulate.apply(model, recipe, checkpoint=checkpoint)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


def test_enforcement_by_blocks_of_rows_is_enforcement_of_the_whole(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mofq.validate.enforcement._BLOCK_ELEMENTS", 5000)
    checkpoint = open_checkpoint(str(tiny_llama))
    for scheme in ("int4.g32", "fp8_e4m3.block32", "nvfp4"):
        recipe = recipe_of(checkpoint, scheme)
        model = emulate.apply(load_model(tiny_llama), recipe)
        assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


def edit_one_weight(model: nn.Module) -> None:
    weight_OI = model.get_parameter(f"{UP}.weight")
    weight_OI[200, 100] = torch.nextafter(weight_OI[200, 100], torch.tensor(9.0))


def flip_the_sign_of_a_zero(model: nn.Module) -> None:
    weight_OI = model.get_parameter(f"{UP}.weight")
    row, column = (weight_OI == 0).nonzero()[0].tolist()
    weight_OI[row, column] = -0.0 if math.copysign(1, weight_OI[row, column].item()) > 0 else 0.0


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def leave_unquantized(model: nn.Module) -> None:
    original: Any = load_model(Path(model.name_or_path))  # type: ignore[arg-type]
    put(model, UP, original.get_submodule(UP))


def replace_by_scheme(name: str) -> Callable[[nn.Module], None]:
    def plant(model: nn.Module) -> None:
        folder = Path(model.name_or_path)  # type: ignore[arg-type]
        other = emulate.apply(load_model(folder), recipe_of(open_checkpoint(str(folder)), name))
        put(model, UP, other.get_submodule(UP))

    return plant


def change_only_the_scheme_of_the_inputs(model: nn.Module) -> None:
    module = model.get_submodule(UP)
    assert isinstance(module, FakeQuantLinear)
    module.scheme = parse_scheme("int4.g32+fp8_e4m3.token")


def take_away_the_quantization_of_the_inputs(model: nn.Module) -> None:
    module = model.get_submodule(UP)
    linear = nn.Linear(module.in_features, module.out_features, bias=False)  # type: ignore[arg-type]
    linear.weight = nn.Parameter(model.get_parameter(f"{UP}.weight"), requires_grad=False)
    put(model, UP, linear)


def transpose_the_scales(model: nn.Module) -> None:
    weight_OI = model.get_parameter(f"{UP}.weight")
    scale_OG = weight_OI.reshape(256, 4, 32).abs().amax(-1)
    swapped = scale_OG.T.reshape(256, 4)
    weight_OI.copy_(
        (weight_OI.reshape(256, 4, 32) / scale_OG[..., None] * swapped[..., None]).reshape(256, 128)
    )


def remove_the_layer(model: nn.Module) -> None:
    put(model, UP, nn.Identity())


def cut_the_layer(model: nn.Module) -> None:
    module = model.get_submodule(UP)
    module.weight = nn.Parameter(model.get_parameter(f"{UP}.weight")[:128], requires_grad=False)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (edit_one_weight, r"1 of 32768 weights .*first at \[200, 100\]"),
        (flip_the_sign_of_a_zero, "1 of 32768 weights"),
        (leave_unquantized, "found a plain Linear|found the layer left unquantized"),
        (replace_by_scheme("int4.g64+int8.token"), "weights are not those of scheme 'int4.g32"),
        (replace_by_scheme("fp4_e2m1.g32+int8.token"), "weights are not those of scheme 'int4.g32"),
        (replace_by_scheme("bf16+int8.token"), "found the layer left unquantized"),
        (change_only_the_scheme_of_the_inputs, "'int4.g32\\+int8.token', found inputs"),
        (take_away_the_quantization_of_the_inputs, "found a plain Linear"),
        (transpose_the_scales, "weights are not those of scheme"),
        (remove_the_layer, "the model has no weight"),
        (cut_the_layer, r"needed a weight of shape \[256, 128\], found \[128, 128\]"),
    ],
)
def test_a_planted_deviation_is_caught_and_named(
    tiny_llama: Path, plant: Callable[[nn.Module], None], reason: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int4.g32+int8.token")
    model = emulate.apply(load_model(tiny_llama), recipe)
    plant(model)
    deviations = find_deviations(model, recipe, checkpoint=checkpoint)
    assert {deviation.layer for deviation in deviations} == {UP}

    assert any(re.search(reason, deviation.reason) for deviation in deviations)


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", UP),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_change_to_what_the_recipe_leaves_alone_is_caught(
    tiny_llama: Path, parameter: str, named: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int4.g32", layers_1_mlp_gate_up="bf16")
    model = emulate.apply(load_model(tiny_llama), recipe)
    model.get_parameter(parameter).view(-1)[7] += 0.5
    deviations = find_deviations(model, recipe, checkpoint=checkpoint)
    assert [deviation.layer for deviation in deviations] == [named]


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen2"])
def test_a_changed_bias_is_caught(tiny: TinyCheckpoint, family: str) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    recipe = recipe_of(checkpoint, "int8.channel")
    model = emulate.apply(load_model(checkpoint.folder), recipe)
    names = [n for n, _ in model.named_parameters() if "1." in n and n.endswith(".bias")]
    name = next(n for n in names if "q_proj" in n or "c_attn" in n)
    model.get_parameter(name)[3] += 1
    (deviation,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert deviation.layer.endswith(name.rpartition("layers")[2])


def test_one_edited_expert_is_caught_among_all(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    recipe = recipe_of(checkpoint, "int8.channel+int8.token")
    model = emulate.apply(load_model(checkpoint.folder), recipe)
    # gate first, then up: row 256 is the first of up, which Mixtral calls w3.
    model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[2, 256, 0] += 1
    (deviation,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert deviation.layer == "model.layers.1.block_sparse_moe.experts.2.w3"
    assert "first at [0, 0]" in deviation.reason


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_changed_static_scale_is_caught(tiny: TinyCheckpoint, family: str) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    plain = recipe_of(checkpoint, "int8.channel+int8.tensor")
    groups = tuple(
        RecipeGroup(g.name, g.scheme, g.layers, dict.fromkeys(g.layers, 2.0)) for g in plain.groups
    )
    recipe = Recipe(plain.model_name, plain.index_sha256, groups, plain.unquantized)
    model: Any = emulate.apply(load_model(checkpoint.folder), recipe)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()
    if family == "llama":
        model.get_submodule(UP).static_amax = 3.0
        named = UP
    else:
        model.get_submodule("model.layers.1.mlp.experts").down_amax[3] = 3.0
        named = "model.layers.1.block_sparse_moe.experts.3.w2"
    (deviation,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert deviation.layer == named
    assert deviation.reason == "needed the static input maximum 2.0, found 3.0"


def test_a_planted_deviation_makes_the_validation_say_so(
    tiny_llama: Path, text: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = emulate.apply

    def apply_and_edit(*args: Any, **options: Any) -> Any:
        model = apply(*args, **options)
        edit_one_weight(model)
        return model

    monkeypatch.setattr("mofq.backends.emulate.apply", apply_and_edit)
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "int4.g32")
    found = validate(str(tiny_llama), recipe, text, **PLAN)
    assert found.enforced is False
    assert [deviation.layer for deviation in found.deviations] == [UP]
