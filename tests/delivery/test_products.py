"""Matrix products of tuning steps in bfloat16: which models can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrated import some_tokens
from tiny_types import write_type

from mofq.delivery.tuning.products import in_bfloat16
from mofq.model.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mofq.numbers.processor.processor_flags", lambda: "fpu avx512_bf16")


@pytest.mark.parametrize("name", ["dbrx", "xmod"])
def test_types_whose_code_mixes_no_dtypes_compute_in_float32(name: str, tmp_path: Path) -> None:
    model = load_model(write_type(name, tmp_path / "model"))
    with in_bfloat16(model, CPU):
        assert model(some_tokens(1, 8)).logits.dtype == torch.float32
