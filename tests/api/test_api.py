"""The flow from Python: the same files and figures as the commands'."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import DEMO, Measured, ok

import mofq as package
from mofq import api
from mofq.api import Budget, Choices, Method, Samples, Windows
from mofq.decision.recipe import load_recipe
from mofq.evidence.corpora import BUNDLED_TEXT
from mofq.exceptions import BudgetError, MofqError

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/how-to/python.md"


def test_the_flow_from_python_writes_what_the_commands_write(
    measured: Measured, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stages: list[str] = []
    reports: dict[str, Any] = {"progress": lambda stage, done, total: stages.append(stage)}
    stats = api.calibrate(
        DEMO,
        {"en": "demo-en-calibration"},
        tmp_path / "stats",
        samples=Samples(sequences=4, sequence_length=64),
        **reports,
    )
    space, table = measured.folder / "space.yaml", tmp_path / "table.jsonl"
    found = api.measure(DEMO, space, table, stats=stats.folder, **reports)
    assert table.read_bytes() == measured.table.read_bytes()
    recipe = tmp_path / "recipe.yaml"
    decided = api.search(found.table, recipe, budget=Budget(max_bits=5))
    assert decided.recipe == load_recipe(measured.recipe)
    assert recipe.read_bytes() == measured.recipe.read_bytes()
    windows = Windows(tokens=128, sequence_length=64)
    done = api.validate(DEMO, decided.recipe, "demo-en", windows=windows, **reports)
    assert done.worst.enforced is True
    exported = api.export(DEMO, decided.recipe, tmp_path / "folder", **reports)
    assert exported.checkpoint is not None
    assert exported.checkpoint.group_bytes == decided.recipe.result.bytes
    assert (exported.serve_command or "").startswith("vllm serve ")
    assert {"calibrate", "measure", "original", "export"} <= set(stages)
    assert capfd.readouterr() == ("", "")


def test_statistics_are_there_already_wherever_the_text_lies(tmp_path: Path) -> None:
    def calibrate(name: str) -> api.CalibrateResult:
        path = tmp_path / name
        shutil.copy(BUNDLED_TEXT["demo-en-calibration"], path)
        samples = Samples(sequences=1, sequence_length=16)
        return api.calibrate(DEMO, {"en": str(path)}, tmp_path / "stats", samples=samples)

    assert not calibrate("text.txt").was_there
    assert calibrate("moved.txt").was_there


def test_a_stage_tells_what_a_user_should_know_and_prints_nothing(
    measured: Measured, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    older = tmp_path / "older.jsonl"
    older.write_bytes(re.sub(rb'"numerics":\d+,', b"", measured.table.read_bytes()))
    api.search(older, budget=Budget(max_bits=6), tell=told.append)
    assert len(told) == 1
    assert "measured before numerics were noted" in told[0]
    api.search(older, budget=Budget(max_bits=6))
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_a_result_is_what_the_command_prints_as_json(measured: Measured, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    printed = ok("search", measured.table, "--max-bits", "5", "-o", recipe, "--json").json
    content = api.search(measured.table, recipe, budget=Budget(max_bits=5)).to_json()
    assert content | {"elapsed_seconds": 0} == printed | {"elapsed_seconds": 0}
    printed = ok("frontier", measured.table, "--json").json
    assert api.frontier(measured.table).to_json() | {"seconds": 0} == printed | {"seconds": 0}
    printed = ok("inspect", DEMO, "--engine", "vllm-cpu", "--json").json
    assert api.inspect(DEMO, engine="vllm-cpu").to_json() == printed


def test_the_frontier_knows_the_engine(measured: Measured) -> None:
    every = api.frontier(measured.table).points
    served = api.frontier(measured.table, choices=Choices(engine="vllm-cpu")).points
    # INT8 alone is no kernel of the CPU.
    assert [point.bytes for point in served] != [point.bytes for point in every]


def test_a_size_is_a_number_or_a_text(measured: Measured) -> None:
    text = api.search(measured.table, budget=Budget(max_size="1.1MB"))
    for size in (1_100_000, 1.1e6):
        number = api.search(measured.table, budget=Budget(max_size=size))
        assert text.recipe == number.recipe
    with pytest.raises(BudgetError, match="inf"):
        api.search(measured.table, budget=Budget(max_size=float("inf")))


@pytest.mark.long
def test_the_blocks_of_the_page_on_python_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(BUNDLED_TEXT["demo-en-calibration"], "calibration.txt")
    shutil.copy(BUNDLED_TEXT["demo-en"], "heldout.txt")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    for block in blocks:
        here = block.replace('"Qwen/Qwen3-0.6B"', repr(DEMO)).replace('"serving"', '"w8a8"')
        exec(compile(here, str(PAGE), "exec"), names)
    assert Path("model-quantized/config.json").exists()
    assert Path("frontiers.png").exists()


def test_the_page_on_python_names_every_function_and_group() -> None:
    page = PAGE.read_text("utf-8")
    for name in api.__all__:
        if not name.endswith(("Result", "Point")):
            assert f"`{name}(" in page or f"`{name}`" in page, name
        value = getattr(api, name)
        if is_dataclass(value) and not name.endswith(("Result", "Point")):
            for field in fields(value):
                assert f"`{field.name}`" in page, f"{name}.{field.name}"


def test_the_stages_of_the_flow_are_names_of_the_package() -> None:
    for name in ("inspect", "calibrate", "measure", "search", "frontier", "validate", "export"):
        assert getattr(package, name) is getattr(api, name)


def test_an_impossible_budget_is_the_error_that_the_command_prints(measured: Measured) -> None:
    with pytest.raises(BudgetError, match="the smallest possible is"):
        api.search(measured.table, budget=Budget(max_bits=2))


def test_a_study_needs_a_place_for_its_trials(measured: Measured) -> None:
    on_model = api.OnModel(model=DEMO, text="demo-en")
    with pytest.raises(MofqError, match="give output or storage"):
        api.search(measured.table, method=Method(solver="optuna"), on_model=on_model)


def test_searching_from_python_needs_no_torch(measured: Measured) -> None:
    code = (
        f"import mofq; mofq.search({str(measured.table)!r}, budget=mofq.Budget(max_bits=5)); "
        "import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_advice_can_be_pickled() -> None:
    advice = api.advise(device_model="h100", deployment="synchronous")
    assert pickle.loads(pickle.dumps(advice)) == advice
