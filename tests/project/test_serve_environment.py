"""The environment that serves exports, and the page of what it served."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from exported import make_recipe

from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.tensors import read_tensor

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


def test_layers_are_compared_by_the_names_that_vllm_has_for_them(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    monkeypatch.syspath_prepend(SERVE.parents[1])
    compare = import_module("scripts.serve.compare")
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = make_recipe(checkpoint, lambda *_: "bf16", lm_head=True)

    def product(x_TI: torch.Tensor, *names: str) -> torch.Tensor:
        weights = [read_tensor(checkpoint.tensors[f"{name}.weight"]).float() for name in names]
        return x_TI @ torch.cat(weights).T

    attention = "model.layers.0.self_attn"
    x_TI = torch.randn(4, checkpoint.config["hidden_size"])
    joined = product(x_TI, *(f"{attention}.{word}_proj" for word in "qkv"))
    records = {
        "blocks.0.attn.qkv_proj.x": x_TI,
        "blocks.0.attn.qkv_proj.y": joined,
        "lm_head.x": x_TI,
        "lm_head.y": product(x_TI, "lm_head") + 1,
    }
    names = {
        name: name.replace("model.layers.0.self_attn", "blocks.0.attn") for name in recipe.schemes
    }
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    report: dict[str, object] = {}
    wrong, left = compare.compare_layers(
        checkpoint, recipe, records, packed, names, "bfloat16", report
    )
    assert report["layers"] == 2
    assert wrong.startswith("layer lm_head: its output in vLLM is ")
    assert left == ("layers: vLLM never ran 11 of them, such as model.layers.0.mlp.down_proj")
