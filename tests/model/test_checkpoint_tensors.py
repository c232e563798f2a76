"""Weights read from disk, against the safetensors library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import DTYPE_BITS, Checkpoint, TensorInfo, read_header
from mofq.model.checkpoint.stored_bytes import TORCH_DTYPES
from mofq.model.checkpoint.tensors import (
    read_layer_rows,
    read_rows,
    read_shared_amax,
    read_tensor,
)
from mofq.model.layers import FusionGroup, LinearLayer
from mofq.numbers.schemes import parse_scheme


def layer_of(tensor: str, out_features: int, in_features: int, **place: Any) -> LinearLayer:
    return LinearLayer(
        name="layer",
        tensor=tensor,
        out_features=out_features,
        in_features=in_features,
        dtype="F32",
        module="layer",
        shares_scale=place.pop("shares_scale", "layer"),
        **place,
    )


def checkpoint_of(tensors: dict[str, torch.Tensor], folder: Path) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, "model", {}, read_header(folder / "model.safetensors"), "")


def random_bytes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(size)
    raw = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality that holds for NaN, and that every dtype has."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (left, right))
    return torch.equal(*flat)


def test_every_dtype_of_a_byte_or_more_has_its_torch_dtype() -> None:
    assert set(TORCH_DTYPES) == {name for name, bits in DTYPE_BITS.items() if bits >= 8}
    for name, dtype in TORCH_DTYPES.items():
        assert 8 * dtype.itemsize == DTYPE_BITS[name]


@pytest.mark.parametrize("name", list(TORCH_DTYPES))
def test_tensors_and_rows_are_those_that_the_safetensors_library_reads(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": random_bytes(TORCH_DTYPES[name], 7, 3, 2)}, path)
    info, expected = read_header(path)["x"], load_file(path)["x"]
    assert info.dtype == name
    assert same_bytes(read_tensor(info), expected)
    assert same_bytes(read_rows(info, 2, 5), expected[2:5])
    assert same_bytes(read_rows(info, 4, 4), expected[4:4])


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 5)}, path)
    header = read_header(path)
    assert read_tensor(header["scalar"]).item() == 2.5
    assert read_tensor(header["empty"]).shape == (0, 5)
    assert read_rows(header["empty"], 0, 0).shape == (0, 5)


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 1), (5, 6), (2, 5), (3, 3)])
def test_rows_of_a_layer_are_the_same_however_it_is_stored(
    tmp_path: Path, start: int, stop: int
) -> None:
    weight_OI = random_bytes(torch.bfloat16, 6, 4)
    other_OI = random_bytes(torch.bfloat16, 6, 4).flip(0)
    fused_EOI = torch.stack([torch.cat([other_OI, other_OI]), torch.cat([other_OI, weight_OI])])
    tensors = {
        "plain": weight_OI,
        "transposed": weight_OI.T.contiguous(),
        "rows": torch.cat([other_OI, weight_OI]),
        "experts": torch.stack([other_OI, weight_OI, other_OI]),
        "fused": fused_EOI,
        "fused_transposed": fused_EOI.transpose(1, 2).contiguous(),
    }
    checkpoint = checkpoint_of(tensors, tmp_path)
    for layer in (
        layer_of("plain", 6, 4),
        layer_of("transposed", 6, 4, transposed=True),
        layer_of("rows", 6, 4, row_start=6),
        layer_of("experts", 6, 4, expert=1),
        layer_of("fused", 6, 4, expert=1, row_start=6),
        layer_of("fused_transposed", 6, 4, expert=1, row_start=6, transposed=True),
    ):
        rows = read_layer_rows(checkpoint, layer, start, stop)
        assert same_bytes(rows, weight_OI[start:stop]), layer.tensor
        assert rows.is_contiguous()


@pytest.mark.parametrize(
    "layer",
    [
        layer_of("plain", 6, 5),
        layer_of("plain", 7, 4),
        layer_of("plain", 6, 4, row_start=1),
        layer_of("plain", 6, 4, row_start=-1),
        layer_of("plain", 6, 4, transposed=True),
        layer_of("plain", 6, 4, expert=0),
        layer_of("experts", 6, 4),
        layer_of("experts", 6, 4, expert=2),
        layer_of("experts", 6, 4, expert=-1),
    ],
)
def test_a_layer_that_does_not_lie_in_its_tensor_is_refused(
    tmp_path: Path, layer: LinearLayer
) -> None:
    tensors = {"plain": torch.zeros(6, 4), "experts": torch.zeros(2, 6, 4)}
    with pytest.raises(ValueError, match=rf"layer: .* does not lie in '{layer.tensor}'"):
        read_layer_rows(checkpoint_of(tensors, tmp_path), layer, 0, 1)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (4, 3)])
def test_rows_outside_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    checkpoint = checkpoint_of({"plain": torch.zeros(6, 4)}, tmp_path)
    with pytest.raises(ValueError, match=rf"rows {start} to {stop}"):
        read_rows(checkpoint.tensors["plain"], start, stop)
    with pytest.raises(ValueError, match=rf"rows {start} to {stop} of 6"):
        read_layer_rows(checkpoint, layer_of("plain", 6, 4), start, stop)


def test_rows_of_a_tensor_far_larger_than_memory_are_read(tmp_path: Path) -> None:
    rows, columns = 2**24, 2**12  # 128 GiB, and none of it on disk
    header = json.dumps(
        {
            "x": {
                "dtype": "BF16",
                "shape": [rows, columns],
                "data_offsets": [0, 2 * rows * columns],
            }
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * rows * columns)
        file.seek(-2, 2)
        file.write(b"\x80\x3f")
    info = read_header(path)["x"]
    assert read_rows(info, rows - 2, rows).sum() == 1.0
    checkpoint = Checkpoint(tmp_path, "model", {}, {"x": info}, "")
    assert read_layer_rows(checkpoint, layer_of("x", rows, columns), rows - 2, rows).sum() == 1.0


def test_a_file_cut_short_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    info = checkpoint_of({"x": torch.ones(6, 4)}, tmp_path).tensors["x"]
    info.file.write_bytes(info.file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors: ends inside tensor 'x': .* 1 "):
        read_tensor(info)


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    info = checkpoint_of({"x": torch.ones(6, 4)}, tmp_path).tensors["x"]
    info.file.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: No such file"):
        read_rows(info, 0, 1)


def test_a_dtype_narrower_than_a_byte_is_refused(tmp_path: Path) -> None:
    info = checkpoint_of({"x": torch.ones(4, dtype=torch.uint8)}, tmp_path).tensors["x"]
    packed: TensorInfo = replace(info, dtype="F4", shape=(8,))
    with pytest.raises(CheckpointError, match=r"tensor 'x' has dtype F4, needed one of BOOL, U8"):
        read_tensor(packed)


def test_layers_that_share_a_scale_share_the_largest_magnitude(tmp_path: Path) -> None:
    rows = {"q": [1.0, -3.0], "k": [2.0, 0.5], "v": [-0.25, 0.125]}
    checkpoint = checkpoint_of({name: torch.tensor([row]) for name, row in rows.items()}, tmp_path)
    layers = {"q": "qk", "k": "qk", "v": "v"}
    group = FusionGroup(
        "qkv", tuple(replace(layer_of(n, 1, 2, shares_scale=s), name=n) for n, s in layers.items())
    )
    weight = parse_scheme("nvfp4").quantized_weight
    assert read_shared_amax(checkpoint, group, weight) == {"q": 3.0, "k": 3.0, "v": 0.25}
