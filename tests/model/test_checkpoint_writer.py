"""Shards as they are written, against the safetensors library and transformers."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TinyCheckpoint
from safetensors.torch import load_file, save_file
from test_checkpoint_tensors import random_bytes, same_bytes

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import open_checkpoint, read_header
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.checkpoint.writer import PlannedTensor, ShardWriter

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def plan_of(tensors: dict[str, torch.Tensor]) -> dict[str, PlannedTensor]:
    return {
        name: PlannedTensor(NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """As on a disk that is full: writing past a size fails with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_one_file_is_byte_for_byte_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {
        f"layer.{number}.{name}·ü": random_bytes(dtype, 3, number)
        for number in range(3)
        for name, dtype in TORCH_DTYPES.items()
    }
    tensors["scalar"] = torch.tensor(1.5)
    with ShardWriter(tmp_path, plan_of(tensors)) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.add(name, tensor)
    save_file(tensors, tmp_path / "expected", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("length", range(1, 9))
def test_data_begins_at_a_multiple_of_eight_bytes(tmp_path: Path, length: int) -> None:
    with ShardWriter(tmp_path, {"x" * length: PlannedTensor("F64", (1,))}) as writer:
        writer.add("x" * length, torch.ones(1, dtype=torch.float64))
    assert read_header(tmp_path / "model.safetensors")["x" * length].start % 8 == 0


def test_shards_are_loaded_by_transformers_and_by_ourselves(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(str(tiny_llama))
    plan = {name: PlannedTensor(info.dtype, info.shape) for name, info in source.tensors.items()}
    with ShardWriter(tmp_path, plan, shard_bytes=100_000) as writer:
        for name, info in source.tensors.items():
            writer.add(name, read_tensor(info))
    shutil.copy(tiny_llama / "config.json", tmp_path)
    written = open_checkpoint(str(tmp_path))
    assert written.index_sha256 == source.index_sha256
    assert len({info.file for info in written.tensors.values()}) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_no_shard_exceeds_its_size_and_the_index_sums_up(tmp_path: Path) -> None:
    small = {f"t{number}": torch.full((100,), float(number)) for number in range(10)}
    tensors = {"large": torch.zeros(1000), **small}
    with ShardWriter(tmp_path, plan_of(tensors), shard_bytes=1000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]
    assert sorted(path.name for path in tmp_path.glob("model-*")) == shards
    assert index["metadata"]["total_size"] == 400 * 10 + 4000
    for shard in shards:
        found = load_file(tmp_path / shard)
        assert found.keys() == {
            name for name, where in index["weight_map"].items() if where == shard
        }
        assert sum(t.nbytes for t in found.values()) <= 1000 or list(found) == ["large"]
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())


def test_rows_come_in_blocks_of_any_size_and_between_those_of_other_tensors(tmp_path: Path) -> None:
    a, b = random_bytes(torch.bfloat16, 10, 3), random_bytes(torch.float8_e4m3fn, 5, 2, 2)
    with ShardWriter(tmp_path, plan_of({"a": a, "b": b})) as writer:
        writer.add_rows("a", a[:4])
        writer.add_rows("b", b[:1])
        writer.add_rows("a", a[4:4])
        writer.add_rows("a", a[4:])
        writer.add_rows("b", b[1:])
    written = load_file(tmp_path / "model.safetensors")
    assert same_bytes(written["a"], a)
    assert same_bytes(written["b"], b)


def test_a_view_that_is_not_contiguous_is_written_in_its_own_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    with ShardWriter(tmp_path, plan_of({"x": tensor})) as writer:
        writer.add("x", tensor)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], tensor)


def test_stored_tensors_are_copied_byte_for_byte(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    source = read_header(tiny("llama") / "model.safetensors")
    plan = {name: PlannedTensor(info.dtype, info.shape) for name, info in source.items()}
    with ShardWriter(tmp_path, plan) as writer:
        for name, info in source.items():
            writer.copy(name, info)
    left = load_file(tiny("llama") / "model.safetensors")
    right = load_file(tmp_path / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_no_final_name_exists_before_everything_is_written(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(10) for name in "abc"}
    with ShardWriter(tmp_path, plan_of(tensors), shard_bytes=40) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
            assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("stopped", ["while it wrote", "while it noted", "while it renamed"])
def test_a_writer_goes_on_with_what_a_killed_one_had_settled(stopped: str, tmp_path: Path) -> None:
    tensors = {name: torch.arange(10.0) + seed for seed, name in enumerate("abcd")}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    with ShardWriter(tmp_path / "whole", plan_of(tensors), shard_bytes=80) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)

    folder, journal = tmp_path / "killed", tmp_path / "journal"

    def begin() -> ShardWriter:
        return ShardWriter(folder, plan_of(tensors), shard_bytes=80, journal=journal)

    killed = begin()  # and never left
    killed.add("a", tensors["a"])
    killed.add("c", tensors["c"])
    assert not killed.is_settled("a and c")
    killed.settle("a and c")
    killed.add("b", tensors["b"] + 1)  # as of a block that was written in part
    if stopped == "while it noted":
        with journal.open("ab") as file:
            file.write(b'["b", ["b"')
    if stopped == "while it renamed":
        first = "model-00001-of-00002.safetensors"
        (folder / f"{first}.partial").rename(folder / first)
    with begin() as writer:
        assert [writer.is_settled(part) for part in ("a and c", "b")] == [True, False]
        writer.add("b", tensors["b"])
        writer.settle("b")
        writer.add("d", tensors["d"])
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [json.loads(line)[0] for line in journal.read_text().splitlines()] == ["a and c", "b"]


def test_a_writer_begins_anew_where_a_shard_is_not_what_was_noted(tmp_path: Path) -> None:
    tensors = {name: torch.arange(10.0) + seed for seed, name in enumerate("ab")}
    journal = tmp_path / "journal"
    killed = ShardWriter(tmp_path, plan_of(tensors), shard_bytes=40, journal=journal)
    killed.add("a", tensors["a"])
    killed.settle("a")
    (tmp_path / "model-00002-of-00002.safetensors.partial").unlink()
    with ShardWriter(tmp_path, plan_of(tensors), shard_bytes=40, journal=journal) as writer:
        assert not writer.is_settled("a")
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def write_then_stop(folder: Path) -> None:
    with ShardWriter(folder, {"a": PlannedTensor("F32", (2,))}) as writer:
        writer.add("a", torch.zeros(2))
        raise KeyboardInterrupt


def write_too_little(folder: Path) -> None:
    with ShardWriter(folder, {"a": PlannedTensor("F32", (2,))}) as writer:
        writer.add_rows("a", torch.zeros(1))


def write_nothing(folder: Path) -> None:
    with ShardWriter(folder, {"a": PlannedTensor("F32", (2,))}):
        pass


def write_too_much(folder: Path) -> None:
    with ShardWriter(folder, {"a": PlannedTensor("F32", (2,))}) as writer:
        writer.add("a", torch.zeros(2))
        writer.add("a", torch.zeros(2))


def write_another_shape(folder: Path) -> None:
    with ShardWriter(folder, {"a": PlannedTensor("F32", (2,))}) as writer:
        writer.add("a", torch.zeros(1, 2))


def write_another_dtype(folder: Path) -> None:
    with ShardWriter(folder, {"a": PlannedTensor("F32", (2,))}) as writer:
        writer.add("a", torch.zeros(2, dtype=torch.int32))


def write_what_was_not_planned(folder: Path) -> None:
    with ShardWriter(folder, {"a": PlannedTensor("F32", (2,))}) as writer:
        writer.add("b", torch.zeros(2))


def fill_the_disk(folder: Path) -> None:
    with files_of_at_most(1000), ShardWriter(folder, {"a": PlannedTensor("F32", (500,))}) as writer:
        writer.add("a", torch.zeros(500))


def fill_the_disk_with_a_header(folder: Path) -> None:
    with files_of_at_most(10), ShardWriter(folder, {"a": PlannedTensor("F32", (500,))}):
        pass


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (write_then_stop, KeyboardInterrupt, None),
        (write_too_little, ValueError, r"a: 8 bytes planned, 4 written"),
        (write_nothing, ValueError, r"a: 8 bytes planned, 0 written"),
        (write_too_much, ValueError, r"a: 8 bytes planned, got 16"),
        (write_another_shape, ValueError, r"a: planned .*shape=\(2,\).* got shape \[1, 2\]"),
        (write_another_dtype, ValueError, r"a: planned torch.float32, got torch.int32"),
        (write_what_was_not_planned, ValueError, r"b: planned None"),
        (fill_the_disk, CheckpointError, r"safetensors.partial: cannot be written: File too large"),
        (fill_the_disk_with_a_header, CheckpointError, r"partial: cannot be written"),
    ],
)
def test_a_writer_that_fails_leaves_nothing_behind(
    tmp_path: Path, fail: object, error: type[BaseException], message: str | None
) -> None:
    assert callable(fail)
    with pytest.raises(error, match=message):
        fail(tmp_path)
    assert list(tmp_path.iterdir()) == []


def write_three_shards(folder: Path) -> None:
    tensors = {name: torch.zeros(10) for name in "abc"}
    with ShardWriter(folder, plan_of(tensors), shard_bytes=40) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def test_a_rename_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail_at_the_index(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_index)
    with pytest.raises(CheckpointError, match=r"index.json.partial: .*No space left"):
        write_three_shards(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"needed 4,000,000,000,000,000 bytes .* found [\d,]+"
    ):
        ShardWriter(tmp_path, {"a": PlannedTensor("F32", (10**15,))})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_weights_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"without weights, found model.safetensors"):
        ShardWriter(tmp_path, {"a": PlannedTensor("F32", (2,))})
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.partial").write_bytes(bytes(10_000))
    with ShardWriter(tmp_path, {"a": PlannedTensor("F32", (2,))}) as writer:
        writer.add("a", torch.ones(2))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
