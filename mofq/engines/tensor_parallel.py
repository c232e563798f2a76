"""Tensor parallelism: which part of a linear layer one device holds, and what that part takes.

Layers that read the decoder layer's stream are cut along their outputs, the two that write to it
(``o``, ``down``) along their inputs. What shares a scale must lie on one device, since each holds
the scales of its own part.

Source: vLLM 0.32.0 ``distributed/utils.py:51-80``, ``model_executor/layers/linear.py:494-499,
1052-1057, 1681``, ``layers/quantization/utils/fp8_utils.py:1318-1344``, ``compressed_tensors_moe_
wna16.py:230-249``; what each device loads of a checkpoint was executed in vLLM 0.32.0 and
0.33.0 and SGLang 0.5.23 (``facts/tensor_parallel``). TensorRT-LLM cuts in the same way; read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mofq.exceptions import EngineError
from mofq.model.layers import FUSION_RULES, AnyGroup, AnyLayer, ModelLayers, attention_of
from mofq.numbers.formats import IntFormat
from mofq.numbers.schemes import Scheme, TensorScheme

#: Last words of the fusion groups that are cut along their inputs.
_CUT_INPUTS = (".attn.o", ".mlp.down", ".mlp.shared_down")
#: Of those that every device has whole: latent vectors are for all heads.
_WHOLE = (".attn.latent",)
_EXPERTS_DOWN = {
    f"experts.{family.experts.down}" for family in FUSION_RULES.values() if family.experts
}
_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Part:
    """What one device holds of a layer."""

    layer: AnyLayer
    rows: int  #: outputs
    columns: int  #: inputs
    cuts_inputs: bool


def device_parts(group: AnyGroup, devices: int) -> list[Part]:
    """The part of each layer of a fusion group that one of several devices holds.

    Keys and values of fewer heads than devices are repeated by engines; here they are taken to
    be cut, which is never too small.
    """
    if group.name.endswith(_WHOLE):
        devices = 1
    parts = []
    for layer in group.layers:
        rows, columns = layer.out_features, layer.in_features
        cuts_inputs = group.name.endswith(_CUT_INPUTS) or layer.module in _EXPERTS_DOWN
        if cuts_inputs:
            columns = -(-columns // devices)
        else:
            rows = -(-rows // devices)
        parts.append(Part(layer, rows, columns, cuts_inputs))
    return parts


def cut_problems(scheme: Scheme, group: AnyGroup, devices: int) -> Iterator[str]:
    """Why a scheme cannot be cut over devices: each reason, nothing where it can."""
    if devices == 1 or group.name.endswith(_WHOLE):
        return
    for part in device_parts(group, devices):
        layer = part.layer
        whole = layer.in_features if part.cuts_inputs else layer.out_features
        what = "inputs" if part.cuts_inputs else "outputs"
        repeated = attention_of(group.name) is not None and layer in group.layers[1:3]
        if whole % devices and not repeated:
            yield f"{layer.name} has {whole} {what}, which {devices} devices cannot share equally"
        for operand in (scheme.weight, scheme.activation):
            if operand is not None:
                is_packed = operand is scheme.weight and _is_packed(scheme)
                yield from _operand_problems(operand, part, devices, is_packed=is_packed)


def _operand_problems(
    operand: TensorScheme, part: Part, devices: int, *, is_packed: bool
) -> Iterator[str]:
    name, tile = part.layer.name, operand.granularity
    one = f"one of {devices} devices"
    if part.cuts_inputs:
        if part.columns % operand.columns_multiple:
            yield (
                f"{tile.name} needs inputs divisible by {operand.columns_multiple} on every "
                f"device; {one} has {part.columns} of {name}. Take a smaller group, channels, or "
                f"fewer devices"
            )
        if is_packed and part.columns * operand.element.bits % _WORD_BITS:
            yield f"{one} has {part.columns} inputs of {name}, which fill no whole 32-bit words"
        return
    if tile.kind == "block" and part.rows % tile.rows:
        yield (
            f"{tile.name} needs outputs divisible by {tile.rows} on every device; {one} has "
            f"{part.rows} of {name}. Take channels, or fewer devices"
        )
    if is_packed and not operand.symmetric and part.rows * operand.element.bits % _WORD_BITS:
        yield f"{one} has {part.rows} zero points of {name}, which fill no whole 32-bit words"


def _is_packed(scheme: Scheme) -> bool:
    """Whether the codes of the weights lie in 32-bit words: all integers but W8A8's."""
    element = scheme.quantized_weight.element
    return isinstance(element, IntFormat) and (element.bits < 8 or scheme.activation is None)


def check_devices(layers: ModelLayers, devices: int) -> None:
    """Refuse to share a model among devices that cannot share its attention.

    Args:
        layers: Of the model.
        devices: That share every layer.

    Raises:
        EngineError: The heads cannot be dealt out evenly, and the message names the numbers; or
            how engines share layers of this type is not known.
    """
    if devices > 1 and layers.architecture not in FUSION_RULES:
        raise EngineError(
            f"how engines share the layers of a {layers.architecture!r} among devices is not known."
            " Give one device."
        )
    outputs = {group.name: group for group in layers.groups if group.name.endswith(".attn.o")}
    for cache in layers.caches:
        group = outputs[cache.name.replace(".kv_cache", ".o")]
        heads = group.layers[0].in_features // cache.head_size
        uneven = heads % devices
        few, many = sorted((cache.kv_heads, devices))
        if uneven or many % few:
            raise EngineError(
                f"{cache.module}: {heads} heads, {cache.kv_heads} of them of keys and values, "
                f"cannot be dealt out to {devices} devices. Give a number of devices that divides "
                f"{heads}."
            )
