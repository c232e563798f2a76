"""What `mofq search`, `diff`, `devices` and `advise` show of a decision."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import DEMO, Measured, ok, refused

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
    shown = ok(*asked).out
    assert "◀ chosen" in shown
    assert "1 MB more would save" in shown
    assert "decode:batch=8,context=128 on h100, at least" in shown
    assert "Did you mean" in refused(*search, "--explain", "model.layers.0.mlp.down")


def test_a_budget_of_time_is_kept_and_named(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    search = ("search", measured.table, "-o", path)
    free = ok(*search, *TIMED, "--json").json["seconds"]
    content = ok(*search, *TIMED, "--max-time", f"{free * 0.9e6:.6f}us", "--json").json
    assert content["seconds"] <= 0.9 * free
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
    total = sum(one["error"] for one in content["groups"].values())
    assert content["difference"]["error"] == pytest.approx(total)
    assert "all together" in ok("diff", measured.recipe, path, "--table", measured.table).out


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
