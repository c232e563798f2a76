"""Lets PyPI's torchvision be imported beside a CPU build of torch. Copied into check.py's venv.

Its library wants CUDA and is not loaded; what of it is looked up while it is imported (meta and
gradient rules of its operators) is declared here first. Transforms of images then work, and
operators on boxes do not, which no language model needs. Python imports this file as it starts.
"""

from __future__ import annotations

import sys
from typing import Any

_BOXES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _Declaring:
    """Stands before all finders until torchvision is looked for, and finds nothing."""

    library: Any = None  #: kept: an operator goes with what declared it

    @classmethod
    def find_spec(cls, name: str, *_: object) -> None:
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")
            for operator in _BOXES:
                cls.library.define(operator)


sys.meta_path.insert(0, _Declaring)
