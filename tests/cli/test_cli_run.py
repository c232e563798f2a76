"""The whole flow in one command, run twice, and stopped in the middle of its stages."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import pytest
from command_line import DEMO, Measured, Ran, mofq, ok, refused, tree

import mofq as package
from mofq.cli.show.terminal import Bars
from mofq.decision.recipe import RecipeResult, write_recipe
from mofq.delivery.validation import read_validation
from mofq.exceptions import MofqError
from mofq.model.streaming.weights import UnitWeights

TEXT = ("--sequences", "4", "--sequence-length", "64", "--tokens", "256")
#: What is asked of runs has nothing to do with how much they try.
SMALL = (*TEXT, "--effort", "quick")

#: Runs mofq, and sends itself Ctrl-C when a stage has come so far.
INTERRUPTED = """
import os, signal, sys
from mofq.cli import main
from mofq.cli.show import terminal
# A shell starts what it runs in the background with Ctrl-C switched off.
signal.signal(signal.SIGINT, signal.default_int_handler)
stage, at, *arguments = sys.argv[1:]
def interrupt(self, name, done, total):
    if name.startswith(stage) and done == int(at):
        os.kill(os.getpid(), signal.SIGINT)
terminal.Bars.stage = interrupt
sys.argv = ["mofq", *arguments]
main()
"""


def interrupt_process(stage: str, at: int, *arguments: str | Path) -> None:
    """Run mofq in a process of its own, with Ctrl-C at some point of a stage."""
    command = [sys.executable, "-c", INTERRUPTED, stage, str(at), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    check_interrupted(Ran(run.returncode, run.stdout, run.stderr))


def interrupt(stage: str, at: int, *arguments: str | Path) -> None:
    """The same in this process, without the signal."""

    def show(bars: Bars, name: str, done: int, total: int) -> None:
        if name.startswith(stage) and done == at:
            raise KeyboardInterrupt

    with patch.object(Bars, "stage", show):
        check_interrupted(mofq(*arguments))


def check_interrupted(ran: Ran) -> None:
    assert ran.code == 128 + signal.SIGINT, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert "run the same command again" in ran.err


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text("version: 1\nschemes: [int4.g64, int8.channel]\n")
    return path


def run_options(space: Path, folder: Path) -> tuple[str | Path, ...]:
    return ("run", DEMO, "--space", space, "--max-bits", "6", *SMALL, "-o", folder)


@pytest.mark.long
def test_run_ends_with_a_table_and_a_second_run_ends_the_same(space: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = ok(*run_options(space, folder))
    for words in ("original", "recipe", "int4.g64", "bits/weight", "KL measured", "perplexity"):
        assert words in first.out
    assert "seconds: calibrate" in first.out
    before = tree(folder)
    assert {name for name in before if "/" not in name} == {
        "recipe.yaml",
        "table.jsonl",
        "validation.json",
    }
    second = mofq(*run_options(space, folder), "--json")
    assert second.err.count("there already") == 2
    after = tree(folder)
    assert {name for name in before if before[name] != after[name]} <= {"validation.json"}
    content = second.json
    validation = json.loads(after["validation.json"])
    assert json.loads(before["validation.json"])["windows"] == validation["windows"]
    assert content["kl_nats_per_token"] == validation["kl_nats_per_token"]
    assert content["enforced"] is True
    assert content["bits_per_weight"] <= 6
    assert set(content["seconds"]) == {"calibrate", "measure", "search", "validate"}
    assert package.load_recipe(folder / "recipe.yaml").bits_per_weight == content["bits_per_weight"]


def test_run_without_a_budget_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    message = refused("run", DEMO, "-o", tmp_path / "run")
    for words in ("needed a budget", "--max-bits", "--max-size", "--max-kl"):
        assert words in message
    assert not (tmp_path / "run").exists()


def test_run_refuses_a_text_that_fills_no_window_before_anything_is_run(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    run = ("run", DEMO, "--max-bits", "5", "-o", tmp_path / "run")
    assert "--tokens 100: does not fill one window of 512. Give --tokens 512 or more" in refused(
        *run, "--tokens", "100"
    )
    assert "short" in refused(*run, "--text", tmp_path / "short.txt")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_with_normal_effort_codes_are_fitted_where_that_pays_and_the_run_says_so(
    space: Path, tmp_path: Path
) -> None:
    folder, quick = tmp_path / "run", tmp_path / "quick"
    run = ("run", DEMO, "--space", space, "--max-bits", "6", *TEXT)
    stages: dict[str, None] = {}
    with (
        patch.object(Bars, "stage", lambda _, name, *__: stages.setdefault(name)),
        # However little is lost, so that the run comes to say why it cannot.
        patch.multiple("mofq.api.run_delivery", _NORMAL_STEPS=8, _LEAST_TUNED=0.0),
    ):
        first = ok(*run, "-o", folder)
    measured = [name for name in stages if name.startswith(("measure", "fit codes"))]
    assert measured[:2] == ["measure", "fit codes (pass 2)"]
    assert "what was tried" in first.out
    assert "codes rounded to nearest" in first.out
    assert "The recipe is not tuned: a model is tuned on three sequences of four" in first.err
    recipe = package.load_recipe(folder / "recipe.yaml")
    assert "int4.g64@nats~descent" in recipe.schemes.values()
    assert recipe.made_by["effort"] == "normal"
    assert recipe.made_by["space"] == "space+fitted"
    rounded, fitted = str(recipe.made_by["tried"]).split("; ")
    assert (rounded[: len("codes ro")], fitted[:6]) == ("codes ro", "fitted")
    before = tree(folder)
    content = ok(*run, "-o", folder, "--json").json
    assert {name for name, data in tree(folder).items() if data != before[name]} <= {
        "validation.json"
    }
    assert (
        content["kl_nats_per_token"]
        < 0.8 * ok(*run, "--effort", "quick", "-o", quick, "--json").json["kl_nats_per_token"]
    )
    rounded, fitted = content["tried"]
    assert fitted["kl_nats_per_token"] < rounded["kl_nats_per_token"]
    assert fitted["kl_nats_per_token"] == content["predicted_kl_nats_per_token"]
    assert set(content["seconds"]) - {"rewrite"} == {
        "calibrate",
        "measure",
        "fit",
        "search",
        "validate",
    }


@pytest.mark.long
def test_a_request_ends_as_before_although_another_one_measured_more_codes(
    space: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    space.write_text("version: 1\nschemes: [int4.g64]\n")
    run = ("run", DEMO, "--space", space, *TEXT, "-o", folder)
    ok(*run, "--max-bits", "6")
    before = tree(folder)
    ok(*run, "--max-bits", "6", "--effort", "best")
    assert (folder / "recipe-6.0bits-best.yaml").is_file()
    ok(*run, "--max-bits", "6")
    assert tree(folder)["recipe.yaml"] == before["recipe.yaml"]


@pytest.mark.long
def test_a_folder_of_a_version_without_efforts_is_continued_as_quick_and_normal_stands_beside(
    space: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ok(*run_options(space, folder))
    path = folder / "recipe.yaml"
    recipe = package.load_recipe(path)
    new = ("effort", "tried")
    former = {key: one for key, one in recipe.made_by.items() if key not in new}
    write_recipe(replace(recipe, made_by=former), path)
    data = path.read_bytes()
    assert ok(*run_options(space, folder)).err.count("there already") == 2
    assert path.read_bytes() == data
    run = ("run", DEMO, "--space", space, "--max-bits", "6", *TEXT, "-o", folder)
    assert "there already" in ok(*run).err
    assert {one.name for one in folder.glob("recipe*")} == {
        "recipe.yaml",
        "recipe-6.0bits-normal.yaml",
    }


@pytest.mark.long
def test_without_stored_samples_fitted_codes_are_chosen_too(space: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = ("run", DEMO, "--space", space, "--max-bits", "6", *TEXT, "--no-stats", "-o", folder)
    content = ok(*run, "--engine", "vllm-hopper", "--json").json
    assert not (folder / "stats").exists()
    assert content["enforced"] is True
    assert any("descent" in name for name in content["schemes"])
    before = tree(folder)
    ok(*run, "--engine", "vllm-hopper")
    assert tree(folder)["recipe.yaml"] == before["recipe.yaml"]


@pytest.mark.long
def test_a_run_for_rounded_inputs_moves_scales_and_one_recipe_makes_its_folder_again(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    run = ("run", DEMO, "--space", "w8a8", "--max-bits", "8.2", "--engine", "vllm-cpu", *TEXT)
    ran = ok(*run, "-o", folder)
    assert "scales moved at" in ran.out
    recipe = package.load_recipe(folder / "recipe.yaml")
    assert recipe.rewriting is not None
    assert recipe.rewriting.model == Path(DEMO).name
    assert not recipe.is_edited
    tables = folder.glob("table-rewritten-*.jsonl")
    (table,) = (one for one in tables if f"mofq explore {one} {folder / 'recipe.yaml'}" in ran.err)
    before = tree(folder)
    content = ok(*run, "-o", folder, "--json").json
    assert content["enforced"] is True
    assert content["table"] == str(table)
    names = [re.sub(r"\d+", "N", one["name"]) for one in content["tried"]]
    assert names == [
        "codes rounded to nearest",
        "scales moved at N inputs",
        "rotated",
        "rotated, and scales moved at N inputs",
        "fitted codes",
    ]
    after = tree(folder)
    assert {name for name in before if after[name] != before[name]} <= {"validation.json"}
    # From the original, the recipe and the statistics, whatever else is in the folder.
    stats, again = ("--stats", folder / "stats"), tmp_path / "again"
    ok("export", DEMO, folder / "recipe.yaml", *stats, "-o", again)
    exported = tree(folder / "model")
    exported.pop("README.md")
    assert {name: data for name, data in tree(again).items() if name != "README.md"} == exported
    size = ("--text", "demo-en", "--tokens", "256", "--sequence-length", "64")
    assert ok("validate", DEMO, again, *stats, *size, "--json").json["enforced"] is True
    of_recipe = ("validate", DEMO, folder / "recipe.yaml", *size)
    assert "as --stats" in refused(*of_recipe)
    resident, streamed = (
        ok(*of_recipe, *stats, "--execution", execution, "--json").json["kl_nats_per_token"]
        for execution in ("resident", "streamed")
    )
    assert streamed == resident
    to = ("--to", "llama.cpp", "-o", tmp_path / "file")
    assert "rewrites model to" in refused("export", DEMO, folder / "recipe.yaml", *stats, *to)


@pytest.mark.long
def test_a_run_layer_by_layer_moves_scales_too(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = ("run", DEMO, "--space", "w8a8", "--max-bits", "8.2", "--engine", "vllm-cpu", *TEXT)
    content = ok(*run, "--execution", "streamed", "-o", folder, "--json").json
    assert content["enforced"] is True
    assert package.load_recipe(folder / "recipe.yaml").rewriting is not None


def test_a_run_whose_export_failed_does_not_validate_layer_by_layer_again(tmp_path: Path) -> None:
    folder, loaded, units = tmp_path / "run", UnitWeights.loaded, list[str]()
    made = ("run", DEMO, "--space", "w4a16", "--max-bits", "9", "--engine", "vllm-cpu", *SMALL)
    run = (*made, "--execution", "streamed", "--rivals", "0", "-o", folder)

    def noted(self: UnitWeights, unit: str, **more: Any) -> Any:
        units.append(unit)
        return loaded(self, unit, **more)

    with patch("mofq.api.run.export_recipe", side_effect=MofqError("the disk is full")):
        ran = mofq(*run)
    assert (ran.code, ran.err.splitlines()[-1]) == (1, "Error: the disk is full")
    with patch.object(UnitWeights, "loaded", noted):
        content = ok(*run, "--json").json
    assert set(units) == {"lm_head"}
    assert content["enforced"] is True
    assert not (folder / ".streamed").exists()
    # All is done: another run validates anew.
    with patch.object(UnitWeights, "loaded", noted):
        again = ok(*run, "--json").json
    assert "model.layers.0" in units
    assert again["kl_nats_per_token"] == content["kl_nats_per_token"]


def test_efforts_that_there_are_not_and_texts_of_one_sequence_are_refused_before_anything_is_run(
    tmp_path: Path,
) -> None:
    run = ("run", DEMO, "--max-bits", "5", *TEXT, "-o", tmp_path / "run")
    assert "quick" in refused(*run, "--effort", "quik")
    message = refused(*run, "--sequences", "1")
    assert "has one sequence" in message
    assert "--effort quick" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "space", "bits", "file", "key"),
    [
        ("torchao-cpu", "w8a8", "9", "torchao.json", "quant_type"),
        ("torchao-cpu", "w8a8", "16", "torchao.json", "quant_type"),  # nothing is quantized
        ("tensorrt-llm-hopper", "serving", "6", "hf_quant_config.json", "quantization"),
    ],
)
def test_run_for_an_engine_that_reads_a_file_writes_that_file(
    engine: str, space: str, bits: str, file: str, key: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = ("--space", space, "--max-bits", bits, "--engine", engine, *SMALL)
    content = ok("run", DEMO, *arguments, "-o", folder, "--json").json
    assert content["exported"] == str(folder / file)
    assert content["serve_command"] is None
    assert key in json.loads((folder / file).read_text("utf-8"))
    assert f"For {engine}: {folder / file}" in ok("run", DEMO, *arguments, "-o", folder).out


@pytest.mark.long
def test_run_to_an_accuracy_takes_a_folder_of_the_models_name_and_says_what_comes_next(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = ok("run", DEMO, "--space", space, "--max-kl", "0.05", *SMALL)
    assert "No corpus is named: calibrating on demo-en-calibration" in ran.err
    folder = tmp_path / "model-mofq"
    recipe = package.load_recipe(folder / "recipe.yaml")
    assert recipe.budget == {"kl_nats_per_token": 0.05}
    # Proved on two of the four windows; the others had no part in the choice.
    assert recipe.made_by["text_tokens"] == 128
    windows = read_validation(folder / "validation.json").windows
    assert (
        f"On the 2 windows in between, which had no part in the choice, the recipe has "
        f"{fmean(windows[1::2]):.3g} nats per token" in ran.err
    )
    assert (recipe.kl_nats_per_token or 1) < 0.05
    assert f"mofq export {DEMO} model-mofq/recipe.yaml --to compressed-tensors" in ran.err
    assert "mofq explore model-mofq/table.jsonl model-mofq/recipe.yaml" in ran.err


@pytest.mark.long
def test_run_to_an_accuracy_proves_in_the_arithmetic_that_it_validates_in(
    space: Path, tmp_path: Path
) -> None:
    folder, limit = tmp_path / "run", ("--max-kl", "0.05")
    ok("run", DEMO, "--space", space, *limit, *SMALL, "--dtype", "bfloat16", "-o", folder)
    windows = read_validation(folder / "validation.json").windows
    proved = package.load_recipe(folder / "recipe.yaml").result.kl_measured
    assert proved == pytest.approx(fmean(windows[::2]), rel=1e-9)


def test_run_to_an_accuracy_needs_windows_that_have_no_part_in_the_choice(
    space: Path, tmp_path: Path
) -> None:
    few = ("--sequences", "4", "--sequence-length", "64", "--tokens", "192")
    run = ("run", DEMO, "--space", space, "--max-kl", "0.05", *few, "-o", tmp_path / "run")
    assert "needs 4 windows, found 3" in refused(*run)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_run_for_an_engine_ends_with_a_folder_and_the_command_that_serves_it(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    arguments = ("--space", "w8a8", "--max-bits", "8.2", "--engine", "vllm-cpu", *SMALL)
    first = ok("run", DEMO, *arguments, "-o", folder)
    exported = folder / "model"
    assert f"Serve it with: {serve(exported)}" in first.out
    assert f"--engine vllm-cpu --space w8a8 -o {folder / 'explorer.html'}" in first.err
    assert serve(exported) in (exported / "README.md").read_text("utf-8")
    recipe = package.load_recipe(exported / "recipe.yaml")
    assert recipe == package.load_recipe(folder / "recipe.yaml")
    before = tree(exported)
    # Proved byte for byte and kept, not written again.
    assert ok("run", DEMO, *arguments, "-o", folder, "--json").json["exported"] == str(exported)
    assert tree(exported) == before
    # A process that was killed before it wrote the last of the results: the model says which.
    whole = tree(folder)
    (folder / "recipe.yaml").unlink()
    other = ("--space", "w8a8", "--max-bits", "16", "--engine", "vllm-cpu", *SMALL)
    content = ok("run", DEMO, *other, "-o", folder, "--json").json
    assert content["exported"] == str(folder / "model-16.0bits")
    assert tree(exported) == before
    ok("run", DEMO, *arguments, "-o", folder)
    assert (folder / "recipe.yaml").read_bytes() == whole["recipe.yaml"]
    # What no run wrote is not taken for a model.
    (exported / "recipe.yaml").unlink()
    assert "no `mofq run` wrote" in refused("run", DEMO, *arguments, "-o", folder)


def serve(folder: Path) -> str:
    return f"python -m vllm.entrypoints.openai.api_server --model {folder}"


@pytest.mark.long
def test_the_demo_shows_a_mixture_below_every_uniform_scheme(tmp_path: Path) -> None:
    content = ok("demo", "-o", tmp_path / "demo", "--json").json
    assert content["preferred"] == "recipe"
    assert content["enforced"] is True
    assert content["bits_per_weight"] <= 5
    assert content["predicted_kl_nats_per_token"] == pytest.approx(
        content["kl_nats_per_token"], rel=0.25
    )
    validations = content["validations"]
    assert content["serve_command"].endswith(
        f"--model {tmp_path / 'demo' / 'model'} --dtype bfloat16"
    )
    assert len(validations) >= 4
    for name, one in validations.items():
        if name != "recipe":
            assert one["kl_nats_per_token"] > 1.5 * content["kl_nats_per_token"], name


@pytest.mark.long
def test_runs_for_other_budgets_spaces_and_engines_share_what_was_measured(
    space: Path, tmp_path: Path
) -> None:
    folder, first = tmp_path / "run", run_options(space, tmp_path / "run")
    ok(*first)
    before = tree(folder)
    other = tmp_path / "other.yaml"
    other.write_text("version: 1\nschemes: [int4.g32, int8.channel+int8.token]\n")
    names = {
        ("--max-bits", "5"): "5.0bits",
        ("--max-size", "3MB", "--max-bits", "7"): "7.0bits-3000000B",
        ("--space", other, "--engine", "vllm-cpu"): "6.0bits-vllm-cpu-other",
    }
    written = {"recipe.yaml", "validation.json", "table.jsonl"}
    for changed, name in names.items():
        ran = ok(*first, *changed)
        assert ran.err.count("there already") == (1 if other in changed else 2)
        files = {f"recipe-{name}.yaml", f"validation-{name}.json"}
        assert all(f"{folder / file}" in ran.err for file in files)  # the page shows all of them
        assert f"{folder / 'recipe.yaml'}" in ran.err
        written |= files
    model = folder / "model-6.0bits-vllm-cpu-other"
    assert serve(model) in ran.out
    assert {path.name for path in folder.iterdir()} == {*written, "stats", model.name}
    recipe = package.load_recipe(folder / "recipe-7.0bits-3000000B.yaml")
    assert recipe.budget == {"bits_per_weight": 7.0, "checkpoint_bytes": 3_000_000}
    inside = package.load_recipe(model / "recipe.yaml")
    assert inside == package.load_recipe(folder / f"recipe-{name}.yaml")
    # The first one is as it was, and is continued although the table has grown since.
    after = tree(folder)
    assert {file for file in before if after[file] != before[file]} == {"table.jsonl"}
    ok(*first)
    whole = tree(folder)
    assert {file for file in whole if whole[file] != after[file]} <= {"validation.json"}


def test_a_space_that_has_changed_under_its_name_is_refused_before_anything_is_written(
    space: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    ok(*run_options(space, folder))
    before = tree(folder)
    space.write_text("version: 1\nschemes: [int4.g32, int8.channel]\n")
    for budget in ("6", "5"):
        message = refused(*run_options(space, folder), "--max-bits", budget)
        assert f"{folder / 'recipe.yaml'}: was decided in the search space space as it" in message
        assert "another -o" in message
    assert tree(folder) == before


@pytest.mark.long
def test_a_folder_that_another_version_finished_is_continued(space: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ok(*run_options(space, folder))
    path = folder / "recipe.yaml"
    recipe = package.load_recipe(path)
    noted = {key: one for key, one in recipe.made_by.items() if key != "corpora_sha256"}
    assert noted != recipe.made_by
    write_recipe(replace(recipe, made_by=noted | {"mofq": "0.0.9"}), path)
    former = path.read_bytes()
    ok(*run_options(space, folder))
    assert path.read_bytes() == former
    lineage = json.loads((folder / "validation.json").read_text("utf-8"))
    assert lineage["recipe_sha256"] == hashlib.sha256(former).hexdigest()
    assert {one.name for one in folder.glob("recipe*")} == {"recipe.yaml"}
    # Another decision under the request's name is not replaced.
    group, *others = recipe.groups
    changed = (replace(group, scheme="bf16"), *others)
    write_recipe(replace(recipe, groups=changed, result=RecipeResult()), path)
    edited = tree(folder)
    assert "is another recipe than this run would end with" in mofq(*run_options(space, folder)).err
    assert tree(folder) == edited


@pytest.mark.long
def test_what_was_measured_beside_the_recipe_is_kept_and_drawn(space: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    measured = ok(*run_options(space, folder), "--json").json["validations"]
    kept = json.loads((folder / "validation.json").read_text("utf-8"))
    assert kept["candidate"] == "recipe.yaml"
    assert kept["alternatives"].keys() == {"int4.g64"}
    assert kept["alternatives"]["int4.g64"] == measured["int4.g64"] | {"candidate": "int4.g64"}
    page, validation = tmp_path / "page.html", folder / "validation.json"
    ok("explore", folder / "table.jsonl", "--validation", validation, "-o", page)
    (data,) = re.findall(r'"measured":(\[.*?\])', page.read_text("utf-8"))
    points = {one["label"]: one["kl_nats_per_token"] for one in json.loads(data)}
    assert points == {name: one["kl_nats_per_token"] for name, one in measured.items()}


@pytest.mark.long
@pytest.mark.parametrize("stage", ["validate_candidates", "export_recipe"])
def test_a_run_that_fails_leaves_no_result(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = import_module("mofq.api.run")

    def fail(*_: object, **__: object) -> None:
        raise MofqError("no more")

    folder = tmp_path / "run"
    arguments = ("--space", "w8a8", "--max-bits", "8.2", "--engine", "vllm-cpu", *SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(run, stage, fail)
        assert "no more" in mofq("run", DEMO, *arguments, "-o", folder).err
    assert {path.name for path in folder.iterdir()} == {"stats", "table.jsonl"}
    # What was measured is the next run's, whatever that asks for.
    other = ("--space", "w8a8", "--max-bits", "9", "--engine", "vllm-cpu", *SMALL)
    assert ok("run", DEMO, *other, "-o", folder).err.count("there already") == 2


@pytest.mark.long
def test_a_mixture_that_does_not_pay_gives_way_to_the_uniform_scheme(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = import_module("mofq.api.run")  # the package's name for it is the function

    def poor(*arguments: object, **options: object) -> object:
        """The measurement, with the mixture's recipe said to be no better than the uniform."""
        found = measure(*arguments, **options)
        worst = max((one for one in found.values()), key=lambda one: one.kl_nats_per_token)
        found["recipe"] = replace(
            found["recipe"],
            kl_nats_per_token=worst.kl_nats_per_token,
            windows=worst.windows,
        )
        return found

    measure = run.validate_candidates
    monkeypatch.setattr(run, "validate_candidates", poor)
    folder = tmp_path / "run"
    ran = ok(*run_options(space, folder))
    assert "int4.g64 for every layer is as small as the mixture" in ran.err
    recipe = package.load_recipe(folder / "recipe.yaml")
    assert set(recipe.schemes.values()) == {"int4.g64"}
    validation = json.loads((folder / "validation.json").read_text("utf-8"))
    assert validation["bits_per_weight"] == recipe.bits_per_weight
    # It notes what was asked for, as the mixture does: the same run again is no other one.
    assert recipe.budget == {"bits_per_weight": 6.0}
    assert recipe.made_by["space"] == "space"
    before = tree(folder)
    ok(*run_options(space, folder))
    assert tree(folder)["recipe.yaml"] == before["recipe.yaml"]
    # Where another text would prefer the mixture, the recipe and its validation stay together.
    monkeypatch.setattr(run, "validate_candidates", measure)
    before = tree(folder)
    assert "another recipe than this run" in mofq(*run_options(space, folder)).err
    assert tree(folder) == before


@pytest.mark.long
def test_ctrl_c_in_measure_keeps_whole_lines_and_a_second_run_makes_the_same_bytes(
    measured: Measured, tmp_path: Path
) -> None:
    table = tmp_path / "table.jsonl"
    space = measured.folder / "space.yaml"
    measure = ("measure", DEMO, "--space", space, "--stats", measured.stats, "-o", table)
    interrupt_process("measure", 7, *measure)
    kept = table.read_bytes()
    whole = measured.table.read_bytes()
    assert 0 < len(kept) < len(whole)
    assert kept.endswith(b"\n")
    assert whole.startswith(kept)
    message = refused("search", table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    assert "Run the same `mofq measure` again" in message
    ok(*measure)
    assert table.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.jsonl"]


def test_ctrl_c_in_calibrate_keeps_whole_sequences_and_a_second_run_makes_the_same_bytes(
    measured: Measured, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    calibrate = ("calibrate", DEMO, "--corpus", "en=demo-en-calibration", *SMALL[:4], "-o", stats)
    interrupt("calibrate", 2, *calibrate)
    assert not (stats / "stats.json").exists()
    kept = {name: data for name, data in tree(stats).items() if name.startswith("en/")}
    numbers = ("00000", "00001")
    assert sorted(kept) == sorted(
        [f"en/gains-{n}.json" for n in numbers] + [f"en/sequence-{n}.safetensors" for n in numbers]
    )
    message = refused("measure", DEMO, "--space", "w8a8", "--stats", stats, "-o", tmp_path / "t")
    assert "it continues where it stopped" in message
    ok(*calibrate)
    assert tree(stats) == tree(measured.stats)


@pytest.mark.parametrize("stage", ["original", "enforce", "validate"])
def test_ctrl_c_in_validate_leaves_nothing(stage: str, measured: Measured, tmp_path: Path) -> None:
    output = tmp_path / "validation.json"
    size = ("--tokens", "128", "--sequence-length", "64")
    validate = ("validate", DEMO, measured.recipe, "--text", "demo-en", *size, "-o", output)
    interrupt(stage, 1, *validate)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_export_leaves_nothing(tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    out.mkdir()
    interrupt("export", 9, "export", DEMO, recipe, "--to", "compressed-tensors", "-o", out / "m")
    assert list(out.iterdir()) == []
