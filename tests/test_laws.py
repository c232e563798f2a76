"""The eight laws that every change must keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported import (
    STORABLE,
    Exported,
    quantize_layer,
    read_codes,
    read_scale,
    read_zero_point,
    uniform_recipe,
)

from mofq.backends.compressed_tensors import export_compressed_tensors
from mofq.checkpoint.headers import open_checkpoint
from mofq.cost import group_bytes, layer_bytes
from mofq.layers import find_layers
from mofq.quantize import dequantize_weight
from mofq.schemes import parse_scheme


@pytest.mark.parametrize("name", STORABLE)
def test_law_1_codes_and_scales_read_back_equal_those_of_quantize(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    scheme = parse_scheme(name)
    export_compressed_tensors(checkpoint, uniform_recipe(checkpoint, name), tmp_path / "out")
    exported = Exported(tmp_path / "out")
    tensors = exported.tensors
    for group in find_layers(checkpoint).groups[:4]:
        for layer in group.layers:
            measured = quantize_layer(checkpoint, group, layer, scheme)
            parts = exported.parts(layer.name, tensors)
            codes = read_codes(parts, scheme)
            assert codes.dtype == measured.codes_OI.dtype
            assert torch.equal(codes, measured.codes_OI)
            assert measured.scale is not None
            assert torch.equal(read_scale(parts, scheme, measured.scale), measured.scale)
            if measured.zero_point is not None:
                points = read_zero_point(parts, scheme, measured.zero_point)
                assert torch.equal(points, measured.zero_point)
            if measured.global_scale is not None:
                # Stored as its reciprocal: the one number that is rounded.
                stored = parts["weight_global_scale"].double()
                assert abs(stored * measured.global_scale.double() - 1) <= 2**-24


@pytest.mark.parametrize("name", STORABLE)
def test_law_1_the_consumers_decoder_returns_fake_quantize_to_one_rounding(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    scheme = parse_scheme(name)
    assert scheme.weight is not None
    export_compressed_tensors(checkpoint, uniform_recipe(checkpoint, name), tmp_path / "out")
    exported = Exported(tmp_path / "out")
    tensors = exported.tensors
    for group in find_layers(checkpoint).groups[:4]:
        for layer in group.layers:
            measured = quantize_layer(checkpoint, group, layer, scheme)
            expected = dequantize_weight(measured, scheme.weight)
            decoded = exported.decode(layer.name, tensors)
            # NVFP4 divides the scale by the global one first, which is a rounding of its own.
            roundings = 2 if scheme.weight.scale.global_scale_bits else 1
            unit = torch.finfo(decoded.dtype).eps / 2
            error = (decoded.double() - expected.double()).abs()
            assert bool((error <= 1.01 * roundings * unit * expected.double().abs()).all())


@pytest.mark.parametrize("name", STORABLE)
def test_law_3_cost_equals_the_bytes_of_the_exported_tensors(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    scheme = parse_scheme(name)
    written = export_compressed_tensors(
        checkpoint, uniform_recipe(checkpoint, name), tmp_path / "out"
    )
    exported = Exported(tmp_path / "out")
    tensors = exported.tensors
    groups = find_layers(checkpoint).groups
    for group in groups:
        for layer in group.layers:
            parts = exported.parts(layer.name, tensors)
            stored = sum(part.numel() * part.element_size() for part in parts.values())
            assert stored == layer_bytes(layer, scheme)
    assert written.group_bytes == sum(group_bytes(group, scheme) for group in groups)
