"""What is measured while a model is calibrated is what is measured through a stats folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mofq.api import Choices, Samples, Where, calibrate, export, measure, search, validate
from mofq.api.measure import fits_beside, work_of
from mofq.api.options import Budget, Windows
from mofq.api.run import run
from mofq.decision.recipe import Recipe
from mofq.demo import demo_mixture_folder, demo_model_folder
from mofq.evidence.measure import while_calibrating
from mofq.exceptions import ClusterError, MofqError, RecipeError, StatsError, TableError

CORPORA = {"en": "demo-en-calibration", "pt": "demo-pt-calibration"}
SAMPLES = Samples(sequences=4, keep=2, sequence_length=32)
PLAIN = ("int4.g32", "int8.channel+int8.token", "bf16")
FITTED = ("int4.g32@nats", "int4.g32@nats~gptq", "bf16")


CACHES = "kv_cache:\n  - kv:fp8_e4m3.tensor\n  - kv:int8.head\n"


def write_space(path: Path, schemes: tuple[str, ...], more: str = "") -> Path:
    lines = "".join(f"  - {scheme}\n" for scheme in schemes)
    path.write_text(f"version: 1\ndescription: some\nschemes:\n{lines}{more}", "utf-8")
    return path


def lines_of(table: Path) -> list[Any]:
    """The table, without the hash of its statistics."""
    lines = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
    lines[0]["stats"].pop("sha256")
    return lines


def through_a_folder(model: Path, space: Path, out: Path, **more: Any) -> Path:
    calibrate(model, CORPORA, out / "stats", samples=SAMPLES, **more)
    return measure(model, space, out / "stored.jsonl", stats=out / "stats").output


def in_passing(model: Path, space: Path, out: Path, **more: Any) -> Path:
    named = {"corpora": CORPORA, "samples": SAMPLES, **more}
    return measure(model, space, out / "table.jsonl", **named).output


class Fitted(NamedTuple):
    """Fitted schemes of the bundled model, measured in both ways."""

    folder: Path
    passing: Path
    stored: Path

    @property
    def recipe(self) -> Recipe:
        fixed = {"*.0.*": "int4.g32@nats~gptq", "*.1.*": "int4.g32@nats"}
        choices = Choices(fixed=fixed)
        return search(self.passing, budget=Budget(max_bits=8.0), choices=choices).decision.recipe


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder = tmp_path_factory.mktemp("fitted")
    space = write_space(folder / "some.yaml", FITTED)
    model = demo_model_folder()
    return Fitted(folder, in_passing(model, space, folder), through_a_folder(model, space, folder))


@pytest.mark.long
def test_a_recipe_of_fitted_schemes_is_exported_and_validated_without_statistics(
    fitted: Fitted, tmp_path: Path
) -> None:
    assert lines_of(fitted.passing) == lines_of(fitted.stored)
    model, fits = demo_model_folder(), fits_beside(fitted.passing)
    folders = {}
    for name, stats in (("kept", fits), ("stored", fitted.folder / "stats")):
        folders[name] = tmp_path / name
        export(model, fitted.recipe, folders[name], stats=stats)
    files = {path.name: path for path in folders["kept"].glob("*.safetensors")}
    assert files
    for path in folders["stored"].glob("*.safetensors"):
        assert path.read_bytes() == files.pop(path.name).read_bytes()
    assert not files
    windows = Windows(tokens=64, sequence_length=32)
    result = validate(model, fitted.recipe, "demo-en", windows=windows, stats=fits)
    assert result.worst.enforced


@pytest.mark.long
def test_fits_that_changed_or_are_of_another_calibration_are_refused(
    fitted: Fitted, tmp_path: Path
) -> None:
    model, recipe, fits = demo_model_folder(), fitted.recipe, tmp_path / "fits"
    shutil.copytree(fits_beside(fitted.passing), fits)
    other = replace(recipe, made_by={**recipe.made_by, "stats_sha256": "0" * 64})
    with pytest.raises(RecipeError, match="is fitted to stats_sha256"):
        export(model, other, tmp_path / "model", stats=fits)
    with next(fits.glob("unit-*")).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    with pytest.raises(StatsError, match="changed since it was written"):
        export(model, recipe, tmp_path / "model", stats=fits)


@pytest.mark.parametrize(
    ("model", "more"),
    [
        pytest.param(demo_model_folder(), CACHES, id="caches"),
        pytest.param(demo_mixture_folder(), "", id="mixture", marks=pytest.mark.long),
    ],
)
def test_the_table_is_that_through_a_stats_folder(model: Path, more: str, tmp_path: Path) -> None:
    space = write_space(tmp_path / "some.yaml", PLAIN, more)
    table = in_passing(model, space, tmp_path)
    stored = through_a_folder(model, space, tmp_path, kv_cache=bool(more))
    assert lines_of(table) == lines_of(stored)
    kinds = {line["kind"] for line in lines_of(table)}
    assert ("cache" in kinds) == bool(more)
    assert ({"visits", "flips"} <= kinds) == (model == demo_mixture_folder())
    assert not work_of(table).exists()


class Stop(BaseException):
    """As a signal that ends a process."""


def test_a_run_that_is_stopped_measures_no_unit_twice_but_that_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, space = demo_model_folder(), write_space(tmp_path / "some.yaml", PLAIN)
    seen: list[int] = []
    take = while_calibrating._Scorer.take

    def stopping(self: Any, step: int, *arguments: Any) -> None:
        seen.append(step)
        if len(seen) == 2:
            raise Stop
        take(self, step, *arguments)

    monkeypatch.setattr(while_calibrating._Scorer, "take", stopping)
    with pytest.raises(Stop):
        in_passing(model, space, tmp_path)
    assert work_of(tmp_path / "table.jsonl").is_dir()
    table = in_passing(model, space, tmp_path)
    assert len(seen) == len(set(seen)) + 1
    assert seen[1] == seen[2]
    assert lines_of(table) == lines_of(through_a_folder(model, space, tmp_path))


@pytest.mark.long
def test_a_table_grows_by_schemes_and_by_corpora(tmp_path: Path) -> None:
    model = demo_model_folder()
    space = write_space(tmp_path / "some.yaml", PLAIN[1:])
    first = {"en": CORPORA["en"]}
    told: list[str] = []
    table = in_passing(model, space, tmp_path, corpora=first, tell=told.append)
    assert len([line for line in told if "too few for error bars" in line]) == 1
    told.clear()
    in_passing(model, space, tmp_path, corpora=first, tell=told.append)
    assert not any("too few for error bars" in line for line in told)
    with pytest.raises(TableError, match="stats"):
        in_passing(model, space, tmp_path, samples=Samples(sequences=3, sequence_length=32))
    in_passing(model, space, tmp_path)
    in_passing(model, write_space(tmp_path / "more.yaml", PLAIN), tmp_path)
    (tmp_path / "at-once").mkdir()
    whole = in_passing(model, tmp_path / "more.yaml", tmp_path / "at-once")
    rows, expected = (
        {
            (row["group"], row["scheme"], row["unit"], row.get("corpus")): row
            for row in lines_of(path)
            if row["kind"] == "row"
        }
        for path in (table, whole)
    )
    assert rows.keys() == expected.keys()
    # What several corpora share, as a static scale, is that of the corpora of a row's run.
    assert all(rows[key]["error"] == expected[key]["error"] for key in expected)


@pytest.mark.parametrize(
    ("named", "problem", "words"),
    [
        ({"stats": "stats"}, MofqError, "has corpora of its own"),
        ({"where": Where(cluster="ray")}, ClusterError, "on one machine"),
        ({"experts": "expert"}, MofqError, "has to be known before"),
        ({"where": Where(dtype="float16")}, StatsError, "underflow"),
    ],
)
def test_what_does_not_go_with_corpora_is_refused(
    named: dict[str, Any], problem: type[MofqError], words: str, tmp_path: Path
) -> None:
    space = write_space(tmp_path / "some.yaml", PLAIN)
    with pytest.raises(problem, match=words):
        in_passing(demo_mixture_folder(), space, tmp_path, **named)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mofq.api.run_folder.disk_usage", lambda _: type("Usage", (), {"free": 10**6})
    )


@pytest.mark.long
def test_a_run_whose_disk_is_too_small_for_statistics_stores_none_and_says_so(
    small_disk: None, tmp_path: Path
) -> None:
    told: list[str] = []
    result = run(
        demo_model_folder(),
        tmp_path / "run",
        space=write_space(tmp_path / "some.yaml", FITTED),
        budget=Budget(max_bits=5.0),
        engine="vllm-cpu",
        sequences=2,
        windows=Windows(tokens=64, sequence_length=32),
        rivals=1,
        tell=told.append,
    )
    assert any("no statistics are stored" in one for one in told)
    assert not (tmp_path / "run" / "stats").exists()
    assert len(result.validations) == 2
    assert result.validations[result.preferred].enforced
    assert (tmp_path / "run" / "model" / "recipe.yaml").is_file()


@pytest.mark.long
def test_a_table_of_a_version_that_kept_fewer_inputs_goes_on(tmp_path: Path) -> None:
    """By default inputs of all sequences decide codes; its rows rest on those that were kept."""
    space = write_space(tmp_path / "space.yaml", PLAIN)
    before = replace(SAMPLES, inputs="kept")
    table = in_passing(demo_model_folder(), space, tmp_path, samples=before)
    rows = table.read_text("utf-8").splitlines()
    write_space(space, (*PLAIN, "int6.channel"))
    in_passing(demo_model_folder(), space, tmp_path)
    longer = table.read_text("utf-8").splitlines()
    assert longer[1 : len(rows)] == rows[1:]
    assert any('"int6.channel"' in line for line in longer[len(rows) :])
    with pytest.raises(MofqError, match="differs in stats"):
        in_passing(demo_model_folder(), space, tmp_path, samples=replace(SAMPLES, inputs="all"))
