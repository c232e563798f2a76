"""What a user can get wrong: one message, exit code 1, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import DEMO, Measured, mofq, ok, refused, tree
from safetensors.torch import load_file, save_file

import mofq as package

SHORT = ("--sequences", "4", "--sequence-length", "64")
TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return Path(shutil.copytree(DEMO, tmp_path / "broken"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for what commands write."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def write_space(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


def shard(model: Path) -> Path:
    """Save the demo model anew as several shards with an index; the folder."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def every_reader(model: Path | str, out: Path) -> list[tuple[str | Path, ...]]:
    """Every command that opens a model, with outputs in one folder."""
    recipe = out.parent / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    return [
        ("inspect", model),
        ("calibrate", model, "--corpus", "demo-en", *SHORT, "-o", out / "stats"),
        ("measure", model, "--space", "w8a8", "-o", out / "table.jsonl"),
        ("recipe", "uniform", model, "int4.g32", "-o", out / "recipe.yaml"),
        ("validate", model, recipe, *TEXT, "-o", out / "validation.json"),
        ("export", model, recipe, "--to", "compressed-tensors", "-o", out / "exported"),
        ("run", model, "--space", "w8a8", "--max-bits", "8.2", "-o", out / "run"),
    ]


def test_a_wrong_model_path_suggests_the_near_one(model: Path, out: Path) -> None:
    for arguments in every_reader(model.with_name("brokn"), out):
        message = refused(*arguments)
        assert "no such folder" in message
        assert f"Did you mean '{model}'?" in message
    assert tree(out) == {}


def test_a_truncated_file_is_named(model: Path, out: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for arguments in every_reader(model, out):
        message = refused(*arguments)
        assert str(weights) in message
        assert "truncated" in message
    assert tree(out) == {}


def test_a_missing_shard_of_an_index_is_named(model: Path, out: Path) -> None:
    shard(model)
    assert ok("inspect", model, "--json").json["linear_layers"] == 42
    gone = model / "model-00002-of-00002.safetensors"
    gone.unlink()
    for arguments in every_reader(model, out):
        assert f"{gone}: model.safetensors.index.json needs this shard" in refused(*arguments)
    assert tree(out) == {}


def test_a_model_without_a_tokenizer_says_which_files_it_needs(model: Path, out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    message = refused("calibrate", model, "--corpus", "demo-en", *SHORT, "-o", out / "stats")
    assert "tokenizer" in message
    assert tree(out) == {}


def test_a_weight_that_is_not_finite_is_named(model: Path, out: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name][7, 9] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refused("measure", model, "--space", "w8a8", "-o", out / "table.jsonl")
    assert "model.layers.3.mlp.up_proj" in message
    refused("calibrate", model, "--corpus", "demo-en", *SHORT, "-o", out / "stats")
    assert not (out / "stats" / "stats.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schemes: [int4.g32, fp4_e2m2.g32]", ("fp4_e2m2", "Did you mean 'fp4_e2m1'?")),
        ("schemes: [int4.g32]\nbas: [int4.g32]", ("unknown key 'bas'", "Did you mean 'base'?")),
        ("schemes: [int4.g32]\nbase: [int8.channel]", ("base", "'int8.channel' is not among")),
        ("schemes: [int4.g32@best]", ("unknown scale rule 'best'", "absmax")),
        ("schemes: [int4.g100]\noffer_unquantized: false", ("no scheme fits layers.0.attn.qkv",)),
        ("schemes: [int8.channel+int8.tensor]\noffer_unquantized: false", ("mofq calibrate",)),
        ("scheme: [int4.g32]", ("unknown key 'scheme'", "Did you mean 'schemes'?")),
        ("schemes: {", ("space.yaml",)),
    ],
)
def test_a_wrong_search_space_says_what_is_wrong(
    text: str, words: tuple[str, ...], out: Path, tmp_path: Path
) -> None:
    space = write_space(tmp_path, f"version: 1\n{text}\n")
    for command in (
        ("measure", DEMO, "--space", space, "-o", out / "table.jsonl"),
        ("run", DEMO, "--space", space, "--max-bits", "5", "-o", out / "run"),
    ):
        if "mofq calibrate" in words and command[0] == "run":
            continue  # it calibrates
        message = refused(*command)
        assert all(word in message for word in words), message
    assert tree(out) == {}


def test_an_unknown_search_space_suggests_the_near_one(out: Path) -> None:
    message = refused("measure", DEMO, "--space", "w8a9", "-o", out / "table.jsonl")
    assert "Did you mean 'w8a8'?" in message
    assert tree(out) == {}


@pytest.mark.parametrize(
    ("budget", "smallest"),
    [
        (("--max-bits", "3"), "4.25 bits per weight"),
        (("--max-size", "100kB"), "bytes"),
        (("--max-kl", "1e-9", "--max-bits", "5"), "nats per token"),
    ],
)
def test_a_budget_that_cannot_be_met_names_the_tightest_that_can(
    budget: tuple[str, ...], smallest: str, measured: Measured, out: Path
) -> None:
    message = refused("search", measured.table, *budget, "-o", out / "recipe.yaml")
    assert smallest in message
    assert tree(out) == {}


def test_the_smallest_size_that_a_refusal_names_can_be_met(measured: Measured, out: Path) -> None:
    # Groups of 64 share a bf16 scale.
    smallest = 4 + 16 / 64
    message = refused("search", measured.table, "--max-bits", "4.2", "-o", out / "recipe.yaml")
    named = float(message.rpartition("possible is ")[2].split()[0])
    assert smallest <= named <= smallest + 1e-4
    ok("search", measured.table, "--max-bits", f"{named}", "-o", out / "recipe.yaml")


def test_a_run_refuses_its_budget_before_it_calibrates(out: Path) -> None:
    arguments = ("--space", "w4a16", "-o", out / "run")
    message = refused("run", DEMO, *arguments, "--max-bits", "3")
    assert "the smallest possible" in message
    assert "`mofq spaces` lists others" in message
    assert "the smallest possible" in refused("run", DEMO, *arguments, "--max-size", "1MB")
    assert "not a size" in refused("run", DEMO, *arguments, "--max-size", "small")
    assert "unknown engine" in refused("run", DEMO, *arguments, "--engine", "vlm-cpu")
    assert tree(out) == {}


def test_a_run_refuses_to_validate_on_its_calibration_text(out: Path) -> None:
    texts = ("--corpus", "x=demo-en", "--text", "demo-en")
    arguments = ("run", DEMO, "--space", "w8a8", "--max-bits", "9", *texts, "-o", out / "run")
    assert "Validate on another text" in refused(*arguments)
    assert tree(out) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ties", "maybe"), "--ties maybe: unknown. Known: off, on."),
        (("--solver", "exat"), "Did you mean 'exact'?"),
        (("--solver", "magic"), "Known: exact, greedy, optuna."),
        (("--engine", "vllm-gpu"), "Did you mean 'vllm-cpu'?"),
        (("--objective", "worst"), "Did you mean 'worst-corpus'?"),
        (("--unit", "nats"), "no errors are in 'nats'"),
        (("--space", "w8a8"), "'w8a8' was not measured"),
        (("--max-bits", "nan"), "must be a number"),
        (("--max-bits", "-1"), "must be a number"),
        (("--max-finer", "3"), "at most 1"),
        (("--max-size", "5XB"), "--max-size: '5XB': unknown unit 'XB'"),
        (("--max-size", "9" * 20 + "GB"), "no model is as large"),
        (("--refine", "4"), "--model"),
    ],
)
def test_an_unknown_word_suggests_the_near_one(
    options: tuple[str, ...], words: str, measured: Measured, out: Path
) -> None:
    assert words in refused("search", measured.table, *options, "-o", out / "recipe.yaml")
    assert tree(out) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect",),
        ("serch",),
        ("search", "table.jsonl", "-o", "recipe.yaml", "--max-bit", "5"),
        ("search", "table.jsonl", "-o", "recipe.yaml", "--max-bits", "five"),
        ("validate", DEMO, "recipe.yaml"),
        ("validate", DEMO, "recipe.yaml", "--text", "demo-en", "--tokens", "1"),
        ("calibrate", DEMO, "--corpus", "demo-en", "-o", "stats", "--keep", "0"),
        ("measure", DEMO, "-o", "table.jsonl"),
    ],
)
def test_wrong_usage_ends_with_2_and_is_one_json_object_where_json_is_asked_for(
    arguments: tuple[str, ...],
) -> None:
    plain, ran = refused(*arguments, code=2), mofq(*arguments, "--json")
    assert "Usage: mofq" in plain
    assert (ran.code, ran.err) == (2, plain)
    error = json.loads(ran.out)["error"]
    assert error["type"] == "UsageError"
    assert plain.endswith(f"Error: {error['message']}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere.txt", "no such file"),
        ("demo-fr", "demo-pt"),
        ("empty.txt", "is empty"),
        ("short.txt", "Give a longer text"),
        ("bytes.txt", "is not UTF-8"),
        ("damaged.jsonl", "damaged or of another kind: make it again"),
        (".", "this is a folder"),
    ],
)
def test_a_text_that_is_none_is_refused(
    text: str,
    words: str,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("A few words.")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    Path("damaged.jsonl").write_text("no JSON")
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    size = ("--tokens", "128", "--sequence-length", "64")
    written = ("-o", out / "validation.json")
    assert words in refused("validate", DEMO, recipe, "--text", text, *size, *written)
    assert words in refused("calibrate", DEMO, "--corpus", f"a={text}", *SHORT, "-o", out / "stats")
    assert tree(out) == {}


def test_two_corpora_need_two_names(out: Path) -> None:
    twice = ("--corpus", "a=demo-en", "--corpus", "a=demo-pt")
    message = refused("calibrate", DEMO, *twice, *SHORT, "-o", out / "stats")
    assert "two corpora have the name 'a'" in message
    message = refused("calibrate", DEMO, "--corpus", "../a=demo-en", *SHORT, "-o", out / "stats")
    assert "no slash" in message
    assert tree(out) == {}


def test_stats_of_another_model_are_refused(
    measured: Measured, tiny_llama: Path, out: Path
) -> None:
    arguments = ("--space", "w8a8", "--stats", measured.stats, "-o", out / "table.jsonl")
    assert "Calibrate this model" in refused("measure", tiny_llama, *arguments)
    assert tree(out) == {}


def test_a_table_of_another_model_is_left_as_it_is(measured: Measured, tiny_llama: Path) -> None:
    before = measured.table.read_bytes()
    message = refused("measure", tiny_llama, "--space", "w8a8", "-o", measured.table)
    assert "write to another table" in message
    assert measured.table.read_bytes() == before


def test_a_recipe_of_another_model_is_refused(tiny_llama: Path, out: Path) -> None:
    recipe = out.parent / "recipe.yaml"
    ok("recipe", "uniform", tiny_llama, "int4.g32", "-o", recipe)
    message = refused("validate", DEMO, recipe, *TEXT)
    assert "or another config.json" in message
    assert "remove index_sha256 from it" in message
    export = ("--to", "compressed-tensors", "-o", out / "exported")
    assert "index_sha256" in refused("export", DEMO, recipe, *export)
    other = out.parent / "demo.yaml"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", other)
    assert "Compare two recipes of one model" in refused("diff", recipe, other)
    assert tree(out) == {}


def edited(recipe: Path, change: Callable[[str], str]) -> Path:
    text = recipe.read_text("utf-8")
    path = recipe.with_name("edited.yaml")
    path.write_text(change(text))
    assert path.read_text() != text
    return path


def split_group(text: str) -> str:
    """Give q_proj of the first decoder layer a scheme of its own."""
    q = "model.layers.0.self_attn.q_proj"
    head, tail = text.split("groups:", 1)
    tail = tail.replace(f"[{q}, ", "[", 1)
    first, rest = tail.split("\n", 1)
    return f"{head}groups:{first}\n  mine:\n    scheme: int8.channel\n    layers: [{q}]\n{rest}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (split_group, ("layers.0.attn.qkv is served as one matrix", "q_proj has int8.channel")),
        (lambda t: t.replace("int4.g32\n", "int4.g33\n", 1), ("divisible by 33",)),
        (lambda t: t.replace("int4.g32\n", "int5g.32\n", 1), ("int5g", "Did you mean")),
        (lambda t: t.replace("version: 1", "version: 2"), ("version 2",)),
        (lambda t: t.replace("unquantized:", "unquantised:"), ("Did you mean 'unquantized'?",)),
        (
            lambda t: t.replace("layers.1.self_attn.o_proj", "layers.9.self_attn.o_proj"),
            ("no linear layer 'model.layers.9.self_attn.o_proj'",),
        ),
    ],
)
def test_an_edited_recipe_is_checked_in_full(
    change: Callable[[str], str], words: tuple[str, ...], out: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    path = edited(recipe, change)
    for command in (
        ("validate", DEMO, path, *TEXT, "-o", out / "validation.json"),
        ("export", DEMO, path, "--to", "compressed-tensors", "-o", out / "exported"),
    ):
        message = refused(*command)
        assert message.startswith(f"Error: {path}: "), message
        assert all(word in message for word in words), message
    assert tree(out) == {}


def test_a_recipe_edited_well_is_taken(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    path = edited(recipe, lambda text: text.replace("scheme: int4.g32\n", "scheme: int8.g64\n", 1))
    content = ok("validate", DEMO, path, *TEXT, "--json").json
    assert content["enforced"] is True
    # Counted from the schemes, not believed from the file, which said those of before.
    before, after = (package.load_recipe(one) for one in (recipe, path))
    assert before.bits_per_weight is not None
    assert content["bits_per_weight"] > before.bits_per_weight
    assert after.bits_per_weight is None


@pytest.mark.long
def test_an_edited_export_is_not_taken_for_its_recipe(tmp_path: Path) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "exported"
    ok("recipe", "uniform", DEMO, "int8.channel+int8.token", "-o", recipe)
    ok("export", DEMO, recipe, "--to", "compressed-tensors", "-o", folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.gate_proj.weight"
    tensors[name][3, 5] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ran = mofq("validate", DEMO, folder, *TEXT)
    assert ran.code == 1
    assert f"{name}: differs from row 3 on" in ran.err


def test_a_model_spread_over_devices_without_the_package_names_the_extra(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mofq.model.loading.find_spec", lambda name: None)
    corpus = ("--corpus", "a=demo-en-calibration", "--sequences", "4", "--sequence-length", "32")
    message = refused(
        "calibrate", tiny_llama, *corpus, "--execution", "spread", "-o", tmp_path / "stats"
    )
    assert "pip install '.[accelerate]'" in message


def test_an_error_is_one_json_object_where_json_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = ("search", tmp_path / "no.jsonl", "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    plain, ran = mofq(*search), mofq(*search, "--json")
    assert (plain.code, ran.code, plain.out, plain.err) == (1, 1, "", ran.err)
    error = json.loads(ran.out)["error"]
    assert error["type"] == "TableError"
    assert ran.err == f"Error: {error['message']}\n"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mofq.api.search"], "make_request", stop)
    stopped = mofq(*search, "--json")
    assert stopped.code == 130
    assert json.loads(stopped.out)["error"]["type"] == "KeyboardInterrupt"
