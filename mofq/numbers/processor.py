"""What the processor can do, as the system says it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

#: Instructions for products of bfloat16, as Linux names them: of Intel and AMD, and of Arm.
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


@lru_cache(maxsize=1)
def processor_flags() -> str:
    """Names of its instructions, separated by spaces; empty where the system is not Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return found.partition(":")[2].strip()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not _BFLOAT16.isdisjoint(processor_flags().split())
