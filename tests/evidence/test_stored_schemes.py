"""The entry ``stored`` of a search space: what a quantized source keeps each layer in."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from families import copy_with_tensors
from fp8_sources import write_fp8
from packed_sources import write_packed
from torch import Tensor

from mofq.evidence.measure.fill_table import measure
from mofq.evidence.spaces import SearchSpace, offer_schemes, parse_search_space, with_stored
from mofq.evidence.stored_schemes import stored_schemes
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers

SIZES = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32}


def space(text: str) -> SearchSpace:
    return parse_search_space(f"version: 1\n{text}", name="mine", where="mine.yaml")


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ("int4 groups", ["int4.g32@stored"]),
        ("int3 groups, zero points", ["int3.g32.asym@stored"]),
        ("int6 rows", ["int6.channel@stored"]),
        ("int8 rows", ["int8.channel@stored"]),
        ("gptq", ["int4.g32.asym.s-f32@stored", "int4.g32.asym@stored"]),
        ("gptq, act order", []),
        ("awq", ["int4.g32.asym.s-f32@stored", "int4.g32.asym@stored"]),
        ("mxfp4", ["mxfp4"]),
        ("modelopt nvfp4", ["nvfp4", "nvfp4+nvfp4"]),
    ],
)
def test_a_packed_source_says_what_it_keeps_layers_in(
    packing: str, expected: list[str], tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    write_packed(tiny("llama", **SIZES), tmp_path / "model", packing)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    for group in find_layers(checkpoint).groups:
        assert [one.name for one in stored_schemes(checkpoint, group)] == expected


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("fp8 blocks", "fp8_e4m3.block128.s-f32 fp8_e4m3.block128.s-f32+fp8_e4m3.g128"),
        (
            "compressed-tensors channel",
            "fp8_e4m3.channel.s-f32 fp8_e4m3.channel.s-f32+fp8_e4m3.token",
        ),
        ("fp8 tensor", "fp8_e4m3.tensor.s-f32 fp8_e4m3.tensor.s-f32+fp8_e4m3.token"),
        ("cast", "fp8_e4m3.unscaled"),
    ],
)
def test_an_fp8_source_says_what_it_keeps_layers_in(
    convention: str, expected: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    # Two blocks a row: of one, nothing tells a block from a tensor.
    model = tiny("llama", hidden_size=256, intermediate_size=256)
    checkpoint = open_checkpoint(str(write_fp8(model, tmp_path / "fp8", convention)))
    group = find_layers(checkpoint).groups[0]
    assert [one.name for one in stored_schemes(checkpoint, group)] == expected.split()


def test_of_an_unquantized_source_the_space_stays_what_it_is(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    found = space("schemes: [stored, int8.channel]")
    assert with_stored(found, checkpoint, find_layers(checkpoint).groups) is found
    assert found.sha256 == space("schemes: [int8.channel]").sha256


def test_a_layer_is_offered_what_it_is_kept_in_and_no_other_is(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    whole, packed = tiny("llama", **SIZES), tmp_path / "packed"
    values = write_packed(whole, packed, "mxfp4")
    kept = "model.layers.1.mlp.down_proj.weight"

    def decode(tensors: dict[str, Tensor]) -> None:
        for name in [one for one in tensors if one.startswith(kept)]:
            del tensors[name]
        tensors[kept] = values[kept].bfloat16()

    checkpoint = open_checkpoint(str(copy_with_tensors(packed, tmp_path / "partly", decode)))
    groups = find_layers(checkpoint).groups
    plain = space("schemes: [stored, int8.channel]\nbase: [int8.channel]")
    found = with_stored(plain, checkpoint, groups)
    assert found.sha256 != plain.sha256
    assert set(found.base) == {"mxfp4", "int8.channel"}
    offers = {one.group.name: one for one in offer_schemes(found, groups)}
    of_other = offers.pop("layers.1.mlp.down")
    assert [scheme.name for scheme in of_other.schemes] == ["int8.channel", "bf16"]
    assert not of_other.rejected
    for one in offers.values():
        assert [scheme.name for scheme in one.schemes] == ["mxfp4", "int8.channel", "bf16"]
    # Where another entry offers it too, to all.
    both = with_stored(space("schemes: [stored, mxfp4]"), checkpoint, groups)
    for one in offer_schemes(both, groups):
        assert [scheme.name for scheme in one.schemes] == ["mxfp4", "bf16"]
        assert not one.rejected


@pytest.mark.parametrize("packing", ["int4 groups", "awq", "mxfp4"])
def test_what_is_kept_as_it_is_stored_has_no_error(
    packing: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    write_packed(tiny("llama", **SIZES), tmp_path / "model", packing)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    layers = find_layers(checkpoint)
    found = with_stored(space("schemes: [stored, int3.g32]"), checkpoint, layers.groups)
    measure(checkpoint, layers, found, table_path=tmp_path / "table.jsonl")
    errors = {}
    for row in read_table(tmp_path / "table.jsonl").rows:
        errors.setdefault(row.scheme, []).append(row.error)
    exact = found.candidates[0].schemes[0].name
    assert max(errors[exact]) == 0 < min(errors["int3.g32"])
