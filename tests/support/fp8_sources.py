"""FP8 checkpoints as their tools write them, made from unquantized ones by plain torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

#: Codes and scale of a weight [out, in].
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]

_LARGEST = 448.0


def quantize_blocks(
    weight_OI: Tensor, *, tile: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """Codes, and one scale for each tile, as DeepSeek-V3 does it; tiles are cut at the edges."""
    codes = torch.empty_like(weight_OI, dtype=torch.float8_e4m3fn)
    rows, columns = (-(-size // step) for size, step in zip(weight_OI.shape, tile, strict=True))
    scale = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            at = (
                slice(row * tile[0], (row + 1) * tile[0]),
                slice(column * tile[1], (column + 1) * tile[1]),
            )
            block = weight_OI[at].float()
            scale[row, column] = block.abs().max() / _LARGEST
            codes[at] = (block / scale[row, column]).to(torch.float8_e4m3fn)
    return codes, scale


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and one scale for each row, [out, 1]."""
    scale_O1 = weight_OI.float().abs().amax(1, keepdim=True) / _LARGEST
    return (weight_OI.float() / scale_O1).to(torch.float8_e4m3fn), scale_O1


def quantize_tensor(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and one scale, without a dimension."""
    scale = weight_OI.float().abs().max() / _LARGEST
    return (weight_OI.float() / scale).to(torch.float8_e4m3fn), scale


def _compressed_tensors(strategy: str, **weights: Any) -> dict[str, Any]:
    arguments = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **weights}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
_MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head"]}


def _four_dimensions(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_blocks(weight_OI)
    return codes, scale[:, None, :, None]


#: Name -> quantization config, what a scale's name ends with, how a weight is quantized.
CONVENTIONS: dict[str, tuple[dict[str, Any] | None, str, Quantize]] = {
    "fp8 blocks": (_BLOCKS, "_scale_inv", quantize_blocks),
    "fp8 blocks, bf16 scales": (
        _BLOCKS,
        "_scale_inv",
        lambda weight: (lambda c, s: (c, s.bfloat16()))(*quantize_blocks(weight)),
    ),
    "fp8 tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        "_scale",
        quantize_tensor,
    ),
    "compressed-tensors channel": (_compressed_tensors("channel"), "_scale", quantize_rows),
    "compressed-tensors tensor": (
        _compressed_tensors("tensor"),
        "_scale",
        lambda weight: (lambda c, s: (c, s.reshape(1)))(*quantize_tensor(weight)),
    ),
    "compressed-tensors block": (
        _compressed_tensors("block", block_structure=[128, 128]),
        "_scale",
        quantize_blocks,
    ),
    "modelopt tensor": ({**_MODELOPT, "quant_algo": "FP8"}, "_scale", quantize_tensor),
    "modelopt channel": (
        {**_MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "_scale",
        lambda weight: (lambda c, s: (c, s[:, 0]))(*quantize_rows(weight)),
    ),
    "modelopt block": ({**_MODELOPT, "quant_algo": "FP8_PB_WO"}, "_scale", _four_dimensions),
    "cast": (None, "", lambda weight: (weight.float().to(torch.float8_e4m3fn), torch.empty(0))),
}


def write_fp8(
    source: Path,
    target: Path,
    convention: str,
    *,
    scales_apart: bool = False,
    with_inputs: bool = False,
) -> Path:
    """Quantize the linear layers of a checkpoint's decoder, and write it as a tool does.

    Args:
        source: An unquantized checkpoint.
        target: Is created.
        convention: A key of `CONVENTIONS`.
        scales_apart: Put all scales into a shard of their own.
        with_inputs: Also write scales of inputs and of the KV cache, as static schemes have.

    Returns:
        The folder.
    """
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((target / "config.json").read_text())
    stated, suffix, quantize = CONVENTIONS[convention]
    if stated is not None:
        config["quantization_config"] = stated
    (target / "config.json").write_text(json.dumps(config))
    tensors = read_all(source)
    scales: dict[str, Tensor] = {}
    for name in [name for name, tensor in tensors.items() if is_quantized(name, tensor)]:
        tensors[name], scale = quantize_experts(tensors[name], quantize)
        if suffix:
            scales[name + suffix] = scale
        if with_inputs:
            scales |= _scales_of_inputs(name.removesuffix(".weight"))
    if scales_apart:
        _save_apart(tensors, scales, target)
    else:
        save(tensors | scales, target / "model.safetensors")
    return target


def _scales_of_inputs(module: str) -> dict[str, Tensor]:
    scales = {f"{module}.input_scale": torch.tensor(0.5)}
    if module.endswith("k_proj"):
        scales[f"{module}.k_scale"] = torch.tensor(0.25)
    return scales


def _save_apart(tensors: dict[str, Tensor], scales: dict[str, Tensor], folder: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": scales or {"unused": torch.zeros(1)},
        "model-00002-of-00002.safetensors": tensors,
    }
    for file, some in shards.items():
        save(some, folder / file)
    weight_map = {name: file for file, some in shards.items() for name in some}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantize_experts(weight: Tensor, quantize: Quantize) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, or of each of a tensor's experts."""
    if weight.ndim == 2:
        return quantize(weight)
    each = [quantize(one) for one in weight]
    # torch.stack knows no FP8.
    codes = torch.stack([codes.view(torch.uint8) for codes, _ in each]).view(each[0][0].dtype)
    return codes, torch.stack([scale for _, scale in each])


def is_quantized(name: str, weight: Tensor) -> bool:
    """Whether tools quantize it: a matrix of the decoder that is no router."""
    return ".layers." in name and weight.ndim > 1 and not name.endswith(".mlp.gate.weight")


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by safetensors' own reader."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return found


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file."""
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"format": "pt"})
