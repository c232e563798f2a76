"""Files of what modules returned: complete, or refused with what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mofq.exceptions import MofqError
from mofq.model.streaming.records import drop_tensors, read_content, write_tensors


def test_a_disk_that_is_full_is_named_when_tensors_are_written_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "returned"
    write_tensors(path, {"a": 1}, [torch.arange(4)])

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("mofq.model.streaming.records.os.replace", full)
    for act in (lambda: write_tensors(path, {}, []), lambda: drop_tensors(path)):
        with pytest.raises(MofqError, match=r"returned: cannot be written: .*Free some space"):
            act()
    assert [one.name for one in tmp_path.iterdir()] == ["returned"]
    content, (tensor_T,) = read_content(path)
    assert content == {"a": 1}
    assert torch.equal(tensor_T, torch.arange(4))
