"""FP8 checkpoints as sources: what their weights are, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from command_line import ok, refused
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from conftest import TinyCheckpoint
from families import copy_with_config, copy_with_tensors
from fp8_sources import CONVENTIONS, is_quantized, read_all, write_fp8
from packed_sources import PACKINGS
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import open_checkpoint, open_stored
from mofq.model.checkpoint.tensors import check_scales, decode_codes, read_layer_rows, read_tensor
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import find_layers, find_loaded_weight
from mofq.model.loading import load_model
from mofq.model.sizes import source_bytes

#: Rows and columns that 128 does not divide, in both directions and for k and v below 128.
EDGES = {"hidden_size": 192, "intermediate_size": 320}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A llama with cut blocks in every convention."""
    source, root = tiny("llama", **EDGES), tmp_path_factory.mktemp("fp8")
    return {
        name: write_fp8(source, root / str(number), name, scales_apart=number % 2 == 0)
        for number, name in enumerate(CONVENTIONS)
    }


def by_hand(tensors: dict[str, Tensor], name: str) -> np.ndarray:
    """Codes as ml_dtypes reads them times the scale of each element's own tile, in float32."""
    codes = tensors[name].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    weight = codes.astype(np.float32)
    scales = [tensors[key] for key in (f"{name}_scale_inv", f"{name}_scale") if key in tensors]
    if not scales:
        return weight
    scale = scales[0].float().numpy()
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0]
    if scale.size == 1:
        return weight * scale.reshape(())
    if scale.size == len(weight):
        return weight * scale.reshape(-1, 1)
    rows, columns = np.indices(weight.shape)
    return weight * scale[rows // 128, columns // 128]


@pytest.mark.parametrize(
    ("dtype", "reference"),
    [
        (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        (torch.float8_e5m2, ml_dtypes.float8_e5m2),
    ],
)
def test_every_code_has_the_value_that_ml_dtypes_gives_it(
    dtype: torch.dtype, reference: Any
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    needed = torch.from_numpy(codes.numpy().view(reference).astype(np.float32))
    found = decode_codes(codes.view(dtype))
    assert torch.equal(found.isnan(), needed.isnan())
    assert torch.equal(found.nan_to_num(), needed.nan_to_num())
    assert torch.equal(found.signbit()[:128], needed.signbit()[:128])
    assert float(found[128]) == 0
    assert bool(found[128].signbit())


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_weight_is_its_codes_times_its_scales(convention: str, made: dict[str, Path]) -> None:
    folder = made[convention]
    checkpoint, tensors = open_checkpoint(str(folder)), read_all(folder)
    layers = list(find_layers(checkpoint).grouped_layers)
    assert len(layers) == 14
    for layer in layers:
        needed = torch.from_numpy(by_hand(tensors, layer.tensor))
        whole_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
        assert whole_OI.dtype == torch.float32
        assert torch.equal(whole_OI, needed)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (127, 129), (5, 5), (1, 300), (256, 320)])
def test_any_range_of_rows_has_the_scales_of_these_rows(
    convention: str, start: int, stop: int, made: dict[str, Path]
) -> None:
    checkpoint = open_checkpoint(str(made[convention]))
    groups = {group.name: group for group in find_layers(checkpoint).groups}
    layer = groups["layers.1.mlp.gate_up"].layers[1]
    whole_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
    assert torch.equal(read_layer_rows(checkpoint, layer, start, stop), whole_OI[start:stop])


@pytest.mark.parametrize(
    ("convention", "config"),
    [
        ("fp8 blocks", FineGrainedFP8Config(dequantize=True)),
        ("compressed-tensors channel", CompressedTensorsConfig(dequantize=True)),
        ("compressed-tensors block", CompressedTensorsConfig(dequantize=True)),
    ],
)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_the_model_is_bit_for_bit_the_one_that_transformers_dequantizes(
    convention: str, config: Any, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    # transformers wants blocks that are not cut.
    folder = write_fp8(tiny("llama", num_key_value_heads=4), tmp_path / "m", convention)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    ).state_dict()
    ours = load_model(folder).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_compressed_tensors_dequantizes_to_the_same_bits(
    strategy: str, made: dict[str, Path]
) -> None:
    folder = made[f"compressed-tensors {strategy}"]
    config = open_stored(str(folder)).config["quantization_config"]
    arguments = QuantizationArgs.model_validate(config["config_groups"]["group_0"]["weights"])
    tensors, checkpoint = read_all(folder), open_checkpoint(str(folder))
    for name in (Q_PROJ, "model.layers.0.mlp.down_proj.weight"):
        scale = tensors[f"{name}_scale"].float()
        theirs = dequantize(tensors[name], scale, args=arguments, dtype=torch.float32)
        assert torch.equal(read_tensor(checkpoint.tensors[name]), theirs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("convention", ["fp8 blocks", "modelopt channel", "fp8 tensor", "cast"])
def test_experts_are_loaded_as_they_are_measured(
    convention: str, fused: bool, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    source = tiny("qwen3_moe", fused=fused, moe_intermediate_size=96)
    folder = write_fp8(source, tmp_path / "m", convention, scales_apart=True)
    checkpoint, model = open_checkpoint(str(folder)), load_model(folder).state_dict()
    layers = find_layers(checkpoint)
    experts = [la for group in layers.groups for la in group.layers if ".experts." in la.name]
    assert len(experts) == 12
    tensors = {name: t for name, t in read_all(folder).items() if ".experts." in name}
    for layer in experts:
        at = find_loaded_weight(layer, layers.architecture)
        loaded_OI = model[at.name][at.expert][at.row_start :][: layer.out_features]
        stored_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
        assert torch.equal(loaded_OI, stored_OI)
        assert torch.equal(read_layer_rows(checkpoint, layer, 3, 77), stored_OI[3:77])
        if layer.expert is not None:
            of_expert = {name: tensor[layer.expert] for name, tensor in tensors.items()}
            needed_OI = by_hand(of_expert, layer.tensor)[layer.row_start :][: layer.out_features]
            assert torch.equal(stored_OI, torch.from_numpy(needed_OI))


def test_scales_of_powers_of_two_and_of_inputs_are_read_and_left_out(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = write_fp8(tiny("llama"), tmp_path / "a", "fp8 blocks", with_inputs=True)

    def to_exponents(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].log2().ceil().exp2().to(torch.float8_e8m0fnu)

    rounded = copy_with_tensors(folder, tmp_path / "b", to_exponents)
    checkpoint, tensors = open_checkpoint(str(rounded)), read_all(rounded)
    exact = read_tensor(checkpoint.tensors[Q_PROJ])
    assert torch.equal(exact, tensors[Q_PROJ].float() * tensors[f"{Q_PROJ}_scale_inv"].float())
    assert torch.equal(exact, exact.bfloat16().float())
    assert not [name for name in checkpoint.tensors if "scale" in name]
    assert {f"{Q_PROJ}_scale_inv", "model.layers.1.self_attn.k_proj.k_scale"} <= set(
        checkpoint.consumed
    )
    assert "quantization_config" not in checkpoint.config


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_size_of_the_source_is_that_of_its_codes_and_scales(
    convention: str, made: dict[str, Path]
) -> None:
    layers = find_layers(open_checkpoint(str(made[convention])))
    stored = {
        name: tensor.nbytes
        for name, tensor in read_all(made[convention]).items()
        if ".layers." in name and "norm" not in name
    }
    assert sum(map(source_bytes, layers.groups)) == sum(stored.values())
    shown = ok("inspect", made[convention], "--json").json
    assert shown["source_bytes"] == sum(stored.values())
    assert shown["source_format"] is not None


def test_another_scale_is_another_model_of_the_same_shapes(
    made: dict[str, Path], tmp_path: Path
) -> None:
    folder = made["compressed-tensors channel"]
    changed = copy_with_tensors(
        folder, tmp_path / "m", lambda tensors: tensors[f"{Q_PROJ}_scale"].mul_(2)
    )
    one, other = open_checkpoint(str(folder)), open_checkpoint(str(changed))
    assert one.index_sha256 == other.index_sha256
    assert hash_weights(one) != hash_weights(other)
    assert hash_weights(one) == hash_weights(open_stored(str(folder)))


def _drop(tensors: dict[str, Any]) -> None:
    del tensors[f"{Q_PROJ}_scale_inv"]


def _set(**edit: Any) -> Any:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{Q_PROJ}_scale_inv"] = edit["to"](tensors[f"{Q_PROJ}_scale_inv"])

    return change


def _twice(tensors: dict[str, Any]) -> None:
    tensors[f"{Q_PROJ}_scale"] = tensors[f"{Q_PROJ}_scale_inv"].clone()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop, r"q_proj.weight' is F8_E4M3 .*needs its scale .*_scale_inv' or .*found none"),
        (_twice, r"needs its scale .*found both"),
        (_set(to=lambda s: s[:, :1]), r"_scale_inv' needs shape \[1, 2\] .*found \[1, 1\]"),
        (_set(to=lambda s: s.double()), r"_scale_inv' needs dtype F32, .*found F64"),
        (_set(to=torch.zeros_like), r"holds 0\.0 as the scale in row 0, column 0; needed positive"),
        (_set(to=torch.neg), r"holds -.* needed positive"),
        (_set(to=lambda s: s * float("nan")), r"holds nan as the scale .*fetch it again"),
    ],
)
def test_a_scale_that_is_none_is_refused_by_name(
    edit: Any, message: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    good = write_fp8(tiny("llama", hidden_size=192), tmp_path / "good", "fp8 blocks")
    folder = copy_with_tensors(good, tmp_path / "bad", edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_scales(open_checkpoint(str(folder)))
    assert "model.safetensors" in str(caught.value)
    table = tmp_path / "table.jsonl"
    assert re.search(message, refused("measure", folder, "--space", "w8a8", "-o", table))
    assert not table.exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"found .*'gptq'.*FP8 weights: quant_method 'fp8'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"'weight_block_size' needs two"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"found \[0, 128\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"'modelopt'.*quantized already"),
        (None, r"_scale_inv'.*quantized already"),
    ],
)
def test_a_config_of_another_kind_is_refused_and_says_what_is_read(
    edit: dict[str, Any] | None, message: str, made: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_with_config(
        made["fp8 blocks"], tmp_path / "m", lambda c: c.update(quantization_config=edit)
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        find_layers(open_checkpoint(str(folder)))
    assert str(folder) in str(caught.value)


def test_a_lone_fp8_tensor_without_a_scale_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def cast(*names: str) -> Any:
        def change(tensors: dict[str, Any]) -> None:
            tensors |= {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items() if n in names}

        return change

    folder = copy_with_tensors(tiny_llama, tmp_path / "one", cast(Q_PROJ))
    message = refused("measure", folder, "--space", "w8a8", "-o", tmp_path / "table.jsonl")
    assert f"model.safetensors: {Q_PROJ!r} is F8_E4M3 without a scale, and" in message
    assert f"{Q_PROJ.replace('.0.', '.1.')!r} is BF16: needed one dtype in all layers" in message
    assert "before it was quantized" in message
    both = copy_with_tensors(
        tiny_llama, tmp_path / "both", cast(Q_PROJ, Q_PROJ.replace(".0.", ".1."))
    )
    assert open_checkpoint(str(both)).source_format == "FP8 without scales"


def test_older_modelopt_says_it_in_a_file_of_its_own(made: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_with_config(
        made["modelopt tensor"], tmp_path / "m", lambda c: c.pop("quantization_config")
    )
    algorithm = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": algorithm})
    )
    checkpoint = open_checkpoint(str(folder))
    needed = read_tensor(open_checkpoint(str(made["modelopt tensor"])).tensors[Q_PROJ])
    assert torch.equal(read_tensor(checkpoint.tensors[Q_PROJ]), needed)


def test_a_mixture_of_integers_and_fp8_is_read(made: dict[str, Path], tmp_path: Path) -> None:
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    stated, (parts, needed) = PACKINGS["int4 groups"](weight)

    def pack(tensors: dict[str, Tensor]) -> None:
        assert tensors.pop(Q_PROJ).shape == weight.shape
        del tensors[f"{Q_PROJ}_scale"]
        tensors |= {Q_PROJ.removesuffix("weight") + end: part for end, part in parts.items()}

    def mix(config: dict[str, Any]) -> None:
        group = stated["config_groups"]["group_0"]
        config["quantization_config"]["config_groups"]["group_1"] = group

    plain = copy_with_tensors(made["compressed-tensors channel"], tmp_path / "m", pack)
    checkpoint = open_checkpoint(str(copy_with_config(plain, tmp_path / "mixed", mix)))
    assert torch.equal(read_tensor(checkpoint.tensors[Q_PROJ]).bfloat16(), needed)
    other = Q_PROJ.replace("q_proj", "k_proj")
    of_fp8 = open_checkpoint(str(made["compressed-tensors channel"])).tensors[other]
    assert torch.equal(read_tensor(checkpoint.tensors[other]), read_tensor(of_fp8))
    assert checkpoint.source_format == (
        "compressed-tensors, INT4 in groups of 32 and"
        " compressed-tensors, FP8 with a scale for each row"
    )
    find_layers(checkpoint)


def test_a_device_map_spreads_decoded_weights_too(made: dict[str, Path]) -> None:
    ours = load_model(made["fp8 blocks"]).state_dict()
    spread = load_model(made["fp8 blocks"], device_map="cpu").state_dict()
    assert all(torch.equal(spread[name], ours[name]) for name in ours)


def test_what_is_quantized_in_the_tests_is_the_decoder(made: dict[str, Path]) -> None:
    tensors = read_all(made["fp8 blocks"])
    codes = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert codes == {name for name in codes if is_quantized(name, tensors[name])}
    assert len(codes) == 14
