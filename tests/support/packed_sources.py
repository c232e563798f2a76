"""Checkpoints with packed weights as their tools write them, made from unquantized ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from fp8_sources import is_quantized, read_all, save
from torch import Tensor

#: What is stored of one weight, by the end of its name; and the weight that it stands for.
Stored = tuple[dict[str, Tensor], Tensor]
#: Eight columns of a word, from its low end.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GROUP = 32


def compressed_tensors(
    form: str, weight_OI: Tensor, *, group_size: int | None = None, **stated: Any
) -> tuple[dict[str, Any], Stored]:
    """By the format's own compressor; the weight is what its own decompressor makes of it."""
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(group_size=group_size, **stated)
    )
    args, compressor = scheme.weights, BaseCompressor.get_value_from_registry(form)
    parts = _scales(form, weight_OI, args, group_size)
    packed = compressor.compress({"weight": weight_OI, **parts}, scheme)
    values = compressor.decompress(dict(packed), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    return config, ({name: t.contiguous() for name, t in packed.items()}, values)


def _scales(form: str, weight_OI: Tensor, args: Any, group_size: int | None) -> dict[str, Tensor]:
    weight = weight_OI.float()
    if form == "nvfp4-pack-quantized":
        whole = (448 * 6 / weight.abs().max()).reshape(1)
        amax = weight.unflatten(1, (-1, 16)).abs().amax(-1)
        scale = (amax / 6 * whole).to(torch.float8_e4m3fn).float()
        return {"weight_scale": scale, "weight_global_scale": whole}
    if form == "mxfp4-pack-quantized":
        amax = weight.unflatten(1, (-1, 32)).abs().amax(-1)
        return {"weight_scale": torch.exp2(amax.log2().floor() - 2)}
    groups = weight.reshape(1, 1, -1)
    if args.strategy != "tensor":
        groups = weight.unflatten(1, (-1, group_size or weight.shape[1]))
    scale, point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    if args.strategy == "tensor":
        scale, point = scale.reshape(1), point.reshape(1)
    return {"weight_scale": scale.bfloat16(), "weight_zero_point": point.to(torch.int8)}


def _asymmetric(weight_OI: Tensor, bits: int, group_I: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, I], zero points [O, G] and float16 scales [O, G]; a column is in any group."""
    groups = int(group_I.max()) + 1
    of = [weight_OI.float()[:, group_I == g] for g in range(groups)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in of], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in of], 1)
    scale = ((high - low) / (2**bits - 1)).half()
    point = (-low / scale.float()).round().clamp(1, 2**bits - 1)
    code = (weight_OI.float() / scale.float()[:, group_I]).round() + point[:, group_I]
    return code.clamp(0, 2**bits - 1).long(), point.long(), scale


def _values(code: Tensor, point: Tensor, scale: Tensor, group_I: Tensor) -> Tensor:
    return (code - point[:, group_I]).float() * scale.float()[:, group_I]


def gptq(weight_OI: Tensor, *, bits: int, form: str, act_order: bool) -> tuple[Any, Stored]:
    """Of GPTQ's exporters: bit by bit, from the first column up."""
    columns = weight_OI.shape[1]
    group_I = torch.arange(columns) // _GROUP
    if act_order:
        group_I = group_I[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    code, point, scale = _asymmetric(weight_OI, bits, group_I)
    stored = {
        "qweight": _by_bits(code.T, bits),
        "qzeros": _by_bits(point - int(form == "gptq"), bits).T.contiguous(),
        "scales": scale.T.contiguous(),
        "g_idx": group_I.to(torch.int32),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": _GROUP, "checkpoint_format": form}
    return config | {"sym": False, "desc_act": act_order}, (
        stored,
        _values(code, point, scale, group_I),
    )


def _by_bits(code_HW: Tensor, bits: int) -> Tensor:
    """Codes packed down the rows, as text of zeros and ones says it."""
    columns = []
    for column in code_HW.T.tolist():
        text = "".join(format(code, f"0{bits}b")[::-1] for code in column)
        text += "0" * (-len(text) % 32)
        columns.append([int(text[i : i + 32][::-1], 2) for i in range(0, len(text), 32)])
    words = torch.tensor(columns).T
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def awq(weight_OI: Tensor) -> tuple[Any, Stored]:
    """Of AutoAWQ's GEMM."""
    group_I = torch.arange(weight_OI.shape[1]) // _GROUP
    code, point, scale = _asymmetric(weight_OI, 4, group_I)
    stored = {
        "qweight": _eight_a_word(code.T),
        "qzeros": _eight_a_word(point.T),
        "scales": scale.T.contiguous(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "version": "gemm"}
    return config | {"zero_point": True}, (stored, _values(code, point, scale, group_I))


def _eight_a_word(code_HW: Tensor) -> Tensor:
    words = sum(code_HW[:, column::8] << (4 * place) for place, column in enumerate(_AWQ_ORDER))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def modelopt(weight_OI: Tensor) -> tuple[Any, Stored]:
    """NVFP4 of ModelOpt: the same codes and scales, the global scale the other way round."""
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True}
    _, (stored, _) = compressed_tensors(
        "nvfp4-pack-quantized", weight_OI.float(), group_size=16, **args
    )
    whole = stored["weight_global_scale"]
    parts = {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": (1 / whole).reshape(()),
        "input_scale": torch.tensor(0.5),
    }
    return {"quant_method": "modelopt", "quant_algo": "NVFP4"}, (parts, _modelopt_values(stored))


def _modelopt_values(stored: dict[str, Tensor]) -> Tensor:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table])
    packed = stored["weight_packed"].long()
    value = torch.stack([table[packed & 15], table[packed >> 4]], -1).flatten(1)
    scale = stored["weight_scale"].float() * (1 / stored["weight_global_scale"])
    return value * scale.repeat_interleave(16, 1)


def _ints(form: str, bits: int, strategy: str, *, symmetric: bool) -> Callable[[Tensor], Any]:
    size = _GROUP if strategy == "group" else None
    stated = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    return lambda weight: compressed_tensors(form, weight, group_size=size, **stated)


#: Name -> what makes config, stored tensors and values of a weight.
PACKINGS: dict[str, Callable[[Tensor], tuple[dict[str, Any], Stored]]] = {
    "int4 groups": _ints("pack-quantized", 4, "group", symmetric=True),
    "int4 groups, zero points": _ints("pack-quantized", 4, "group", symmetric=False),
    "int3 groups, zero points": _ints("pack-quantized", 3, "group", symmetric=False),
    "int6 rows": _ints("pack-quantized", 6, "channel", symmetric=True),
    "int8 packed rows, zero points": _ints("pack-quantized", 8, "channel", symmetric=False),
    "int8 rows": _ints("int-quantized", 8, "channel", symmetric=True),
    "int8 rows, zero points": _ints("int-quantized", 8, "channel", symmetric=False),
    "int8 tensor": _ints("int-quantized", 8, "tensor", symmetric=True),
    "nvfp4": lambda weight: compressed_tensors(
        "nvfp4-pack-quantized",
        weight.float(),
        group_size=16,
        num_bits=4,
        type="float",
        strategy="tensor_group",
        symmetric=True,
    ),
    "mxfp4": lambda weight: compressed_tensors(
        "mxfp4-pack-quantized",
        weight.float(),
        group_size=32,
        num_bits=4,
        type="float",
        strategy="group",
        symmetric=True,
        scale_dtype=torch.uint8,
    ),
    "modelopt nvfp4": modelopt,
    "gptq": lambda weight: gptq(weight, bits=4, form="gptq", act_order=False),
    "gptq, act order": lambda weight: gptq(weight, bits=4, form="gptq", act_order=True),
    "gptq v2, 3 bits": lambda weight: gptq(weight, bits=3, form="gptq_v2", act_order=False),
    "gptq, 8 bits": lambda weight: gptq(weight, bits=8, form="gptq", act_order=False),
    "awq": awq,
}


def write_packed(source: Path, target: Path, packing: str) -> dict[str, Tensor]:
    """Quantize the linear layers of a checkpoint's decoder, and write it as a tool does.

    Args:
        source: An unquantized checkpoint whose experts, if any, are stored one by one.
        target: Is created.
        packing: A key of `PACKINGS`.

    Returns:
        Name -> the values that the checkpoint stands for, of every tensor.
    """
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((target / "config.json").read_text())
    tensors, values = read_all(source), {}
    for name in list(tensors):
        values[name] = tensors[name]
        if is_quantized(name, tensors[name]):
            stated, (parts, values[name]) = PACKINGS[packing](tensors.pop(name))
            config["quantization_config"] = stated
            tensors |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    (target / "config.json").write_text(json.dumps(config))
    save(tensors, target / "model.safetensors")
    return values


def pack_experts(folder: Path) -> None:
    """Write the experts of a gpt-oss checkpoint in MXFP4, as it is released, in their place."""
    config = json.loads((folder / "config.json").read_text())
    tensors = read_all(folder)
    for name in [one for one in tensors if one.endswith(("experts.gate_up_proj", "down_proj"))]:
        weight_EOGK = tensors.pop(name).float().transpose(1, 2).unflatten(2, (-1, 32))
        exponent_EOG = weight_EOGK.abs().amax(-1).log2().floor() - 2
        value_EOGK = weight_EOGK / torch.exp2(exponent_EOG)[..., None]
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        code_EOGK = (value_EOGK.abs()[..., None] - magnitudes).abs().argmin(-1)
        code_EOGK = (code_EOGK + 8 * (value_EOGK < 0)).to(torch.uint8)
        tensors[f"{name}_blocks"] = code_EOGK[..., ::2] | (code_EOGK[..., 1::2] << 4)
        tensors[f"{name}_scales"] = (exponent_EOG + 127).to(torch.uint8)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save(tensors, folder / "model.safetensors")
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
