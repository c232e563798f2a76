"""The environment that serves exports, and the page of what it served."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

SERVE = Path(__file__).parents[2] / "scripts" / "serve"
#: What torchvision does while it is imported, whether or not its library was loaded.
TORCHVISION = """\
import torch

@torch.library.register_fake("torchvision::nms")
def fake_nms(dets, scores, iou_threshold):
    return dets.new_empty(0)
"""


@pytest.mark.long
def test_torchvision_is_imported_without_its_library(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text(TORCHVISION, encoding="utf-8")

    def run(*folders: Path) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join(map(str, (*folders, tmp_path)))
        return subprocess.run(
            [sys.executable, "-c", "import torchvision"],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )

    assert "torchvision::nms does not exist" in run().stderr
    assert run(SERVE).returncode == 0


def test_the_page_keeps_the_rows_of_types_that_were_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SERVE.parents[1])
    script = import_module("scripts.serve.structures")
    before = script.PAGE.read_text("utf-8")
    # Its text is changed in the script, which writes the page with any type that it tries.
    assert script.page(before, {}) == before
    row = "| `opt` | made anew |"
    after = script.page(before, {"opt": row})
    changed = set(after.splitlines()) ^ set(before.splitlines())
    assert row in changed
    assert len(changed) == 2
