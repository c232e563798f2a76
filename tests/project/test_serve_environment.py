"""What the environment that serves exports needs beside its packages."""

from __future__ import annotations

import os
import subprocess
import sys
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
