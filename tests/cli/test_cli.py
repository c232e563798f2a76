"""Every command through the real command line, on the bundled model."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from command_line import DEMO, Measured, ok
from transformers import AutoModelForCausalLM

import mofq as package
from mofq import api
from mofq.delivery.validation import read_validation
from mofq.evidence.corpora import BUNDLED_TEXT
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.numbers.numerics import NUMERICS

WINDOWS = ("--tokens", "256", "--sequence-length", "64")


def demo_layers() -> list[str]:
    groups = find_layers(open_checkpoint(DEMO)).groups
    return [layer.name for group in groups for layer in group.layers]


def test_inspect_lists_layers_and_fusion_groups_from_headers() -> None:
    content = ok("inspect", DEMO, "--json").json
    assert content["architecture"] == "llama"
    assert content["linear_layers"] == 42
    assert len(content["groups"]) == 24
    assert content["tied_lm_head"] is True
    assert content["groups"][0]["name"] == "layers.0.attn.qkv"
    assert [layer["module"] for layer in content["groups"][0]["layers"]] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    # 6 layers of 128x128 q, o, 64x128 k, v, 384x128 gate, up and 128x384 down.
    assert content["weights"] == 6 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128)


def test_inspect_looks_at_the_space_that_run_offers() -> None:
    offers = ok("inspect", DEMO, "--engine", "vllm-hopper", "--json").json["offers"]
    space = ("--space", inspect.signature(api.run).parameters["space"].default)
    assert offers == ok("inspect", DEMO, "--engine", "vllm-hopper", *space, "--json").json["offers"]


def test_inspect_says_what_an_engine_refuses_and_why() -> None:
    content = ok("inspect", DEMO, "--engine", "vllm-cpu", "--space", "w4a16", "--json").json
    offer = content["offers"]["layers.0.attn.qkv"]
    assert "int4.g32" in offer["schemes"]
    assert "FP4" in offer["rejected"]["fp4_e2m1.g32"]
    shown = ok("inspect", DEMO, "--engine", "vllm-cpu", "--space", "w4a16").out
    assert "24 of 24" in shown
    assert "refused" in shown


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("spaces", {"w8a8", "w4a16", "w4w8_mixed", "w8a8_finer", "llama3_70b_w8a8"}),
        ("formats", {"elements", "scales", "aliases"}),
        ("engines", {"vllm-cpu", "vllm-hopper", "transformers"}),
    ],
)
def test_a_list_is_there_for_people_and_for_machines(command: str, keys: set[str]) -> None:
    assert keys <= ok(command, "--json").json.keys()
    assert ok(command).out.count("\n") > 5


def test_calibrate_says_what_it_wrote(measured: Measured) -> None:
    arguments = ("--corpus", "en=demo-en-calibration", "--sequences", "4", "--sequence-length")
    content = ok("calibrate", DEMO, *arguments, "64", "-o", measured.stats, "--json").json
    assert content["corpora"] == {"en": 4}
    assert content["sequence_length"] == 64
    plan = json.loads((measured.stats / "stats.json").read_text("utf-8"))
    assert plan["version"] == 1
    assert plan["index_sha256"] == open_checkpoint(DEMO).index_sha256


def test_calibrate_keeps_some_of_the_sequences_that_a_text_holds(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(BUNDLED_TEXT["demo-en"].read_text("utf-8")[:1000], "utf-8")
    arguments = ("--corpus", f"en={text}", "--sequence-length", "64", "--keep", "2")
    content = ok("calibrate", DEMO, *arguments, "-o", tmp_path / "stats", "--json").json
    assert 2 < content["corpora"]["en"] < 32
    assert content["kept"] == {"en": 2}
    names = [path.name for path in (tmp_path / "stats" / "en").iterdir()]
    assert sum(name.startswith("gains") for name in names) == content["corpora"]["en"]
    assert sum(name.startswith("sequence") for name in names) == 2


def test_measure_names_its_units_and_schemes(measured: Measured) -> None:
    space = ("--space", measured.folder / "space.yaml", "--stats", measured.stats)
    content = ok("measure", DEMO, *space, "-o", measured.table, "--json").json
    assert content["groups"] == 24
    assert content["units"] == ["kl_nats_per_token", "output_mse", "relative_weight_error"]
    assert set(content["schemes"]) == {
        "int4.g64",
        "int4.g32@mse",
        "fp4_e2m1.g32",
        "int8.channel",
        "bf16",
    }
    first = json.loads(measured.table.read_text("utf-8").partition("\n")[0])
    assert first["version"] == 1
    assert first["stats"]["sha256"]


def test_search_gives_the_promised_keys(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    content = ok("search", measured.table, "--max-bits", "5", "-o", path, "--json").json
    assert 4 < content["bits_per_weight"] <= 5
    assert content["kl_nats_per_token"] > 0
    recipe = package.load_recipe(path)
    assert recipe.bits_per_weight == content["bits_per_weight"]
    assert recipe.kl_nats_per_token == content["kl_nats_per_token"]
    assert sorted(recipe.schemes) == sorted(demo_layers())
    finer = [layer for layer, scheme in recipe.schemes.items() if scheme != "int4.g64"]
    assert sorted(content["finer_layers"]) == sorted(finer)
    assert content["finer_fraction"] == len(finer) / 42


def test_a_share_of_finer_layers_is_a_budget(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    content = ok("search", measured.table, "--max-finer", "0.1", "-o", path, "--json").json
    assert 0 < content["finer_fraction"] <= 0.1
    assert 0 < len(content["finer_layers"]) <= 4


def test_a_size_is_a_budget_of_the_whole_checkpoint(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    content = ok("search", measured.table, "--max-size", "1.1MB", "-o", path, "--json").json
    other = ok("inspect", DEMO, "--json").json["other_bytes"]
    shapes = content["checkpoint_bytes"] - content["bytes"] - other
    # Every layer that is packed notes its shape in 16 bytes, which are in the file.
    assert 0 < shapes <= 16 * 42
    assert shapes % 16 == 0
    assert content["checkpoint_bytes"] <= 1_100_000


@pytest.mark.long
def test_predictions_are_null_where_the_table_is_not_in_nats(
    measured: Measured, tmp_path: Path
) -> None:
    unit = ("--unit", "relative_weight_error")
    path = tmp_path / "recipe.yaml"
    content = ok("search", measured.table, "--max-bits", "5", *unit, "-o", path, "--json").json
    assert content["kl_nats_per_token"] is None
    assert content["error"] > 0
    shown = ok("search", measured.table, "--max-bits", "5", *unit, "-o", path).out
    assert "error [relative_weight_error]" in shown
    assert_ends_in_histogram(shown, path)
    done = ok("validate", DEMO, path, "--text", "demo-en", *WINDOWS, "--json").json
    assert done["predicted_kl_nats_per_token"] is None


def test_greedy_keeps_the_budget_too(measured: Measured, tmp_path: Path) -> None:
    exact = package.load_recipe(measured.recipe)
    path = tmp_path / "recipe.yaml"
    arguments = ("--solver", "greedy", "--max-bits", "5", "-o", path, "--json")
    greedy = ok("search", measured.table, *arguments).json
    assert greedy["bits_per_weight"] <= 5
    assert exact.result.error <= greedy["error"]  # type: ignore[operator]


def test_without_a_budget_the_search_says_that_it_needs_one(
    measured: Measured, tmp_path: Path
) -> None:
    ran = ok("search", measured.table, "-o", tmp_path / "recipe.yaml")
    assert "Give a budget of bits, of size or of KL." in ran.err


def test_validate_gives_the_promised_keys(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "validation.json"
    arguments = ("--text", "demo-en", *WINDOWS, "-o", path, "--json")
    content = ok("validate", DEMO, measured.recipe, *arguments).json
    recipe = package.load_recipe(measured.recipe)
    assert content["enforced"] is True
    assert content["tokens"] == 256
    assert content["bits_per_weight"] == recipe.bits_per_weight
    assert content["predicted_kl_nats_per_token"] == recipe.kl_nats_per_token
    assert 0 < content["kl_nats_per_token"] < 0.1
    assert 0.5 < content["top1_agreement"] < 1
    assert content["perplexity"] != content["perplexity_original"]
    assert json.loads(path.read_text("utf-8")) == content


def test_validate_shows_people_predicted_beside_measured(measured: Measured) -> None:
    ran = ok("validate", DEMO, measured.recipe, "--text", "demo-en", *WINDOWS)
    for words in ("KL, measured", "KL, predicted", "enforced", "256 tokens of demo-en"):
        assert words in ran.out
    assert_ends_in_histogram(ran.out, measured.recipe)
    assert "of the calibration" not in ran.err


def test_validate_says_that_windows_are_longer_than_what_was_calibrated_on(
    measured: Measured, tmp_path: Path
) -> None:
    path = tmp_path / "validation.json"
    longer = ("--text", "demo-en", "--tokens", "256", "--sequence-length", "128")
    ran = ok("validate", DEMO, measured.recipe, *longer, "-o", path)
    assert "have 128 tokens, and the sequences of the calibration 64" in ran.err
    assert "Compare with --sequence-length 64" in ran.err
    assert read_validation(path).lineage.stats_sequence_length == 64


def assert_ends_in_histogram(shown: str, recipe: Path) -> None:
    """The last line counts the fusion groups of the recipe by scheme, the most frequent first."""
    last = shown.splitlines()[-1]
    counts = Counter(group.scheme for group in package.load_recipe(recipe).groups)
    name, count = counts.most_common(1)[0]
    assert re.match(rf"fusion groups: {re.escape(name)} █+ {count}\b", last)


@pytest.mark.long
def test_an_exported_folder_validates_as_its_recipe(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    ok("search", measured.table, "--max-bits", "4.6", "--engine", "vllm-cpu", "-o", path)
    folder = tmp_path / "exported"
    export = ok("export", DEMO, path, "--to", "compressed-tensors", "-o", folder, "--json").json
    assert export["engine"] == "vllm-cpu"
    assert str(folder) in export["serve_command"]
    text = ("--text", "demo-en", *WINDOWS, "--json")
    of_folder = ok("validate", DEMO, folder, *text).json
    of_recipe = ok("validate", DEMO, path, *text).json
    assert of_folder["enforced"] is True
    assert of_folder["kl_nats_per_token"] == of_recipe["kl_nats_per_token"]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_diff_names_what_changed_and_what_it_costs(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    ok("search", measured.table, "--max-bits", "4.5", "-o", path)
    ours, theirs = package.load_recipe(measured.recipe), package.load_recipe(path)
    content = ok("diff", measured.recipe, path, "--json").json
    changed = [
        a.name for a, b in zip(ours.groups, theirs.groups, strict=True) if a.scheme != b.scheme
    ]
    assert list(content["changed"]) == changed != []
    assert content["bits_per_weight"] == [ours.bits_per_weight, theirs.bits_per_weight]
    assert f"{len(changed)} of 24 fusion groups differ" in ok("diff", measured.recipe, path).out
    assert ok("diff", path, path, "--json").json["changed"] == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sharded_folder_of_another_dtype_works_the_same(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    # Every bfloat16 is a float32; float16 rounds what is very small.
    folder, recipe = tmp_path / "model", tmp_path / "recipe.yaml"
    model = AutoModelForCausalLM.from_pretrained(DEMO).to(dtype)
    model.save_pretrained(folder, max_shard_size="1MB")
    for path in Path(DEMO).glob("tokenizer*"):
        shutil.copy(path, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = []
    for source in (folder, Path(DEMO)):
        ok("recipe", "uniform", source, "int4.g32", "-o", recipe)
        text = ("--text", "demo-en", *WINDOWS, "--json")
        found.append(ok("validate", source, recipe, *text).json)
        assert found[-1]["enforced"] is True
    here, there = found
    assert here["bits_per_weight"] == there["bits_per_weight"]
    tolerance = 0.0 if dtype == torch.float32 else 0.02
    assert here["kl_nats_per_token"] == pytest.approx(there["kl_nats_per_token"], rel=tolerance)


def test_the_version_is_the_package_s() -> None:
    assert ok("--version").out == f"mofq {package.__version__}\n"


def test_a_uniform_recipe_needs_no_table(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    scheme = "int8.channel+int8.token"
    content = ok("recipe", "uniform", DEMO, scheme, "-o", path, "--json").json
    recipe = package.load_recipe(path)
    assert set(recipe.schemes.values()) == {scheme}
    assert recipe.kl_nats_per_token is None
    # One bf16 scale per output row: of 128 weights, but of 384 in down_proj.
    wide, all_weights = 128 * 384, 2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 384
    bits = 8 + 16 * ((all_weights - wide) / 128 + wide / 384) / all_weights
    assert content["bits_per_weight"] == pytest.approx(bits, rel=1e-12)


def test_the_curve_ends_where_nothing_is_quantized(measured: Measured) -> None:
    points = ok("frontier", measured.table, "--json").json["points"]
    assert points[-1]["bits_per_weight"] == 16
    assert points[-1]["error"] == 0
    errors = [point["error"] for point in points]
    assert errors == sorted(errors, reverse=True)


def test_explore_writes_one_page(measured: Measured, tmp_path: Path) -> None:
    page = tmp_path / "explorer.html"
    ok("explore", measured.table, measured.recipe, "-o", page)
    assert page.read_text("utf-8").lower().startswith("<!doctype html>")


def test_a_recipe_is_applied_from_python(measured: Measured) -> None:
    recipe = package.load_recipe(measured.recipe)
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    applied = package.apply_recipe(model, recipe, backend="emulate")
    assert recipe.schemes["model.layers.0.mlp.down_proj"] != "bf16"
    after = applied.get_submodule("model.layers.0.mlp.down_proj").weight
    assert not after.equal(before)


@pytest.mark.long
def test_help_and_the_deciding_commands_never_load_torch(
    measured: Measured, tmp_path: Path
) -> None:
    recipe = str(tmp_path / "recipe.yaml")
    program = f"""
import sys
from mofq.cli import main
for arguments in (
    ["--help"], ["--version"], ["search", "--help"], ["spaces"], ["formats"], ["engines"],
    ["inspect", {DEMO!r}], ["inspect", {DEMO!r}, "--engine", "vllm-cpu", "--json"],
    ["search", {str(measured.table)!r}, "--max-bits", "5", "-o", {recipe!r}],
    ["search", {str(measured.table)!r}, "--max-kl", "0.01", "--solver", "greedy", "-o", {recipe!r}],
    ["frontier", {str(measured.table)!r}], ["diff", {recipe!r}, {recipe!r}],
    ["recipe", "uniform", {DEMO!r}, "int4.g32", "-o", {recipe!r}],
    ["explore", {str(measured.table)!r}, "-o", {recipe + ".html"!r}],
):
    sys.argv = ["mofq", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
    for heavy in ("torch", "transformers", "datasets"):
        assert heavy not in sys.modules, (arguments, heavy)
    if arguments == ["--help"]:
        assert not {{"numpy", "scipy", "yaml"}} & set(sys.modules), "help loads numbers"
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_table_of_other_numerics_is_searched_with_a_warning(
    measured: Measured, tmp_path: Path
) -> None:
    older, recipe = tmp_path / "older.jsonl", tmp_path / "recipe.yaml"
    content = measured.table.read_bytes()
    (noted,) = re.findall(rb'"numerics":\d+,', content)
    older.write_bytes(content.replace(noted, b""))
    shown = ok("search", older, "--max-bits", "6", "-o", recipe).err
    assert shown.count("measured before numerics were noted") == 1
    assert "numerics" not in recipe.read_text("utf-8")
    shown = ok("search", measured.table, "--max-bits", "6", "-o", recipe).err
    assert "numerics" not in shown.replace(str(tmp_path), "")
    assert f"numerics: {NUMERICS}" in recipe.read_text("utf-8")


@pytest.mark.long
def test_measure_says_once_why_several_schemes_are_not_offered(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    shown = ok("measure", DEMO, "--space", "w4a16", "--engine", "vllm-cpu", "-o", table).err
    lines = [line for line in shown.splitlines() if "not offered to 24 fusion groups" in line]
    reasons = [line.partition("groups: ")[2].partition(": ")[2] for line in lines]
    named = [
        name for line in lines for name in line.split("groups: ")[1].split(": ")[0].split(", ")
    ]
    assert len(set(reasons)) == len(reasons) < len(named)
    assert {r.scheme for r in read_table(table).rejections} == set(named)
