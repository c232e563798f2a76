"""The one judge: what a quantized model loses on a text that nobody calibrated on.

A folder in compressed-tensors is decoded by the package compressed-tensors itself, in float32; of
other formats the peer's own code has made float32 weights (`handover`). Inputs of layers that are
quantized too are rounded as mofq emulates them. Both models run in float32 over the same windows,
and are compared as `mofq validate` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mofq.decision import recipe_from_layers
from mofq.decision.recipe import Recipe
from mofq.delivery.apply.emulate import apply_groups
from mofq.delivery.export.compressed_tensors import recipe_from_compressed_tensors
from mofq.delivery.export.compressed_tensors.model_from_folder import quantize_inputs
from mofq.delivery.export.compressed_tensors.recipe_from_folder import (
    QUANTIZATION_KEY,
    config_group,
)
from mofq.delivery.validation.divergence import OriginalLogits, compare, run_original
from mofq.delivery.validation.report import Agreement, summarize
from mofq.evidence.corpora import load_text
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint, open_stored
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from scripts.reproduce.peers.handover import MADE, MODEL, WEIGHTS
from scripts.shared.windows import model_windows

#: Beside a layer's weight, and no part of what stands for it.
_NOT_COUNTED = ("weight_shape", "bias")


@dataclass(frozen=True, slots=True)
class Quantized:
    """A model as a peer made it, ready to run."""

    model: PreTrainedModel  #: float32
    bits_per_weight: float  #: of the decoder's linear layers: codes, scales, zero points, padding


class Judge:
    """An original that has run over a text; close it to drop its logits.

    They lie in a temporary file: windows times tokens times vocabulary times 4 bytes.
    """

    def __init__(self, model: str, text: str, *, windows: int, sequence_length: int) -> None:
        """Cut the text into windows spread over it, and run the original over them."""
        self.original = open_checkpoint(model)
        self.windows_NT = model_windows(
            self.original, load_text(text), windows=windows, sequence_length=sequence_length
        )
        self._logits = OriginalLogits()
        self._entropies = run_original(
            load_model(self.original.folder), self.windows_NT, into=self._logits
        )

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._logits.close()

    def judge(self, quantized: Quantized) -> Agreement:
        """KL to the original with its standard error over windows, perplexities, agreement."""
        scores = compare(quantized.model, self.windows_NT, original=self._logits)
        return summarize(scores, self._entropies, sequence_length=int(self.windows_NT.shape[1]))


def read_entry(original: Checkpoint, folder: Path) -> Quantized:
    """The model of what a script has handed over."""
    if (folder / MODEL).is_dir():
        return read_folder(original, folder / MODEL)
    made = json.loads((folder / MADE).read_text("utf-8"))
    weights = load_file(folder / WEIGHTS)
    return read_weights(original, weights, stored=made["stored_bytes"], inputs=made["inputs"])


def read_folder(original: Checkpoint, folder: Path) -> Quantized:
    """The model of a folder in compressed-tensors, whoever wrote it.

    Args:
        original: That it was made of.
        folder: With its own config and all tensors.
    """
    stored = open_stored(str(folder))
    config = stored.config[QUANTIZATION_KEY]
    tensors: dict[str, Callable[[], Tensor]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name, info in stored.tensors.items():
        layer, _, part = name.rpartition(".")
        group = config_group(config, layer)
        if group is None or part == "bias" or f"{layer}.weight_scale" not in stored.tensors:
            tensors[name] = partial(read_tensor, info)
        else:
            tensors[f"{layer}.weight"] = partial(_decompress, stored, layer, group)
        sizes.setdefault(layer, {})[part] = info.nbytes
    model = load_model(stored.folder, tensors=tensors)
    # Of weights alone, layers that engines join may have several schemes, which the recipe refuses.
    if any(group.get("input_activations") for group in config["config_groups"].values()):
        model = apply_groups(model, recipe_from_compressed_tensors(folder), quantize_inputs)
    return Quantized(model, bits_per_weight(original, sizes))


def _decompress(stored: Checkpoint, layer: str, group: Mapping[str, Any]) -> Tensor:
    """A weight as compressed-tensors decodes it; scales in float32, so that it rounds nothing."""
    parts = {
        name.rpartition(".")[2]: read_tensor(info)
        for name, info in stored.tensors.items()
        if name.rpartition(".")[0] == layer
    }
    if parts["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        parts["weight_scale"] = parts["weight_scale"].float()
    form = group.get("format") or stored.config[QUANTIZATION_KEY]["format"]
    compressor = BaseCompressor.get_value_from_registry(form)
    scheme = QuantizationScheme.model_validate(group)
    weight_OI: Tensor = compressor.decompress(parts, scheme)["weight"]
    return weight_OI


def read_weights(
    original: Checkpoint,
    weights: Mapping[str, Tensor],
    *,
    stored: Mapping[str, Mapping[str, int]],
    inputs: str | None,
) -> Quantized:
    """The model of weights that a peer's code has decoded.

    Args:
        original: Whose other tensors stay as they are.
        weights: Name of a tensor -> its values, float32.
        stored: Layer -> name -> bytes of what stands for its weight; the others are the original's.
        inputs: How inputs of those layers are rounded, or None.

    Raises:
        SystemExit: A weight has no place in the original.
    """
    unknown = sorted(weights.keys() - original.tensors.keys())
    if unknown:
        raise SystemExit(f"{original.name} has no tensor {unknown[0]!r}, which was handed over.")
    tensors: dict[str, Callable[[], Tensor]] = {
        name: partial(read_tensor, info) for name, info in original.tensors.items()
    }
    tensors |= {name: partial(weights.__getitem__, name) for name in weights}
    model = load_model(original.folder, tensors=tensors)
    if inputs is not None:
        model = apply_groups(model, _rounding_inputs(original, stored, inputs), quantize_inputs)
    return Quantized(model, bits_per_weight(original, stored))


def _rounding_inputs(original: Checkpoint, quantized: Collection[str], inputs: str) -> Recipe:
    """A recipe of which `quantize_inputs` takes what it says of inputs."""
    layers = find_layers(original)
    schemes = {}
    for group in layers.groups:
        is_quantized = {layer.name for layer in group.layers} <= set(quantized)
        schemes[group.name] = f"int8.channel+{inputs}" if is_quantized else "bf16"
    return recipe_from_layers(layers, schemes, checkpoint=original)


def bits_per_weight(original: Checkpoint, stored: Mapping[str, Mapping[str, int]]) -> float:
    """True bits of the decoder's linear layers.

    Args:
        original: Whose layers they are; those that are not in ``stored`` are as they are in it.
        stored: Layer -> name -> bytes of each tensor: codes, scales, zero points, with all padding.
            A noted shape and the bias are not counted.
    """
    layers = find_layers(original).grouped_layers
    total = 0
    for layer in layers:
        parts = stored.get(layer.name, {"weight": original.tensors[layer.tensor].nbytes})
        total += sum(size for name, size in parts.items() if name not in _NOT_COUNTED)
    return 8 * total / sum(layer.weights for layer in layers)
