"""Checkpoints with packed weights as sources: what their weights are, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ok, refused
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from conftest import TinyCheckpoint
from families import copy_with_config, copy_with_tensors
from packed_sources import PACKINGS, pack_experts, write_packed
from tiny_types import write_type
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mofq.decision.recipe import load_recipe
from mofq.evidence.table import read_table
from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.packed import read_packed
from mofq.model.checkpoint.safetensors_header import read_header
from mofq.model.checkpoint.tensors import check_scales, read_layer_rows, read_rows, read_tensor
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.model.sizes import source_bytes
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.schemes import parse_scheme

SIZES = {"hidden_size": 96, "intermediate_size": 160}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(
    tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """A llama in a packing, and its values."""
    root, written = tmp_path_factory.mktemp("packed"), {}

    def get(packing: str) -> tuple[Path, dict[str, Tensor]]:
        if packing not in written:
            folder = root / packing.replace(" ", "-")
            written[packing] = folder, write_packed(tiny("llama", **SIZES), folder, packing)
        return written[packing]

    return get


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_source_has_the_values_that_its_own_decoder_gives(
    packing: str, made: Callable[[str], tuple[Path, dict[str, Tensor]]]
) -> None:
    folder, values = made(packing)
    checkpoint = open_checkpoint(str(folder))
    assert set(checkpoint.tensors) == set(values)
    assert "quantization_config" not in checkpoint.config
    for name, needed in values.items():
        found = read_tensor(checkpoint.tensors[name])
        # A decoder may round its product to the dtype of the scales.
        assert torch.equal(found.to(needed.dtype), needed), name
    check_scales(checkpoint)


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_of_a_packed_weight_are_those_of_the_whole(
    packing: str, made: Callable[[str], tuple[Path, dict[str, Tensor]]]
) -> None:
    checkpoint = open_checkpoint(str(made(packing)[0]))
    layers = find_layers(checkpoint)
    for layer in layers.grouped_layers:
        whole = read_tensor(checkpoint.tensors[layer.tensor])
        assert whole.shape == (layer.out_features, layer.in_features)
        for start, stop in ((0, 1), (3, 11), (7, 7), (31, 33), (0, layer.out_features)):
            assert torch.equal(read_layer_rows(checkpoint, layer, start, stop), whole[start:stop])
            assert torch.equal(
                read_rows(checkpoint.tensors[layer.tensor], start, stop), whole[start:stop]
            )


@pytest.mark.parametrize("packing", ["int4 groups, zero points", "gptq, act order", "awq"])
def test_the_loaded_model_computes_with_the_values(
    packing: str, made: Callable[[str], tuple[Path, dict[str, Tensor]]], tiny: TinyCheckpoint
) -> None:
    folder, values = made(packing)
    needed = AutoModelForCausalLM.from_pretrained(tiny("llama", **SIZES), dtype=torch.float32)
    needed.load_state_dict({name: value.float() for name, value in values.items()}, strict=True)
    token_NT = torch.arange(8)[None]
    found = load_model(folder)(token_NT).logits
    # Values of compressed-tensors are rounded by its decoder, ours are not.
    assert torch.allclose(found, needed(token_NT).logits, atol=2e-2 if "int4" in packing else 1e-6)


def test_sizes_count_codes_scales_and_zero_points(
    made: Callable[[str], tuple[Path, dict[str, Tensor]]],
) -> None:
    folder, _ = made("gptq, act order")
    stored = read_header(folder / "model.safetensors")
    group = find_layers(open_checkpoint(str(folder))).groups[1]
    assert group.name == "layers.0.attn.o"
    prefix = group.layers[0].name + "."
    needed = sum(info.nbytes for name, info in stored.items() if name.startswith(prefix))
    assert source_bytes(group) == needed


def test_awq_columns_are_in_the_order_that_compressed_tensors_reads(
    made: Callable[[str], tuple[Path, dict[str, Tensor]]],
) -> None:
    folder, _ = made("awq")
    stored = read_header(folder / "model.safetensors")
    words, zeros, scales = (
        read_tensor(stored[f"{Q_PROJ}.{end}"]) for end in ("qweight", "qzeros", "scales")
    )
    code, point = AutoAWQConverter.reverse_awq_order(
        *AutoAWQConverter.unpack_awq(words, zeros, 4), 4
    )
    needed = ((code & 15).float() - (point & 15).float().repeat_interleave(32, 0)) * (
        scales.float().repeat_interleave(32, 0)
    )
    info = open_checkpoint(str(folder)).tensors[f"{Q_PROJ}.weight"]
    assert torch.equal(read_tensor(info), needed.T)


@pytest.mark.parametrize(
    ("packing", "scheme"),
    [
        ("int4 groups", "int4.g32@stored"),
        ("int4 groups, zero points", "int4.g32.asym@stored"),
        ("int3 groups, zero points", "int3.g32.asym@stored"),
        ("int6 rows", "int6.channel@stored"),
        ("int8 rows", "int8.channel@stored"),
        ("gptq", "int4.g32.asym.s-f32@stored"),
        ("awq", "int4.g32.asym.s-f32@stored"),
        ("mxfp4", "mxfp4"),
    ],
)
def test_a_source_is_kept_by_its_own_scheme(
    packing: str, scheme: str, made: Callable[[str], tuple[Path, dict[str, Tensor]]]
) -> None:
    checkpoint = open_checkpoint(str(made(packing)[0]))
    for layer in find_layers(checkpoint).grouped_layers:
        weight_OI = read_tensor(checkpoint.tensors[layer.tensor])
        kept_OI = fake_quantize_weight(weight_OI, parse_scheme(scheme).quantized_weight)
        assert torch.equal(kept_OI, weight_OI), layer.name


def _as_published(words_NW: Tensor, bits: int) -> Tensor:
    """Codes in words, by the tables of GPTQ's own kernels, [N, codes].

    Source: AutoGPTQ 0.7.1 ``nn_modules/qlinear/qlinear_cuda_old.py``, ``forward``: of 3 bits, the
    codes 10 and 21 of 32 lie in two of three words.
    """
    word_NW = words_NW.long() & 0xFFFFFFFF
    if bits != 3:
        shift = torch.arange(0, 32, bits)
        return ((word_NW[..., None] >> shift) & (2**bits - 1)).flatten(1)
    first, second, third = word_NW.unflatten(1, (-1, 3)).unbind(-1)
    across = (
        ((first >> 30) & 0x3) | ((second & 0x1) << 2),
        ((second >> 31) & 0x1) | ((third & 0x3) << 1),
    )
    codes = [(first[..., None] >> torch.arange(0, 30, 3)) & 7, across[0][..., None]]
    codes += [(second[..., None] >> torch.arange(1, 31, 3)) & 7, across[1][..., None]]
    codes += [(third[..., None] >> torch.arange(2, 32, 3)) & 7]
    return torch.cat(codes, -1).flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_decoded_as_its_kernels_decode_it(
    tiny: TinyCheckpoint, tmp_path: Path, bits: int, form: str, act_order: bool
) -> None:
    """Of words with any bits, which no encoder of ours wrote."""
    random, needed = torch.Generator().manual_seed(bits), {}

    def draw(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=random).int()

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [one for one in tensors if one.endswith("_proj.weight")]:
            rows, columns = tensors.pop(name).shape
            words_WO, zeros_GW = (
                draw(columns * bits // 32, rows),
                draw(columns // 32, rows * bits // 32),
            )
            # Below the largest zero point, to which kernels that add one differ in what they add.
            top_bits = sum(1 << bit for bit in range(bits - 1, 32 * bits, bits))
            masks = [(~top_bits >> 32 * word) & 0xFFFFFFFF for word in range(bits)]
            mask_W = torch.tensor(masks * (zeros_GW.shape[1] // bits))
            zeros_GW &= torch.where(mask_W >= 2**31, mask_W - 2**32, mask_W).int()
            group_I = torch.arange(columns) // 32
            if act_order:
                group_I = group_I[torch.randperm(columns, generator=random)]
            scale_GO = (torch.rand(columns // 32, rows, generator=random) + 0.5).half()
            code_OI, point_GO = _as_published(words_WO.T, bits), _as_published(zeros_GW, bits)
            point_GO += int(form == "gptq")
            needed[name] = (scale_GO.float()[group_I] * (code_OI.T - point_GO[group_I])).T
            parts = {"qweight": words_WO, "qzeros": zeros_GW, "scales": scale_GO}
            parts["g_idx"] = group_I.int()
            tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}

    stated = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": form}
    folder = copy_with_tensors(tiny("llama", **SIZES), tmp_path / "tensors", pack)
    folder = copy_with_config(
        folder,
        tmp_path / "model",
        lambda config: config.update(quantization_config=stated | {"desc_act": act_order}),
    )
    checkpoint = open_checkpoint(str(folder))
    assert len(needed) == len(find_layers(checkpoint).grouped_layers)
    for name, weight_OI in needed.items():
        assert torch.equal(read_tensor(checkpoint.tensors[name]), weight_OI), name


def test_experts_of_gpt_oss_are_what_transformers_decodes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 20, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 20, 2), dtype=torch.uint8, generator=generator)
    stem = "model.layers.0.mlp.experts.gate_up_proj"
    path = tmp_path / "model.safetensors"
    save_file({f"{stem}_blocks": blocks, f"{stem}_scales": scales}, path)
    found = read_packed(tmp_path, {"quant_method": "mxfp4"}, read_header(path))
    assert found is not None
    info = found.tensors[stem]
    needed = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert info.shape == (3, 64, 20)
    assert torch.equal(read_tensor(info), needed)
    assert torch.equal(read_rows(info, 1, 3), needed[1:])


def _read_all(folder: Path) -> None:
    for info in open_checkpoint(str(folder)).tensors.values():
        read_tensor(info)


def _drop(end: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q_PROJ}.{end}"]

    return change


def _set(end: str, to: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.{end}"] = to(tensors[f"{Q_PROJ}.{end}"]).contiguous()

    return change


@pytest.mark.parametrize(
    ("packing", "edit", "message"),
    [
        (
            "int4 groups",
            _drop("weight_scale"),
            r"weight_packed' needs .*weight_scale' .*found none",
        ),
        ("int4 groups", _drop("weight_shape"), r"needs .*weight_shape' .*found none"),
        ("int4 groups", _set("weight_shape", lambda t: t + 8), r"is no weight of \[136, 104\]"),
        ("int4 groups", _set("weight_scale", lambda t: t[:4]), r"needs \[128, 3\] or .*found \[4"),
        ("int4 groups", _set("weight_scale", lambda t: t[:, :2]), r"2 scales a row.* is \[32\]"),
        ("int4 groups", _set("weight_scale", lambda t: -t), r"holds -.* needed positive"),
        ("gptq", _drop("qzeros"), r"qweight' needs .*qzeros' .*found none"),
        ("gptq", _set("g_idx", lambda t: t + 9), r"g_idx' needs numbers of 3 groups, found 9 to"),
        ("gptq", _set("scales", lambda t: t[:1]), r"has 96 columns and 1 scales a row"),
        ("awq", _set("qweight", lambda t: t.to(torch.int64)), r"qweight' needs words of I32"),
        ("nvfp4", _set("weight_global_scale", torch.zeros_like), r"holds 0\.0 as a scale"),
        ("mxfp4", _set("weight_scale", lambda t: t * 0 + 255), r"holds nan as a scale"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_by_name(
    packing: str,
    edit: Any,
    message: str,
    made: Callable[[str], tuple[Path, dict[str, Tensor]]],
    tmp_path: Path,
) -> None:
    folder = copy_with_tensors(made(packing)[0], tmp_path / "bad", edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        _read_all(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("packing", "edit", "message"),
    [
        ("gptq", {"bits": 5}, r"'bits' needs one of 2, 3, 4, 8, found 5"),
        ("gptq", {"checkpoint_format": "marlin"}, r"quantized already"),
        ("awq", {"version": "gemv"}, r"quantized already"),
        ("int4 groups", {"transform_config": {"config_groups": {}}}, r"quantized already"),
        ("int4 groups", {"config_groups": {}}, r"in integers of \[\] bits"),
        ("gptq", {"quant_method": "bitsandbytes"}, r"'bitsandbytes'.*quantized already"),
    ],
)
def test_a_config_of_another_kind_is_refused(
    packing: str,
    edit: dict[str, Any],
    message: str,
    made: Callable[[str], tuple[Path, dict[str, Tensor]]],
    tmp_path: Path,
) -> None:
    folder = copy_with_config(
        made(packing)[0], tmp_path / "m", lambda c: c["quantization_config"].update(edit)
    )
    with pytest.raises(CheckpointError, match=message):
        find_layers(open_checkpoint(str(folder)))


@pytest.mark.long
@pytest.mark.parametrize("packing", ["gptq, act order", "int4 groups", "nvfp4"])
def test_the_whole_flow_starts_from_a_packed_source(
    packing: str, made: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, _ = made(packing)
    space = tmp_path / "space.yaml"
    space.write_text("version: 1\nschemes: [int4.g32, int8.channel, bf16]\n")
    stats, table, recipe = (tmp_path / name for name in ("stats", "table.jsonl", "recipe.yaml"))
    assert "decoded" in ok("inspect", folder).err
    short = ("--sequences", "4", "--sequence-length", "32")
    ok("calibrate", folder, "--corpus", "a=demo-en-calibration", *short, "-o", stats)
    ok("measure", folder, "--space", space, "--stats", stats, "-o", table)
    ok("search", table, "--max-bits", "6.5", "-o", recipe)
    ok("export", folder, recipe, "--to", "compressed-tensors", "-o", tmp_path / "out")
    text = ("--text", "demo-en", "--tokens", "96", "--sequence-length", "32")
    out = ok("validate", folder, tmp_path / "out", *text).out
    assert "enforced" in out


def test_an_nvfp4_source_goes_through_the_whole_flow_with_layers_as_they_are_stored(
    made: Callable[[str], tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, _ = made("nvfp4")
    space = tmp_path / "space.yaml"
    space.write_text("version: 1\nschemes: [stored, int3.g32]\nlm_head: true\n")
    stats, table, recipe = (tmp_path / name for name in ("stats", "table.jsonl", "recipe.yaml"))
    short = ("--sequences", "4", "--sequence-length", "32", "--lm-head")
    ok("calibrate", folder, "--corpus", "a=demo-en-calibration", *short, "-o", stats)
    ok("measure", folder, "--space", space, "--stats", stats, "-o", table)
    fixed = ("--fix", "last:1=stored", "--fix", "lm_head=stored")
    budget = ("--max-bits", "8.5")
    ok("search", table, *budget, *fixed, "--at-most", "first:1=4", "-o", recipe)
    chosen = load_recipe(recipe)
    assert chosen.made_by["constraints"].startswith("fixed last:1=stored; fixed lm_head=stored")
    schemes = chosen.scheme_of_group
    assert schemes["lm_head"] == "bf16"
    # Exact where one global scale is that of all that engines join.
    assert {schemes[f"layers.1.{of}"] for of in ("attn.o", "mlp.down")} == {"nvfp4@stored"}
    assert schemes["layers.1.attn.qkv"] == "nvfp4"
    assert {s for group, s in schemes.items() if group.startswith("layers.0.")} == {"int3.g32"}
    text = ("--text", "demo-en", "--tokens", "96", "--sequence-length", "32", "--json")
    emulated = ok("validate", folder, recipe, *text).json
    ok("export", folder, recipe, "--to", "compressed-tensors", "-o", tmp_path / "out")
    reloaded = ok("validate", folder, tmp_path / "out", *text).json
    assert emulated["enforced"]
    assert reloaded["enforced"]
    assert reloaded["kl_nats_per_token"] == emulated["kl_nats_per_token"] > 0


@pytest.mark.parametrize(
    ("packing", "schemes", "message"),
    [
        ("int4 groups", "[int3.g32, int8.channel]", "`mofq measure` a search space whose schemes"),
        ("gptq, act order", "[stored, int8.channel]", "keeps it in a way that no scheme has"),
    ],
)
def test_a_layer_that_cannot_be_had_as_it_is_stored_is_refused(
    packing: str,
    schemes: str,
    message: str,
    made: Callable[[str], tuple[Path, dict[str, Tensor]]],
    tmp_path: Path,
) -> None:
    folder, _ = made(packing)
    space, table = tmp_path / "space.yaml", tmp_path / "table.jsonl"
    space.write_text(f"version: 1\nschemes: {schemes}\n")
    ok("measure", folder, "--space", space, "-o", table)
    fixed = ("--fix", "last:1=stored")
    said = refused("search", table, "--max-bits", "7", *fixed, "-o", tmp_path / "recipe.yaml")
    assert "`--fix last:1=stored` leaves no scheme to layers.1.attn.qkv" in said
    assert message in said
    text = ("--corpus", "demo-en-calibration", "--text", "demo-en")
    run = ("run", folder, "--space", space, "--max-bits", "7", *text, *fixed)
    assert message in refused(*run, "-o", tmp_path / "run")


@pytest.mark.long
def test_a_release_of_gpt_oss_is_made_smaller_where_it_is_not_in_mxfp4(tmp_path: Path) -> None:
    folder, run = write_type("gpt_oss", tmp_path / "model"), tmp_path / "run"
    pack_experts(folder)
    short = ("--sequences", "4", "--sequence-length", "32", "--tokens", "96")
    text = ("--corpus", "demo-en-calibration", "--text", "demo-en")
    ok("run", folder, "--max-bits", "4.5", *text, *short, "-o", run)
    recipe = load_recipe(run / "recipe.yaml")
    experts = [group for group in recipe.groups if "experts" in group.layers[0]]
    assert {group.scheme for group in experts} == {"mxfp4"}
    assert recipe.bits_per_weight <= 4.5
    assert {
        row.error
        for row in read_table(run / "table.jsonl").rows
        if row.scheme == "mxfp4" and "experts" in row.group
    } == {0.0}
