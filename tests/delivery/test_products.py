"""Matrix products of tuning steps in bfloat16: which models can, and what they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrated import some_tokens
from conftest import TinyCheckpoint
from tiny_types import write_type

from mofq.delivery.tuning.products import copies_bytes, in_bfloat16
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.loading import load_model
from mofq.model.streaming.execution import model_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mofq.numbers.processor.processor_flags", lambda: "fpu avx512_bf16")


@pytest.mark.parametrize("name", ["dbrx", "xmod"])
def test_types_whose_code_mixes_no_dtypes_compute_in_float32(name: str, tmp_path: Path) -> None:
    model = load_model(write_type(name, tmp_path / "model"))
    with in_bfloat16(model, CPU):
        assert model(some_tokens(1, 8)).logits.dtype == torch.float32


def test_copies_of_weights_are_what_autograd_keeps(tiny: TinyCheckpoint) -> None:
    folder = tiny("llama")
    model, checkpoint = load_model(folder), open_checkpoint(str(folder))
    model.get_input_embeddings().weight.requires_grad_(True)
    kept: dict[int, torch.Tensor] = {}
    matrices = [one.shape for one in model.parameters() if one.ndim == 2]
    shapes = {*matrices, *(shape[::-1] for shape in matrices)}

    def keep(one: torch.Tensor) -> torch.Tensor:
        if one.dtype == torch.bfloat16 and one.shape in shapes:
            kept[one.data_ptr()] = one
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one), in_bfloat16(model, CPU):
        model(some_tokens(1, 8))
    counted = copies_bytes(checkpoint, dtype="float32", device="cpu")
    assert 0.5 * counted < sum(one.nbytes for one in kept.values()) <= counted


def test_where_steps_are_in_the_dtype_of_the_model_nothing_is_copied(
    tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny("llama")))
    assert copies_bytes(checkpoint, dtype="bfloat16", device="cpu") == 0
    assert copies_bytes(checkpoint, dtype="float32", device="cpu") == model_bytes(
        checkpoint, "bfloat16"
    )
    monkeypatch.setattr("mofq.numbers.processor.processor_flags", lambda: "fpu")
    assert copies_bytes(checkpoint, dtype="float32", device="cpu") == 0
