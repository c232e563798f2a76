"""The check of a GPU, where there is none: on the CPU, and what it would find there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from pretend_gpu import pretend_gpu

from mofq.numbers.quantize import scales
from scripts.quality import gpu_check
from scripts.quality.gpu import fitting, measure, numbers, report
from scripts.quality.gpu.report import Report

ROOT = Path(__file__).parents[2]


@pytest.mark.long(first=True)
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    subprocess.run(
        ["bash", "scripts/quality/gpu_check.sh", "--device", "cpu", "--small", "--json", found],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    content = json.loads(found.read_text("utf-8"))
    assert list(content["parts"]) == list(gpu_check.PARTS)
    assert content["versions"]["torch"]
    for part in content["parts"].values():
        assert part["state"] == "passed"
        assert part["checks"]
    assert content["parts"]["measure"]["figures"]["8B's shapes: to reading"]["aim"] == "at most 3"


def test_the_parts_fit_into_eight_minutes() -> None:
    assert sum(part.limit_s for part in gpu_check.PARTS.values()) <= gpu_check._TOTAL_S < 480


def end_of(part: str, tmp_path: Path, code: str, *, limit_s: float = 30.0) -> str:
    """The state of a part that is some code, run as a part is."""
    script = tmp_path / "part.py"
    script.write_text(f"import json, sys, time\npath = sys.argv[-3]\n{code}\n")
    options = gpu_check.argparse.Namespace(device="cpu", small=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "__file__", str(script))
        found = gpu_check.start_part(part, tmp_path, options, limit_s)
    state: str = found["state"]
    return f"{state}, {len(found['checks'])}"


@pytest.mark.long
def test_a_part_that_is_slow_or_ends_by_itself_stops_no_other(tmp_path: Path) -> None:
    held = '{"name": "a", "holds": True, "detail": ""}'
    write = f"json.dump({{'checks': [{held}], 'figures': {{}}, 'complete': %s}}, open(path, 'w'))"
    assert end_of("numbers", tmp_path, write % True) == "passed, 1"
    assert end_of("numbers", tmp_path, f"{write % False}; sys.exit(3)") == "ended with 3, 1"
    slow = f"{write % False}; open(path).close(); time.sleep(60)"
    assert end_of("numbers", tmp_path, slow, limit_s=1.0) == "out of time, 1"


#: Parts that end in all ways, without torch, which takes seconds to import in each of them.
PLANTED = """
import os, signal, sys, time, types
from scripts.quality import gpu_check

torch = types.ModuleType("torch")
torch.device = lambda name: types.SimpleNamespace(type=name)
torch.version = types.SimpleNamespace(cuda=None)
sys.modules["torch"] = torch

def run(report):
    report.check("the first", True)
    report.figure("a figure", 1.0, "s")
    if name == "applier":
        raise ValueError("planted")
    if name == "models":
        time.sleep(600)
    if name == "measure":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "streamed":
        report.check("the second", False, "planted detail")

name = sys.argv[sys.argv.index("--run") + 1]
if name == "fitting":
    sys.exit("planted: what it needs cannot be imported")
module = types.ModuleType(name)
module.run = run
sys.modules[f"scripts.quality.gpu.{name}"] = module
gpu_check.main()
"""
STATES = {
    "numbers": ("passed", 1, 1),
    "applier": ("ended with 1", 1, 2),
    "models": ("out of time", 1, 1),
    "measure": ("ended with -9", 1, 1),
    "streamed": ("failed", 1, 2),
    "fitting": ("ended with 1", 0, 0),
}


@pytest.mark.long
def test_table_and_file_are_whole_when_parts_crash_fail_and_take_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, out = tmp_path / "planted.py", tmp_path / "found.json"
    script.write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    limits = {
        name: gpu_check.Part("", 2.0 if name == "models" else 60.0) for name in gpu_check.PARTS
    }
    monkeypatch.setattr(gpu_check, "PARTS", limits)
    monkeypatch.setattr(gpu_check, "_LEAST_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--json", str(out)])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1
    found = json.loads(out.read_text("utf-8"))
    assert found["versions"]["torch"]
    assert found["machine"]["device"] == "cpu"
    table = capsys.readouterr().out
    assert list(found["parts"]) == list(STATES)
    for name, (state, holding, checks) in STATES.items():
        part = found["parts"][name]
        assert part.keys() == {"checks", "figures", "state", "seconds", "limit_s"}
        assert part["state"] == state
        assert len(part["checks"]) == checks
        assert sum(one["holds"] for one in part["checks"]) == holding
        assert len(part["figures"]) == min(1, checks)
        assert any(
            line.startswith(f"{name} ") and state in line and f"{holding} of {checks}" in line
            for line in table.splitlines()
        )
    assert "ValueError: planted" in table
    assert "FAILED the second: planted detail" in table


def checks_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    monkeypatch.setattr(report, "machine", lambda device: {})
    monkeypatch.setattr(numbers, "FEW", ("int8.channel", "int4.g32.asym", "nvfp4"))
    monkeypatch.setattr(numbers, "INPUTS", ("int8.token", "nvfp4"))
    monkeypatch.setattr(numbers, "FITTED", ("int4.g32@nats",))
    path = tmp_path / "numbers.json"
    with pretend_gpu():
        numbers.check_eager(Report(path, device="cuda", small=True))
    return {one["name"]: one["holds"] for one in json.loads(path.read_text("utf-8"))["checks"]}


@pytest.mark.long
def test_the_numbers_are_made_on_one_device_and_are_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checks_on_a_gpu(tmp_path, monkeypatch)
    assert len(found) == 8
    assert all(found.values())


@pytest.mark.long
def test_a_division_by_a_plain_number_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scales, "divide", lambda x, by: x / by)
    found = checks_on_a_gpu(tmp_path, monkeypatch)
    assert not all(found.values())
    assert any(name.startswith("eager int8.channel.s-f32, ") for name in found)


@pytest.mark.long
def test_a_table_is_measured_on_one_device(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With statistics, inputs that are rounded, and rounding that is fitted."""
    monkeypatch.setattr(report, "machine", lambda device: {})
    monkeypatch.setattr(measure, "demo_model_folder", lambda: tiny("llama", num_hidden_layers=1))
    space = "version: 1\nschemes: [bf16, int4.g32, int8.channel+int8.token, int4.channel~gptq]\n"
    monkeypatch.setattr(measure, "SPACE", space)
    path = tmp_path / "measure.json"
    with pretend_gpu():
        measure.check_table(Report(path, device="cuda", small=True), tmp_path)
    checks = json.loads(path.read_text("utf-8"))["checks"]
    assert len(checks) == 4
    assert all(one["holds"] for one in checks)


@pytest.mark.long
def test_descent_stays_on_one_device_and_has_the_bits_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "machine", lambda device: {})
    path = tmp_path / "fitting.json"
    with pretend_gpu():
        fitting.check_descent(Report(path, device="cuda", small=True), 128, 64)
    (check,) = json.loads(path.read_text("utf-8"))["checks"]
    assert check["holds"]
