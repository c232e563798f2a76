"""What `mofq search`, `diff`, `devices` and `advise` show of a decision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import DEMO, Measured, ok, refused
from explore_tables import write_explore_table

from mofq.api.formatting import with_interval
from mofq.decision.model_error import row_error
from mofq.decision.recipe import load_recipe
from mofq.engines.devices import DEVICE_MODELS

GROUP, LAYER = "layers.0.mlp.down", "model.layers.0.mlp.down_proj"
TIMED = ("--device-model", "h100", "--workload", "decode:batch=8,context=128")


def test_a_layer_is_explained_and_a_time_is_told(measured: Measured, tmp_path: Path) -> None:
    search = ("search", measured.table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    asked = (*search, *TIMED, "--explain", LAYER, "--explain", GROUP)
    content = ok(*asked, "--json").json
    assert content["seconds"] > 0
    first, second = content["explained"]
    assert first == second
    assert (first["group"], first["unit"]) == (GROUP, "kl_nats_per_token")
    assert set(first["prices"]) == {"max_bits"}
    chosen = [one for one in first["alternatives"] if one["difference"] is None]
    assert [one["scheme"] for one in chosen] == [first["chosen"]]
    assert all(
        one["difference"]["stderr"] > 0 for one in first["alternatives"] if one not in chosen
    )
    for one in first["alternatives"]:
        wide = 2 * row_error().spread * one["error"]
        assert one["low"] <= one["error"] - wide + 1e-12
        assert one["error"] + wide - 1e-12 <= one["high"]
    assert not first["has_flips"]
    shown = ok(*asked).out
    dearest = max(first["alternatives"], key=lambda one: one["error"])
    assert with_interval(dearest["error"], dearest["low"], dearest["high"]) in shown
    assert "error, 95 %" in shown
    assert "◀ chosen" in shown
    assert "--max-bits: 10 kB more would save" in shown  # of a checkpoint of 1.3 MB
    assert "decode:batch=8,context=128 on h100, at least" in shown
    assert "Did you mean" in refused(*search, "--explain", "model.layers.0.mlp.down")


def test_rows_larger_than_any_that_was_compared_with_a_measurement_are_told(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("search", measured.table, "--max-bits", "5", "--explain", LAYER)
    search = (*asked, "-o", tmp_path / "recipe.yaml")
    said = "more than any single layer was compared with a measurement at"
    assert said not in ok(*search).err
    known = replace(row_error(), largest=1e-9)
    monkeypatch.setattr("mofq.decision.model_error.row_error", lambda: known)
    assert f"Errors above 1e-09 are {said}" in ok(*search).err


def test_a_budget_of_time_is_kept_and_named(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    search = ("search", measured.table, "-o", path)
    free = ok(*search, *TIMED, "--json").json["seconds"]
    content = ok(*search, *TIMED, "--max-time", f"{free * 0.9e6:.6f}us", "--json").json
    assert content["seconds"] <= 0.9 * free
    loose = ok(*search, *TIMED, "--max-bits", "5", "--max-time", "1s").err
    assert "--max-time does not bind: " in loose
    assert "of 1000 ms." in loose
    assert "does not bind" not in ok(*search, *TIMED, "--max-time", f"{free * 0.9e6:.6f}us").err
    assert content["prices"]["max_time"] > 0
    text = path.read_text("utf-8")
    assert "device: h100" in text
    assert 'workload: "decode:batch=8,context=128"' in text
    assert "the smallest possible is" in refused(*search, *TIMED, "--max-time", "0.01us")
    for missing in (TIMED[:2], TIMED[2:], ("--max-time", "1ms")):
        assert "give --device-model" in refused(*search, *missing)
    assert "Did you mean one of 'h100', 'h100-pcie'?" in refused(
        *search, "--device-model", "h10", *TIMED[2:]
    )


def test_a_difference_is_priced_by_its_table(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    ok("search", measured.table, "--max-bits", "4.5", "-o", path)
    content = ok("diff", measured.recipe, path, "--table", measured.table, "--json").json
    assert content["unit"] == "kl_nats_per_token"
    assert set(content["groups"]) == set(content["changed"])
    first, second = (load_recipe(one).result.error for one in (measured.recipe, path))
    assert first is not None
    assert second is not None
    assert content["difference"]["error"] == pytest.approx(second - first)
    # Beside what each group loses, what they do together: little at these sizes.
    total = sum(one["error"] for one in content["groups"].values())
    assert content["difference"]["error"] == pytest.approx(total, rel=0.05)
    assert "all together" in ok("diff", measured.recipe, path, "--table", measured.table).out


def test_a_difference_says_where_the_figures_of_two_recipes_do_not_compare(tmp_path: Path) -> None:
    table = write_explore_table(tmp_path / "table.jsonl", corpora=("en", "pt"))
    asked = {
        "mean": (),
        "again": (),
        "english": ("--corpus-weights", "en=1,pt=0"),
        "worst": ("--objective", "worst-corpus"),
    }
    for name, words in asked.items():
        ok("search", table, "--max-bits", "5", *words, "-o", tmp_path / f"{name}.yaml")
    mean, again, english, worst = (tmp_path / f"{name}.yaml" for name in asked)
    assert "do not compare" not in ok("diff", mean, again).err
    told = " ".join(ok("diff", english, worst).err.split())
    assert "that of english.yaml is the mean of the corpora, en=1,pt=0; that of worst" in told
    assert told.endswith("worst.yaml is the worst corpus.")
    # A table prices both alike, so that they do, and their difference is what is said.
    priced = ok("diff", english, worst, "--table", table)
    assert "mean of en=1,pt=1" in priced.out
    assert "do not compare" not in priced.err
    content = ok("diff", english, worst, "--table", table, "--json").json
    first, second = content["kl_nats_per_token"]
    # Differences are of the expansion, predictions are corrected by a factor near 1.
    assert second - first == pytest.approx(content["difference"]["error"], rel=0.02)
    own = [load_recipe(one).kl_nats_per_token for one in (english, worst)]
    assert first != own[0]
    assert second != own[1]


def test_devices_and_advice_are_listed_with_their_sources(tmp_path: Path) -> None:
    assert set(ok("devices", "--json").json) == set(DEVICE_MODELS)
    assert "H100 SXM data sheet" in ok("devices").err
    advise = ("advise", DEMO, "--device-model", "h100", "--deployment", "asynchronous")
    content = ok(*advise, "--json").json
    assert content["space"] == "w8a8"
    assert content["commands"][0].startswith(f"mofq calibrate {DEMO}")
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int8.channel+int8.token", "-o", recipe)
    assert content["budget"][0] == "--max-bits"
    assert load_recipe(recipe).bits_per_weight <= float(content["budget"][1])
    shown = ok(*advise).out
    assert "arXiv:2411.02355" in shown
    assert "mofq measure" in shown


def test_a_search_for_no_engine_says_which_engines_serve_its_recipe(
    measured: Measured, tmp_path: Path
) -> None:
    space, table = tmp_path / "space.yaml", tmp_path / "table.jsonl"
    search = ("search", measured.table, "-o", tmp_path / "recipe.yaml")
    served = ok(*search, "--max-bits", "8.2", "--json").json
    assert "int8.channel" in served["schemes"]
    assert "vllm-hopper" in served["served_by"]
    assert "vllm-cpu" not in served["served_by"]  # it has no kernel for INT8 weights alone
    shown = ok(*search, "--max-bits", "8.2").err
    assert f"Served as measured by: {', '.join(served['served_by'])}." in shown
    assert "Served as measured" not in ok(*search, "--max-bits", "16").err
    space.write_text("version: 1\nschemes: [fp4_e2m1.g32]\noffer_unquantized: false\n")
    ok("measure", DEMO, "--space", space, "-o", table)
    search = ("search", table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    assert "No engine serves all of these schemes" in ok(*search).err
    assert ok(*search, "--json").json["served_by"] == []


def test_a_recipe_that_takes_the_place_of_another_says_so(
    measured: Measured, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    replaces = f"{path}: replaces what was in this file."
    search = ("search", measured.table, "-o", path)
    assert replaces not in ok(*search, "--max-bits", "5").err
    assert replaces not in ok(*search, "--max-bits", "5").err  # the same again
    assert replaces in ok(*search, "--max-bits", "6").err
    assert replaces in ok("recipe", "uniform", DEMO, "int4.g32", "-o", path).err


@pytest.mark.long
def test_a_text_that_a_recipe_was_made_with_is_told(measured: Measured, tmp_path: Path) -> None:
    windows = ("--tokens", "128", "--sequence-length", "64")
    text = ("--text", "demo-en-calibration", *windows)
    validation = tmp_path / "validation.json"
    shown = ok("validate", DEMO, measured.recipe, *text, "-o", validation).err
    assert "The recipe was calibrated on this very text, which flatters it" in shown
    assert '"text_use": "calibrated"' in validation.read_text("utf-8")
    search = ("search", measured.table, "--max-bits", "5", "-o", tmp_path / "refined.yaml")
    refined = ok(*search, "--refine", "1", "--model", DEMO, *text).err
    assert "demo-en-calibration: was calibrated on too" in refined
    assert (
        "flatters" not in ok("validate", DEMO, measured.recipe, "--text", "demo-en", *windows).err
    )
    refine = ("--refine", "1", "--model", DEMO, "--text", "demo-en", *windows)
    ok(*search, *refine)
    shown = ok("validate", DEMO, tmp_path / "refined.yaml", "--text", "demo-en", *windows).err
    assert "The recipe was searched on this very text" in shown


def test_an_export_for_the_recipes_own_devices_is_what_comes_next(
    measured: Measured, tmp_path: Path
) -> None:
    path, folder = tmp_path / "recipe.yaml", tmp_path / "exported"
    ok("search", measured.table, "--engine", "vllm-hopper:tp=2", "--max-bits", "9", "-o", path)
    windows = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")
    shown = ok("validate", DEMO, path, *windows).err
    assert f"Next: mofq export {DEMO} {path} -o FOLDER" in shown
    assert "--tensor-parallel-size 2" in ok("export", DEMO, path, "-o", folder).out


def test_no_export_comes_next_where_the_budget_of_kl_was_not_kept(
    measured: Measured, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    ok("search", measured.table, "--max-kl", "0.01", "-o", path)
    windows = ("--text", "demo-pt", "--tokens", "128", "--sequence-length", "64")
    shown = ok("validate", DEMO, path, *windows)
    assert "NOT kept" in shown.out
    assert "Next: mofq export" not in shown.err
    assert "Search again: with a smaller --max-kl" in shown.err


def test_times_do_not_follow_from_peaks_that_are_not_stated(
    measured: Measured, tmp_path: Path
) -> None:
    search = ("search", measured.table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    workload = ("--workload", "decode:batch=8,context=128")
    message = refused(*search, "--device-model", "dgx-spark", *workload)
    assert "states no peak of bf16, int8, fp8" in message
    assert "a YAML file" in message
    assert "not stated" in ok("devices").out


def test_a_difference_says_how_its_corpora_count(tmp_path: Path) -> None:
    table = write_explore_table(tmp_path / "table.jsonl", decoder_layers=1, corpora=("en", "pt"))
    recipes = [tmp_path / f"{bits}.yaml" for bits in (5, 8)]
    for bits, path in zip((5, 8), recipes, strict=True):
        weighed = ("--max-bits", str(bits), "--corpus-weights", "en=3,pt=1")
        ok("search", table, *weighed, "-o", path)
    content = ok("diff", *recipes, "--table", table, "--json").json
    assert (content["objective"], content["corpus_weights"]) == ("mean", {"en": 3.0, "pt": 1.0})
    shown = ok("diff", *recipes, "--table", table, "--corpus-weights", "en=1,pt=0")
    assert "errors in kl_nats_per_token, mean of en=1,pt=0" in shown.out
    assert "Differences are of the second-order expansion" in shown.err
    assert f"scatters by another {row_error().spread:.0%} of their error" in shown.err
    message = refused("diff", *recipes, "--corpus-weights", "en=1,pt=0")
    assert "--corpus-weights is of a cost; give --table too." in message
