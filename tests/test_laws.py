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
from number_cases import (
    WEIGHT_SCHEMES,
    adversarial_weight,
    quantized,
    trained_like_weight,
    weight_scheme,
)

from mofq.backends.compressed_tensors import export_compressed_tensors
from mofq.checkpoint.headers import open_checkpoint
from mofq.cost import group_bytes, layer_bytes
from mofq.layers import find_layers
from mofq.quantize import QuantizedWeight, dequantize_weight, quantize_with_scales
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


@pytest.mark.parametrize("weight_OI", [trained_like_weight(), adversarial_weight()])
@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_law_2_with_its_scales_held_a_quantized_weight_quantizes_to_itself(
    name: str, weight_OI: torch.Tensor
) -> None:
    scheme, q = weight_scheme(name), quantized(name, weight_OI)
    once_OI = dequantize_weight(q, scheme)
    codes_OI = quantize_with_scales(
        once_OI,
        scheme,
        scale=q.scale,
        zero_point=q.zero_point,
        global_scale=q.global_scale,
    )
    assert codes_OI.dtype == q.codes_OI.dtype
    assert torch.equal(codes_OI, q.codes_OI)
    twice = QuantizedWeight(codes_OI, q.scale, q.zero_point, q.global_scale)
    assert torch.equal(dequantize_weight(twice, scheme), once_OI)


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
