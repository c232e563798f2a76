r"""Per-embedding-group activations with range-based permutation (arXiv:2109.12948), on one model.

    python scripts/reproduce/per_embedding_group.py MODEL --calibration FILE --text FILE \
        --work FOLDER

Inputs of linear layers, outputs of the feed-forward networks and both residual sums of every
decoder layer (the sum after attention where the norm reads it) are INT8 under static scales; the
weights are INT8 with one scale for a tensor, as in the source's figure 3. The channels of such a
tensor share one scale, or are cut into equal groups with a scale each: as they lie, or sorted by
the largest magnitude that calibration saw. A permutation of channels changes no product, so it is
enough to say who shares a scale. The mixed version leaves what the source calls most sensitive,
residual sums and the outputs of the feed-forward networks, in 16 bits. Emulated: no engine of
`mofq engines` has static groups. What the search offers are dynamic groups for each token, of
neighbours (`int8.g64`) or sorted by the range that the sequence has in each channel (`int8.peg4`:
4 groups), measured last.

The source has no figure in its abstract for this table; it reports GLUE with BERT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.delivery.apply import emulate
from mofq.evidence.corpora import load_text
from mofq.model.checkpoint.headers import open_checkpoint
from scripts.shared.reproduction import (
    Version,
    arguments,
    load_original,
    measure_versions,
    print_measured,
    reference_of,
    run_over,
    true_bits,
    uniform_of,
    windows_of,
)

CALIBRATION_TOKENS = 2048
WEIGHTS = "int8.tensor"
#: Of linear inputs, a scale for each token and group.
DYNAMIC = ("int8.token", "int8.g64", "int8.g32", "int8.peg2", "int8.peg4", "int8.peg8")
#: Ranges of each quantized tensor of the model: its name -> largest magnitude of each channel.
Ranges = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which channels share a scale."""

    groups: int  #: equal parts of the channels; 0: each for itself
    permuted: bool = False  #: whether channels are sorted by range first
    sums_in_16_bits: bool = False


GROUPINGS = {
    "one scale for a tensor": Grouping(1),
    "one scale, sums in 16 bits": Grouping(1, sums_in_16_bits=True),
    "3 groups": Grouping(3),
    "3 groups, permuted": Grouping(3, permuted=True),
    "6 groups": Grouping(6),
    "6 groups, permuted": Grouping(6, permuted=True),
    "6 groups, permuted, sums in 16 bits": Grouping(6, permuted=True, sums_in_16_bits=True),
    "a scale for each channel": Grouping(0),
}


def tensors_of(model: PreTrainedModel) -> dict[str, tuple[nn.Module, bool]]:
    """Name -> the module whose input (True) or output (False) is quantized."""
    found: dict[str, tuple[nn.Module, bool]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            found[f"{name}.input"] = (module, True)
        elif name.endswith(".mlp") or name.rpartition(".")[0].endswith(".layers"):
            found[f"{name}.output"] = (module, False)
        elif name.endswith(".post_attention_layernorm"):  # reads the sum after attention
            found[f"{name}.sum"] = (module, True)
    return found


def attach(module: nn.Module, is_input: bool, change: Callable[[Tensor], Tensor]) -> None:
    """Let a function change what goes into or comes out of a module."""
    if is_input:
        module.register_forward_pre_hook(lambda _, x: (change(x[0]), *x[1:]))
        return

    def on_output(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...]) -> object:
        return change(out) if isinstance(out, Tensor) else (change(out[0]), *out[1:])

    module.register_forward_hook(on_output)


def calibrate(model_folder: str, text: str) -> Ranges:
    """The largest magnitude of every channel of every tensor."""
    checkpoint = open_checkpoint(model_folder)
    model = load_original(checkpoint)
    ranges: Ranges = {}

    def see(name: str, x: Tensor) -> Tensor:
        amax = x.abs().flatten(0, -2).amax(0)
        ranges[name] = torch.maximum(ranges[name], amax) if name in ranges else amax
        return x

    for name, (module, is_input) in tensors_of(model).items():
        attach(module, is_input, partial(see, name))
    run_over(model, windows_of(checkpoint, load_text(text), tokens=CALIBRATION_TOKENS))
    return ranges


def scales_of(amax_I: Tensor, grouping: Grouping) -> Tensor:
    """The scale of each channel, [channels]."""
    if grouping.groups:
        order = torch.argsort(amax_I) if grouping.permuted else torch.arange(len(amax_I))
        shared_I = torch.empty_like(amax_I)
        for part in torch.tensor_split(order, grouping.groups):
            shared_I[part] = amax_I[part].max()
        amax_I = shared_I
    return torch.where(amax_I > 0, amax_I / 127, 1.0)


def rounded(scale_I: Tensor, x: Tensor) -> Tensor:
    """INT8 under static scales; what exceeds them saturates."""
    return torch.round(torch.clamp(x / scale_I, -127, 127)) * scale_I


def quantize(
    model: PreTrainedModel, folder: str, ranges: Ranges, grouping: Grouping
) -> PreTrainedModel:
    """Weights and activations, in place."""
    scales = {
        name: scales_of(amax_I, grouping)
        for name, amax_I in ranges.items()
        if name.endswith(".input") or not grouping.sums_in_16_bits
    }
    emulate.apply(model, uniform_of(folder, WEIGHTS), checkpoint=open_checkpoint(folder))
    modules = dict(model.named_modules())
    for name, scale_I in scales.items():
        path, _, place = name.rpartition(".")
        attach(modules[path], place != "output", partial(rounded, scale_I))
    return model


def versions(folder: str, ranges: Ranges) -> Mapping[str, Version]:
    """Label -> version."""
    digest = json.dumps({name: float(amax.double().sum()) for name, amax in ranges.items()})
    checkpoint = open_checkpoint(folder)
    weights_only = uniform_of(folder, WEIGHTS)
    found = {
        f"weights alone `{WEIGHTS}`": Version(
            WEIGHTS,
            true_bits(checkpoint, weights_only),
            partial(emulate.apply, recipe=weights_only, checkpoint=checkpoint),
        )
    }
    for label, grouping in GROUPINGS.items():
        found[label] = Version(
            f"{grouping} {digest}",
            true_bits(checkpoint, weights_only),
            partial(quantize, folder=folder, ranges=ranges, grouping=grouping),
        )
    for inputs in DYNAMIC:
        dynamic = uniform_of(folder, f"{WEIGHTS}+{inputs}")
        found[f"linear inputs alone, dynamic `{WEIGHTS}+{inputs}`"] = Version(
            f"dynamic {inputs}",
            true_bits(checkpoint, dynamic),
            partial(emulate.apply, recipe=dynamic, checkpoint=checkpoint),
        )
    return found


def main(given: Sequence[str] | None = None) -> None:
    """One table."""
    options = arguments(__doc__, given, ("--calibration", "text file"), ("--text", "held-out text"))
    ranges = calibrate(options.model, options.calibration)
    print_measured(measure_versions(reference_of(options), versions(options.model, ranges)))


if __name__ == "__main__":
    main()
