"""The flow from Python: the same files and figures as the commands'."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import DEMO, Measured, ok

from mofq import api
from mofq.decision.recipe import load_recipe
from mofq.exceptions import BudgetError


def test_the_flow_from_python_writes_what_the_commands_write(
    measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora = {"en": "demo-en-calibration"}
    stats = api.calibrate(DEMO, corpora, tmp_path / "stats", sequences=4, sequence_length=64)
    table = api.measure(DEMO, measured.folder / "space.yaml", tmp_path / "table.jsonl", stats=stats)
    assert (tmp_path / "table.jsonl").read_bytes() == measured.table.read_bytes()
    recipe = api.search(table, max_bits=5, output=tmp_path / "recipe.yaml")
    assert recipe == load_recipe(measured.recipe)
    assert (tmp_path / "recipe.yaml").read_bytes() == measured.recipe.read_bytes()
    done = api.validate(DEMO, recipe, "demo-en", tokens=128, sequence_length=64)
    assert done.enforced is True
    exported = api.export(DEMO, recipe, tmp_path / "folder", engine=None)
    assert exported.group_bytes == recipe.result["bytes"]
    assert exported.serve_command.startswith("vllm serve ")
    assert capsys.readouterr().out == ""


def test_the_curve_is_that_of_frontier_and_knows_the_engine(measured: Measured) -> None:
    whole = ok("frontier", measured.table, "--json").json["points"]
    curve = api.curve(measured.table)
    assert curve.unit == "kl_nats_per_token"
    assert [point.error for point in curve.points] == [point["error"] for point in whole]
    served = api.curve(measured.table, engine="vllm-cpu")
    named = ok("frontier", measured.table, "--engine", "vllm-cpu", "--json").json["points"]
    assert [point.bytes for point in served.points] == [point["bytes"] for point in named]
    # INT8 alone is no kernel of the CPU.
    assert [point.bytes for point in served.points] != [point.bytes for point in curve.points]


def test_the_page_on_python_calls_what_there_is() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/how-to/python.md").read_text("utf-8")
    called = re.findall(r"\bapi\.(\w+)\(([^)]*)\)", page)
    assert {name for name, _ in called} == set(api.__all__)
    for name, arguments in called:
        known = inspect.signature(getattr(api, name)).parameters
        assert set(re.findall(r"(\w+)=", arguments)) <= set(known), name


def test_an_impossible_budget_is_the_error_that_the_command_prints(measured: Measured) -> None:
    with pytest.raises(BudgetError, match="the smallest possible is"):
        api.search(measured.table, max_bits=2)


def test_searching_from_python_needs_no_torch(measured: Measured) -> None:
    code = (
        f"from mofq import api; api.search({str(measured.table)!r}, max_bits=5); "
        "import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
