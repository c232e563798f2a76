"""Stands in for timm, of which transformers builds the vision towers of some types.

timm imports torchvision, whose compiled operators on PyPI are of torch's CUDA builds and do not
load beside one for a CPU. mofq leaves towers as they are, so that any tower will do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.models.timm_wrapper import modeling_timm_wrapper
from transformers.utils import is_timm_available

_WIDTH = 32


def stand_in_for_timm() -> None:
    """Let ``TimmWrapperModel`` of this process build a small tower, where timm is not installed."""
    if not is_timm_available():
        modeling_timm_wrapper.timm = SimpleNamespace(create_model=_create_model)
        modeling_timm_wrapper.requires_backends = lambda *_: None


def _create_model(_architecture: str, **_options: Any) -> nn.Module:
    """A tower with names of timm's, of linear layers too; it cannot be run."""
    tower = nn.Module()
    tower.conv_stem = nn.Conv2d(3, _WIDTH, 3)
    tower.blocks = nn.ModuleList(_create_block() for _ in range(2))
    return tower


def _create_block() -> nn.Module:
    block = nn.Module()
    block.attn = nn.Module()
    block.attn.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
    block.attn.proj = nn.Linear(_WIDTH, _WIDTH)
    return block
