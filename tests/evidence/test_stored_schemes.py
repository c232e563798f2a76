"""The entry ``stored`` of a search space: what a quantized source keeps each layer in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from exported import make_recipe
from families import copy_with_tensors
from fp8_sources import read_all, write_fp8
from packed_sources import pack_experts, write_packed
from tiny_types import write_type
from torch import Tensor

from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.spaces import SearchSpace, offer_schemes, parse_search_space, with_stored
from mofq.evidence.stored_schemes import stored_schemes
from mofq.evidence.table import read_table
from mofq.exceptions import SearchSpaceError
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
        ("mxfp4", ["mxfp4", "nvfp4@stored", "nvfp4@stored+nvfp4"]),
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
    assert set(found.base) == {"mxfp4", "nvfp4@stored", "nvfp4@stored+nvfp4", "int8.channel"}
    offers = {one.group.name: one for one in offer_schemes(found, groups)}
    of_other = offers.pop("layers.1.mlp.down")
    assert [scheme.name for scheme in of_other.schemes] == ["int8.channel", "bf16"]
    assert not of_other.rejected
    of_source = ["mxfp4", "nvfp4@stored"]  # and with activations, which need statistics
    for one in offers.values():
        assert [scheme.name for scheme in one.schemes] == [*of_source, "int8.channel", "bf16"]
    # Where another entry offers it too, to all.
    both = with_stored(space("schemes: [stored, mxfp4]"), checkpoint, groups)
    for one in offer_schemes(both, groups):
        names = [scheme.name for scheme in one.schemes]
        assert names == (["mxfp4"] if one.group is of_other.group else of_source) + ["bf16"]
        assert set(one.rejected) <= {"nvfp4@stored+nvfp4"}


@pytest.mark.parametrize("packing", ["int4 groups", "awq", "mxfp4"])
def test_what_is_kept_as_it_is_stored_has_no_error(
    packing: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    write_packed(tiny("llama", **SIZES), tmp_path / "model", packing)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    layers = find_layers(checkpoint)
    found = with_stored(space("schemes: [stored, int3.g32]"), checkpoint, layers.groups)
    measure(checkpoint, layers, found, table_path=tmp_path / "table.jsonl")
    errors = errors_of(tmp_path / "table.jsonl")
    exact = found.candidates[0].schemes[0].name
    assert max(errors[exact]) == 0 < min(errors["int3.g32"])


def shared_global_scales(tensors: dict[str, Tensor]) -> None:
    """Give layers that engines join the codes and scales of one of them, as tools that join do."""
    of_first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name in list(tensors):
        layer, _, word = name.rpartition(".")
        stem, _, last = layer.rpartition(".")
        if last in of_first:
            first = tensors[f"{stem}.{of_first[last]}.{word}"]
            tensors[name] = first[: len(tensors[name])].clone() if first.ndim else first.clone()


@pytest.mark.parametrize("packing", ["nvfp4", "modelopt nvfp4"])
def test_nvfp4_keeps_its_codes_and_scales_where_joined_layers_share_a_global_one(
    packing: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    write_packed(tiny("llama", **SIZES), tmp_path / "apart", packing)
    copy_with_tensors(tmp_path / "apart", tmp_path / "model", shared_global_scales)
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    layers = find_layers(checkpoint)
    exact, again = ["nvfp4@stored", "nvfp4@stored+nvfp4"], ["nvfp4", "nvfp4+nvfp4"]
    for folder in ("model", "apart"):
        opened = open_checkpoint(str(tmp_path / folder))
        groups = find_layers(opened).groups
        apart = [one for one in groups if len({la.global_scale for la in one.layers}) > 1]
        assert bool(apart) == (folder == "apart")
        for group in groups:
            found = [one.name for one in stored_schemes(opened, group)]
            assert found == (again if group in apart else exact)
    space_of_both = with_stored(space("schemes: [stored, nvfp4]"), checkpoint, layers.groups)
    measure(checkpoint, layers, space_of_both, table_path=tmp_path / "table.jsonl")
    errors = errors_of(tmp_path / "table.jsonl")
    # The global scale to a unit in the last place.
    assert max(errors["nvfp4@stored"]) < 1e-13
    export_compressed_tensors(
        checkpoint, make_recipe(checkpoint, lambda *_: "nvfp4@stored"), tmp_path / "exported"
    )
    source, exported = read_all(tmp_path / "model"), read_all(tmp_path / "exported")
    by_name = {layer.name: layer for layer in layers.grouped_layers}
    for name in [one for one in exported if one.endswith("weight_packed")]:
        stem = name.removesuffix("weight_packed")
        codes = source.get(name, source.get(f"{stem}weight"))
        assert codes is not None
        assert torch.equal(exported[name], codes)
        scale = f"{stem}weight_scale"
        assert torch.equal(exported[scale].float(), source[scale].float())
        whole = by_name[stem.removesuffix(".")].global_scale
        assert whole is not None
        assert float(exported[f"{stem}weight_global_scale"]) * whole == pytest.approx(1, rel=2**-22)


def test_mxfp4_is_nvfp4_exactly_where_its_exponents_fit(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    write_packed(tiny("llama", **SIZES), tmp_path / "model", "mxfp4")
    wide, zeros = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"

    def spread(tensors: dict[str, Tensor]) -> None:
        for name in (wide, zeros):
            tensors[f"{name}_scale"][0, 0] = tensors[f"{name}_scale"].max() - 18
        tensors[f"{zeros}_packed"][0, :16] = 0x80  # of both signs

    copy_with_tensors(tmp_path / "model", tmp_path / "spread", spread)
    checkpoint = open_checkpoint(str(tmp_path / "spread"))
    layers = find_layers(checkpoint)
    for group in layers.groups:
        found = [one.name for one in stored_schemes(checkpoint, group)]
        fits = group.layers[0].tensor != wide
        assert found == (["mxfp4", "nvfp4@stored", "nvfp4@stored+nvfp4"] if fits else ["mxfp4"])
    measure(
        checkpoint,
        layers,
        with_stored(space("schemes: [stored, nvfp4]"), checkpoint, layers.groups),
        table_path=tmp_path / "table.jsonl",
    )
    errors = errors_of(tmp_path / "table.jsonl")
    assert max(errors["mxfp4"]) == max(errors["nvfp4@stored"]) == 0 < max(errors["nvfp4"])
    assert len(errors["mxfp4"]) == len(errors["nvfp4@stored"]) + 1


def test_each_expert_of_an_mxfp4_tensor_has_a_global_scale_of_its_own(tmp_path: Path) -> None:
    packed = write_type("gpt_oss", tmp_path / "model")
    pack_experts(packed)
    stem, apart = "model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"

    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[f"{stem}_scales"][0] -= 40  # a whole expert
        tensors[f"{apart}_scales"][0, 0] -= 40  # a part of one

    checkpoint = open_checkpoint(str(copy_with_tensors(packed, tmp_path / "shrunk", shrink)))
    layers = find_layers(checkpoint)
    found = {g.name: [s.name for s in stored_schemes(checkpoint, g)] for g in layers.groups}
    assert found["layers.0.moe.experts"] == ["mxfp4", "nvfp4@stored", "nvfp4@stored+nvfp4"]
    assert found["layers.1.moe.experts"] == ["mxfp4"]
    chosen = with_stored(space("schemes: [stored, nvfp4]"), checkpoint, layers.groups)
    measure(checkpoint, layers, chosen, table_path=tmp_path / "table.jsonl")
    assert max(errors_of(tmp_path / "table.jsonl")["nvfp4@stored"]) == 0


def test_a_space_fixes_layers_to_what_they_are_stored_in(
    tiny: TinyCheckpoint, tiny_llama: Path, tmp_path: Path
) -> None:
    write_packed(tiny("llama", **SIZES), tmp_path / "model", "int4 groups")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    groups = find_layers(checkpoint).groups
    fixed = space("schemes: [stored, int8.channel]\nfixed: {'*.down_proj': stored}")
    for one in offer_schemes(with_stored(fixed, checkpoint, groups), groups):
        names = [scheme.name for scheme in one.choices]
        is_fixed = one.group.name.endswith("mlp.down")
        assert names == ["int4.g32@stored"] + ([] if is_fixed else ["int8.channel", "bf16"])
    plain = open_checkpoint(str(tiny_llama))
    groups = find_layers(plain).groups
    for one in offer_schemes(with_stored(fixed, plain, groups), groups):
        is_fixed = one.group.name.endswith("mlp.down")
        assert [s.name for s in one.choices] == ([] if is_fixed else ["int8.channel"]) + ["bf16"]
    with pytest.raises(SearchSpaceError, match="'stored' is not among the schemes"):
        space("schemes: [int8.channel]\nfixed: {'*.down_proj': stored}")


def errors_of(table: Path) -> dict[str, list[float]]:
    """Scheme -> the errors of its rows."""
    errors: dict[str, list[float]] = {}
    for row in read_table(table).rows:
        errors.setdefault(row.scheme, []).append(row.error)
    return errors
