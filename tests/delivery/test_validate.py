from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from emulated import recipe_of, validate

from mofq.decision.recipe import RecipeResult, load_recipe, write_recipe
from mofq.delivery.apply import emulate
from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.delivery.validation import (
    validate_many,
    write_validation,
)
from mofq.delivery.validation.divergence import check_logits
from mofq.delivery.validation.report import read_validation
from mofq.evidence.corpora import Corpus, load_text, tokenize
from mofq.exceptions import (
    BackendError,
    CheckpointError,
    CorpusError,
    MofqError,
    RecipeError,
)
from mofq.model.checkpoint.headers import open_checkpoint, open_stored
from mofq.model.loading import load_model, load_tokenizer

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
    result = RecipeResult(kl_nats_per_token=0.125, kl_stderr=0.5)
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
    # 4-bit codes, and one 16-bit scale for 32 of them.
    per_layer = {"128x128": 2, "64x128": 2, "256x128": 2, "128x256": 1}
    weights = 2 * sum(n * math.prod(map(int, k.split("x"))) for k, n in per_layer.items())
    stored_bytes = weights / 2 + weights / 32 * 2
    assert found.bits_per_weight == pytest.approx(8 * stored_bytes / weights)
    assert found.enforced is True
    assert found.deviations == ()


def test_what_was_measured_is_said_to_be_inside_of_the_predicted_interval_or_not(
    tiny_llama: Path, recipe_file: Path, text: Corpus, tmp_path: Path
) -> None:
    plain = validate(str(tiny_llama), str(recipe_file), text, **PLAN)
    assert plain.within_prediction is None  # a recipe of before has no interval
    assert "predicted_kl_low" not in plain.to_json()
    kl, noise = plain.kl_nats_per_token, 2 * (plain.kl_stderr or 0.0)
    recipe = load_recipe(recipe_file)

    def inside(value: float, half: float) -> bool | None:
        ends = {"kl_low": value - half, "kl_high": value + half}
        result = RecipeResult(kl_nats_per_token=value, kl_stderr=half / 2, **ends)
        write_recipe(replace(recipe, result=result), tmp_path / "with.yaml")
        found = validate(str(tiny_llama), str(tmp_path / "with.yaml"), text, **PLAN)
        assert found.to_json()["predicted_kl_high"] == pytest.approx(value + half)
        write_validation(found, tmp_path / "validation.json")
        assert read_validation(tmp_path / "validation.json") == found
        return found.within_prediction

    assert inside(1.1 * kl, 0.2 * kl)
    # The noise of what was measured counts too, in quadrature.
    far = 1.5 * math.hypot(0.01 * kl, noise)
    assert inside(kl + far, 0.01 * kl) is False
    assert inside(kl + far / 2, 0.01 * kl)


@pytest.mark.parametrize("execution", ["resident", "streamed"])
def test_a_text_that_the_tokenizer_has_no_words_for_is_told(
    execution: Any, tiny_llama: Path, recipe_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<unk>"] = tokenizer["model"]["vocab"].pop("z")
    tokenizer["model"]["unk_token"] = "<unk>"
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    path = tmp_path / "rare.txt"
    path.write_text("az bz " * 20)
    told: list[str] = []
    validate_many(
        str(model),
        [recipe_file],
        load_text(str(path)),
        **PLAN,
        execution=execution,
        tell=told.append,
    )
    assert [line for line in told if line.startswith("text rare: 3")], told


def test_a_budget_is_kept_with_two_standard_errors_as_it_is_proved(
    tiny_llama: Path, recipe_file: Path, text: Corpus, tmp_path: Path
) -> None:
    plain = validate(str(tiny_llama), str(recipe_file), text, **PLAN)
    upper = plain.kl_nats_per_token + 2 * (plain.kl_stderr or 0.0)
    assert upper > plain.kl_nats_per_token

    def is_kept(budget: float) -> bool | None:
        asked = replace(load_recipe(recipe_file), budget={"kl_nats_per_token": budget})
        return validate(str(tiny_llama), asked, text, **PLAN).within_kl_budget

    assert is_kept(1.001 * upper)
    assert is_kept(0.999 * upper) is False


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
    told: dict[str, list[int]] = {}
    together = validate_many(
        str(tiny_llama),
        recipes,
        text,
        **PLAN,
        progress=lambda stage, done, _: told.setdefault(stage, []).append(done),
    )
    assert told["original"] == [0, 1, 2, 3]
    assert told["validate"] == [0, 1, 2, 3, 3, 4, 5, 6]  # of one recipe, then of the other
    for recipe, found in zip(recipes, together, strict=True):
        alone = validate(str(tiny_llama), recipe, text, **PLAN)
        assert (found.windows, found.perplexity) == (alone.windows, alone.perplexity)


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
    with pytest.raises(CorpusError, match="sequence_length=129: the model's context is 128"):
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

    monkeypatch.setattr("mofq.delivery.validation.against_original.load_model", broken)
    with pytest.raises(MofqError, match="the original model gives logits that are not finite"):
        validate(str(folder), recipe_of(open_checkpoint(str(folder)), "bf16"), text, **PLAN)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_logit_that_is_not_finite_is_found(value: float) -> None:
    logits_TV = torch.zeros(3, 5)
    check_logits(logits_TV, what="it")
    logits_TV[1, 2] = value
    with pytest.raises(MofqError, match="it gives logits that are not finite"):
        check_logits(logits_TV, what="it")


def test_a_full_disk_is_a_clear_error(
    tiny_llama: Path, text: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "bf16")
    # 3 windows of 16 positions, 256 tokens and 4 bytes.
    with pytest.raises(MofqError, match=r"need 49,152 bytes here.*Set TMPDIR"):
        validate(str(tiny_llama), recipe, text, **PLAN)


def test_a_planted_deviation_makes_the_validation_say_so(
    tiny_llama: Path, text: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = emulate.apply

    def apply_and_edit(*args: Any, **options: Any) -> Any:
        model = apply(*args, **options)
        model.get_parameter(f"{UP}.weight")[200, 100] += 1e-3
        return model

    monkeypatch.setattr("mofq.delivery.apply.emulate.apply", apply_and_edit)
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "int4.g32")
    found = validate(str(tiny_llama), recipe, text, **PLAN)
    assert found.enforced is False
    assert [deviation.layer for deviation in found.deviations] == [UP]


def test_an_exported_folder_is_proved_byte_for_byte_and_validated_as_its_recipe(
    tiny_llama: Path, text: Corpus, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int4.g32", layers_0_attn_o="fp8_e4m3.channel+fp8_e4m3.token")
    folder = tmp_path / "exported"
    export_compressed_tensors(checkpoint, recipe, folder)
    found = validate(str(tiny_llama), str(folder), text, **PLAN)
    emulated = validate(str(tiny_llama), recipe, text, **PLAN)
    assert found.enforced is True
    assert (found.windows, found.bits_per_weight) == (emulated.windows, emulated.bits_per_weight)
    assert found.lineage.folder_index_sha256 == open_checkpoint(str(folder)).index_sha256


def test_an_exported_folder_with_an_edited_byte_is_run_with_it_and_not_enforced(
    tiny_llama: Path, text: Corpus, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    folder = tmp_path / "exported"
    export_compressed_tensors(checkpoint, recipe_of(checkpoint, "int4.g32"), folder)
    info = open_stored(str(folder)).tensors[f"{UP}.weight_packed"]
    with info.file.open("r+b") as file:
        file.seek(info.start + 40)
        byte = file.read(1)[0]
        file.seek(info.start + 40)
        file.write(bytes([byte ^ 1]))
    found = validate(str(tiny_llama), str(folder), text, **PLAN)
    assert found.enforced is False
    # Its stored bytes are named, and not once more the weight that is decoded from them.
    assert [deviation.layer for deviation in found.deviations] == [f"{UP}.weight_packed"]
    as_exported = validate(str(tiny_llama), str(folder / "recipe.yaml"), text, **PLAN)
    assert found.kl_nats_per_token != as_exported.kl_nats_per_token


def test_a_folder_quantized_by_a_method_that_is_not_read_is_refused(
    tiny_llama: Path, text: Corpus, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    folder = tmp_path / "exported"
    export_compressed_tensors(checkpoint, recipe_of(checkpoint, "int4.g32"), folder)
    (folder / "recipe.yaml").unlink()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BackendError, match="found quant_method 'gptq'"):
        validate(str(tiny_llama), str(folder), text, **PLAN)
