"""Windows begin as an engine's prompts do: a BOS that the tokenizer adds is calibrated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ok, refused
from families import copy_with_tensors, write_byte_tokenizer, write_family

from mofq.decision.recipe import load_recipe
from mofq.evidence.calibration.stats import read_stats

SPACE = """
version: 1
description: static activations
schemes: [fp8_e4m3.tensor+fp8_e4m3.tensor]
"""
LENGTH = ("--sequence-length", "16")
DOWN = "model.layers.0.mlp.down_proj"
TEMPLATE = (
    "{{ bos_token }}{% for one in messages %}{{ one.role }}: {{ one.content }}\\n{% endfor %}"
)


def massive_bos(tensors: dict[str, torch.Tensor]) -> None:
    """Let BOS, and no other token, reach one channel of the first MLP, and there be large.

    BOS alone has the last coordinate of the embedding, which the norm makes sqrt(128) = 11.3;
    silu(11.3) * 11.3 = 128.
    """
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, -1] = 0
    embedding[256] = 0
    embedding[256, -1] = 1
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1)
    for name in ("gate_proj", "up_proj"):
        weight_OI = tensors[f"model.layers.0.mlp.{name}.weight"]
        weight_OI[0] = 0
        weight_OI[0, -1] = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose BOS is its largest activation by far."""
    folder = tmp_path_factory.mktemp("bos")
    write_family("llama", folder / "plain", vocab_size=260)
    model = copy_with_tensors(folder / "plain", folder / "model", massive_bos)
    write_byte_tokenizer(model, bos=True, chat_template=TEMPLATE)
    return model


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with stats, table and recipe for each way to begin windows."""
    folders = {}
    for bos in ("auto", "never"):
        folder = folders[bos] = tmp_path_factory.mktemp(bos)
        (folder / "space.yaml").write_text(SPACE)
        corpus = ("--corpus", "en=demo-en-calibration", "--sequences", "8")
        ok("calibrate", model, *corpus, *LENGTH, "--bos", bos, "-o", folder / "stats")
        space = ("--space", folder / "space.yaml", "--stats", folder / "stats")
        ok("measure", model, *space, "-o", folder / "table.jsonl")
        ok("search", folder / "table.jsonl", "--max-bits", "8.1", "-o", folder / "recipe.yaml")
    return folders


def validated(model: Path, folder: Path, *options: str) -> dict[str, Any]:
    text = ("--text", "demo-en", "--tokens", "256", *LENGTH)
    return ok("validate", model, folder / "recipe.yaml", *text, *options, "--json").json


def test_static_scales_see_the_largest_activation_which_is_that_of_bos(
    model: Path, made: dict[str, Path]
) -> None:
    amax = {
        bos: load_recipe(folder / "recipe.yaml").static_amax[DOWN] for bos, folder in made.items()
    }
    assert amax["auto"] == pytest.approx(128, rel=0.01)
    assert amax["never"] < 1
    right, wrong = (validated(model, made[bos]) for bos in ("auto", "never"))
    assert right["kl_nats_per_token"] < 0.05 * wrong["kl_nats_per_token"]
    assert right["predicted_kl_nats_per_token"] == pytest.approx(
        right["kl_nats_per_token"], rel=0.15
    )


def test_stats_table_recipe_and_validation_say_that_windows_begin_with_bos(
    model: Path, made: dict[str, Path]
) -> None:
    for bos, folder in made.items():
        expected = True if bos == "auto" else None
        assert read_stats(folder / "stats").plan.bos is expected
        assert json.loads((folder / "stats" / "plan.json").read_text()).get("bos") is expected
        header = json.loads((folder / "table.jsonl").read_text().partition("\n")[0])
        assert header["stats"].get("bos") is expected
        assert load_recipe(folder / "recipe.yaml").made_by.get("bos") is expected
        content = validated(model, folder, "--bos", bos)
        assert content.get("bos") is expected
        assert "stats_bos" not in content


def test_a_validation_that_begins_otherwise_than_the_calibration_says_so(
    model: Path, made: dict[str, Path]
) -> None:
    for bos, other in (("auto", "never"), ("never", "auto")):
        recipe = made[bos] / "recipe.yaml"
        options = ("--text", "demo-en", "--tokens", "32", *LENGTH)
        assert (
            "BOS, and the calibration"
            not in ok("validate", model, recipe, *options, "--bos", bos).err
        )
        ran = ok("validate", model, recipe, *options, "--bos", other)
        begin = "with BOS" if other == "auto" else "without BOS"
        assert f"The windows begin {begin}, and the calibration's" in ran.err
        assert "Begin both alike" in ran.err
        content = validated(model, made[bos], "--bos", other)
        assert (content["bos"], content["stats_bos"]) == (other == "auto", bos == "auto")


def test_a_search_that_measures_begins_its_windows_as_those_that_calibrated(
    model: Path, made: dict[str, Path]
) -> None:
    for bos, other in (("auto", "never"), ("never", "auto")):
        windows = ("--text", "demo-en", "--tokens", "256", *LENGTH)
        search = ("search", made[bos] / "table.jsonl", "--max-bits", "8.1", "--refine", "1")
        refined = made[bos] / "refined.yaml"
        found = ok(*search, "--model", model, *windows, "-o", refined, "--json").json["kl_measured"]
        of = {
            one: ok("validate", model, refined, *windows, "--bos", one, "--json").json
            for one in (bos, other)
        }
        assert found == pytest.approx(of[bos]["kl_nats_per_token"], rel=1e-4)
        assert found != pytest.approx(of[other]["kl_nats_per_token"], rel=0.1)


def test_statistics_go_on_only_as_they_were_begun(model: Path, made: dict[str, Path]) -> None:
    calibrate = ("calibrate", model, "--corpus", "en=demo-en-calibration", "--sequences", "8")
    for bos, other, goes_on in (("auto", "never", "always"), ("never", "auto", "never")):
        stats = ("-o", made[bos] / "stats")
        message = refused(*calibrate, *LENGTH, "--bos", other, *stats)
        assert f"give --bos {goes_on} to go on with this one" in message
        assert "Name another folder" in message
        ok(*calibrate, *LENGTH, "--bos", goes_on, *stats)


def test_a_run_begins_all_its_windows_alike_and_the_model_card_says_so(
    model: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "What is this?" * 9}]
    chats.write_text(4 * (json.dumps({"messages": messages}) + "\n"))
    space = ("--space", made["auto"] / "space.yaml", "--max-bits", "8.1")
    options = (*space, "--corpus", chats, "--sequences", "4", "--tokens", "64", *LENGTH)
    ok("run", model, *options, "--engine", "vllm-hopper", "-o", tmp_path / "run")
    assert read_stats(tmp_path / "run" / "stats").plan.bos
    assert json.loads((tmp_path / "run" / "validation.json").read_text())["bos"] is True
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "On 64 tokens of `demo-en`, in windows that begin with BOS: KL divergence" in card


def test_bos_of_a_tokenizer_that_has_none_is_refused_before_anything_runs(
    tiny_llama: Path, tmp_path: Path
) -> None:
    options = ("--corpus", "demo-en-calibration", "-o", tmp_path / "stats")
    message = refused("calibrate", tiny_llama, *options, "--bos", "always")
    assert "the tokenizer has no BOS token" in message
    message = refused("calibrate", tiny_llama, *options, "--bos", "on")
    assert "--bos on: unknown. Known: always, auto, never." in message
    assert not (tmp_path / "stats").exists()
