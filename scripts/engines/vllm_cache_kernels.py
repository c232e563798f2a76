"""Writes down what vLLM's Triton kernels keep of keys and values, run by Triton's interpreter.

    python scripts/engines/vllm_cache_kernels.py VLLM tests/numbers/vllm_cache.safetensors

VLLM is the folder that a wheel of vLLM was unpacked to. Needs torch, safetensors and triton 3.9.0;
no GPU, and nothing of mofq. The kernels are those of the wheel's files, which are loaded without
the rest of vLLM. What the interpreter does otherwise than a GPU: divisions are rounded once, and
no multiplication is fused with an addition. Its conversion to FP8 is replaced by torch's, as it
rounds halves up and loses a carry, where GPUs round to nearest even (``cvt.rn.satfinite.e4m3x2``
in the PTX that Triton makes of the same kernel).

The file has, for heads of some sizes: the rows that were cached and what each format gives back
for them; and what attention makes of an INT4 cache.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")
interpreter: Any = importlib.import_module("triton.runtime.interpreter")

OPS = "vllm.v1.attention.ops"
#: Channels of a head, and the dtype of the model. 80 channels are rotated in blocks of 16.
CASES = ((32, torch.float32), (64, torch.bfloat16), (80, torch.bfloat16))
#: `KVQuantMode` -> what the cache is a tensor of.
INT8, FP8, INT4 = 2, 3, 4
STORED = {INT8: torch.int8, FP8: torch.float8_e4m3fn, INT4: torch.uint8}
BLOCK = 16


def load_kernels(folder: Path) -> tuple[Any, Any]:
    """The modules of the INT4 kernels, and of those of INT8 and FP8."""
    fp8 = torch.float8_e4m3fn
    platform = SimpleNamespace(
        fp8_dtype=lambda: fp8,
        is_cuda=lambda: False,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
    )
    modes = {"INT8_PER_TOKEN_HEAD": INT8, "FP8_PER_TOKEN_HEAD": FP8, "INT4_PER_TOKEN_HEAD": INT4}
    quantization = "vllm.model_executor.layers.quantization.utils.quant_utils"
    _stand_in("vllm.platforms", current_platform=platform)
    _stand_in("vllm.triton_utils", tl=tl, triton=triton)
    _stand_in("vllm.envs", VLLM_BATCH_INVARIANT=False)
    _stand_in("vllm.utils.math_utils", largest_power_of_2_divisor=lambda n: n & -n)
    _stand_in(quantization, FP8_DTYPE=fp8, get_fp8_min_max=lambda: (-448.0, 448.0))
    _stand_in(
        "vllm.v1.kv_cache_interface",
        KVQuantMode=SimpleNamespace(**modes),
        is_quantized_kv_cache=lambda name: True,
    )
    _stand_in(
        f"{OPS}.triton_unified_attention",
        reduce_segments=None,
        _get_tile_size=lambda *sizes, **kind: BLOCK,
    )
    _load(folder, "triton_attention_helpers")
    return _load(folder, "int4_per_token_head"), _load(folder, "triton_reshape_and_cache_flash")


def _stand_in(name: str, **content: object) -> None:
    """A module, and the packages around it, in the place of vLLM's."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        package = ModuleType(".".join(parts[:end]))
        package.__path__ = []
        sys.modules.setdefault(package.__name__, package)
    sys.modules[name].__dict__.update(content)


def _load(folder: Path, name: str) -> ModuleType:
    path = folder / OPS.replace(".", "/") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{OPS}.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def round_to_fp8_as_torch() -> None:
    """Replace the interpreter's conversion to FP8."""
    convert = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target == tl.float8e4nv:
            codes = torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    interpreter._convert_float = converted


def adversarial_rows(size: int) -> Tensor:
    """Heads that a rule of rounding shows in, float32 [tokens, 1, size]."""
    x = torch.randn(24, 1, size, generator=torch.Generator().manual_seed(size))
    x[1] = 0.0
    x[2] *= 1e-7  # below the smallest scale
    x[3] *= 1e-5
    x[4, :, 3] = 300.0  # an outlier
    x[5] = torch.round(x[5] * 4) / 4
    x[6], x[7] = 1.0, -1.0  # a constant head, which the rotation makes a single channel
    x[8], x[9] = 0.0, 0.0
    x[8, :, 0] = 1000.0  # a single channel, which the rotation makes a constant head
    x[9, :, size - 1] = -5.0
    x[10] *= 1e4
    x[11, :, 5] = -3e30
    x[12] = x[12].abs() + 3.0  # nothing negative
    x[13] = torch.arange(size) % 16 * 0.5
    x[14] = 127.0  # a scale of 1, and halves that tie under it
    x[14, :, 1:9] = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, -3.5, 126.5, -126.5])
    x[15] = 448.0  # the same for FP8
    x[15, :, 1:9] = torch.tensor([17.0, 19.0, -17.0, -19.0, 2**-10, 3 * 2**-10, 432.0, -1e-4])
    return x


def kept(kernels: tuple[Any, Any], x: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """The pages and scales after ``x`` was written as keys and as values."""
    tokens, heads, size = x.shape
    pages = -(-tokens // BLOCK)
    shape = (pages, BLOCK, heads, size // 2 if mode == INT4 else size)
    keys, values = torch.zeros(shape, dtype=STORED[mode]), torch.zeros(shape, dtype=STORED[mode])
    key_scales, value_scales = torch.ones(shape[:3]), torch.ones(shape[:3])
    kernels[1].triton_reshape_and_cache_flash_per_token_head_quant(
        x, x, keys, values, key_scales, value_scales, torch.arange(tokens), mode
    )
    assert torch.equal(keys.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(key_scales, value_scales)
    return keys, key_scales


def given_back(kernels: tuple[Any, Any], x: Tensor, mode: int) -> Tensor:
    """What codes and scales stand for, in the dtype of ``x``."""
    pages, scales = kept(kernels, x, mode)
    codes = pages.flatten(0, 1)[: len(x)]
    scale = scales.flatten(0, 1)[: len(x), :, None]
    if mode != INT4:
        return (codes.float() * scale).to(x.dtype)
    bits = scale.view(torch.int32)
    code = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
    rotated = (code - (bits & 15).float()) * (bits & -16).view(torch.float32)
    size = x.shape[-1]
    straight: Tensor = kernels[0].single_rht(rotated, inverse=True) / (size & -size)
    return straight.to(x.dtype)


def attended(kernels: tuple[Any, Any], query: Tensor, x: Tensor) -> Tensor:
    """What causal attention gives for queries over the INT4 cache of as many tokens."""
    pages, scales = kept(kernels, x, INT4)
    tokens, _, size = x.shape
    out = torch.zeros_like(query)
    kernels[0].unified_attention_int4(
        query,
        pages,
        pages,
        out,
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32),
        max_seqlen_q=tokens,
        seqused_k=torch.tensor([tokens], dtype=torch.int32),
        max_seqlen_k=tokens,
        softmax_scale=size**-0.5,
        window_size=(-1, -1),
        block_table=torch.arange(len(pages), dtype=torch.int32)[None],
        softcap=0.0,
        sinks=None,
        alibi_slopes=None,
        use_alibi_sqrt=False,
        qq_bias=None,
        output_scale=None,
        mm_prefix_range=None,
        k_scale_cache=scales,
        v_scale_cache=scales,
    )
    return out


def main(folder: str, out: str) -> None:
    """Run the kernels and write the file."""
    kernels = load_kernels(Path(folder))
    round_to_fp8_as_torch()
    found: dict[str, Tensor] = {}
    for size, dtype in CASES:
        x = adversarial_rows(size).to(dtype)
        found[f"x.{size}"] = x
        for name, mode in (("int8", INT8), ("fp8_e4m3", FP8), ("int4", INT4)):
            found[f"{name}.{size}"] = given_back(kernels, x, mode)
    generator = torch.Generator().manual_seed(0)
    query, x = (torch.randn(20, 1, 64, generator=generator) for _ in range(2))
    found |= {"query": query, "x": x, "attended": attended(kernels, query, x)}
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
