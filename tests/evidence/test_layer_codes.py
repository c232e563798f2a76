"""Codes that were fitted once are read, and never other ones."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calibrated import calibrate_folder, some_tokens
from conftest import TinyCheckpoint
from torch import Tensor

from mofq.evidence import layer_codes as module
from mofq.evidence.calibration.stats import Stats, read_stats
from mofq.evidence.fits import Fits
from mofq.evidence.layer_codes import FOLDER, LayerCodes, layer_codes
from mofq.exceptions import StatsError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import LinearLayer, find_layers
from mofq.numbers.quantize import QuantizedWeight, quantize_weight
from mofq.numbers.schemes import parse_scheme

SCHEMES = (
    "int4.g32~gptq",
    "int4.g32.asym@nats",
    "int8.channel@nats",
    "int8.tensor~gptq",
    "fp8_e4m3.block128x128~gptq",
    "nvfp4@nats~gptq",
    "fp4_e2m1.g32@nats",
)


@pytest.fixture(scope="module")
def checkpoint(tiny: TinyCheckpoint) -> Checkpoint:
    return open_checkpoint(str(tiny("llama")))


@pytest.fixture
def stats(tiny: TinyCheckpoint, tmp_path: Path) -> Stats:
    return calibrate_folder(tiny("llama"), tmp_path / "stats", {"a": some_tokens(2, 16)})


@pytest.fixture
def layer(checkpoint: Checkpoint) -> LinearLayer:
    return find_layers(checkpoint).groups[0].layers[0]


def codes_of(
    checkpoint: Checkpoint, stats: Stats, layer: LinearLayer, name: str = SCHEMES[0]
) -> LayerCodes:
    read_rows = partial(read_layer_rows, checkpoint, layer)
    amax = float(read_rows(0, layer.out_features).float().abs().max())
    scheme = parse_scheme(name).quantized_weight
    with Fits(stats) as fits:
        return layer_codes(fits, layer, scheme, read_rows, tensor_amax=amax)


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("was fitted again")


def tensors(found: QuantizedWeight) -> list[Tensor]:
    parts = (found.codes_OI, found.scale, found.zero_point, found.global_scale)
    return [part for part in parts if part is not None]


def files(stats: Stats) -> list[Path]:
    return sorted((stats.folder / FOLDER).rglob("*.safetensors"))


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_that_are_read_are_those_that_were_fitted_in_every_bit(
    checkpoint: Checkpoint,
    stats: Stats,
    layer: LinearLayer,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme = parse_scheme(name).quantized_weight
    weight_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
    with Fits(stats) as fits:
        arguments = fits.of(layer, [scheme]).arguments(scheme)
    amax = float(weight_OI.float().abs().max())
    expected = quantize_weight(weight_OI, scheme, tensor_amax=amax, **arguments)
    fitted = codes_of(checkpoint, stats, layer, name)
    monkeypatch.setattr(Fits, "of", refuse)
    kept = codes_of(checkpoint, stats, layer, name)
    tile = scheme.granularity.rows or layer.out_features
    for codes in (fitted, kept):
        for start, stop in ((0, layer.out_features), (0, tile), (layer.out_features - tile, None)):
            found = codes.rows(start, stop or layer.out_features)
            one = expected.codes_OI[start:stop]
            assert found.codes_OI.dtype == one.dtype
            bits = torch.int32 if one.is_floating_point() else one.dtype
            assert torch.equal(found.codes_OI.view(bits), one.contiguous().view(bits))
        for found_part, part in zip(
            tensors(codes.rows(0, layer.out_features))[1:], tensors(expected)[1:], strict=True
        ):
            assert found_part.dtype == part.dtype
            assert torch.equal(found_part, part)


def test_whatever_decides_the_codes_is_part_of_their_name(
    checkpoint: Checkpoint, stats: Stats, layer: LinearLayer, tmp_path: Path
) -> None:
    codes_of(checkpoint, stats, layer)
    (before,) = files(stats)
    scheme = parse_scheme(SCHEMES[0]).quantized_weight

    def changed(start: int, stop: int) -> Tensor:
        rows_OI = read_layer_rows(checkpoint, layer, start, stop).clone()
        rows_OI[-1, -1] += 0.5
        return rows_OI

    with Fits(stats) as fits:
        layer_codes(fits, layer, scheme, changed)  # other weights
        assert len(files(stats)) == 2
        # The same in another dtype, and a magnitude that the scheme does not look at.
        wide = layer_codes(
            fits,
            layer,
            scheme,
            lambda *rows: read_layer_rows(checkpoint, layer, *rows).float(),
            tensor_amax=7.0,
        )
    assert len(files(stats)) == 2
    assert torch.equal(
        wide.rows(0, layer.out_features).codes_OI,
        codes_of(checkpoint, stats, layer).rows(0, layer.out_features).codes_OI,
    )
    for file in files(stats):
        file.unlink()
    codes_of(checkpoint, stats, layer, "nvfp4~gptq")
    assert len(files(stats)) == 1
    nvfp4 = parse_scheme("nvfp4~gptq").quantized_weight
    with Fits(stats) as fits:
        layer_codes(
            fits, layer, nvfp4, partial(read_layer_rows, checkpoint, layer), tensor_amax=9.0
        )
    assert len(files(stats)) == 2
    assert before.name not in {file.name for file in files(stats)}


@pytest.mark.parametrize("damage", ["a bit", "cut", "another layer's"])
def test_a_file_that_was_changed_is_fitted_again_with_a_note(
    checkpoint: Checkpoint,
    stats: Stats,
    layer: LinearLayer,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = codes_of(checkpoint, stats, layer).rows(0, layer.out_features)
    (file,) = files(stats)
    data = file.read_bytes()
    if damage == "a bit":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        other = find_layers(checkpoint).groups[0].layers[1]
        codes_of(checkpoint, stats, other)
        (theirs,) = (one for one in files(stats) if one != file)
        file.write_bytes(theirs.read_bytes())
    found = codes_of(checkpoint, stats, layer).rows(0, layer.out_features)
    assert torch.equal(found.codes_OI, expected.codes_OI)
    assert file.read_bytes() == data
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{file}: changed since it was written")


def test_of_each_layer_the_sets_that_were_used_last_are_kept(
    checkpoint: Checkpoint, stats: Stats, layer: LinearLayer
) -> None:
    names = ("int4.g32~gptq", "int4.g64~gptq", "int8.g32~gptq", "int8.g64~gptq")
    kept: dict[str, Path] = {}
    for number, name in enumerate(names[:3]):
        codes_of(checkpoint, stats, layer, name)
        (kept[name],) = set(files(stats)) - set(kept.values())
        os.utime(kept[name], ns=(number, number))
    codes_of(checkpoint, stats, layer, names[0])  # is used, and so no longer the oldest
    codes_of(checkpoint, stats, layer, names[3])
    assert len(files(stats)) == 3
    assert kept[names[0]].exists()
    assert not kept[names[1]].exists()


def test_without_room_or_the_right_to_write_codes_are_fitted_and_not_kept(
    checkpoint: Checkpoint,
    stats: Stats,
    layer: LinearLayer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "disk_usage", lambda path: SimpleNamespace(free=1000))
    codes_of(checkpoint, stats, layer)
    assert files(stats) == []
    (stats.folder / FOLDER).rename(stats.folder / "elsewhere")
    (stats.folder / FOLDER).write_text("no folder")
    codes_of(checkpoint, stats, layer)
    assert "fitted codes are not kept" in caplog.text


def test_a_scheme_that_is_not_fitted_keeps_nothing_and_needs_no_statistics(
    checkpoint: Checkpoint, stats: Stats, layer: LinearLayer
) -> None:
    read_rows = partial(read_layer_rows, checkpoint, layer)
    plain = parse_scheme("int4.g32@mse").quantized_weight
    found = layer_codes(None, layer, plain, read_rows).rows(0, layer.out_features)
    expected = quantize_weight(read_rows(0, layer.out_features), plain)
    assert torch.equal(found.codes_OI, expected.codes_OI)
    codes_of(checkpoint, stats, layer, "int4.g32@mse")
    assert files(stats) == []
    with pytest.raises(StatsError, match="there are none here"):
        layer_codes(None, layer, parse_scheme(SCHEMES[0]).quantized_weight, read_rows)
    assert read_stats(stats.folder).sha256 == stats.sha256


def test_codes_that_earlier_numerics_kept_are_taken(
    checkpoint: Checkpoint,
    stats: Stats,
    layer: LinearLayer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mofq.evidence.layer_codes.NUMERICS", 3)
        codes_of(checkpoint, stats, layer)
    (kept,) = files(stats)
    before = kept.stat().st_mtime_ns
    codes_of(checkpoint, stats, layer)
    assert files(stats) == [kept]
    assert kept.stat().st_mtime_ns != before  # it was read, and used last now
