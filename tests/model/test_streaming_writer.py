"""Writing behind a GPU, on one that is not there."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from pretend_gpu import pretend_gpu

from mofq.exceptions import MofqError
from mofq.model.streaming.records import read_content
from mofq.model.streaming.writer import Writer


def test_files_have_what_tensors_were_and_nothing_of_the_device_is_waited_for(
    tmp_path: Path,
) -> None:
    with pretend_gpu() as gpu, Writer(torch.device("cuda")) as writer:
        x = torch.zeros(4).to("cuda")
        gpu.waits.clear()
        for number in range(10):
            x += 1
            writer.write(tmp_path / str(number), number, [x])
        assert gpu.waits == []
        writer.wait()
    for number in range(10):
        content, (found,) = read_content(tmp_path / str(number))
        assert content == number
        assert found.tolist() == [number + 1.0] * 4


def test_on_a_cpu_a_file_is_there_at_once(tmp_path: Path) -> None:
    with Writer(torch.device("cpu")) as writer:
        writer.write(tmp_path / "a", None, [torch.ones(2)])
        assert read_content(tmp_path / "a")[1][0].tolist() == [1.0, 1.0]


def test_a_file_that_cannot_be_written_is_an_error_when_it_is_waited_for(tmp_path: Path) -> None:
    with pretend_gpu(), Writer(torch.device("cuda")) as writer:
        writer.write(tmp_path / "no such folder" / "a", None, [torch.ones(2).to("cuda")])
        with pytest.raises(MofqError, match="cannot be written"):
            writer.wait()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_behind_a_file_that_cannot_be_written_there_is_none(device: str, tmp_path: Path) -> None:
    target = torch.device(device)
    with pretend_gpu(), Writer(target) as writer:

        def write(name: str) -> None:
            writer.write(tmp_path / name, None, [torch.ones(2).to(target)])

        def write_all() -> None:
            for name in ("before", "no such folder/data", "done"):
                write(name)
            writer.wait()

        for attempt in (write_all, partial(write, "done"), writer.wait):
            with pytest.raises(MofqError, match="no such folder"):
                attempt()
    assert [one.name for one in tmp_path.iterdir()] == ["before"]
