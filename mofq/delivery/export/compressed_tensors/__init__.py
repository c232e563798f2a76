"""Checkpoints in the compressed-tensors format, which vLLM, SGLang and transformers load."""

from __future__ import annotations

from mofq.delivery.export.compressed_tensors.check_folder import (
    check_compressed_tensors,
    find_folder_deviations,
)
from mofq.delivery.export.compressed_tensors.export import (
    Export,
    export_compressed_tensors,
    read_export,
)
from mofq.delivery.export.compressed_tensors.recipe_from_folder import (
    recipe_from_compressed_tensors,
)

__all__ = [
    "Export",
    "check_compressed_tensors",
    "export_compressed_tensors",
    "find_folder_deviations",
    "read_export",
    "recipe_from_compressed_tensors",
]
