"""Reads back what a layer of TorchAO's holds, against what a recipe makes of the original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mofq.delivery.apply.torchao.apply import device_engine, kernel_refusal, make_target
from mofq.delivery.apply.torchao.linear import TorchaoLinear
from mofq.delivery.apply.torchao.weights import make_weight
from mofq.model.layers import FusionGroup
from mofq.numbers.quantize import QuantizedWeight, dequantize_weight
from mofq.numbers.schemes import Scheme

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_deviation(
    module: TorchaoLinear,
    quantized: QuantizedWeight,
    *,
    scheme: Scheme,
    group: FusionGroup,
    static_amax: float | None,
) -> str | None:
    """How a layer's weight differs from the scheme's, if it does.

    The tensor that the recipe makes of the original weight is made again, and every
    part of the two is compared: class, codes, scales, zero points, granularity, dtype
    and kernel. Where TorchAO can dequantize the class, the result must also be what
    ``quantize`` says, which does not depend on how the tensor is made.

    Args:
        module: Of the model.
        quantized: The original weight under the scheme.
        scheme: That the layer should have; it quantizes the weight.
        group: The layer's fusion group.
        static_amax: Largest magnitude of the inputs, where the scheme has static ones.

    Returns:
        One sentence, or None.
    """
    weight = scheme.quantized_weight
    found: Any = module.weight.data
    engine = device_engine(found.device)
    if reason := kernel_refusal(scheme, group, engine=engine, dtype=found.dtype):
        return f"needed scheme {scheme.name!r} emulated ({reason}), found {type(found).__name__}"
    target = make_target(scheme, group, engine=engine, dtype=found.dtype, static_amax=static_amax)
    needed: Any = make_weight(quantized, scheme, target)
    if type(found) is not type(needed):
        return (
            f"needed a weight of TorchAO's class {type(needed).__name__} for scheme "
            f"{scheme.name!r}, found {type(found).__name__}"
        )
    for difference in _differences(found, needed):
        return f"{difference}; scheme {scheme.name!r}"
    if hasattr(type(found), "dequantize") and type(found).__name__ != "Int4OpaqueTensor":
        values = dequantize_weight(quantized, weight).to(found.dtype)
        if not torch.equal(found.dequantize().cpu(), values):
            return f"dequantizes to other weights than those of scheme {scheme.name!r}"
    return None


def _differences(found: Any, needed: Any) -> Iterator[str]:
    """Parts of two tensors of one class that are not the same."""
    kind = type(needed)
    for word in [*kind.tensor_attribute_names, *_optional(kind, "attribute")]:
        ours, theirs = getattr(needed, word), getattr(found, word)
        if not _same(ours, theirs):
            yield f"needed {word} {ours}, found {theirs}"
    for word in [*kind.tensor_data_names, *_optional(kind, "data")]:
        ours, theirs = getattr(needed, word), getattr(found, word)
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None:
            yield f"needed {word} {_kind(ours)}, found {_kind(theirs)}"
            continue
        theirs = theirs.cpu()
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            yield f"needed {word} of {_kind(ours)}, found {_kind(theirs)}"
        elif (count := int(_differs(ours, theirs).sum())) != 0:
            place = _differs(ours, theirs).reshape(ours.shape).nonzero()[0].tolist()
            index = tuple(place)
            yield (
                f"{count} of {ours.numel()} values of {word} differ (first at {place}, needed "
                f"{float(ours[index].to(torch.float32))}, found "
                f"{float(theirs[index].to(torch.float32))})"
            )


def _optional(kind: Any, what: str) -> list[str]:
    return list(getattr(kind, f"optional_tensor_{what}_names", []))


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return list(ours) == list(theirs)
    return bool(ours == theirs)


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _differs(ours: Tensor, theirs: Tensor) -> Tensor:
    """Where two tensors of one dtype and shape are not the same bits; -0 is not 0."""
    bits = _BITS[ours.element_size()]
    flat = [each.contiguous().reshape(-1).view(bits) for each in (ours, theirs)]
    return flat[0] != flat[1]
