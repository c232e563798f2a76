"""`mofq tune`, and what other commands say of a tuned recipe."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from shutil import copytree

import pytest
from command_line import DEMO, mofq, ok, refused, tree

import mofq as package
from mofq.api import Excerpts, run_delivery, tune
from mofq.demo import demo_mixture_folder
from mofq.exceptions import MofqError

ON = ("--corpus", "en=demo-en-calibration", "--sequence-length", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of four bits, and the same with tuned norms. Not to be changed in place."""
    folder = tmp_path_factory.mktemp("tuned")
    ok("recipe", "uniform", DEMO, "int4.channel", "-o", folder / "plain.yaml")
    ran = ok(
        *("tune", DEMO, folder / "plain.yaml", *ON, "--sequences", "32", "--steps", "4"),
        *("-o", folder / "tuned.yaml"),
    )
    assert "codes and scales of 42 layers learned, 13 norms tuned, KL" in ran.err
    assert "on 8 held-out sequences" in ran.err
    return folder


def test_validate_and_diff_say_that_norms_are_tuned(folder: Path) -> None:
    measured = {
        name: ok(
            *("validate", DEMO, folder / name, "--text", "demo-en", "--tokens", "512"),
            *("--sequence-length", "64", "--json"),
        ).json
        for name in ("plain.yaml", "tuned.yaml")
    }
    before, after = (one["kl_nats_per_token"] for one in measured.values())
    assert after < before
    assert measured["tuned.yaml"]["is_tuned"]
    assert "is_tuned" not in measured["plain.yaml"]
    compared = mofq("diff", folder / "plain.yaml", folder / "tuned.yaml")
    assert "0 of 24 fusion groups differ" in compared.out
    assert (
        "tuned.yaml: codes and scales of 42 layers learned, 13 norms tuned, of which"
        in compared.err
    )
    tuning = ok("diff", folder / "plain.yaml", folder / "tuned.yaml", "--json").json["tuned"]
    assert tuning[0] is None
    assert tuning[1]["kl_after"] < tuning[1]["kl_before"]


def test_a_model_that_does_not_fit_is_tuned_layer_by_layer_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (
        *("tune", DEMO, folder / "plain.yaml", *ON, "--sequences", "32", "--steps", "4"),
        *("-o", tmp_path / "tuned.yaml"),
    )

    def fail(*_: object) -> None:
        raise MofqError("no space left")

    monkeypatch.setattr("mofq.model.streaming.execution.free_bytes", lambda _: 10**6)
    with monkeypatch.context() as patch:
        patch.setattr("mofq.decision.recipe.write_recipe", fail)
        ran = mofq(*asked)
    assert "it is run layer by layer (--execution streamed)" in ran.err
    assert f"GB are kept in {tmp_path / '.tuned.yaml.streamed'}" in ran.err
    assert "no space left" in ran.err
    # What could not be written is not lost.
    monkeypatch.setattr("mofq.delivery.tuning.tune_recipe.tune_model", None)
    ok(*asked)
    assert tree(tmp_path) == {
        name: content for name, content in tree(folder).items() if name.startswith("tuned")
    }


@pytest.mark.long
def test_the_bundled_mixture_is_tuned_the_same_layer_by_layer(tmp_path: Path) -> None:
    model = demo_mixture_folder()
    ok("recipe", "uniform", model, "int4.g32", "-o", tmp_path / "plain.yaml")
    resident, streamed = (
        tune(
            model,
            tmp_path / "plain.yaml",
            ["en=demo-en-calibration"],
            steps=2,
            excerpts=Excerpts(sequences=12, sequence_length=64),
            execution=execution,
        ).tuning
        for execution in ("resident", "streamed")
    )
    assert streamed == resident


@pytest.mark.long
def test_the_next_step_names_the_statistics_and_the_length_that_were_given(tmp_path: Path) -> None:
    stats, plain, tuned = (tmp_path / name for name in ("stats", "plain.yaml", "tuned.yaml"))
    ok("calibrate", DEMO, *ON, "--sequences", "40", "-o", stats)
    ok("recipe", "uniform", DEMO, "int4.g32@nats~descent", "--stats", stats, "-o", plain)
    words = (*ON, "--sequences", "40", "--stats", stats)
    ran = ok("tune", DEMO, plain, *words, "--steps", "0", "-o", tuned)
    assert "compensate errors of those before" in ran.err
    length = ON[ON.index("--sequence-length") + 1]
    assert (
        f"Next: mofq validate {DEMO} {tuned} --stats {stats} --text OTHER_TEXT "
        f"--sequence-length {length}\n"
    ) in ran.err
    ran = ok(
        *("validate", DEMO, plain, "--stats", stats, "--text", "demo-en-calibration"),
        *("--tokens", "64", "--sequence-length", "64"),
    )
    assert "was calibrated on this very text" in ran.err
    other = demo_mixture_folder()
    told = refused(
        *("recipe", "uniform", other, "int4.g32@nats~descent", "--stats", stats),
        *("-o", tmp_path / "other.yaml"),
    )
    assert "Calibrate this model" in told
    ran = ok("validate", DEMO, tuned, "--stats", stats, "--text", "demo-en", "--tokens", "512")
    assert f" --stats {stats} -o FOLDER" in ran.err


def test_norms_alone_are_tuned_where_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    ran = ok(
        *("tune", DEMO, folder / "plain.yaml", *ON, "--sequences", "32", "--steps", "4"),
        *("--what", "norms", "-o", tmp_path / "norms.yaml"),
    )
    assert "norms.yaml: 13 norms tuned, KL" in ran.err
    both, norms = (
        package.load_recipe(path).tuning
        for path in (folder / "tuned.yaml", tmp_path / "norms.yaml")
    )
    assert both is not None
    assert norms is not None
    assert norms.layers == 0
    assert both.kl_before == norms.kl_before
    assert norms.kl_after < norms.kl_before


def test_text_that_norms_were_tuned_on_is_known_again(folder: Path) -> None:
    ran = ok(
        *("validate", DEMO, folder / "tuned.yaml", "--text", "demo-en-calibration"),
        *("--tokens", "64", "--sequence-length", "32"),
    )
    assert "was tuned on this very text" in ran.err


def test_where_nothing_is_gained_the_recipe_is_written_as_it_was(
    folder: Path, tmp_path: Path
) -> None:
    ok("recipe", "uniform", DEMO, "bf16", "-o", tmp_path / "plain.yaml")
    ran = ok(
        *("tune", DEMO, tmp_path / "plain.yaml", *ON, "--sequences", "12", "--steps", "1"),
        *("-o", tmp_path / "tuned.yaml"),
    )
    assert "the recipe as it was. Tuned it has KL 0 to " in ran.err
    assert (tmp_path / "tuned.yaml").read_bytes() == (tmp_path / "plain.yaml").read_bytes()


def test_what_a_recipe_was_tuned_to_before_stays_and_is_told(folder: Path, tmp_path: Path) -> None:
    copytree(folder, tmp_path, dirs_exist_ok=True)
    before = package.load_recipe(tmp_path / "tuned.yaml").tuning
    assert before is not None
    ran = ok(
        *("tune", DEMO, tmp_path / "plain.yaml", *ON, "--sequences", "32", "--steps", "2"),
        *("-o", tmp_path / "tuned.yaml"),
    )
    assert f"{tmp_path / before.file}: what the recipe before was tuned to. It stays" in ran.err
    assert (tmp_path / before.file).is_file()
    after = package.load_recipe(tmp_path / "tuned.yaml").tuning
    assert after is not None
    assert after.file != before.file


def test_a_recipe_that_is_tuned_is_refused(folder: Path, tmp_path: Path) -> None:
    message = refused("tune", DEMO, folder / "tuned.yaml", *ON, "-o", tmp_path / "again.yaml")
    assert "is tuned already, in 4 steps. To tune it anew, take its section `tuning` out" in message


def test_too_little_text_is_refused(folder: Path, tmp_path: Path) -> None:
    message = refused(
        *("tune", DEMO, folder / "plain.yaml", *ON, "--sequences", "4"),
        *("-o", tmp_path / "tuned.yaml"),
    )
    assert "needed to judge, found 1: of a text too few windows were cut. Give longer" in message


@pytest.mark.long
def test_a_run_tunes_what_it_found_and_ends_the_same_when_it_is_repeated(tmp_path: Path) -> None:
    space, folder = tmp_path / "space.yaml", tmp_path / "run"
    space.write_text("version: 1\nschemes: ['int3.channel@nats']\n")
    run = ("run", DEMO, "--space", space, "--max-bits", "4", *ON, "--sequences", "32")
    small = ("--tokens", "256", "--rivals", "0", "-o", folder)
    first = ok(*run, *small)
    assert "learned, 13 norms tuned; KL" in first.out
    assert "before it was tuned" in first.out
    before = tree(folder)
    recipe = package.load_recipe(folder / "recipe.yaml")
    assert recipe.tuning is not None
    assert recipe.tuning.held_out == 8
    content = ok(*run, *small, "--json").json
    assert content["tuned"]["kl_after"] == recipe.tuning.kl_after
    assert "tune" not in content["seconds"]
    assert {name for name, data in tree(folder).items() if data != before[name]} <= {
        "validation.json"
    }
    quick = ok(*run, *small, "--effort", "quick", "--json").json
    assert quick["tuned"] is None
    assert content["kl_nats_per_token"] < quick["kl_nats_per_token"]


@pytest.mark.long
def test_a_run_layer_by_layer_tunes_at_its_best_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, folder = tmp_path / "space.yaml", tmp_path / "best"
    space.write_text("version: 1\nschemes: ['int3.channel']\n")
    run = ("run", DEMO, "--space", space, "--max-bits", "4", *ON, "--sequences", "12")
    best = ("--tokens", "128", "--rivals", "0", "--execution", "streamed", "--effort", "best")

    def fail(*_: object) -> None:
        raise MofqError("no space left")

    monkeypatch.setattr(run_delivery, "_BEST_STEPS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(import_module("mofq.api.run"), "validate_candidates", fail)
        ran = mofq(*run, *best, "-o", folder)
    assert f"GB are kept in {folder / '.tuning'}" in ran.err
    assert "no space left" in ran.err
    monkeypatch.setattr("mofq.delivery.tuning.tune_recipe.tune_model", None)
    ok(*run, *best, "-o", folder)
    assert not (folder / ".tuning").exists()
