"""Writes an FP8 copy of a checkpoint, as DeepSeek-V3 or llm-compressor lays it out.

    python scripts/make/fp8_checkpoint.py MODEL --scales blocks -o MODEL-fp8
    python scripts/make/fp8_checkpoint.py MODEL --scales rows -o MODEL-fp8

To try what docs/how-to/fp8.md says on a model that has no FP8 release. The matrices of the decoder
layers are rounded to FP8 E4M3 with absmax scales: float32 ones of blocks of 128 x 128
(``quant_method: fp8``), or bfloat16 ones of rows (``compressed-tensors``). All is done in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 128
_LARGEST = 448.0

_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
_INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "blocks": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [_BLOCK, _BLOCK],
    },
    "rows": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _WEIGHTS,
                "input_activations": _INPUTS,
            }
        },
    },
}


def quantize_blocks(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in], and float32 scales of blocks, which the edges may cut."""
    rows, columns = weight_OI.shape
    padded = pad(weight_OI, (0, -columns % _BLOCK, 0, -rows % _BLOCK))
    tiles = padded.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    scale = tiles.abs().amax((1, 3)) / _LARGEST
    codes = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in], and bfloat16 scales [out, 1]."""
    scale_O1 = (weight_OI.abs().amax(1, keepdim=True) / _LARGEST).bfloat16()
    codes_OI = (weight_OI / scale_O1.float()).clamp(-_LARGEST, _LARGEST)
    return codes_OI.to(torch.float8_e4m3fn), scale_O1


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scales", choices=CONFIGS, default="blocks")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    is_blocks = options.scales == "blocks"
    quantize = quantize_blocks if is_blocks else quantize_rows
    shutil.copytree(options.model, options.output, ignore=shutil.ignore_patterns("*.safetensors*"))
    written: dict[str, Tensor] = {}
    for path in sorted(options.model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if ".layers." in name and tensor.ndim == 2 and not name.endswith(".gate.weight"):
                    tensor, scale = quantize(tensor.float())
                    written[f"{name}_scale_inv" if is_blocks else f"{name}_scale"] = scale
                written[name] = tensor
    config = json.loads((options.output / "config.json").read_text())
    config["quantization_config"] = CONFIGS[options.scales]
    (options.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(written, options.output / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
